"""Qwen 4's residual: hyper-connections with low-rank gates, and embeddings of n-grams.

Mirrors src/models/qwen4exp.cpp (build_hc_mix, build_hc_combine, build_ple).
"""

from __future__ import annotations

from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.hyper import MIX, SPREAD, n_wide, widened
from placement.llamacpp.graph.pools import pool_inputs
from placement.llamacpp.graph.recurrent import joined_state
from placement.llamacpp.graph.tensor import GraphTensor


def gated_widened(builder: Builder, cur: GraphTensor) -> GraphTensor:
    """The embeddings once per stream; pools and n-grams enter the graph between (graph::graph)."""
    builder.expand(cur)
    pool_inputs(builder)
    table = builder.weight("per_layer_token_embd.weight")
    if table is not None:
        n = builder.integer("ple.heads_per_ngram") * (builder.integer("ple.ngram_size") - 1)
        rows = builder.get_rows(table, builder.input_once("ngram_rows", "I32", n * builder.n_tokens))
        builder.shared.ngrams = builder.reshape(rows, rows.ne[0] * n, builder.n_tokens)
        builder.expand(builder.shared.ngrams)
    wide = widened(builder, cur)
    builder.expand(wide)
    return wide


def gated_head(builder: Builder, wide: GraphTensor) -> GraphTensor:
    """The streams mixed for the output."""
    return gated_mix(builder, wide, "output_hc", None)[0]


def gated_mix(
    builder: Builder, wide: GraphTensor, name: str, il: int | None
) -> tuple[GraphTensor, GraphTensor | None]:
    """A block's input, and how its result is spread (build_hc_mix)."""
    n, hc = wide.ne[2], n_wide(builder)
    weights = {part: builder.weight(f"{name}_{part}.weight", il) for part in ("norm", "down", "up", "inject")}
    normed = builder.mul(builder.rms_norm(wide), builder.need(weights["norm"]))
    normed = builder.reshape(normed, hc * builder.n_embd, n)
    low = builder.unary(builder.scale(builder.lora_mm(weights["down"], normed)), "silu")
    gate = builder.lora_mm(weights["up"], low)
    shape = (builder.n_embd, hc, n)
    if il is None or MIX in builder.context.unfused:
        mixed = _gated_sum(
            builder, builder.reshape(builder.mul(normed, builder.unary(gate, "sigmoid")), *shape)
        )
    else:
        parts = (builder.reshape(normed, *shape), builder.reshape(gate, *shape))
        mixed = builder.op(MIX, "F32", (builder.n_embd, n, 1, 1), *parts)
        builder.fused_nodes.append((MIX, mixed, il))
    inject = None if weights["inject"] is None else builder.lora_mm(weights["inject"], normed)
    return mixed, inject


def _gated_sum(builder: Builder, gated: GraphTensor) -> GraphTensor:
    row, n = 4 * builder.n_embd, gated.ne[2]
    stride = row * gated.ne[1]
    total = builder.cont(builder.view_2d(gated, builder.n_embd, n, stride))
    for i in range(1, gated.ne[1]):
        total = builder.add(total, builder.view_2d(gated, builder.n_embd, n, stride, i * row))
    return builder.scale(total)


def gated_spread(
    builder: Builder, il: int, cur: GraphTensor, wide: GraphTensor, inject: GraphTensor
) -> GraphTensor:
    """The residual after a block (build_hc_combine)."""
    weights = builder.scale(builder.unary(builder.scale(inject), "sigmoid"))
    if SPREAD not in builder.context.unfused:
        out = builder.op(SPREAD, "F32", wide.ne, cur, wide, weights)
        builder.fused_nodes.append((SPREAD, out, il))
        return out
    hc, n = wide.ne[1], wide.ne[2]
    weights = builder.reshape(weights, 1, hc, n)
    repeated = builder.repeat(builder.reshape(cur, builder.n_embd, 1, n), builder.n_embd, hc, n, 1)
    return builder.add(wide, builder.mul(repeated, weights))


# --- n-grams


def ngram_block(builder: Builder, il: int, wide: GraphTensor) -> GraphTensor:
    """The residual plus what the n-grams say, gated and convolved (build_ple)."""
    hc, n = n_wide(builder), builder.n_tokens
    key = builder.lora_mm(builder.w(il, "ple_key"), builder.shared.ngrams)
    value = builder.lora_mm(builder.w(il, "ple_value"), builder.shared.ngrams)
    key = _grouped_norm(builder, il, key, "ple_norm_key")
    query = _grouped_norm(builder, il, wide, "ple_norm_query")
    score = builder.scale(builder.sum_rows(builder.mul(key, query)))
    size = builder.like("SQRT", builder.clamp(builder.unary(score, "abs")))
    gate = builder.unary(builder.mul(builder.unary(score, "sgn"), size), "sigmoid")
    spread = builder.repeat(builder.reshape(value, builder.n_embd, 1, n), builder.n_embd, hc, n, 1)
    gated = builder.mul(spread, gate)
    normed = _grouped_norm(builder, il, builder.reshape(gated, hc * builder.n_embd, n), "ple_norm_conv")
    out = builder.unary(_ngram_conv(builder, il, builder.reshape(normed, hc * builder.n_embd, n)), "silu")
    out = builder.reshape(builder.cont(out), builder.n_embd, hc, n)
    return builder.add(wide, builder.add(gated, out))


def _grouped_norm(builder: Builder, il: int, cur: GraphTensor, name: str) -> GraphTensor:
    cur = builder.reshape(cur, builder.n_embd, n_wide(builder), builder.n_tokens)
    return builder.mul(builder.rms_norm(cur), builder.need(builder.w(il, name)))


def _ngram_conv(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """A dilated convolution over the batch and the state before it."""
    taps, step = builder.integer("ple.conv_kernel"), builder.integer("ple.ngram_size")
    past, width, n_seqs = (taps - 1) * step, cur.ne[0], builder.batch.n_seqs
    cur = builder.reshape(cur, width, builder.n_seq_tokens, n_seqs)
    joined = joined_state(builder, builder.state(il, "p"), builder.layer(il).state_extra, cur, past, width)
    kernel = builder.need(builder.w(il, "ple_conv1d"))
    total: GraphTensor | None = None
    for i in range(taps):
        shape = (builder.n_seq_tokens, width, n_seqs)
        part = builder.view_3d(joined, *shape, joined.nb[1], joined.nb[2], 4 * i * step)
        weight = builder.cont(builder.view_2d(kernel, 1, width, kernel.nb[1], i * kernel.nb[0]))
        weight = builder.reshape(weight, width)
        weight = weight if weight.type == "F32" else builder.cast(weight, "F32")
        term = builder.mul(builder.cont(builder.transpose(part)), weight)
        total = term if total is None else builder.add(total, term)
    return builder.need(total)
