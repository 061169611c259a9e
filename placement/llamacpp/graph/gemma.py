"""Gemma 3n and 4: embeddings per layer, shared caches, experts beside a dense block, alternating updates.

Mirrors src/models/gemma3n.cpp and gemma4.cpp.
"""

from __future__ import annotations

from placement.llamacpp.graph.attention import attention
from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.experts import ffn, moe
from placement.llamacpp.graph.feed import routing_of
from placement.llamacpp.graph.tensor import GraphTensor

ALTUP_INPUTS = 4  # planes of Gemma 3n's residual
ACTIVE_INPUT = 0  # the plane that its blocks read
SPARSE_LAYERS = 10  # its first layers keep only large gates


# --- embeddings per layer


def per_layer_inputs(builder: Builder, cur: GraphTensor) -> GraphTensor:
    """The embeddings themselves; what each layer gets of its own from the tokens is kept for it.

    Mirrors build_inp_per_layer and project_per_layer_inputs.
    """
    table = builder.weight("per_layer_token_embd.weight")
    if table is None:
        return cur
    n, n_layer = builder.n_tokens, builder.facts.n_layer
    size = table.ne[0] // n_layer
    rows = builder.get_rows(table, builder.input_once("layer_tokens", "I32", n))
    rows = builder.scale(builder.reshape(rows, size, n_layer, n))
    builder.expand(rows)
    projected = builder.scale(
        builder.mul_mat(builder.need(builder.weight("per_layer_model_proj.weight")), cur)
    )
    projected = builder.reshape(projected, size, n_layer, n)
    projected = builder.build_norm(projected, builder.weight("per_layer_proj_norm.weight"))
    total = builder.scale(builder.add(projected, rows))
    builder.shared.per_layer = builder.cont(builder.permute(total, 0, 2, 1, 3))
    return cur


def _slice(builder: Builder, cur: GraphTensor, i: int) -> GraphTensor:
    """The i-th plane of a tensor with contiguous planes."""
    size, n = cur.ne[:2]
    return builder.view_2d(cur, size, n, 4 * size, 4 * i * size * n)


def _per_layer_part(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    gate = builder.unary(builder.lora_mm(builder.w(il, "inp_gate"), cur), "gelu")
    part = builder.mul(gate, _slice(builder, builder.need(builder.shared.per_layer), il))
    return builder.layer_norm(builder.lora_mm(builder.w(il, "proj"), part), il, "post_norm")


# --- attention


def gemma_attention(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Attention whose layers may share the cache of an earlier one, and use K as V."""
    facts, (size, _) = builder.layer(il), builder.head_sizes(il)
    q, k, v = _gemma_heads(builder, il, cur, size, has_own=facts.cache_layer == il)
    factors = builder.rope_factors(il)
    q = builder.rope(builder.layer_norm(q, il, "attn_q_norm"), builder.positions, factors)
    if k is not None and v is not None:
        k = builder.layer_norm(k, il, "attn_k_norm")
        v = builder.rms_norm(v)
        k = builder.rope(k, builder.positions, factors)
    return attention(builder, il, q, k, v, is_windowed=True)


def _gemma_heads(
    builder: Builder, il: int, cur: GraphTensor, size: int, *, has_own: bool
) -> tuple[GraphTensor, GraphTensor | None, GraphTensor | None]:
    facts, n = builder.layer(il), builder.n_tokens
    heads = (facts.n_head, facts.n_head_kv, facts.n_head_kv)
    parts: list[GraphTensor | None] = []
    if (fused := builder.w(il, "attn_qkv")) is not None:
        qkv, offset = builder.lora_mm(fused, cur, is_scaled=True), 0
        for n_head in heads:
            parts.append(builder.cont(builder.view_2d(qkv, size * n_head, n, qkv.nb[1], offset)))
            offset += 4 * size * n_head
    else:
        names = ("attn_q", "attn_k", "attn_v") if has_own else ("attn_q",)
        parts = [
            None if (weight := builder.w(il, name)) is None else builder.lora_mm(weight, cur, is_scaled=True)
            for name in names
        ]
    q, k, v = [*parts, None, None][:3]
    q = builder.reshape(builder.need(q), size, heads[0], n)
    if not has_own or k is None:
        return q, None, None
    v = k if v is None else v
    return q, builder.reshape(k, size, heads[1], n), builder.reshape(v, size, heads[2], n)


# --- Gemma 4


def gemma4_layer(builder: Builder, il: int, residual: GraphTensor, is_last: bool) -> GraphTensor:
    """A layer of Gemma 4."""
    cur = gemma_attention(builder, il, builder.layer_norm(residual, il, "attn_norm"))
    middle = builder.add(builder.layer_norm(cur, il, "post_attention_norm"), residual)
    cur = builder.layer_norm(_gemma4_feed(builder, il, middle), il, "post_ffw_norm", is_pinned=False)
    cur = builder.add(cur, middle)
    if builder.shared.per_layer is not None:
        cur = builder.add(cur, _per_layer_part(builder, il, cur))
    scale = builder.w(il, "layer_output_scale")
    return cur if scale is None else builder.mul(cur, scale)


def _gemma4_feed(builder: Builder, il: int, middle: GraphTensor) -> GraphTensor:
    dense = ffn(builder, builder.layer_norm(middle, il, "ffn_norm"), il, "gelu", is_scaled=True)
    if builder.w(il, "ffn_gate_inp") is None:
        return dense
    dense = builder.layer_norm(dense, il, "post_ffw_norm_1")
    routed = builder.layer_norm(middle, il, "pre_ffw_norm_2")
    scale = builder.need(builder.weight(f"blk.{il}.ffn_gate_inp.scale", il))
    logits = builder.mul(builder.scale(builder.rms_norm(middle)), scale)
    logits = builder.lora_mm(builder.w(il, "ffn_gate_inp"), logits)
    routed = moe(builder, routed, il, routing_of(builder, il), logits=logits)
    return builder.add(dense, builder.layer_norm(routed, il, "post_ffw_norm_2"))


# --- Gemma 3n


def _magnitude(builder: Builder, cur: GraphTensor) -> GraphTensor:
    return builder.like("SQRT", builder.sum_rows(builder.like("SQR", cur)))


def _matched(builder: Builder, cur: GraphTensor, like: GraphTensor) -> GraphTensor:
    """A tensor with the magnitude of another."""
    return builder.div(builder.mul(cur, like), _magnitude(builder, cur))


def altup_widened(builder: Builder, cur: GraphTensor) -> GraphTensor:
    """The embeddings and their projections, as planes."""
    cur = per_layer_inputs(builder, cur)
    like = _magnitude(builder, cur)
    repeated = builder.repeat(cur, builder.n_embd, builder.n_tokens, ALTUP_INPUTS - 1, 1)
    added = builder.mul_mat(builder.need(builder.weight("altup_proj.weight")), repeated)
    return builder.concat(cur, _matched(builder, added, like), 2)


def altup_head(builder: Builder, cur: GraphTensor) -> GraphTensor:
    """The planes merged into one."""
    like = _magnitude(builder, _slice(builder, cur, ACTIVE_INPUT))
    out = builder.mul_mat(builder.need(builder.weight("altup_unembd_proj.weight")), _rest(builder, cur))
    out = _matched(builder, out, like)
    total = _slice(builder, cur, 0)
    for i in range(ALTUP_INPUTS - 1):
        total = builder.add(total, _slice(builder, out, i))
    return builder.scale(total)


def _rest(builder: Builder, cur: GraphTensor) -> GraphTensor:
    row, plane = 4 * builder.n_embd, 4 * builder.n_embd * builder.n_tokens
    return builder.view_3d(cur, builder.n_embd, builder.n_tokens, ALTUP_INPUTS - 1, row, plane, plane)


def altup_layer(builder: Builder, il: int, cur: GraphTensor, is_last: bool) -> GraphTensor:
    """A layer of Gemma 3n."""
    predictions = _predicted(builder, il, cur)
    active = _slice(builder, predictions, ACTIVE_INPUT)
    normed = builder.layer_norm(active, il, "attn_norm")
    laurel = builder.lora_mm(builder.w(il, "laurel_r"), builder.lora_mm(builder.w(il, "laurel_l"), normed))
    laurel = builder.add(builder.layer_norm(laurel, il, "laurel_post_norm"), normed)
    out = builder.layer_norm(gemma_attention(builder, il, normed), il, "post_attention_norm")
    middle = builder.scale(builder.add(builder.add(out, active), laurel))
    out = _sparse_feed(builder, il, builder.layer_norm(middle, il, "ffn_norm"))
    out = builder.add(builder.layer_norm(out, il, "post_ffw_norm", is_pinned=False), middle)
    corrected = _corrected(builder, il, predictions, out)
    first = builder.mul(
        _slice(builder, corrected, ACTIVE_INPUT), builder.need(builder.w(il, "altup_correct_scale"))
    )
    rest = builder.add(_rest(builder, corrected), _per_layer_part(builder, il, first))
    return builder.concat(_slice(builder, corrected, 0), rest, 2)


def _sparse_feed(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    up, gate = builder.lora_mm(builder.w(il, "ffn_up"), cur), builder.lora_mm(builder.w(il, "ffn_gate"), cur)
    if il < SPARSE_LAYERS:
        mean = builder.op("MEAN", "F32", (1, *gate.ne[1:]), gate)
        spread = builder.sum_rows(builder.like("SQR", builder.sub(gate, mean)))
        cutoff = builder.add(mean, builder.scale(builder.like("SQRT", builder.scale(spread))))
        gate = builder.unary(builder.sub(gate, cutoff), "relu")
    return builder.lora_mm(builder.w(il, "ffn_down"), builder.mul(up, builder.unary(gate, "gelu")))


def _modalities(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    normed = builder.scale(builder.layer_norm(cur, il, "altup_router_norm"))
    return builder.unary(builder.mul_mat(builder.need(builder.w(il, "altup_router")), normed), "tanh")


def _predicted(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    modalities = _modalities(builder, il, _slice(builder, cur, ACTIVE_INPUT))
    n = ALTUP_INPUTS
    coefficients = builder.lora_mm(builder.w(il, "altup_predict_coef"), modalities)
    coefficients = builder.reshape(coefficients, n, n, builder.n_tokens)
    out = builder.mul_mat(builder.cont(builder.permute(cur, 1, 2, 0, 3)), coefficients)
    return builder.add(builder.cont(builder.permute(out, 0, 2, 1, 3)), cur)


def _corrected(builder: Builder, il: int, predictions: GraphTensor, active: GraphTensor) -> GraphTensor:
    modalities = _modalities(builder, il, active)
    innovation = builder.sub(active, _slice(builder, predictions, ACTIVE_INPUT))
    coefficients = builder.scale(builder.lora_mm(builder.w(il, "altup_correct_coef"), modalities))
    coefficients = builder.cont(builder.transpose(coefficients), 1, builder.n_tokens, ALTUP_INPUTS)
    innovation = builder.repeat(innovation, builder.n_embd, builder.n_tokens, ALTUP_INPUTS, 1)
    return builder.add(builder.mul(innovation, coefficients), predictions)
