"""Hyper-connections: a residual several streams wide, mixed into one before a block, spread after it.

Mirrors src/models/deepseek4.cpp, hy-v4.cpp and glm5-next.cpp (build_hc_*).
"""

from __future__ import annotations

from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.tensor import GraphTensor

MIX, COMBINE, SPREAD = "DSV4_HC_PRE", "DSV4_HC_COMB", "DSV4_HC_POST"
FUSED_HYPER = (MIX, COMBINE, SPREAD)  # in the order in which the engine probes them


def n_wide(builder: Builder) -> int:
    """Streams of the residual."""
    return builder.integer("hyper_connection.count")


def widened(builder: Builder, cur: GraphTensor) -> GraphTensor:
    """The embeddings, once per stream."""
    cur = builder.reshape(cur, builder.n_embd, 1, builder.n_tokens)
    return builder.repeat(cur, builder.n_embd, n_wide(builder), builder.n_tokens, 1)


def _output_rows(builder: Builder, wide: GraphTensor) -> GraphTensor:
    """The rows of the tokens that give logits."""
    flat = builder.reshape(wide, builder.n_embd * n_wide(builder), builder.n_tokens)
    (flat,) = builder.rows_out(flat)
    return builder.reshape(flat, builder.n_embd, n_wide(builder), builder.batch.n_outputs)


def hyper_mean(builder: Builder, wide: GraphTensor) -> GraphTensor:
    """The mean of the streams, of the rows that give logits (GLM 5 Next's head)."""
    wide = _output_rows(builder, wide)
    ne, nb = wide.ne, wide.nb
    cur = builder.view_2d(wide, ne[0], ne[2], nb[2])
    for i in range(1, ne[1]):
        cur = builder.add(cur, builder.view_2d(wide, ne[0], ne[2], nb[2], i * nb[1]))
    return builder.scale(cur)


def hyper_head(builder: Builder, wide: GraphTensor) -> GraphTensor:
    """The streams mixed by the output's own weights, of the rows that give logits."""
    wide = _output_rows(builder, wide)
    mixes = _mixes(builder, wide, builder.need(builder.weight("output_hc_fn.weight")))
    scale, base = (builder.need(builder.weight(f"output_hc_{name}.weight")) for name in ("scale", "base"))
    pre = builder.scale(builder.unary(builder.add(builder.mul(mixes, scale), base), "sigmoid"))
    return (
        _cast_mix(builder, wide, pre) if builder.row.structure == "hyper_cast" else _mix(builder, wide, pre)
    )


def hyper_before(
    builder: Builder, il: int, wide: GraphTensor, name: str
) -> tuple[GraphTensor, GraphTensor, GraphTensor | None]:
    """The block's input, and what spreads its result: weights per stream, and how streams mix."""
    hc, is_cast = n_wide(builder), builder.row.structure == "hyper_cast"
    mixes = _mixes(builder, wide, builder.need(builder.w(il, f"{name}_fn")))
    scale, base = builder.need(builder.w(il, f"{name}_scale")), builder.need(builder.w(il, f"{name}_base"))
    pre = builder.scale(_gate(builder, mixes, scale, base, 0))
    post = builder.scale(_gate(builder, mixes, scale, base, 1))
    if is_cast:
        return _cast_mix(builder, wide, pre), builder.scale(post), None
    comb = _combination(builder, il, mixes, scale, base, hc)
    if MIX in builder.context.unfused:
        return _mix(builder, wide, pre), post, comb
    out = builder.op(MIX, "F32", (builder.n_embd, wide.ne[2], 1, 1), wide, pre)
    builder.fused_nodes.append((MIX, out, il))
    return out, post, comb


def hyper_after(
    builder: Builder,
    il: int,
    cur: GraphTensor,
    wide: GraphTensor,
    post: GraphTensor,
    comb: GraphTensor | None,
) -> GraphTensor:
    """The residual after a block."""
    if comb is None:
        return _cast_spread(builder, cur, wide, post)
    if SPREAD in builder.context.unfused:
        return _spread(builder, cur, wide, post, comb)
    out = builder.op(SPREAD, "F32", wide.ne, cur, wide, post, comb)
    builder.fused_nodes.append((SPREAD, out, il))
    return out


def _mixes(builder: Builder, wide: GraphTensor, weight: GraphTensor) -> GraphTensor:
    flat = builder.reshape(wide, wide.ne[0] * wide.ne[1], wide.ne[2])
    return builder.mul_mat(weight, builder.rms_norm(flat))


def _gate(
    builder: Builder, mixes: GraphTensor, scale: GraphTensor, base: GraphTensor, part: int
) -> GraphTensor:
    hc = n_wide(builder)
    view = builder.view_2d(mixes, hc, mixes.ne[1], mixes.nb[1], 4 * part * hc)
    scaled = builder.mul(view, builder.view_1d(scale, 1, 4 * part))
    return builder.unary(builder.add(scaled, builder.view_1d(base, hc, 4 * part * hc)), "sigmoid")


def _streams(builder: Builder, wide: GraphTensor) -> list[GraphTensor]:
    return [
        builder.view_2d(wide, wide.ne[0], wide.ne[2], wide.nb[2], i * wide.nb[1]) for i in range(wide.ne[1])
    ]


def _mix(builder: Builder, wide: GraphTensor, weights: GraphTensor) -> GraphTensor:
    """The weighted sum of the streams, product by product."""
    total: GraphTensor | None = None
    for i, stream in enumerate(_streams(builder, wide)):
        weight = builder.view_2d(weights, 1, weights.ne[1], weights.nb[1], i * weights.nb[0])
        product = builder.mul(stream, weight)
        total = product if total is None else builder.add(total, product)
    return builder.need(total)


def _cast_mix(builder: Builder, wide: GraphTensor, weights: GraphTensor) -> GraphTensor:
    return builder.cast(_mix(builder, builder.cast(wide, "F32"), weights), "F32")


def _cast_spread(builder: Builder, cur: GraphTensor, wide: GraphTensor, post: GraphTensor) -> GraphTensor:
    cur, post, wide = (builder.cast(tensor, "F32") for tensor in (cur, post, wide))
    out: GraphTensor | None = None
    for i, stream in enumerate(_streams(builder, wide)):
        weight = builder.view_2d(post, 1, post.ne[1], post.nb[1], i * post.nb[0])
        part = builder.reshape(builder.add(stream, builder.mul(cur, weight)), builder.n_embd, 1, cur.ne[1])
        out = part if out is None else builder.concat(out, part, 1)
    return builder.cast(builder.need(out), "F32")


def _spread(
    builder: Builder, cur: GraphTensor, wide: GraphTensor, post: GraphTensor, comb: GraphTensor
) -> GraphTensor:
    out: GraphTensor | None = None
    for i in range(n_wide(builder)):
        part = builder.mul(cur, builder.view_2d(post, 1, post.ne[1], post.nb[1], i * post.nb[0]))
        for j, stream in enumerate(_streams(builder, wide)):
            offset = i * comb.nb[0] + j * comb.nb[1]
            weight = builder.view_2d(comb, 1, comb.ne[2], comb.nb[2], offset)
            part = builder.add(part, builder.mul(stream, weight))
        part = builder.reshape(part, builder.n_embd, 1, cur.ne[1])
        out = part if out is None else builder.concat(out, part, 1)
    return builder.need(out)


def _combination(
    builder: Builder, il: int, mixes: GraphTensor, scale: GraphTensor, base: GraphTensor, hc: int
) -> GraphTensor:
    n = mixes.ne[1]
    if COMBINE not in builder.context.unfused:
        out = builder.op(COMBINE, "F32", (hc, hc, n, 1), mixes, scale, base)
        builder.fused_nodes.append((COMBINE, out, il))
        return out
    comb = builder.view_2d(mixes, hc * hc, n, mixes.nb[1], 8 * hc)
    comb = builder.mul(comb, builder.view_1d(scale, 1, 8))
    comb = builder.add(comb, builder.view_1d(base, hc * hc, 8 * hc))
    return _sinkhorn(builder, builder.reshape(comb, hc, hc, n))


def _sinkhorn(builder: Builder, comb: GraphTensor) -> GraphTensor:
    eps = builder.like("FILL", builder.new("F32", 1))
    comb = builder.add(builder.soft_max(comb), eps)
    for i in range(builder.integer("hyper_connection.sinkhorn_iterations")):
        if i > 0:
            comb = builder.div(comb, builder.add(builder.sum_rows(comb), eps))
        columns = builder.sum_rows(builder.cont(builder.permute(comb, 1, 0, 2, 3)))
        comb = builder.div(comb, builder.permute(builder.add(columns, eps), 1, 0, 2, 3))
    return comb
