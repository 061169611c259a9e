"""Linear attention with state: Kimi's delta attention and MiniMax's lightning attention."""

from __future__ import annotations

import math
from dataclasses import dataclass

from placement.graph.state_space import StateSpaceBuilder
from placement.graph.tensor import Tensor


@dataclass(frozen=True, slots=True)
class KdaKind:
    """How an architecture's Kimi delta attention differs."""

    has_low_rank_gate: bool = True  # the decay gate is a product of two small matrices
    gate: str = "softplus"  # sigmoid, or bounded: sigmoid where the metadata has a lower bound
    out_gate: tuple[str, ...] = ("ssm_g_a", "ssm_g_b")
    has_rows_reshaped: bool = False
    is_state_flat: bool = False


KDA_KINDS = {
    "kda": KdaKind(has_rows_reshaped=True, is_state_flat=True),
    "kda_direct": KdaKind(has_low_rank_gate=False, gate="sigmoid", out_gate=("ssm_g_a",)),
    "kda_bounded": KdaKind(gate="bounded", out_gate=("ssm_g",), has_rows_reshaped=True),
    "kda_bounded_low": KdaKind(gate="bounded"),
}


class LinearBuilder(StateSpaceBuilder):
    """Adds Kimi delta attention (kimi-linear, bailingmoe3) and lightning attention (minimax-01)."""

    def kda_layer(self, il: int, cur: Tensor, kind: str = "kda") -> Tensor:
        """Kimi delta attention, as one of `KDA_KINDS` has it."""
        variant = KDA_KINDS[kind]
        n_seqs, n = self.batch.n_seqs, self.n_seq_tokens
        head, n_head = self.integer("kda.head_dim"), self.layer(il).n_head or self.facts.layers[0].n_head
        stored = self.state(il, "r")
        past = self.read_state(stored, self.layer(il).state_r)
        q, k, v = (
            self._kda_conv(il, i, stored, past, part, head, n_head)
            for i, part in enumerate(self._kda_inputs(il, cur, head * n_head))
        )
        gate = self._kda_gate(il, cur, head, n_head, variant)
        beta = self.reshape(self.mul_mat(self.need(self.w(il, "ssm_beta")), cur), 1, n_head, n, n_seqs)
        beta = self.unary(beta, "sigmoid")
        rows = self.reshape(cur, cur.ne[0], n, n_seqs)
        state = self.read_state(self.state(il, "s"), self.layer(il).state_s)
        state = self.reshape(state, head, head, n_head, n_seqs)
        q, k = self.delta_norm(q), self.delta_norm(k)
        out = self.cont(self.delta_net(il, q, k, v, gate, beta, state, is_flat=variant.is_state_flat))
        source = self.reshape(rows, cur.ne[0], n * n_seqs) if variant.has_rows_reshaped else cur
        out_gate = source
        for name in variant.out_gate:
            out_gate = self.mul_mat(self.need(self.w(il, name)), out_gate)
        out_gate = self.reshape(out_gate, head, n_head, self.n_tokens)
        normed = self.layer_norm(self.reshape(out, head, n_head, self.n_tokens), il, "ssm_norm")
        gated = self.cont(self.mul(normed, self.unary(out_gate, "sigmoid")), head * n_head, self.n_tokens)
        return self.mul_mat(self.need(self.w(il, "attn_output")), gated)

    def _kda_inputs(self, il: int, cur: Tensor, width: int) -> list[Tensor]:
        if (fused := self.w(il, "attn_qkv")) is None:
            names = ("attn_q", "attn_k", "attn_v")
            return [self.mul_mat(self.need(self.w(il, name)), cur) for name in names]
        qkv = self.mul_mat(fused, cur)
        return [
            self.cont(self.view_2d(qkv, width, self.n_tokens, qkv.nb[1], 4 * i * width)) for i in range(3)
        ]

    def _kda_conv(
        self, il: int, i: int, stored: Tensor, past: Tensor, cur: Tensor, head: int, n_head: int
    ) -> Tensor:
        """The short convolution of Q, K or V, each with a third of the state."""
        n_seqs, n = self.batch.n_seqs, self.n_seq_tokens
        taps, width = self.integer("ssm.conv_kernel") - 1, head * n_head
        strides, offset = (4 * taps, 12 * taps * width), 4 * i * taps * width
        own = self.view_3d(past, taps, width, n_seqs, *strides, offset)
        joined = self.concat(own, self.transpose(self.reshape(cur, width, n, n_seqs)), 0)
        last = self.view_3d(joined, taps, width, n_seqs, joined.nb[1], joined.nb[2], n * joined.nb[0])
        self.expand(self.cpy(last, self.view_3d(stored, taps, width, n_seqs, *strides, offset)))
        kernel = self.need(self.w(il, f"ssm_conv1d_{'qkv'[i]}"))
        out = self.ssm_conv(joined, self.reshape(kernel, taps + 1, width))
        out = self.unary(self.reshape(out, width, self.n_tokens), "silu")
        return self.reshape(out, head, n_head, n, n_seqs)

    def _kda_gate(self, il: int, cur: Tensor, head: int, n_head: int, variant: KdaKind) -> Tensor:
        gate = self.mul_mat(self.need(self.w(il, "ssm_f_a")), cur)
        if variant.has_low_rank_gate:
            gate = self.mul_mat(self.need(self.w(il, "ssm_f_b")), gate)
        gate = self.add(gate, self.need(self.b(il, "ssm_dt")))
        is_bounded = variant.gate == "bounded" and self.number("kda.gate_lower_bound", -math.inf) > -math.inf
        if variant.gate != "sigmoid" and not is_bounded:
            gate = self.unary(gate, "softplus")
        gate = self.reshape(gate, head, n_head, self.n_tokens)
        gate = self.mul(gate, self.reshape(self.bare(il, "ssm_a"), 1, n_head, 1))
        if is_bounded:
            gate = self.scale(gate)
        if is_bounded or variant.gate == "sigmoid":
            gate = self.scale(self.unary(gate, "sigmoid"))
        return self.reshape(gate, head, n_head, self.n_seq_tokens, self.batch.n_seqs)

    def lightning_layer(self, il: int, cur: Tensor) -> Tensor:
        """MiniMax-01's linear attention with per-head decay."""
        n_seqs, n, n_head = self.batch.n_seqs, self.n_seq_tokens, self.layer(il).n_head
        head = self.integer("attention.key_length")
        self.expand(self.read_state(self.state(il, "r"), self.layer(il).state_r))
        slopes = self.input_once("slopes", "F32", n_head)
        slope_rate = self.scale(slopes)
        cur = self.reshape(cur, cur.ne[0], n, 1, n_seqs)
        qkv = self.unary(self.lora_mm(self.w(il, "attn_qkv"), cur), "silu")
        qkv = self.reshape(qkv, 3 * head, n_head, n, n_seqs)
        q, k, v = (self.view(qkv, (head, n_head, n, n_seqs), qkv.nb[1:], 4 * i * head) for i in range(3))
        state = self.read_state(self.state(il, "s"), self.layer(il).state_s)
        old = self.reshape(state, head, head, n_head, n_seqs)
        q_decay = self.unary(self.scale(self.input_once("q_decay", "F32", 1, n_head, n, n_seqs)), "exp")
        k_decay = self.unary(self.scale(self.input_once("k_decay", "F32", 1, n_head, n, n_seqs)), "exp")
        diag = self.unary(self.scale(self.input_once("diag_decay", "F32", n, n, n_head, n_seqs)), "exp")
        past = self.mul_mat(old, self.permute(self.mul(q, q_decay), 0, 2, 1, 3))
        qk = self.mul_mat(self.permute(k, 0, 2, 1, 3), self.permute(q, 0, 2, 1, 3))
        v_rows = self.cont(self.permute(v, 1, 2, 0, 3))
        out = self.add(past, self.mul_mat(v_rows, self.mul(qk, diag)))
        self.expand(out)
        decay = self.reshape(self.unary(self.scale(slope_rate), "exp"), 1, 1, n_head)
        k_rows = self.cont(self.permute(self.mul(k, k_decay), 1, 2, 0, 3))
        new = self.add(self.mul(old, decay), self.mul_mat(k_rows, v_rows))
        stored = self.state(il, "s")
        self.expand(self.cpy(new, self.view_1d(stored, self.layer(il).state_s * n_seqs)))
        out = self.cont(self.permute(out, 0, 2, 1, 3))
        out = self.reshape(out, out.ne[0] * out.ne[1], out.ne[2], 1, out.ne[3])
        normed = self.layer_norm(out, il, "attn_norm_2")
        gate = self.unary(self.lora_mm(self.w(il, "attn_gate"), cur), "sigmoid")
        out = self.lora_mm(self.w(il, "attn_output"), self.mul(gate, normed))
        return self.reshape(out, out.ne[0], n * n_seqs)
