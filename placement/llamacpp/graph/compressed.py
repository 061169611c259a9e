"""DeepSeek 4's attention: a window of raw keys beside keys compressed by 4 (with an indexer) or by 128.

Mirrors src/models/deepseek4.cpp and src/llama-kv-cache-dsv4.cpp.
"""

from __future__ import annotations

from placement.llamacpp.architecture.records import Cache
from placement.llamacpp.context_rules import compressed_cells
from placement.llamacpp.graph.attention import cache_rotation, mha, rotate
from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.sparse import sparse_mask
from placement.llamacpp.graph.tensor import GraphTensor

OVERLAPPED = 4  # the ratio whose blocks overlap and have an indexer


def compressed_attention(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """One layer's attention with the grouped output projection (build_attention_impl)."""
    size, n_head, n = builder.layer(il).caches[0].k_head, builder.layer(il).n_head, builder.n_tokens
    narrow = builder.layer_norm(builder.lora_mm(builder.w(il, "attn_q_a"), cur), il, "attn_q_a_norm")
    q = builder.reshape(builder.lora_mm(builder.w(il, "attn_q_b"), narrow), size, n_head, n)
    q = builder.rope(builder.rms_norm(q), builder.positions)
    kv = builder.layer_norm(builder.lora_mm(builder.w(il, "attn_kv"), cur), il, "attn_kv_a_norm")
    kv = builder.rope(builder.reshape(kv, size, 1, n), builder.positions)
    kept = next((c for c in builder.layer(il).caches if c.ratio > 1 and not c.is_indexer), None)
    index = builder.indexer_cache(il)
    if kept is not None:
        _compress(builder, il, cur, "attn", "main", kept)
    if index is not None:
        _compress(builder, il, cur, "indexer", "index", index)
    picked = None if index is None else _picked_blocks(builder, il, narrow, cur, index)
    out = _attend_all(builder, il, q, kv, kept, picked)
    return _grouped_output(builder, il, out, size)


def _grouped_output(builder: Builder, il: int, out: GraphTensor, size: int) -> GraphTensor:
    n, n_head, groups = (
        builder.n_tokens,
        builder.layer(il).n_head,
        builder.integer("attention.output_group_count"),
    )
    out = builder.reshape(out, size, n_head, n)
    out = builder.like("ROPE_BACK", out, builder.positions)
    out = builder.permute(builder.reshape(out, size * n_head // groups, groups, n), 0, 2, 1, 3)
    out = builder.mul_mat(builder.need(builder.w(il, "attn_output_a")), out)
    width = builder.integer("attention.output_lora_rank") * groups
    return builder.lora_mm(
        builder.w(il, "attn_output_b"), builder.cont(builder.permute(out, 0, 2, 1, 3), width, n)
    )


def _attend_all(
    builder: Builder, il: int, q: GraphTensor, kv: GraphTensor, kept: Cache | None, picked: GraphTensor | None
) -> GraphTensor:
    rotation = cache_rotation(builder, il, "k")
    if rotation is not None:
        q, kv = rotate(builder, q, rotation), rotate(builder, kv, rotation)
    builder.expand(q)
    builder.expand(kv)
    cache = builder.cache(il, "k", kv.ne[0])
    builder.expand(builder.store_k(cache, kv, builder.k_ids(il)))
    k, mask = builder.read_k(cache, kv.ne[0], 1), builder.mask(il)
    if kept is not None:
        compressed = _read_compressed(builder, il, "main", kept)
        more = _compressed_mask(builder, kept)
        k = builder.concat(k, compressed, 2)
        mask = builder.concat(mask, more if picked is None else sparse_mask(builder, more, picked), 0)
    out = mha(builder, il, q, k, k, mask, sinks=builder.w(il, "attn_sinks"))
    return rotate(builder, out, rotation) if rotation is not None else out


# --- compressed caches


def _n_compressed(builder: Builder, cache: Cache) -> int:
    return compressed_cells(builder.context.n_ctx_seq, cache.ratio)


def _compressed_cache(builder: Builder, il: int, which: str, cache: Cache) -> GraphTensor:
    key = f"cache_{which}.{il}"
    if key not in builder.inputs:
        n_stream = builder.context.n_stream
        leaf = builder.new(builder.context.type_k, cache.k_width, _n_compressed(builder, cache), n_stream)
        leaf.cache_layer = il
        builder.inputs[key] = leaf
    return builder.inputs[key]


def _read_compressed(builder: Builder, il: int, which: str, cache: Cache) -> GraphTensor:
    k = builder.read_k(_compressed_cache(builder, il, which, cache), cache.k_head, 1)
    return builder.view(k, k.ne, k.nb[1:])


def _compressed_mask(builder: Builder, cache: Cache, name: str = "main") -> GraphTensor:
    n_stream = builder.context.n_stream
    type = "F16" if builder.context.is_flash or name == "index" else "F32"
    shape = (_n_compressed(builder, cache), builder.n_tokens // n_stream, 1, n_stream)
    return builder.input_once(f"mask.{name}.{cache.ratio}", type, *shape)


def _plan(builder: Builder, name: str, type: str, n: int, cache: Cache, which: str) -> GraphTensor:
    return builder.input_once(f"{name}.{which}.{cache.ratio}", type, n)


def _compress(builder: Builder, il: int, cur: GraphTensor, prefix: str, which: str, cache: Cache) -> None:
    """Rows for the batch's blocks, made from the kept state and the batch, and the new state."""
    ratio, n = cache.ratio, builder.n_tokens
    is_overlapped = ratio == OVERLAPPED
    kv = builder.lora_mm(builder.w(il, f"{prefix}_compressor_kv"), cur)
    score = builder.lora_mm(builder.w(il, f"{prefix}_compressor_gate"), cur)
    ape = builder.need(builder.w(il, f"{prefix}_compressor_ape"))
    score = builder.add(score, builder.get_rows(ape, _plan(builder, "state_pos", "I32", n, cache, which)))
    n_rows = (2 * ratio if is_overlapped else ratio) * builder.context.n_seq_max
    states = [_state_rows(builder, il, which, part, kv.ne[0], n_rows) for part in ("kv", "score")]
    sources = []
    for state, new in zip(states, (kv, score), strict=True):
        base = builder.view_2d(state, state.ne[0], n_rows, state.nb[1])
        sources.append(builder.concat(base, new, 1))
    blocks = _blocks(builder, il, sources, f"{prefix}_compressor_norm", cache, which)
    rotation = _compressed_rotation(builder, which, cache)
    if rotation is not None:
        blocks = rotate(builder, blocks, rotation)
    ids = _plan(builder, "write_rows", "I64", _n_blocks(builder, ratio), cache, which)
    builder.expand(builder.store_k(_compressed_cache(builder, il, which, cache), blocks, ids))
    n_kept = min(n, n_rows)
    source = _plan(builder, "persist_src", "I32", n_kept, cache, which)
    target = _plan(builder, "persist_dst", "I32", n_kept, cache, which)
    kept = [builder.get_rows(new, source) for new in (kv, score)]
    for part, rows in zip(("kv", "score"), kept, strict=True):
        builder.expand(
            builder.set_rows(_state_rows(builder, il, which, part, rows.ne[0], n_rows), rows, target)
        )


def _compressed_rotation(builder: Builder, which: str, cache: Cache) -> GraphTensor | None:
    is_plain = builder.context.type_k in ("F16", "BF16", "F32")
    if which != "index" and (is_plain or cache.k_head % 64):
        return None
    n = 64
    while cache.k_head % (2 * n) == 0:
        n *= 2
    return _plan_matrix(builder, n, cache, which)


def _plan_matrix(builder: Builder, n: int, cache: Cache, which: str) -> GraphTensor:
    return builder.input_once(f"k_rot.{which}.{cache.ratio}", "F32", n, n)


def _n_blocks(builder: Builder, ratio: int) -> int:
    return builder.n_tokens // ratio + max(1, builder.batch.n_seqs)


def _state_rows(builder: Builder, il: int, which: str, part: str, width: int, n_rows: int) -> GraphTensor:
    key = f"compressor_{which}_{part}.{il}"
    if key not in builder.inputs:
        leaf = builder.new("F32", width, n_rows // builder.context.n_seq_max, builder.context.n_seq_max)
        leaf.cache_layer = il
        builder.inputs[key] = leaf
    state = builder.inputs[key]
    return builder.view_2d(state, width, n_rows, state.nb[1])


def _blocks(
    builder: Builder, il: int, sources: list[GraphTensor], norm: str, cache: Cache, which: str
) -> GraphTensor:
    """The compressed rows of the batch's blocks: values weighed by scores, normed and roped."""
    ratio, size = cache.ratio, cache.k_head
    n_blocks, is_overlapped = _n_blocks(builder, ratio), ratio == OVERLAPPED
    if is_overlapped:
        sources = [_with_zero_row(builder, source) for source in sources]
    n_read = ratio * n_blocks
    ids = _plan(builder, "read_rows", "I32", n_read * (2 if is_overlapped else 1), cache, which)
    rows = [builder.get_rows(source, ids) for source in sources]
    if is_overlapped:
        parts = [_overlapped(builder, tensor, size, ratio, n_blocks) for tensor in rows]
    else:
        parts = [builder.reshape(tensor, size, ratio, n_blocks) for tensor in rows]
    values, scores = (builder.cont(builder.permute(tensor, 1, 0, 2, 3)) for tensor in parts)
    out = builder.sum_rows(builder.mul(values, builder.soft_max(scores)))
    out = builder.layer_norm(builder.cont(builder.permute(out, 1, 0, 2, 3)), il, norm)
    return builder.rope(out, _plan(builder, "write_pos", "I32", n_blocks, cache, which))


def _with_zero_row(builder: Builder, source: GraphTensor) -> GraphTensor:
    row = builder.scale(builder.view_1d(source, source.ne[0]))
    return builder.concat(source, builder.reshape(row, source.ne[0], 1), 1)


def _overlapped(builder: Builder, rows: GraphTensor, size: int, ratio: int, n_blocks: int) -> GraphTensor:
    """The first half of the block before, and the second half of the block itself."""
    n_read = ratio * n_blocks
    before = builder.cont(builder.view_2d(rows, size, n_read, rows.nb[1]))
    own = builder.cont(builder.view_2d(rows, size, n_read, rows.nb[1], n_read * rows.nb[1] + 4 * size))
    before, own = (builder.reshape(part, size, ratio, n_blocks) for part in (before, own))
    return builder.concat(before, own, 1)


# --- the indexer


def _picked_blocks(
    builder: Builder, il: int, narrow: GraphTensor, cur: GraphTensor, cache: Cache
) -> GraphTensor:
    """The compressed rows that the indexer chooses (build_lid_top_k)."""
    weight, size = builder.need(builder.w(il, "indexer.attn_q_b")), cache.k_head
    q = builder.reshape(builder.lora_mm(weight, narrow), size, weight.ne[1] // size, builder.n_tokens)
    q = builder.rope(q, builder.positions)
    q = rotate(builder, q, builder.need(_compressed_rotation(builder, "index", cache)))
    weights = builder.scale(builder.lora_mm(builder.w(il, "indexer.proj"), cur))
    k = _read_compressed(builder, il, "index", cache)
    n_stream, nb = k.ne[3], weights.nb
    q = builder.view(q, (*q.ne[:2], q.ne[2] // n_stream, n_stream), (q.nb[1], q.nb[2], q.nb[3] // n_stream))
    shape = (weights.ne[0], weights.ne[1] // n_stream, weights.ne[2], n_stream)
    weights = builder.view(weights, shape, (nb[1], nb[2] // n_stream, nb[3] // n_stream))
    mask = _compressed_mask(builder, cache, "index")
    score = builder.op("LIGHTNING_INDEXER", "F32", (k.ne[2], q.ne[2], 1, n_stream), q, k, weights, mask)
    return builder.cont(builder.top_k_of(score, min(score.ne[0], builder.facts.indexer_top_k)))
