"""Block-sparse attention (MiniMax M3): an indexer chooses blocks of positions for each of its heads.

Mirrors src/models/minimax-m3.cpp and src/llama-kv-cache-msa.cpp.
"""

from __future__ import annotations

from placement.llamacpp.context_rules import CELL_PADDING
from placement.llamacpp.graph.attention import cache_rotation, rotate, through_cache
from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.tensor import GraphTensor

EMPTY_CACHE_POSITIONS = CELL_PADDING  # what an empty cache counts as used: reservations are made with one


def has_blocks(builder: Builder, il: int) -> bool:
    """Whether the layer attends to selected blocks: flash attention, and sequences with own streams."""
    context = builder.context
    is_split = context.n_seq_max == 1 or not context.is_unified
    return context.is_flash and is_split and builder.layer(il).is_sparse


def block_attention(
    builder: Builder, il: int, cur: GraphTensor, q: GraphTensor, k: GraphTensor, v: GraphTensor
) -> GraphTensor:
    """Attention of one layer up to, and with, the output projection."""
    iq, index = _block_index(builder, il, cur)
    k_rot, v_rot = cache_rotation(builder, il, "k"), cache_rotation(builder, il, "v")
    if k_rot is not None:
        q, k = rotate(builder, q, k_rot), rotate(builder, k, k_rot)
    if v_rot is not None:
        v = rotate(builder, v, v_rot)
    for tensor in (q, k, v):
        builder.expand(tensor)
    k, v = through_cache(builder, il, k, v)
    is_single = builder.n_tokens == builder.context.n_stream
    out = _decoded(builder, q, iq, index, k, v) if is_single else _by_stream(builder, il, q, iq, index, k, v)
    if v_rot is not None:
        out = rotate(builder, out, v_rot)
    return builder.lora_mm(builder.w(il, "attn_output"), out, is_scaled=True)


def _block_index(builder: Builder, il: int, cur: GraphTensor) -> tuple[GraphTensor, GraphTensor]:
    """The indexer's queries, and its keys of the whole cache."""
    size, n_head = (
        builder.integer("attention.indexer.key_length"),
        builder.integer("attention.indexer.head_count"),
    )
    n = builder.n_tokens
    iq = builder.reshape(builder.lora_mm(builder.w(il, "indexer.q_proj"), cur), size, n_head, n)
    ik = builder.reshape(builder.lora_mm(builder.w(il, "indexer.k_proj"), cur), size, 1, n)
    iq = builder.rope(builder.layer_norm(iq, il, "indexer.q_norm"), builder.positions)
    ik = builder.rope(builder.layer_norm(ik, il, "indexer.k_norm"), builder.positions)
    cache = builder.index_cache(il, size)
    builder.expand(builder.store_k(cache, ik, builder.input_once("k_ids.index", "I64", n)))
    return iq, builder.read_k(cache, size, 1)


# --- inputs


def _block(builder: Builder) -> int:
    return builder.integer("attention.indexer.block_size", 1)


def _n_positions(builder: Builder) -> int:
    return -(-EMPTY_CACHE_POSITIONS // _block(builder)) * _block(builder)


def _bias(builder: Builder) -> GraphTensor:
    return builder.input_once("block_bias", "F32", _n_positions(builder) // _block(builder), builder.n_tokens)


def _position_mask(builder: Builder) -> GraphTensor:
    return builder.input_once("position_mask", "F32", _n_positions(builder), builder.n_tokens)


def _slots(builder: Builder, type: str) -> GraphTensor:
    return builder.input_once(f"slots.{type}", type, _n_positions(builder), builder.context.n_stream)


def _n_picked(builder: Builder) -> int:
    return min(builder.facts.indexer_top_k, _n_positions(builder) // _block(builder))


def _mask_f32(builder: Builder, il: int) -> GraphTensor:
    if "mask_f32" not in builder.inputs:
        builder.inputs["mask_f32"] = builder.cast(builder.mask(il), "F32")
    return builder.inputs["mask_f32"]


# --- products


def _attend(
    builder: Builder, q: GraphTensor, k: GraphTensor, v: GraphTensor, mask: GraphTensor, group: int
) -> GraphTensor:
    size, n_head, n = q.ne[:3]
    n_chunks = k.ne[3]
    q = builder.reshape(q, size, group, n_chunks, n_head * n // (group * n_chunks))
    out = builder.flash_attn(builder.permute(q, 0, 2, 3, 1), k, v, mask)
    out = builder.permute(out, 0, 1, 3, 2)
    out = out if out.is_contiguous else builder.cont(out)
    return builder.reshape(out, size * n_head, n)


def _pooled(builder: Builder, score: GraphTensor) -> GraphTensor:
    return builder.op("POOL_2D", "F32", (score.ne[0] // _block(builder), *score.ne[1:]), score)


def _by_stream(
    builder: Builder,
    il: int,
    q: GraphTensor,
    iq: GraphTensor,
    ik: GraphTensor,
    k: GraphTensor,
    v: GraphTensor,
) -> GraphTensor:
    outs = [_stream(builder, il, i, q, iq, ik, k, v) for i in range(builder.context.n_stream)]
    total = outs[0]
    for out in outs[1:]:
        total = builder.concat(total, out, 1)
    return total


def _stream(
    builder: Builder,
    il: int,
    st: int,
    q: GraphTensor,
    iq: GraphTensor,
    ik: GraphTensor,
    k: GraphTensor,
    v: GraphTensor,
) -> GraphTensor:
    n, cells = builder.n_tokens // builder.context.n_stream, k.ne[2]
    iq = builder.view_3d(iq, *iq.ne[:2], n, iq.nb[1], iq.nb[2], st * n * iq.nb[2])
    ik = builder.view_2d(ik, ik.ne[0], cells, ik.nb[2], st * ik.nb[3])
    mask = _block_mask(builder, il, st, n, iq, ik, cells)
    head, n_head = q.ne[:2]
    q = builder.view_3d(q, head, n_head, n, q.nb[1], q.nb[2], st * n * q.nb[2])
    k, v = (builder.view(t, (*t.ne[:3], 1), t.nb[1:], st * t.nb[3]) for t in (k, v))
    group = n_head // k.ne[1]
    return _attend(builder, q, builder.permute(k, 0, 3, 1, 2), builder.permute(v, 0, 3, 1, 2), mask, group)


def _block_mask(
    builder: Builder, il: int, st: int, n: int, iq: GraphTensor, ik: GraphTensor, cells: int
) -> GraphTensor:
    """The mask of one stream, by indexer head, that leaves only the selected blocks."""
    n_head, positions, n_picked = iq.ne[1], _n_positions(builder), _n_picked(builder)
    n_blocks = positions // _block(builder)
    slots, bias, hidden = _slots(builder, "I32"), _bias(builder), _position_mask(builder)
    of_cell = builder.input_once("cell_block", "I32", cells, builder.context.n_stream)
    keys = builder.get_rows(ik, builder.view_1d(slots, positions, st * slots.nb[1]))
    score = builder.mul_mat(keys, builder.reshape(iq, iq.ne[0], n_head * n))
    score = builder.reshape(score, positions, n_head, n)
    hidden = builder.view_3d(hidden, positions, 1, n, hidden.nb[1], hidden.nb[1], st * n * hidden.nb[1])
    pooled = _pooled(builder, builder.in_place("ADD", score, score, hidden))
    bias = builder.view_3d(bias, n_blocks, 1, n, bias.nb[1], bias.nb[1], st * n * bias.nb[1])
    picked = builder.top_k_of(builder.add(pooled, bias), n_picked)
    nothing = builder.repeat(builder.cast(builder.scale(bias), "F16"), n_blocks, n_head, n, 1)
    zero = builder.scale(builder.cast(picked, "F32"))
    rows = n_head * n
    kept = builder.set_rows(
        builder.reshape(nothing, 1, n_blocks, rows),
        builder.reshape(zero, 1, n_picked, rows),
        builder.reshape(picked, n_picked, rows),
    )
    kept = builder.cont(builder.permute(builder.reshape(kept, n_blocks, n_head, n), 0, 2, 1, 3))
    kept = builder.cont(builder.transpose(builder.reshape(kept, n_blocks, rows)))
    by_cell = builder.get_rows(kept, builder.view_1d(of_cell, cells, st * of_cell.nb[1]))
    by_cell = builder.reshape(builder.cont(builder.transpose(by_cell)), cells, n, n_head)
    mask = _mask_f32(builder, il)
    mask = builder.view_3d(mask, cells, n, 1, mask.nb[1], mask.nb[3], st * mask.nb[3])
    mask = builder.in_place("ADD", by_cell, by_cell, mask)
    return builder.cast(builder.reshape(mask, cells, n, 1, n_head), "F16")


def _decoded(
    builder: Builder, q: GraphTensor, iq: GraphTensor, ik: GraphTensor, k: GraphTensor, v: GraphTensor
) -> GraphTensor:
    """One token per stream: the selected blocks' rows are gathered."""
    ns, block, n_picked = builder.context.n_stream, _block(builder), _n_picked(builder)
    size, n_head, positions = iq.ne[0], iq.ne[1], _n_positions(builder)
    head, n_kv_head, cells = k.ne[:3]
    ids = _slots(builder, "I32")
    keys = builder.get_rows(builder.view_3d(ik, size, cells, ns, ik.nb[2], ik.nb[3]), ids)
    score = builder.mul_mat(
        builder.reshape(keys, size, positions, 1, ns), builder.reshape(iq, size, n_head, 1, ns)
    )
    hidden = builder.reshape(_position_mask(builder), positions, 1, 1, ns)
    pooled = _pooled(builder, builder.in_place("ADD", score, score, hidden))
    bias = builder.reshape(_bias(builder), positions // block, 1, 1, ns)
    picked = builder.top_k_of(builder.add(pooled, bias), n_picked)
    first = builder.reshape(builder.scale(builder.cast(picked, "F32")), 1, n_picked, n_head, ns)
    steps = builder.reshape(builder.op("ARANGE", "F32", (block, 1, 1, 1)), block, 1, 1)
    spread = builder.add(builder.repeat(first, block, n_picked, n_head, ns), steps)
    n_rows = block * n_picked * n_head
    token_ids = builder.cast(builder.reshape(spread, n_rows, ns), "I32")
    rows = builder.get_rows(builder.reshape(_slots(builder, "F32"), 1, positions, ns), token_ids)
    rows = builder.reshape(rows, block, n_picked, n_head, ns)
    steps = builder.reshape(builder.op("ARANGE", "F32", (n_kv_head, 1, 1, 1)), 1, 1, n_head)
    rows = builder.cast(builder.reshape(builder.add(builder.scale(rows), steps), n_rows, ns), "I32")
    gathered = []
    for tensor in (k, v):
        flat = builder.view_3d(tensor, head, n_kv_head * cells, ns, tensor.nb[1], tensor.nb[3])
        gathered.append(builder.get_rows(flat, rows))
    hidden = builder.get_rows(builder.reshape(_position_mask(builder), 1, positions, ns), token_ids)
    parts = [builder.reshape(t, head, block * n_picked, 1, n_head * ns) for t in gathered]
    types = [t.type if t.type in ("F16", "F32", "BF16") else "F16" for t in (k, v)]
    kk, vv = (p if p.type == t else builder.cast(p, t) for p, t in zip(parts, types, strict=True))
    mask = builder.cast(builder.reshape(hidden, block * n_picked, 1, 1, n_head * ns), "F16")
    return _attend(builder, q, kk, vv, mask, q.ne[1] // n_kv_head)
