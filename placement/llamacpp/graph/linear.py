"""Linear attention with state: Kimi's delta attention and MiniMax's lightning attention.

Mirrors src/models/kimi-linear.cpp, kimi-k3.cpp, bailingmoe3.cpp, glm5-next.cpp and minimax-01.cpp.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.recurrent import delta_net, delta_norm, read_state, ssm_conv
from placement.llamacpp.graph.tensor import GraphTensor


@dataclass(frozen=True, slots=True)
class KdaKind:
    """How an architecture's Kimi delta attention differs."""

    has_low_rank_gate: bool = True  # the decay gate is a product of two small matrices
    gate: Literal["softplus", "sigmoid", "bounded"] = (
        "softplus"  # bounded: sigmoid where there is a lower bound
    )
    out_gate: tuple[str, ...] = ("ssm_g_a", "ssm_g_b")
    has_rows_reshaped: bool = False
    is_state_flat: bool = False


KDA = KdaKind(has_rows_reshaped=True, is_state_flat=True)  # kimi-linear
KDA_DIRECT = KdaKind(has_low_rank_gate=False, gate="sigmoid", out_gate=("ssm_g_a",))  # bailingmoe3
KDA_BOUNDED = KdaKind(gate="bounded", out_gate=("ssm_g",), has_rows_reshaped=True)  # kimi-k3
KDA_BOUNDED_LOW = KdaKind(gate="bounded")  # glm5-next


def kda_layer(builder: Builder, il: int, cur: GraphTensor, variant: KdaKind) -> GraphTensor:
    """Kimi delta attention."""
    n_seqs, n = builder.batch.n_seqs, builder.n_seq_tokens
    head, n_head = builder.integer("kda.head_dim"), builder.layer(il).n_head or builder.facts.layers[0].n_head
    stored = builder.state(il, "r")
    past = read_state(builder, stored, builder.layer(il).state_r)
    q, k, v = (
        _kda_conv(builder, il, i, stored, past, part, head, n_head)
        for i, part in enumerate(_kda_inputs(builder, il, cur, head * n_head))
    )
    gate = _kda_gate(builder, il, cur, head, n_head, variant)
    beta = builder.reshape(
        builder.mul_mat(builder.need(builder.w(il, "ssm_beta")), cur), 1, n_head, n, n_seqs
    )
    beta = builder.unary(beta, "sigmoid")
    rows = builder.reshape(cur, cur.ne[0], n, n_seqs)
    state = read_state(builder, builder.state(il, "s"), builder.layer(il).state_s)
    state = builder.reshape(state, head, head, n_head, n_seqs)
    q, k = delta_norm(builder, q), delta_norm(builder, k)
    out = builder.cont(delta_net(builder, il, q, k, v, gate, beta, state, is_flat=variant.is_state_flat))
    source = builder.reshape(rows, cur.ne[0], n * n_seqs) if variant.has_rows_reshaped else cur
    out_gate = source
    for name in variant.out_gate:
        out_gate = builder.mul_mat(builder.need(builder.w(il, name)), out_gate)
    out_gate = builder.reshape(out_gate, head, n_head, builder.n_tokens)
    normed = builder.layer_norm(builder.reshape(out, head, n_head, builder.n_tokens), il, "ssm_norm")
    gated = builder.cont(
        builder.mul(normed, builder.unary(out_gate, "sigmoid")), head * n_head, builder.n_tokens
    )
    return builder.mul_mat(builder.need(builder.w(il, "attn_output")), gated)


def _kda_inputs(builder: Builder, il: int, cur: GraphTensor, width: int) -> list[GraphTensor]:
    if (fused := builder.w(il, "attn_qkv")) is None:
        names = ("attn_q", "attn_k", "attn_v")
        return [builder.mul_mat(builder.need(builder.w(il, name)), cur) for name in names]
    qkv = builder.mul_mat(fused, cur)
    return [
        builder.cont(builder.view_2d(qkv, width, builder.n_tokens, qkv.nb[1], 4 * i * width))
        for i in range(3)
    ]


def _kda_conv(
    builder: Builder,
    il: int,
    i: int,
    stored: GraphTensor,
    past: GraphTensor,
    cur: GraphTensor,
    head: int,
    n_head: int,
) -> GraphTensor:
    """The short convolution of Q, K or V, each with a third of the state."""
    n_seqs, n = builder.batch.n_seqs, builder.n_seq_tokens
    taps, width = builder.integer("ssm.conv_kernel") - 1, head * n_head
    strides, offset = (4 * taps, 12 * taps * width), 4 * i * taps * width
    own = builder.view_3d(past, taps, width, n_seqs, *strides, offset)
    joined = builder.concat(own, builder.transpose(builder.reshape(cur, width, n, n_seqs)), 0)
    last = builder.view_3d(joined, taps, width, n_seqs, joined.nb[1], joined.nb[2], n * joined.nb[0])
    builder.expand(builder.cpy(last, builder.view_3d(stored, taps, width, n_seqs, *strides, offset)))
    kernel = builder.need(builder.w(il, f"ssm_conv1d_{'qkv'[i]}"))
    out = ssm_conv(builder, joined, builder.reshape(kernel, taps + 1, width))
    out = builder.unary(builder.reshape(out, width, builder.n_tokens), "silu")
    return builder.reshape(out, head, n_head, n, n_seqs)


def _kda_gate(
    builder: Builder, il: int, cur: GraphTensor, head: int, n_head: int, variant: KdaKind
) -> GraphTensor:
    gate = builder.mul_mat(builder.need(builder.w(il, "ssm_f_a")), cur)
    if variant.has_low_rank_gate:
        gate = builder.mul_mat(builder.need(builder.w(il, "ssm_f_b")), gate)
    gate = builder.add(gate, builder.need(builder.b(il, "ssm_dt")))
    is_bounded = variant.gate == "bounded" and builder.number("kda.gate_lower_bound", -math.inf) > -math.inf
    if variant.gate != "sigmoid" and not is_bounded:
        gate = builder.unary(gate, "softplus")
    gate = builder.reshape(gate, head, n_head, builder.n_tokens)
    gate = builder.mul(gate, builder.reshape(builder.bare(il, "ssm_a"), 1, n_head, 1))
    if is_bounded:
        gate = builder.scale(gate)
    if is_bounded or variant.gate == "sigmoid":
        gate = builder.scale(builder.unary(gate, "sigmoid"))
    return builder.reshape(gate, head, n_head, builder.n_seq_tokens, builder.batch.n_seqs)


def lightning_layer(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """MiniMax-01's linear attention with per-head decay."""
    n_seqs, n, n_head = builder.batch.n_seqs, builder.n_seq_tokens, builder.layer(il).n_head
    head = builder.integer("attention.key_length")
    builder.expand(read_state(builder, builder.state(il, "r"), builder.layer(il).state_r))
    slopes = builder.input_once("slopes", "F32", n_head)
    slope_rate = builder.scale(slopes)
    cur = builder.reshape(cur, cur.ne[0], n, 1, n_seqs)
    qkv = builder.unary(builder.lora_mm(builder.w(il, "attn_qkv"), cur), "silu")
    qkv = builder.reshape(qkv, 3 * head, n_head, n, n_seqs)
    q, k, v = (builder.view(qkv, (head, n_head, n, n_seqs), qkv.nb[1:], 4 * i * head) for i in range(3))
    state = read_state(builder, builder.state(il, "s"), builder.layer(il).state_s)
    old = builder.reshape(state, head, head, n_head, n_seqs)
    q_decay = builder.unary(builder.scale(builder.input_once("q_decay", "F32", 1, n_head, n, n_seqs)), "exp")
    k_decay = builder.unary(builder.scale(builder.input_once("k_decay", "F32", 1, n_head, n, n_seqs)), "exp")
    diag = builder.unary(builder.scale(builder.input_once("diag_decay", "F32", n, n, n_head, n_seqs)), "exp")
    past = builder.mul_mat(old, builder.permute(builder.mul(q, q_decay), 0, 2, 1, 3))
    qk = builder.mul_mat(builder.permute(k, 0, 2, 1, 3), builder.permute(q, 0, 2, 1, 3))
    v_rows = builder.cont(builder.permute(v, 1, 2, 0, 3))
    out = builder.add(past, builder.mul_mat(v_rows, builder.mul(qk, diag)))
    builder.expand(out)
    decay = builder.reshape(builder.unary(builder.scale(slope_rate), "exp"), 1, 1, n_head)
    k_rows = builder.cont(builder.permute(builder.mul(k, k_decay), 1, 2, 0, 3))
    new = builder.add(builder.mul(old, decay), builder.mul_mat(k_rows, v_rows))
    stored = builder.state(il, "s")
    builder.expand(builder.cpy(new, builder.view_1d(stored, builder.layer(il).state_s * n_seqs)))
    out = builder.cont(builder.permute(out, 0, 2, 1, 3))
    out = builder.reshape(out, out.ne[0] * out.ne[1], out.ne[2], 1, out.ne[3])
    normed = builder.layer_norm(out, il, "attn_norm_2")
    gate = builder.unary(builder.lora_mm(builder.w(il, "attn_gate"), cur), "sigmoid")
    out = builder.lora_mm(builder.w(il, "attn_output"), builder.mul(gate, normed))
    return builder.reshape(out, out.ne[0], n * n_seqs)
