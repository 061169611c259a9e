"""Attention of most rows: Q, K and V split into heads, their norms, rope and gates, and the attention itself.

Mirrors src/llama-graph.cpp (build_qkv) and the attention of src/models/*.cpp: llama.cpp, llama4.cpp, ...
"""

from __future__ import annotations

from typing import assert_never

from placement.llamacpp.graph.attention import attention, attention_no_cache, gated_result, tempered
from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.tensor import GraphTensor, row_size

NO_ROPE_STEP = 4  # n_no_rope_layer_step
ROPED_BAICHUAN_LAYERS = 32
UNNORMED_LLAMA4_EXPERTS = 128


def qkv(
    builder: Builder,
    cur: GraphTensor,
    il: int,
    heads: tuple[int, int, int],
    sizes: tuple[int, int, int],
    *,
    is_flat: bool = False,
) -> tuple[GraphTensor, GraphTensor, GraphTensor]:
    """Q, K and V as [head size, heads, tokens], or as [width, tokens] if `is_flat` (build_qkv)."""
    if (fused := builder.w(il, "attn_qkv")) is not None:
        return _qkv_fused(builder, cur, il, fused, heads, sizes, is_flat)
    parts = []
    for name, n_head, size in zip(("attn_q", "attn_k", "attn_v"), heads, sizes, strict=True):
        part = builder.lora_mm(
            builder.w(il, name), cur, is_scaled="attention_scale" not in builder.row.unread
        )
        bias = builder.b(il, name) if "qkv_bias" not in builder.row.unread else None
        if bias is not None:
            part = builder.add(part, bias)
        if not is_flat:
            part = _clamp_qkv(builder, part)
            part = builder.reshape(part, size, n_head, builder.n_tokens)
        parts.append(part)
    return parts[0], parts[1], parts[2]


def _clamp_qkv(builder: Builder, cur: GraphTensor) -> GraphTensor:
    return builder.clamp(cur) if builder.number("attention.clamp_kqv") > 0.0 else cur


def _qkv_fused(
    builder: Builder,
    cur: GraphTensor,
    il: int,
    fused: GraphTensor,
    heads: tuple[int, int, int],
    sizes: tuple[int, int, int],
    is_flat: bool,
) -> tuple[GraphTensor, GraphTensor, GraphTensor]:
    qkv = builder.lora_mm(fused, cur, is_scaled="attention_scale" not in builder.row.unread)
    biases = [builder.b(il, name) for name in ("attn_q", "attn_k", "attn_v")]
    if (bias := builder.b(il, "attn_qkv")) is not None:
        qkv = builder.add(qkv, bias)
    elif all(bias is not None for bias in biases):
        q_b, k_b, v_b = (builder.need(bias) for bias in biases)
        qkv = builder.add(qkv, builder.concat(builder.concat(q_b, k_b, 0), v_b, 0))
    if not is_flat:
        qkv = _clamp_qkv(builder, qkv)
    parts, offset = [], 0
    for n_head, size in zip(heads, sizes, strict=True):
        width = n_head * size
        if is_flat:
            part = builder.cont(builder.view_2d(qkv, width, builder.n_tokens, qkv.nb[1], offset))
        else:
            strides = (row_size("F32", size), qkv.nb[1])
            part = builder.view_3d(qkv, size, n_head, builder.n_tokens, *strides, offset)
        parts.append(part)
        offset += row_size("F32", width)
    return parts[0], parts[1], parts[2]


def plain_attention(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Q, K and V, their norms and rope, attention, output projection."""
    return attended(builder, il, cur, *prepared_heads(builder, il, cur))


def no_cache_attention(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """The same within the batch (models without a cache)."""
    return attention_no_cache(builder, il, *prepared_heads(builder, il, cur))


def prepared_heads(
    builder: Builder, il: int, cur: GraphTensor
) -> tuple[GraphTensor, GraphTensor, GraphTensor]:
    """Q, K and V as attention takes them."""
    source = norm_beside(builder, il) if builder.w(il, "attn_norm_2") is not None else cur
    q, k, v = split_heads(builder, il, source)
    q, k = positioned(builder, il, q, k)
    return builder.scale(q) if builder.row.has_q_scale else q, k, v


def attended(
    builder: Builder, il: int, cur: GraphTensor, q: GraphTensor, k: GraphTensor, v: GraphTensor
) -> GraphTensor:
    """Attention through the caches, its gate, and the output projection."""
    row = builder.row
    out = attention(
        builder,
        il,
        q,
        k,
        v,
        wo=None if row.gate else "attn_output",
        sinks=builder.w(il, "attn_sinks"),
        is_windowed=builder.has_windows,
        is_capped=row.is_capped,
    )
    if row.gate:
        out = gated_result(builder, il, row.gate, out, cur)
        out = builder.lora_mm(builder.w(il, "attn_output"), out, is_scaled=True)
    return builder.scale(out) if builder.is_on(row.value_scale, "attention.value_scale") else out


def norm_beside(builder: Builder, il: int) -> GraphTensor:
    """Falcon's second norm: attention reads it, the feed-forward block the first."""
    return builder.layer_norm(builder.shared.layer_input, il, "attn_norm_2", builder.row.norm)


def split_heads(builder: Builder, il: int, cur: GraphTensor) -> tuple[GraphTensor, GraphTensor, GraphTensor]:
    """Q, K and V by head."""
    facts = builder.layer(il)
    k_size, v_size = builder.head_sizes(il)
    heads, sizes = (facts.n_head, facts.n_head_kv, facts.n_head_kv), (k_size, k_size, v_size)
    if builder.row.has_reshaped_qkv:
        return _reshaped_heads(builder, il, cur, heads, k_size)
    if builder.row.qk_norm != "flat":
        return qkv(builder, cur, il, heads, sizes)
    q, k, v = qkv(builder, cur, il, heads, sizes, is_flat=True)
    q, k = qk_normed(builder, il, q, k)
    parts = zip((q, k, v), sizes, heads, strict=True)
    q, k, v = (builder.reshape(tensor, size, n, builder.n_tokens) for tensor, size, n in parts)
    return q, k, v


def _reshaped_heads(
    builder: Builder, il: int, cur: GraphTensor, heads: tuple[int, int, int], size: int
) -> tuple[GraphTensor, GraphTensor, GraphTensor]:
    qkv = builder.lora_mm(builder.w(il, "attn_qkv"), cur)
    qkv = builder.reshape(qkv, size, sum(heads), builder.n_tokens)
    parts, offset = [], 0
    for n in heads:
        parts.append(builder.view_3d(qkv, size, n, builder.n_tokens, qkv.nb[1], qkv.nb[2], offset))
        offset += n * qkv.nb[1]
    return parts[0], parts[1], parts[2]


def qk_normed(builder: Builder, il: int, q: GraphTensor, k: GraphTensor) -> tuple[GraphTensor, GraphTensor]:
    """Q and K after their norms, where the layer has them."""
    kind, is_bare = (
        builder.row.qk_norm_kind,
        not builder.row.has_norm_weights and builder.row.qk_norm == "after",
    )
    if is_bare or builder.w(il, "attn_q_norm") is not None:
        q = builder.layer_norm(q, il, "attn_q_norm", kind)
    if is_bare or builder.w(il, "attn_k_norm") is not None:
        k = builder.layer_norm(k, il, "attn_k_norm", kind)
    return q, k


def positioned(builder: Builder, il: int, q: GraphTensor, k: GraphTensor) -> tuple[GraphTensor, GraphTensor]:
    """Q and K normed, roped and tempered in the row's order."""
    row = builder.row
    if row.qk_norm == "mpt" and builder.w(il, "attn_q_norm") is not None:
        q, k = _flat_normed(builder, il, q, k)
    if row.qk_norm == "before":
        q, k = qk_normed(builder, il, q, k)
    has_rope = is_roped(builder, il)
    if has_rope:
        factors = builder.rope_factors(il)
        q, k = roped(builder, q, factors), roped(builder, k, factors)
    if row.qk_norm == "after":
        q, k = qk_normed(builder, il, q, k)
    if _is_tempered(builder, has_rope=has_rope):
        q = tempered(builder, q)
    if has_rope and row.has_plain_qk_norm and builder.facts.n_expert != UNNORMED_LLAMA4_EXPERTS:
        q, k = builder.rms_norm(q), builder.rms_norm(k)
    return q, k


def _is_tempered(builder: Builder, *, has_rope: bool) -> bool:
    match builder.row.temperature:
        case "meta":
            return builder.number("attention.temperature_scale") != 0.0
        case "no_rope":
            return not has_rope
        case None:
            return False
        case unknown:
            assert_never(unknown)


def roped(builder: Builder, cur: GraphTensor, factors: GraphTensor | None) -> GraphTensor:
    """Rope at the batch's positions."""
    return builder.rope(cur, builder.positions, factors)


def _flat_normed(
    builder: Builder, il: int, q: GraphTensor, k: GraphTensor
) -> tuple[GraphTensor, GraphTensor]:
    out = []
    for tensor, name in ((q, "attn_q_norm"), (k, "attn_k_norm")):
        flat = builder.reshape(tensor, tensor.ne[0] * tensor.ne[1], builder.n_tokens)
        out.append(builder.reshape(builder.layer_norm(flat, il, name, "layer"), *tensor.ne[:3]))
    return out[0], out[1]


def is_roped(builder: Builder, il: int) -> bool:
    """Whether the layer's Q and K are roped."""
    is_windowed = builder.layer(il).window_tokens is not None
    match builder.row.rope:
        case "all":
            return True
        case "none":
            return False
        case "swa":
            return is_windowed
        case "swa_if_any":
            return is_windowed or not builder.has_windows
        case "swa_or_dense":
            return is_windowed or il < builder.integer("leading_dense_block_count")
        case "step":
            return (il + 1) % _no_rope_step(builder) != 0
        case "step_from_0":
            return not builder.has_windows or il % NO_ROPE_STEP != 0
        case "by_size":
            return builder.facts.n_layer == ROPED_BAICHUAN_LAYERS
        case "pattern":
            pattern = builder.model.get("attention.rope_pattern", ())
            return bool(pattern[il]) if isinstance(pattern, (tuple, list)) and il < len(pattern) else True
        case "finetuned":  # Granite uses the key as a switch
            return bool(builder.model.get("rope.scaling.finetuned", True))
        case unknown:
            assert_never(unknown)


def _no_rope_step(builder: Builder) -> int:
    is_stepped = builder.has_windows or builder.row.temperature != "no_rope"
    return NO_ROPE_STEP if is_stepped else builder.facts.n_layer


def gated_query_attention(
    builder: Builder, il: int, cur: GraphTensor, mask: GraphTensor | None
) -> GraphTensor:
    """Attention whose Q projection also gives a gate for the result (Qwen3-Next)."""
    facts, (size, _) = builder.layer(il), builder.head_sizes(il)
    heads, n = (facts.n_head, facts.n_head_kv, facts.n_head_kv), builder.n_tokens
    full, k, v = qkv(builder, cur, il, heads, (2 * size, size, size), is_flat=True)
    if builder.row.attention == "gated_q":
        full = builder.reshape(full, 2 * size, facts.n_head, n, 1)
    strides = (8 * size, 8 * size * facts.n_head)
    q = builder.view_3d(full, size, facts.n_head, n, *strides)
    gate = builder.view_3d(full, size, facts.n_head, n, *strides, 4 * size)
    k = builder.reshape(k, size, facts.n_head_kv, n)
    v = builder.reshape(v, size, facts.n_head_kv, n)
    q, k = positioned(builder, il, q, k)
    if mask is not None:
        mask = builder.reshape(mask, *mask.ne)
    cur = attention(builder, il, q, k, v, wo=None, mask=mask)
    gate = builder.unary(builder.cont(gate, size * facts.n_head, n), "sigmoid")
    return builder.lora_mm(builder.w(il, "attn_output"), builder.mul(cur, gate), is_scaled=True)
