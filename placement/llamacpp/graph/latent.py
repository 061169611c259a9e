"""Multi-head latent attention: compressed K and V, absorbed projections (deepseek2 and its kin).

Mirrors src/models/deepseek2.cpp, deepseek32.cpp, glm-dsa.cpp, kimi-linear.cpp, kimi-k3.cpp and bailingmoe3.cpp.
"""

from __future__ import annotations

from placement.llamacpp.graph.attention import attention, attention_latent, gated_result, tempered
from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.sparse import choose_cells, latent_query, sparse_mask
from placement.llamacpp.graph.tensor import GraphTensor, row_size


def latent_attention(
    builder: Builder,
    il: int,
    cur: GraphTensor,
    *,
    has_rope: bool = True,
    is_reshaped: bool = True,
    wo: str | None = "attn_output",
) -> GraphTensor:
    """DeepSeek V2's attention, absorbed where the model has wk_b, else decompressed."""
    facts, n = builder.layer(il), builder.n_tokens
    rope, factors = builder.integer("rope.dimension_count"), builder.rope_factors(il)
    narrow, q = latent_query(builder, il, cur)
    top_k = choose_cells(builder, il, cur, narrow)
    head = q.ne[0] // facts.n_head
    q = builder.reshape(q, head, facts.n_head, n) if is_reshaped else q
    both = builder.mul_mat(builder.need(builder.w(il, "attn_kv_a_mqa")), cur)
    lora = both.ne[0] - rope
    row = row_size("F32", lora + rope)
    compressed = builder.view_2d(both, lora, n, row)
    k_pe = builder.view_3d(both, rope, 1, n, row, row, row_size("F32", lora))
    if builder.w(il, "attn_k_norm") is not None:
        k_pe = builder.layer_norm(k_pe, il, "attn_k_norm")
    k_pe = builder.rope(k_pe, builder.positions, factors) if has_rope else k_pe
    compressed = builder.layer_norm(compressed, il, "attn_kv_a_norm")
    if not builder.facts.is_mla:
        return _decompressed(builder, il, q, compressed, k_pe, head - rope)
    query = _tempered(builder, _absorbed(builder, il, q, head, rope, factors, has_rope=has_rope))
    compressed = builder.reshape(compressed, lora, 1, n)
    key = builder.concat(compressed, k_pe, 0)
    mask = None if top_k is None else sparse_mask(builder, builder.mask(il), top_k)
    return attention_latent(builder, il, query, key, compressed, builder.w(il, "attn_v_b"), wo=wo, mask=mask)


def _absorbed(
    builder: Builder,
    il: int,
    q: GraphTensor,
    head: int,
    rope: int,
    factors: GraphTensor | None,
    *,
    has_rope: bool,
) -> GraphTensor:
    """Q in the space of the compressed rows, and its roped part behind."""
    n_head, nope = builder.layer(il).n_head, head - rope
    strides = (row_size("F32", head), row_size("F32", head) * n_head)
    q_nope = builder.view_3d(q, nope, n_head, builder.n_tokens, *strides)
    q_pe = builder.view_3d(q, rope, n_head, builder.n_tokens, *strides, row_size("F32", nope))
    q_pe = builder.rope(q_pe, builder.positions, factors) if has_rope else q_pe
    absorbed = builder.mul_mat(builder.need(builder.w(il, "attn_k_b")), builder.permute(q_nope, 0, 2, 1, 3))
    return builder.concat(builder.permute(absorbed, 0, 2, 1, 3), q_pe, 0)


def _tempered(builder: Builder, query: GraphTensor) -> GraphTensor:
    return tempered(builder, query) if builder.number("attention.temperature_scale") != 0.0 else query


def gated_latent_attention(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Latent attention weighed by a gate per head, then projected (bailingmoe3)."""
    out = latent_attention(builder, il, cur, is_reshaped=False, wo=None)
    n_head, n, width = builder.layer(il).n_head, builder.n_tokens, out.ne[0]
    gate = builder.mul_mat(builder.need(builder.w(il, "attn_gate")), cur)
    gate = builder.unary(builder.reshape(gate, 1, n_head, n), "sigmoid")
    out = builder.mul(builder.reshape(out, width // n_head, n_head, n), gate)
    return builder.mul_mat(builder.need(builder.w(il, "attn_output")), builder.cont(out, width, n))


def _decompressed(
    builder: Builder, il: int, q: GraphTensor, compressed: GraphTensor, k_pe: GraphTensor, nope: int
) -> GraphTensor:
    """Full heads from the compressed rows (models without absorbed projections)."""
    n_head, n = builder.layer(il).n_head, builder.n_tokens
    v_head = builder.integer("attention.value_length_mla") or builder.integer("attention.value_length")
    kv = builder.mul_mat(builder.need(builder.w(il, "attn_kv_b")), compressed)
    step = row_size("F32", nope + v_head)
    k_nope = builder.view_3d(kv, nope, n_head, n, step, step * n_head)
    v = builder.cont(builder.view_3d(kv, v_head, n_head, n, step, step * n_head, row_size("F32", nope)))
    q = builder.rope(q, builder.positions, builder.rope_factors(il))
    k = builder.concat(k_nope, builder.repeat(k_pe, k_pe.ne[0], n_head, n, 1), 0)
    return attention(builder, il, _tempered(builder, q), k, v)


def sparse_attention(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Latent attention over the cells that an indexer chose, gated where the row says so."""
    if not builder.row.gate:
        return latent_attention(builder, il, cur, is_reshaped=False)
    has_rope = builder.row.attention == "dsa"
    out = latent_attention(builder, il, cur, has_rope=has_rope, is_reshaped=False, wo=None)
    out = gated_result(builder, il, builder.row.gate, out, cur)
    return builder.lora_mm(
        builder.w(il, "attn_output"), out, is_scaled="attention_scale" not in builder.row.unread
    )
