"""Sparse attention over pools of cells: GLM 5 Next and Qwen 4 score pooled keys and read whole pools.

Mirrors src/models/glm5-next.cpp, qwen4exp.cpp and src/llama-memory-hybrid-idx.cpp.
"""

from __future__ import annotations

from placement.llamacpp.graph.attention import mha
from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.sparse import latent_query
from placement.llamacpp.graph.tensor import GraphTensor, row_size

POOL_PAD = 64


# --- inputs


def _pool(builder: Builder) -> int:
    """Cells of a pool."""
    by_key = builder.integer("attention.indexer.kpool")
    ratios = builder.model.get("attention.compress_ratios", 0)
    ratio = max(ratios) if isinstance(ratios, (tuple, list)) else int(ratios)
    return int(ratio) if builder.facts.name == "qwen4exp" else by_key


def _n_new(builder: Builder) -> int:
    """Pools that are made anew: all, as far as reservations go."""
    return max(1, builder.context.n_ctx_seq // _pool(builder) * builder.context.n_stream)


def _n_pool(builder: Builder) -> int:
    return max(POOL_PAD, -(-(_n_new(builder) + 1) // POOL_PAD) * POOL_PAD)


def _n_top(builder: Builder) -> int:
    return min(_n_pool(builder), builder.facts.indexer_top_k // _pool(builder))


def pool_inputs(builder: Builder) -> None:
    """The inputs that enter the graph before any layer (build_inp_kpool)."""
    for tensor in (
        _pool_cells(builder),
        _pool_ids(builder),
        _pool_mask(builder),
        _tail_ids_of_pools(builder),
    ):
        builder.expand(tensor)
    if builder.facts.name != "qwen4exp":
        builder.expand(_gather_mask(builder))


def _pool_cells(builder: Builder) -> GraphTensor:
    return builder.input_once("pool_cells", "I32", _n_pool(builder))


def _pool_ids(builder: Builder) -> GraphTensor:
    return builder.input_once("pool_ids", "I32", _pool(builder), _n_pool(builder))


def _pool_mask(builder: Builder) -> GraphTensor:
    return builder.input_once("pool_mask", "F16", _n_pool(builder), builder.n_tokens)


def _tail_ids_of_pools(builder: Builder) -> GraphTensor:
    return builder.input_once("tail_ids", "I32", _pool(builder) - 1, builder.n_tokens)


def _gather_mask(builder: Builder) -> GraphTensor:
    has_tail = bool(builder.model.get("attention.indexer.kpool_select_tail", True))
    n = _pool(builder) * _n_top(builder) + (_pool(builder) - 1 if has_tail else 0)
    return builder.input_once("gather_mask", "F32", n, 1, 1, builder.n_tokens)


# --- the pooled keys


def _stored_keys(
    builder: Builder, il: int, parts: list[GraphTensor], size: int
) -> tuple[GraphTensor, GraphTensor]:
    """Views of the cache after the batch's rows were written: what pools are made from, and pooled keys."""
    n = builder.n_tokens
    zeros = builder.like("FILL", builder.new("F32", size, n))
    packed = parts[0]
    for part in (*parts[1:], zeros):
        packed = builder.concat(packed, part, 0)
    width = packed.ne[0]
    cache = builder.index_cache(il, width)
    packed = builder.reshape(packed, width, 1, n)
    builder.expand(builder.store_k(cache, packed, builder.input_once("k_ids.index", "I64", n)))
    n_cells = cache.ne[1] * cache.ne[2]
    kept = builder.view_2d(cache, width - size, n_cells, cache.nb[1])
    offset = row_size(cache.type, width - size)
    return kept, builder.view_2d(cache, size, n_cells, cache.nb[1], offset)


def _pooled_keys(builder: Builder, target: GraphTensor, pooled: GraphTensor, size: int) -> GraphTensor:
    """All pooled keys, the new ones written first."""
    ids = builder.input_once("new_pool_rows", "I64", _n_new(builder))
    builder.expand(builder.set_rows(target, pooled, ids))
    return builder.reshape(builder.get_rows(target, _pool_cells(builder)), size, 1, _n_pool(builder))


def _members(builder: Builder, kept: GraphTensor) -> GraphTensor:
    """The rows of the cells that make up the new pools."""
    pool, n = _pool(builder), _n_new(builder)
    ids = builder.reshape(builder.input_once("new_pool_ids", "I32", pool, n), pool * n)
    return builder.reshape(builder.get_rows(kept, ids), kept.ne[0], pool, n)


def _gated_pools(builder: Builder, il: int, rows: GraphTensor, size: int) -> GraphTensor:
    """Pools as sums weighed by a gate and by place (GLM 5 Next)."""
    pool, n = _pool(builder), _n_new(builder)
    keys = builder.view_3d(rows, size, pool, n, rows.nb[1], rows.nb[2])
    gates = builder.view_3d(rows, size, pool, n, rows.nb[1], rows.nb[2], row_size(rows.type, size))
    logits = builder.add(gates, builder.need(builder.w(il, "indexer_compressor_ape")))
    logits = builder.cont(builder.permute(logits, 1, 0, 2, 3))
    shares = builder.soft_max(builder.reshape(logits, pool, size * n))
    shares = builder.reshape(shares, pool, size, n)
    keys = builder.cont(builder.permute(keys, 1, 0, 2, 3))
    return builder.reshape(builder.sum_rows(builder.mul(shares, keys)), size, n)


# --- GLM 5 Next


def pooled_latent_attention(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Latent attention without rope over selected pools (build_dsa_layer)."""
    narrow, q = latent_query(builder, il, cur)
    n_head, n = builder.layer(il).n_head, builder.n_tokens
    q = builder.reshape(q, q.ne[0] // n_head, n_head, n)
    compressed = builder.mul_mat(builder.need(builder.w(il, "attn_kv_a_mqa")), cur)
    compressed = builder.layer_norm(compressed, il, "attn_kv_a_norm")
    compressed = builder.reshape(compressed, compressed.ne[0], 1, n)
    query = builder.mul_mat(builder.need(builder.w(il, "attn_k_b")), builder.permute(q, 0, 2, 1, 3))
    query = builder.permute(query, 0, 2, 1, 3)
    if builder.indexer_cache(il) is not None:
        builder.shared.selection = _select_pools(builder, il, cur, narrow)
    for tensor in (query, compressed):
        builder.expand(tensor)
    cache = builder.cache(il, "k", compressed.ne[0])
    builder.expand(builder.store_k(cache, compressed, builder.k_ids(il)))
    mask = builder.reshape(builder.need(builder.shared.selection), *builder.mask(il).ne)
    k = builder.read_k(cache, compressed.ne[0], 1)
    v = builder.view(k, k.ne, k.nb[1:])
    out = mha(builder, il, query, k, v, mask, v_mla=builder.w(il, "attn_v_b"))
    return builder.mul_mat(builder.need(builder.w(il, "attn_output")), out)


def _select_pools(builder: Builder, il: int, cur: GraphTensor, narrow: GraphTensor) -> GraphTensor:
    """The mask that leaves the best pools (build_kpool_select)."""
    size, n_head = (
        builder.integer("attention.indexer.key_length"),
        builder.integer("attention.indexer.head_count"),
    )
    q = builder.mul_mat(builder.need(builder.w(il, "indexer.attn_q_b")), narrow)
    q = builder.reshape(q, size, n_head, builder.n_tokens)
    key = builder.mul_mat(builder.need(builder.w(il, "indexer.attn_k")), cur)
    key = builder.layer_norm(key, il, "indexer.k_norm", "layer")
    gate = builder.mul_mat(builder.need(builder.w(il, "indexer_compressor_gate")), cur)
    kept, target = _stored_keys(builder, il, [key, gate], size)
    keys = _pooled_keys(builder, target, _gated_pools(builder, il, _members(builder, kept), size), size)
    weights = builder.scale(builder.mul_mat(builder.need(builder.w(il, "indexer.proj")), cur))
    score = _pool_scores(builder, q, keys, weights)
    best = _in_order(builder, score, builder.top_k_of(score, _n_top(builder)))
    picked = _cells_of(builder, best)
    if bool(builder.model.get("attention.indexer.kpool_select_tail", True)):
        picked = builder.concat(picked, _tail_ids_of_pools(builder), 0)
    builder.expand(picked)
    mask = builder.mask(il)
    live = builder.unary(builder.reshape(_gather_mask(builder), picked.ne[0], builder.n_tokens), "exp")
    dump = builder.op("ARANGE", "F32", (picked.ne[0], 1, 1, 1))
    rows = _unmasked(builder, mask, picked, live, dump)
    rows = builder.view_2d(rows, mask.ne[0], builder.n_tokens, rows.nb[2])
    return builder.add(rows, builder.reshape(mask, mask.ne[0], builder.n_tokens))


def _pool_scores(builder: Builder, q: GraphTensor, keys: GraphTensor, weights: GraphTensor) -> GraphTensor:
    shape = (_n_pool(builder), builder.n_tokens, 1, 1)
    return builder.op("LIGHTNING_INDEXER", "F32", shape, q, keys, weights, _pool_mask(builder))


def _in_order(builder: Builder, score: GraphTensor, best: GraphTensor) -> GraphTensor:
    """The selected pools, best first."""
    n, n_top = builder.n_tokens, _n_top(builder)
    scores = builder.get_rows(builder.reshape(score, 1, _n_pool(builder), n), best)
    order = builder.argsort(builder.reshape(scores, n_top, n))
    best = builder.get_rows(builder.reshape(builder.cast(best, "F32"), 1, n_top, n), order)
    return builder.cast(builder.cont(builder.reshape(best, n_top, n)), "I32")


def _cells_of(builder: Builder, pools: GraphTensor) -> GraphTensor:
    n, n_top = builder.n_tokens, _n_top(builder)
    cells = builder.get_rows(_pool_ids(builder), builder.reshape(pools, n_top * n))
    return builder.reshape(cells, _pool(builder) * n_top, n)


def _unmasked(
    builder: Builder, mask: GraphTensor, picked: GraphTensor, live: GraphTensor, dump: GraphTensor
) -> GraphTensor:
    """A mask of everything with the selected cells visible; dead choices go to spare columns."""
    n, cells, n_sel = builder.n_tokens, mask.ne[0], picked.ne[0]
    everything = builder.like("FILL", builder.new(mask.type, cells + n_sel, 1, 1, 1))
    everything = builder.repeat(everything, cells + n_sel, n, 1, 1)
    zeros = builder.repeat(builder.like("FILL", builder.new(mask.type, n_sel, 1, 1, 1)), n_sel, n, 1, 1)
    rows, zeros = builder.reshape(everything, 1, cells + n_sel, n), builder.reshape(zeros, 1, n_sel, n)
    ids = builder.cast(picked, "F32")
    ids = builder.add(builder.mul(builder.sub(ids, dump), live), dump)
    ids = builder.cast(ids, "I32")
    return builder.set_rows(rows, zeros, builder.reshape(ids, n_sel, n, 1))


def pool_mask_of(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """The mask that leaves the best pools (build_qsa_sel)."""
    size, n_head = (
        builder.integer("attention.indexer.key_length"),
        builder.integer("attention.indexer.head_count"),
    )
    n, mask = builder.n_tokens, builder.mask(il)
    kept, target = _stored_keys(builder, il, [builder.lora_mm(builder.w(il, "indexer.k_proj"), cur)], size)
    pooled = _mean_pools(builder, il, _members(builder, kept), size)
    keys = _pooled_keys(builder, target, pooled, size)
    q = builder.reshape(builder.lora_mm(builder.w(il, "indexer.q_proj"), cur), size, n_head, n)
    q = builder.rope(builder.layer_norm(q, il, "indexer.q_norm"), builder.positions)
    weights = builder.like("FILL", builder.new("F32", n_head, n))
    score = _pool_scores(builder, q, keys, weights)
    best = builder.top_k_of(score, _n_top(builder))
    picked = builder.concat(_cells_of(builder, best), _tail_ids_of_pools(builder), 0)
    builder.expand(picked)
    live = _live(builder, score, best)
    dump = builder.scale(builder.op("CUMSUM", "F32", live.ne, builder.like("FILL", live)))
    rows = _unmasked(builder, mask, picked, live, dump)
    row, per_stream = rows.nb[2], mask.ne[1]
    strides = (row, row * per_stream, row * per_stream * mask.ne[2])
    return builder.add(builder.view(rows, mask.ne, strides), mask)


def _mean_pools(builder: Builder, il: int, rows: GraphTensor, size: int) -> GraphTensor:
    n = _n_new(builder)
    total: GraphTensor | None = None
    for i in range(_pool(builder)):
        part = builder.view_2d(rows, size, n, rows.nb[2], i * rows.nb[1])
        total = builder.cont(part) if total is None else builder.add(total, part)
    pooled = builder.layer_norm(builder.scale(builder.need(total)), il, "indexer.k_norm")
    positions = builder.input_once("new_pool_pos", "I32", 4 * n)
    return builder.reshape(builder.rope(builder.reshape(pooled, size, 1, n), positions), size, n)


def _live(builder: Builder, score: GraphTensor, best: GraphTensor) -> GraphTensor:
    """Which choices are real: pools with a score, and tail cells that exist."""
    n, pool, n_top = builder.n_tokens, _pool(builder), _n_top(builder)
    scores = builder.get_rows(builder.reshape(score, 1, _n_pool(builder), n), best)
    pools = builder.repeat(builder.clamp(builder.scale(scores)), pool, n_top, n, 1)
    pools = builder.reshape(pools, pool * n_top, n)
    tail = builder.clamp(builder.scale(builder.cast(_tail_ids_of_pools(builder), "F32")))
    return builder.concat(pools, tail, 0)
