"""The decoder that almost every architecture is: attention or state, feed-forward, residual sums by layer.

Mirrors the constructors and layer loops of src/models/*.cpp. `build` follows the builder's row; what a residual
is made of is the row's structure, and `STRUCTURES` says of each how it begins, goes through a layer and ends.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import assert_never

from placement.llamacpp.graph.builder import Builder, UnknownGraph
from placement.llamacpp.graph.ends import deepstack_part, deepstacked, embed, output_head
from placement.llamacpp.graph.feed import feed, feed_forward
from placement.llamacpp.graph.gated_hyper import (
    gated_head,
    gated_mix,
    gated_spread,
    gated_widened,
    ngram_block,
)
from placement.llamacpp.graph.gemma import (
    SPARSE_LAYERS,
    altup_head,
    altup_layer,
    altup_widened,
    gemma4_layer,
    per_layer_inputs,
)
from placement.llamacpp.graph.heads import is_roped
from placement.llamacpp.graph.hyper import hyper_after, hyper_before, hyper_head, hyper_mean, n_wide, widened
from placement.llamacpp.graph.mixers import input_norm, mix
from placement.llamacpp.graph.pools import pool_inputs
from placement.llamacpp.graph.row import Parallel, Structure
from placement.llamacpp.graph.stack import (
    checkpoint_step,
    cycle_begun,
    cycle_ended,
    is_checkpoint,
    keep_checkpoint,
    loop_ended,
    stack_mixed,
)
from placement.llamacpp.graph.tensor import GraphTensor


def build(builder: Builder, layers: Sequence[int]) -> None:
    """Emit the whole graph; the builder's `layer_starts` then hold where in `nodes` each layer begins.

    `layers` may leave out layers that repeat others. Raises: UnknownGraph.
    """
    if bool(builder.model.get("swin_norm", False)):
        raise UnknownGraph("norms after the blocks")
    kind = STRUCTURES[builder.row.structure]
    builder.shared.skip = embed(builder)
    cur = kind.begin(builder, builder.shared.skip)
    if builder.row.attention == "compressed":
        builder.expand(builder.mask(0))
    if builder.row.has_pools and builder.row.structure != "gated_streams":
        pool_inputs(builder)
    for i, il in enumerate(layers):
        _mark_start(builder)
        builder.slot = il
        cur = kind.layer(builder, il, cur, i == len(layers) - 1)
    _mark_start(builder)
    output_head(builder, kind.end(builder, cur))


def _mark_start(builder: Builder) -> None:
    builder.layer_starts.append(len(builder.nodes))
    builder.leaf_starts.append(len(builder.leafs))


def layer_traits(builder: Builder, il: int) -> tuple[object, ...]:
    """What the layer's number decides beyond its facts and tensors."""
    match builder.row.structure:
        case "cycles" | "loops":
            return (builder.block_of(il), il)
        case "altup":
            return (il < SPARSE_LAYERS,)
        case "stack":
            step = checkpoint_step(builder)
            checkpoint = (il // step, is_checkpoint(builder, il)) if step else ()
            return is_roped(builder, il), deepstack_part(builder, il), checkpoint
        case "usual" | "gemma4" | "gated_streams" | "hyper_cast" | "hyper_expanded" | "hyper_mean":
            return is_roped(builder, il), deepstack_part(builder, il), ()
        case unknown:
            assert_never(unknown)


# --- layers by structure


def usual_layer(builder: Builder, il: int, residual: GraphTensor, is_last: bool) -> GraphTensor:
    """Norm, attention, sum, norm, feed-forward, sum, in the row's order."""
    row = builder.row
    if row.deepstack == "before":
        residual = deepstacked(builder, il, residual)
    builder.shared.layer_input = residual
    if row.feed == "router_first":
        builder.shared.router_logits = builder.lora_mm(builder.w(il, "ffn_gate_inp"), residual)
    normed = input_norm(builder, il, residual)
    cur = mix(builder, il, normed)
    skip = builder.shared.skip
    if row.has_rows_after_norm:
        cur = attention_normed(builder, il, cur)
    if row.has_rows_after_sum:
        residual = builder.add(cur, residual)
    if is_last and row.rows_at == "last_layer":
        cur, residual, normed, skip = _last_rows(builder, cur, residual, normed, skip)
    if row.parallel is not None and _is_parallel(builder, il, row.parallel):
        cur = parallel_sum(builder, il, row.parallel, cur, residual, normed)
    elif row.recurrent == "lightning":
        cur = normed_sum(builder, il, cur, normed)
    else:
        cur = serial_sum(builder, il, cur, residual)
    if row.has_skip:
        cur = builder.add(cur, builder.mul(skip, builder.need(builder.w(il, "layer_output_scale"))))
    return deepstacked(builder, il, cur) if row.deepstack == "after" else cur


def stack_layer(builder: Builder, il: int, residual: GraphTensor, is_last: bool) -> GraphTensor:
    """A layer whose blocks read a mix of the residual and its checkpoints."""
    cur = stack_mixed(builder, residual, builder.w(il, "attn_res_score"))
    if is_checkpoint(builder, il):
        keep_checkpoint(builder, residual)
    cur = mix(builder, il, input_norm(builder, il, cur))
    residual = cur if is_checkpoint(builder, il) else builder.add(residual, cur)
    cur = stack_mixed(builder, residual, builder.w(il, "ffn_res_score"))
    return builder.add(residual, feed_forward(builder, il, cur))


def hyper_layer(builder: Builder, il: int, wide: GraphTensor, is_last: bool) -> GraphTensor:
    """A layer whose blocks read and write the streams of a wide residual."""
    cur, post, comb = hyper_before(builder, il, wide, "hc_attn")
    cur = mix(builder, il, input_norm(builder, il, cur))
    wide = hyper_after(builder, il, cur, wide, post, comb)
    cur, post, comb = hyper_before(builder, il, wide, "hc_ffn")
    if builder.row.structure == "hyper_expanded":
        for tensor in (wide, post, builder.need(comb)):
            builder.expand(tensor)
    return hyper_after(builder, il, feed_forward(builder, il, cur), wide, post, comb)


def gated_layer(builder: Builder, il: int, wide: GraphTensor, is_last: bool) -> GraphTensor:
    """A layer, its n-gram block and both residual spreads included."""
    if builder.w(il, "ple_key") is not None:
        wide = ngram_block(builder, il, wide)
    cur, inject = gated_mix(builder, wide, f"blk.{il}.hc_attn", il)
    builder.expand(cur)
    cur = mix(builder, il, cur)
    if is_last:
        wide = builder.reshape(wide, builder.n_embd * n_wide(builder), wide.ne[2])
        cur, inject, wide = builder.rows_out(cur, builder.need(inject), wide)
        wide = builder.reshape(wide, builder.n_embd, n_wide(builder), wide.ne[1])
    wide = gated_spread(builder, il, cur, wide, builder.need(inject))
    cur, inject = gated_mix(builder, wide, f"blk.{il}.hc_ffn", il)
    return gated_spread(builder, il, feed(builder, il, cur), wide, builder.need(inject))


def _last_rows(
    builder: Builder, cur: GraphTensor, residual: GraphTensor, normed: GraphTensor, skip: GraphTensor
) -> list[GraphTensor]:
    """The rows that give logits, of all that the layer still reads; unread ones never enter the graph."""
    cur, residual, normed, skip, builder.shared.router_logits = builder.rows_out(
        cur, residual, normed, skip, builder.shared.router_logits or cur
    )
    builder.shared.layer_input = residual
    return [cur, residual, normed, skip]


def serial_sum(builder: Builder, il: int, cur: GraphTensor, residual: GraphTensor) -> GraphTensor:
    """Attention added to the residual, then feed-forward added to that."""
    row = builder.row
    if row.feed in ("none", "layer"):
        return builder.add(cur, residual)
    if not row.has_rows_after_norm:
        cur = attention_normed(builder, il, cur)
    cur = residual_scaled(builder, cur)
    middle = residual
    if not row.has_rows_after_sum:
        middle = builder.add(residual, cur) if row.is_residual_first else builder.add(cur, residual)
    cur = feed_forward(builder, il, middle)
    if row.post_ffn_norm:
        name = next(n for n in row.post_ffn_norm if builder.w(il, n) is not None)
        cur = builder.layer_norm(cur, il, name, row.norm, is_pinned=row.is_post_ffn_norm_pinned)
    if row.feed == "arctic":
        return cur
    cur = residual_scaled(builder, cur)
    return builder.add(middle, cur) if row.is_middle_first else builder.add(cur, middle)


def normed_sum(builder: Builder, il: int, cur: GraphTensor, normed: GraphTensor) -> GraphTensor:
    """Sums with what the norms gave instead of what they read (MiniMax-01)."""
    middle = builder.layer_norm(builder.add(cur, builder.scale(normed)), il, "ffn_norm")
    return builder.add(feed(builder, il, middle), builder.scale(middle))


def attention_normed(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """The attention's result after its norm, where the row has one."""
    row = builder.row
    if not row.post_attention_norm:
        return cur
    is_pinned = row.is_post_attention_norm_pinned
    return builder.layer_norm(cur, il, row.post_attention_norm, row.norm, is_pinned=is_pinned)


def residual_scaled(builder: Builder, cur: GraphTensor) -> GraphTensor:
    """The block's result, scaled where the metadata has a residual scale."""
    return builder.scale(cur) if builder.is_on(builder.row.residual_scale, "residual_scale") else cur


def _is_parallel(builder: Builder, il: int, kind: Parallel) -> bool:
    match kind:
        case "neox":
            return bool(builder.model.get("use_parallel_residual", True))
        case "stablelm":
            return builder.w(il, "ffn_norm") is None
        case "attention_feed_residual" | "feed_attention_residual" | "feed_residual_attention":
            return True
        case unknown:
            assert_never(unknown)


def parallel_sum(
    builder: Builder, il: int, kind: Parallel, attn: GraphTensor, residual: GraphTensor, normed: GraphTensor
) -> GraphTensor:
    """Feed-forward beside attention: the three sums in the row's order."""
    if kind == "neox":
        normed = builder.layer_norm(residual, il, "ffn_norm", builder.row.norm)
    fed = feed(builder, il, normed)
    match kind:
        case "attention_feed_residual":
            return builder.add(builder.add(attn, fed), residual)
        case "feed_attention_residual":
            return builder.add(builder.add(fed, attn), residual)
        case "feed_residual_attention" | "neox":
            return builder.add(builder.add(fed, residual), attn)
        case "stablelm":
            return builder.add(fed, builder.add(attn, residual))
        case unknown:
            assert_never(unknown)


# --- structures


def _kept(builder: Builder, cur: GraphTensor) -> GraphTensor:
    return cur


def _cycle_layer(builder: Builder, il: int, cur: GraphTensor, is_last: bool) -> GraphTensor:
    return cycle_ended(builder, il, usual_layer(builder, il, cycle_begun(builder, il, cur), is_last))


def _loop_layer(builder: Builder, il: int, cur: GraphTensor, is_last: bool) -> GraphTensor:
    return loop_ended(builder, il, usual_layer(builder, il, cur, is_last), is_last=is_last)


def _stack_end(builder: Builder, cur: GraphTensor) -> GraphTensor:
    return stack_mixed(builder, cur, builder.weight("output_res_score.weight"))


@dataclass(frozen=True, slots=True)
class ResidualStructure:
    """What a row's structure does with the embeddings, in a layer, and before the last norm."""

    begin: Callable[[Builder, GraphTensor], GraphTensor] = _kept
    layer: Callable[[Builder, int, GraphTensor, bool], GraphTensor] = usual_layer  # the flag: the last layer
    end: Callable[[Builder, GraphTensor], GraphTensor] = _kept


STRUCTURES: dict[Structure, ResidualStructure] = {
    "usual": ResidualStructure(),
    "altup": ResidualStructure(altup_widened, altup_layer, altup_head),
    "cycles": ResidualStructure(layer=_cycle_layer),
    "gated_streams": ResidualStructure(gated_widened, gated_layer, gated_head),
    "gemma4": ResidualStructure(per_layer_inputs, gemma4_layer),
    "hyper_cast": ResidualStructure(widened, hyper_layer, hyper_head),
    "hyper_expanded": ResidualStructure(widened, hyper_layer, hyper_head),
    "hyper_mean": ResidualStructure(widened, hyper_layer, hyper_mean),
    "loops": ResidualStructure(layer=_loop_layer),
    "stack": ResidualStructure(layer=stack_layer, end=_stack_end),
}
