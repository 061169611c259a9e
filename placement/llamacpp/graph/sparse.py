"""Sparse attention: an indexer scores all cells, and the mask leaves only the best (DeepSeek V3.2).

Mirrors src/models/deepseek32.cpp, glm-dsa.cpp, dots3note.cpp and hy-v4.cpp.
"""

from __future__ import annotations

from placement.llamacpp.architecture.records import Cache
from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.tensor import GraphTensor

HADAMARD_INDEXERS = frozenset({"deepseek32", "deepseek4", "glm-dsa", "dots3note"})


def choose_cells(
    builder: Builder, il: int, cur: GraphTensor, compressed_q: GraphTensor
) -> GraphTensor | None:
    """The cells that the layer's attention reads: its own indexer's choice, else the last one."""
    facts = builder.indexer_cache(il)
    if facts is not None:
        builder.shared.top_k = _indexed(builder, il, cur, compressed_q, facts)
    return builder.shared.top_k if builder.layer(il).is_sparse else None


def _indexed(
    builder: Builder, il: int, cur: GraphTensor, compressed_q: GraphTensor, facts: Cache
) -> GraphTensor:
    n, size = builder.n_tokens, facts.k_head
    weight = builder.need(builder.w(il, "indexer.attn_q_b"))
    q = builder.reshape(builder.mul_mat(weight, compressed_q), size, weight.ne[1] // size, n)
    q = builder.rope(q, builder.positions)
    k = builder.mul_mat(builder.need(builder.w(il, "indexer.attn_k")), cur)
    k = builder.reshape(builder.layer_norm(k, il, "indexer.k_norm", "layer"), size, 1, n)
    k = builder.rope(k, builder.positions)
    if builder.facts.name in HADAMARD_INDEXERS:
        q, k = (builder.mul_mat(_index_rotation(builder, size), tensor) for tensor in (q, k))
    cache = builder.index_cache(il, size)
    builder.expand(builder.store_k(cache, k, builder.input_once("k_ids.index", "I64", n)))
    weights = builder.mul_mat(builder.need(builder.w(il, "indexer.proj")), cur)
    k = builder.read_k(cache, size, 1)
    score = scored(builder, q, k, weights)
    return builder.cont(builder.top_k_of(score, min(score.ne[0], builder.facts.indexer_top_k)))


def _index_rotation(builder: Builder, size: int) -> GraphTensor:
    n = 64
    while size % (2 * n) == 0:
        n *= 2
    return builder.input_once("k_rot.index", "F32", n, n)


def scored(builder: Builder, q: GraphTensor, k: GraphTensor, weights: GraphTensor) -> GraphTensor:
    """Scores of all cells per token, [cells, tokens of a stream, 1, streams]."""
    n_stream = k.ne[3]
    q = builder.view(q, (*q.ne[:2], q.ne[2] // n_stream, n_stream), (q.nb[1], q.nb[2], q.nb[3] // n_stream))
    ne, nb = weights.ne, weights.nb
    shape = (ne[0], ne[1] // n_stream, ne[2], n_stream)
    weights = builder.scale(builder.view(weights, shape, (nb[1], nb[2] // n_stream, nb[3] // n_stream)))
    mask = builder.input_once("mask.index", "F16", k.ne[2], q.ne[2], 1, n_stream)
    return builder.op("LIGHTNING_INDEXER", "F32", (k.ne[2], q.ne[2], 1, n_stream), q, k, weights, mask)


def sparse_mask(builder: Builder, mask: GraphTensor, top_k: GraphTensor) -> GraphTensor:
    """The mask with every cell hidden that was not selected."""
    everything = builder.like("FILL", mask)
    nb = everything.nb
    rows = builder.view(everything, (1, mask.ne[0], mask.ne[1], mask.ne[3]), nb[:3])
    ne, nb = top_k.ne, top_k.nb
    ids = builder.view(top_k, (ne[0], ne[1], ne[3], 1), (nb[1], nb[2], ne[3] * nb[3]))
    type = mask.type if builder.row.attention == "compressed" else "F32"
    zeros = builder.like("FILL", builder.new(type, 1, *ids.ne[:3]))
    kept = builder.set_rows(rows, zeros, ids)
    ne, nb = kept.ne, kept.nb
    kept = builder.view(kept, (ne[1], ne[2], 1, ne[3]), (nb[2], nb[3], nb[3]))
    return builder.add(kept, mask)


def latent_query(builder: Builder, il: int, cur: GraphTensor) -> tuple[GraphTensor, GraphTensor]:
    """Q compressed (what it is made from, without compression) and in full."""
    if (direct := builder.w(il, "attn_q")) is not None:
        return cur, builder.mul_mat(direct, cur)
    narrow = builder.layer_norm(
        builder.mul_mat(builder.need(builder.w(il, "attn_q_a")), cur), il, "attn_q_a_norm"
    )
    return narrow, builder.mul_mat(builder.need(builder.w(il, "attn_q_b")), narrow)
