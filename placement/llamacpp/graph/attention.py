"""Attention through the caches: flash attention or plain products, and the output projection.

Mirrors src/llama-graph.cpp (build_attn, build_attn_mha) and src/llama-kv-cache.cpp (the rotations).
"""

from __future__ import annotations

from placement.inputs.quants import BLOCKS
from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.tensor import GraphTensor


def cache_rotation(builder: Builder, il: int, which: str) -> GraphTensor | None:
    """The Hadamard matrix by which quantised caches are rotated, or None."""
    type = builder.context.type_k if which == "k" else builder.context.type_v
    if BLOCKS[type][0] == 1 or builder.is_hybrid_windowed:  # the engine makes none for hybrids with windows
        return None
    group = builder.cache_group(il)
    if (which, group) not in builder.rotation_sizes:
        builder.rotation_sizes[which, group] = _rotation_size(builder, which, group)
    n = builder.rotation_sizes[which, group]
    return builder.input_once(f"{which}_rot.{group}", "F32", n, n) if n else None


def _rotation_size(builder: Builder, which: str, group: str) -> int:
    """Rows of the Hadamard matrix; 0 where head sizes vary or are no multiple of 64."""
    owners = [layer for layer in builder.facts.layers if layer.caches]
    sizes = [(layer.window_tokens is not None, getattr(layer.caches[0], f"{which}_head")) for layer in owners]
    heads = {head for is_windowed, head in sizes if is_windowed == (group == "swa")}
    if len(heads) != 1 or not sizes or sizes[0][1] % 64:
        return 0
    n, size = 64, heads.pop()
    while which == "k" and size % (2 * n) == 0:
        n *= 2
    return n


def rotate(builder: Builder, cur: GraphTensor, matrix: GraphTensor) -> GraphTensor:
    """A tensor times the matrix of `cache_rotation`, as many elements of a row at once as it has rows."""
    n = matrix.ne[0]
    rows = cur.n_elements // n
    flat = builder.reshape(cur, n, rows) if cur.is_contiguous else builder.cont(cur, n, rows)
    product = builder.mul_mat(matrix, flat)
    product.kind = "hadamard"
    return builder.reshape(product, *cur.ne)


# --- attention


def attention(
    builder: Builder,
    il: int,
    q: GraphTensor,
    k: GraphTensor | None,
    v: GraphTensor | None,
    *,
    wo: str | None = "attn_output",
    sinks: GraphTensor | None = None,
    bias: GraphTensor | None = None,
    mask: GraphTensor | None = None,
    is_windowed: bool = False,
    is_capped: bool = False,
) -> GraphTensor:
    """Attention through K and V caches and the output projection (build_attn with kv input)."""
    k_rot, v_rot = cache_rotation(builder, il, "k"), cache_rotation(builder, il, "v")
    if k_rot is not None:
        q = rotate(builder, q, k_rot)
        k = rotate(builder, k, k_rot) if k is not None else None
    if v_rot is not None and v is not None:
        v = rotate(builder, v, v_rot)
    for tensor in (q, k, v) if is_windowed else (q, v, k):
        if tensor is not None:
            builder.expand(tensor)
    k_read, v_read = through_cache(builder, il, k, v)
    mask = builder.mask(il) if mask is None else mask
    cur = mha(builder, il, q, k_read, v_read, mask, sinks=sinks, bias=bias, is_capped=is_capped)
    if v_rot is not None:
        cur = rotate(builder, cur, v_rot)
    return project_out(builder, cur, il, wo)


def through_cache(
    builder: Builder, il: int, k: GraphTensor | None, v: GraphTensor | None
) -> tuple[GraphTensor, GraphTensor]:
    """Write K and V into the layer's caches, as far as it has its own, and read both back."""
    owner = builder.layer(il).cache_layer
    facts = builder.layer(il if owner is None else owner)
    cache = facts.caches[0]
    v_width = builder.facts.v_width_max if builder.context.is_v_transposed else cache.v_width
    k_cache = builder.cache(facts.index, "k", cache.k_width)
    v_cache = builder.cache(facts.index, "v", v_width)
    if k is not None:
        builder.expand(builder.store_k(k_cache, k, builder.k_ids(il)))
    if v is not None:
        builder.expand(builder.store_v(v_cache, v, builder.v_ids(il)))
    n_head_kv = builder.layer(il).n_head_kv
    return builder.read_k(k_cache, cache.k_head, n_head_kv), builder.read_v(v_cache, cache.v_head, n_head_kv)


def attention_latent(
    builder: Builder,
    il: int,
    q: GraphTensor,
    k: GraphTensor,
    v: GraphTensor,
    wv_b: GraphTensor | None,
    *,
    wo: str | None = "attn_output",
    mask: GraphTensor | None = None,
) -> GraphTensor:
    """Attention over a cache that holds K only, V being its first part (build_attn with k input)."""
    for tensor in (q, v, k):
        builder.expand(tensor)
    facts = builder.layer(il).caches[0]
    cache = builder.cache(il, "k", facts.k_width)
    builder.expand(builder.store_k(cache, k, builder.k_ids(il)))
    k_read = builder.read_k(cache, facts.k_head, builder.layer(il).n_head_kv)
    v_read = builder.view(k_read, (v.ne[0], *k_read.ne[1:]), k_read.nb[1:])
    mask = builder.mask(il) if mask is None else mask
    cur = mha(builder, il, q, k_read, v_read, mask, sinks=builder.w(il, "attn_sinks"), v_mla=wv_b)
    return project_out(builder, cur, il, wo)


def attention_no_cache(
    builder: Builder,
    il: int,
    q: GraphTensor,
    k: GraphTensor,
    v: GraphTensor,
    *,
    wo: str | None = "attn_output",
    bias: GraphTensor | None = None,
) -> GraphTensor:
    """Attention within the batch (build_attn with no_cache input)."""
    for tensor in (q, k, v):
        builder.expand(tensor)
    type = "F16" if builder.context.is_flash else "F32"
    mask = builder.input_once(f"mask.{builder.cache_group(il)}", type, builder.n_tokens, builder.n_tokens)
    return project_out(builder, mha(builder, il, q, k, v, mask, bias=bias), il, wo)


def project_out(builder: Builder, cur: GraphTensor, il: int, wo: str | None) -> GraphTensor:
    """The output projection `blk.<il>.<wo>`, if any; BitNet norms before it."""
    if wo is None:
        return cur
    if builder.w(il, "attn_sub_norm") is not None:
        cur = builder.layer_norm(cur, il, "attn_sub_norm")
    if (weight := builder.w(il, wo)) is not None:
        cur = builder.lora_mm(weight, cur, is_scaled=True)
    bias = builder.b(il, wo) if "attention_output_bias" not in builder.row.unread else None
    return builder.add(cur, bias) if bias is not None else cur


def mha(
    builder: Builder,
    il: int,
    q: GraphTensor,
    k: GraphTensor,
    v: GraphTensor,
    mask: GraphTensor | None,
    *,
    sinks: GraphTensor | None = None,
    bias: GraphTensor | None = None,
    v_mla: GraphTensor | None = None,
    is_capped: bool = False,
) -> GraphTensor:
    """The attention product itself, streams split and merged again (build_attn_mha)."""
    v_trans = v.nb[1] > v.nb[2]
    n_stream = k.ne[3]
    per_stream = q.ne[2] // n_stream
    q = builder.view(q, (q.ne[0], q.ne[1], per_stream, n_stream), (q.nb[1], q.nb[2], q.nb[2] * per_stream))
    q, k, v = (builder.permute(tensor, 0, 2, 1, 3) for tensor in (q, k, v))
    if builder.context.is_flash and bias is None:
        cur = _flash(builder, il, q, k, v, mask, sinks, v_mla, v_trans)
    else:
        cur = _plain(builder, q, k, v, mask, sinks, bias, v_mla, v_trans, is_capped)
    builder.expand(cur)
    return cur


def _flash(
    builder: Builder,
    il: int,
    q: GraphTensor,
    k: GraphTensor,
    v: GraphTensor,
    mask: GraphTensor | None,
    sinks: GraphTensor | None,
    v_mla: GraphTensor | None,
    v_trans: bool,
) -> GraphTensor:
    if v_trans:
        v = builder.transpose(v)
    k = builder.cast(k, "F16") if k.type == "F32" else k
    v = builder.cast(v, "F16") if v.type == "F32" else v
    cur = builder.flash_attn(q, k, v, mask, sinks)
    builder.fused_nodes.append((cur.op, cur, il))
    if v_mla is not None:
        cur = builder.mul_mat(v_mla, builder.permute(cur, 0, 2, 1, 3))
        cur = builder.cont(builder.permute(cur, 0, 2, 1, 3))
    ne = cur.ne
    return builder.reshape(cur, ne[0] * ne[1], ne[2] * ne[3])


def _plain(
    builder: Builder,
    q: GraphTensor,
    k: GraphTensor,
    v: GraphTensor,
    mask: GraphTensor | None,
    sinks: GraphTensor | None,
    bias: GraphTensor | None,
    v_mla: GraphTensor | None,
    v_trans: bool,
    is_capped: bool,
) -> GraphTensor:
    kq = builder.mul_mat(k, q)
    if builder.facts.name == "grok":
        kq = builder.scale(builder.unary(builder.scale(kq), "tanh"))
    if is_capped:
        kq = builder.soft_cap(kq)
    if bias is not None:
        kq = builder.add(kq, bias)
    kq = builder.soft_max(kq, mask, sinks)
    if not v_trans:
        v = builder.cont(builder.transpose(v))
    kqv = builder.mul_mat(v, kq)
    if v_mla is not None:
        kqv = builder.mul_mat(v_mla, kqv)
    cur = builder.permute(kqv, 0, 2, 1, 3)
    ne = cur.ne
    cur = builder.cont(cur, ne[0] * ne[1], ne[2] * ne[3])
    if not builder.context.is_kv_offloaded:
        cur.kind = "cpu"
    return cur


def tempered(builder: Builder, query: GraphTensor) -> GraphTensor:
    """Q times the temperature of its position."""
    return builder.mul(query, builder.input_once("attn_scale", "F32", 1, 1, builder.n_tokens))


def gated_result(builder: Builder, il: int, kind: str, out: GraphTensor, source: GraphTensor) -> GraphTensor:
    """The attention's result times a gate per element or per head."""
    weight = builder.need(builder.w(il, "attn_gate"))
    gate = builder.unary(builder.lora_mm(weight, source), kind)
    n_head, n = builder.layer(il).n_head, out.ne[1]
    if weight.ne[1] != n_head:
        return builder.mul(out, gate)
    width = out.ne[0]
    heads = builder.reshape(out, width // n_head, n_head, n)
    return builder.reshape(builder.mul(heads, builder.reshape(gate, 1, n_head, n)), width, n)
