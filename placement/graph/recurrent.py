"""Recurrent state: reading, clearing and copying it, and the gated delta net (build_rs, delta-net-base)."""

from __future__ import annotations

from placement.graph.experts import ExpertBuilder
from placement.graph.tensor import Tensor


class RecurrentBuilder(ExpertBuilder):
    """Adds recurrent state and the gated delta net."""

    @property
    def n_seq_tokens(self) -> int:
        """Tokens of each sequence in the batch."""
        return self.n_tokens // self.batch.n_seqs

    def state(self, il: int, which: str) -> Tensor:
        """The r, s or (n-grams') p state of layer `il`: one row per sequence."""
        key = f"state_{which}.{il}"
        if key not in self.inputs:
            facts = self.layer(il)
            width = {"r": facts.state_r, "s": facts.state_s, "p": facts.state_extra}[which]
            leaf = self.new("F32", width, self.context.n_seq_max)
            leaf.cache_layer = il
            self.inputs[key] = leaf
        return self.inputs[key]

    @property
    def state_ids(self) -> Tensor:
        """rs_s_copy: which rows the batch's states are read from."""
        return self.input_once("s_copy", "I32", self.context.n_seq_max)

    @property
    def main_ids(self) -> Tensor:
        """The part of `state_ids` for the batch's own sequences."""
        if "s_copy_main" not in self.inputs:
            self.inputs["s_copy_main"] = self.view_1d(self.state_ids, self.batch.n_seqs)
        return self.inputs["s_copy_main"]

    def read_state(self, state: Tensor, size: int, *, is_own_read: bool = False) -> Tensor:
        """The batch's states as [size, sequences] (build_rs).

        With `is_own_read` the caller reads the main rows itself: the states as [size, rows] are returned.
        """
        n_rs, n_seqs = self.context.n_seq_max, self.batch.n_seqs
        states = self.reshape(state, size, state.ne[1])
        cleared = self.view_1d(states, size)
        self.expand(self.in_place("SCALE", cleared, cleared))
        ids = self.state_ids
        skip = 0
        if is_own_read:
            skip = 1
            ids = self._tail_ids()
        gathered = self.get_rows(states, ids)
        if not is_own_read:
            out = self.view_2d(gathered, size, n_seqs, gathered.nb[1])
            self.expand(out)
        else:
            out = states
        self._pending = (gathered, state, size, n_rs - n_seqs, (n_seqs - skip) * gathered.nb[1])
        if not is_own_read:
            self.keep_extra_states()
        return out

    def _tail_ids(self) -> Tensor:
        if "s_copy_tail" not in self.inputs:
            n = self.context.n_seq_max - 1
            self.inputs["s_copy_tail"] = self.view_1d(self.state_ids, n, self.state_ids.nb[0])
        return self.inputs["s_copy_tail"]

    def keep_extra_states(self) -> None:
        """Copy the states of the other sequences back to their rows: the end of build_rs."""
        gathered, state, size, n_extra, offset = self._pending
        extra = self.view_2d(gathered, size, n_extra, gathered.nb[1], offset)
        target = self.view_2d(state, size, n_extra, state.nb[1], self.batch.n_seqs * state.nb[1])
        self.expand(self.cpy(extra, target))

    def conv_state(self, il: int, mixed: Tensor, kernel: int, channels: int) -> Tensor:
        """The state and the batch side by side, and the new state stored (build_conv_state)."""
        n_seqs, state = self.batch.n_seqs, self.state(il, "r")
        past = self.read_state(state, self.layer(il).state_r)
        past = self.reshape(past, kernel - 1, channels, n_seqs)
        joined = self.concat(past, self.transpose(mixed), 0)
        offset = (joined.ne[0] - past.ne[0]) * joined.nb[0]
        last = self.view_3d(joined, kernel - 1, channels, n_seqs, joined.nb[1], joined.nb[2], offset)
        target = self.view_2d(state, (kernel - 1) * channels, n_seqs, state.nb[1])
        self.expand(self.cpy(last, target))
        return joined

    def joined_state(self, stored: Tensor, width: int, cur: Tensor, past: int, channels: int) -> Tensor:
        """The state and the batch side by side, and a copy of the new state stored (build_conv_state_at)."""
        n_seqs = self.batch.n_seqs
        rows = self.reshape(self.read_state(stored, width), past, channels, n_seqs)
        joined = self.concat(rows, self.transpose(cur), 0)
        offset = 4 * (joined.ne[0] - past)
        last = self.view_3d(joined, past, channels, n_seqs, joined.nb[1], joined.nb[2], offset)
        target = self.view_2d(stored, past * channels, n_seqs, stored.nb[1])
        self.expand(self.cpy(self.cont(last), target))
        return joined

    def ssm_conv(self, joined: Tensor, kernel: Tensor) -> Tensor:
        """The short convolution over the joined rows."""
        n_tokens = joined.ne[0] - kernel.ne[0] + 1
        return self.op("SSM_CONV", "F32", (kernel.ne[1], n_tokens, joined.ne[2], 1), joined, kernel)

    def delta_net(
        self,
        il: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gate: Tensor,
        beta: Tensor,
        state: Tensor,
        *,
        is_flat: bool = False,
    ) -> Tensor:
        """The fused gated delta net; its new state is stored (build_recurrent_attn)."""
        head, n_head, n_tokens, n_seqs = v.ne
        rows = n_tokens * n_seqs + head * n_seqs
        out = self.op("GATED_DELTA_NET", "F32", (head * n_head, rows, 1, 1), q, k, v, gate, beta, state)
        result = self.view(
            out, (head, n_head, n_tokens, n_seqs), (4 * head, 4 * head * n_head, 4 * head * n_head * n_tokens)
        )
        new = self.view(
            out,
            (head, head, n_head, n_seqs),
            (4 * head, 4 * head * head, 4 * head * head * n_head),
            4 * head * n_head * n_tokens * n_seqs,
        )
        stored = self.state(il, "s")
        width = self.layer(il).state_s
        flat = self.view_1d(stored, width * n_seqs) if is_flat else None
        self.expand(self.cpy(new, flat or self.view_2d(stored, width, n_seqs, stored.nb[1])))
        return result

    # --- Qwen3-Next

    def gated_delta_layer(
        self, il: int, cur: Tensor, *, is_split: bool = False, is_padded: bool = False
    ) -> Tensor:
        """A linear attention layer of Qwen3-Next (build_layer_attn_linear).

        With `is_split` of Qwen 3.5, with `is_padded` of Qwen 4.
        """
        n_seqs, n_seq_tokens = self.batch.n_seqs, self.n_seq_tokens
        head_k, n_k = self.integer("ssm.state_size"), self.integer("ssm.group_count")
        n_v = self.integer("ssm.time_step_rank")
        head_v = self.integer("ssm.inner_size") // n_v
        mixed, z = self._delta_projections(il, cur, head_k, head_v, n_k, n_v, is_split)
        gates = self._split_gates if is_split else self._delta_gates
        beta, gate = gates(il, cur, n_k, n_v)
        kernel = self.need(self.w(il, "ssm_conv1d"))
        channels = 2 * head_k * n_k + head_v * n_v
        if is_padded:
            past = kernel.ne[0] - 1
            joined = self.joined_state(self.state(il, "r"), self.layer(il).state_r, mixed, past, channels)
        else:
            joined = self.conv_state(il, mixed, kernel.ne[0], channels)
        state = self.read_state(self.state(il, "s"), self.layer(il).state_s)
        state = self.reshape(state, head_v, head_v, n_v, n_seqs)
        conv = self.unary(self.ssm_conv(joined, kernel), "silu")
        row = 4 * channels
        strides_k, strides_v = (4 * head_k, row, row * n_seq_tokens), (4 * head_v, row, row * n_seq_tokens)
        shape_k = (head_k, n_k, n_seq_tokens, n_seqs)
        q = self.delta_norm(self.view(conv, shape_k, strides_k))
        k = self.delta_norm(self.view(conv, shape_k, strides_k, 4 * head_k * n_k))
        v = self.view(conv, (head_v, n_v, n_seq_tokens, n_seqs), strides_v, 8 * head_k * n_k)
        if n_k != n_v and not is_split:
            q, k = (self._interleave(tensor, n_v // n_k) for tensor in (q, k))
        out = self.delta_net(il, q, k, v, gate, beta, state)
        z = self.reshape(z, head_v, n_v, n_seq_tokens, n_seqs)
        normed = self.build_norm(out, self.w(il, "ssm_norm"), None, "rms", il)
        out = self.mul(normed, self.unary(z, "sigmoid" if is_padded else "silu"))
        out = self.reshape(out, head_v * n_v, n_seq_tokens, n_seqs)
        out = self.lora_mm(self.w(il, "ssm_out"), out, is_scaled=is_split)
        return self.reshape(out, self.n_embd, n_seq_tokens * n_seqs)

    def delta_norm(self, cur: Tensor) -> Tensor:
        """build_gdn_l2_norm."""
        return self.scale(self.rms_norm(cur))

    def _interleave(self, cur: Tensor, n: int) -> Tensor:
        head, n_head, n_tokens, n_seqs = cur.ne
        spread = self.repeat(
            self.reshape(cur, head, 1, n_head, n_tokens * n_seqs), head, n, n_head, n_tokens * n_seqs
        )
        return self.reshape(spread, head, n_head * n, n_tokens, n_seqs)

    def _delta_projections(
        self, il: int, cur: Tensor, head_k: int, head_v: int, n_k: int, n_v: int, is_scaled: bool
    ) -> tuple[Tensor, Tensor]:
        n_seqs, n_seq_tokens = self.batch.n_seqs, self.n_seq_tokens
        if (fused := self.w(il, "attn_qkv")) is not None:
            mixed = self.lora_mm(fused, cur, is_scaled=is_scaled)
            mixed = self.reshape(mixed, mixed.ne[0], n_seq_tokens, n_seqs)
            return mixed, self.lora_mm(self.w(il, "attn_gate"), cur, is_scaled=is_scaled)
        per = n_v // n_k
        both = self.lora_mm(self.w(il, "ssm_in"), cur)
        both = self.reshape(both, 2 * head_k + 2 * head_v * per, n_k, n_seq_tokens, n_seqs)
        sizes, parts, offset = (head_k, head_k, head_v * per, head_v * per), [], 0
        for size in sizes:
            parts.append(self.view(both, (size, n_k, n_seq_tokens, n_seqs), both.nb[1:], offset))
            offset += 4 * size
        q, k, v, z = parts
        z = self.cont(z)
        flat = [self.cont(part, part.ne[0] * n_k, n_seq_tokens, n_seqs) for part in (q, k, v)]
        return self.concat(self.concat(flat[0], flat[1], 0), flat[2], 0), z

    def _delta_gates(self, il: int, cur: Tensor, n_k: int, n_v: int) -> tuple[Tensor, Tensor]:
        n_seqs, n_seq_tokens = self.batch.n_seqs, self.n_seq_tokens
        per = n_v // n_k
        mixed = self.lora_mm(self.w(il, "ssm_ba"), cur)
        mixed = self.reshape(mixed, 2 * per, n_k, n_seq_tokens, n_seqs)
        shape = (per, n_k, n_seq_tokens, n_seqs)
        b = self.cont(self.view(mixed, shape, mixed.nb[1:]))
        a = self.view(mixed, shape, mixed.nb[1:], 4 * per)
        beta = self.unary(b, "sigmoid")
        alpha = self.cont(a, n_v, n_seq_tokens, n_seqs)
        alpha = self.unary(self.add(alpha, self.need(self.b(il, "ssm_dt"))), "softplus")
        gate = self.mul(alpha, self.need(self.weight(f"blk.{il}.ssm_a", il)))
        shape4 = (1, n_v, n_seq_tokens, n_seqs)
        return self.reshape(beta, *shape4), self.reshape(gate, *shape4)

    def _split_gates(self, il: int, cur: Tensor, n_k: int, n_v: int) -> tuple[Tensor, Tensor]:
        shape = (1, n_v, self.n_seq_tokens, self.batch.n_seqs)
        beta = self.lora_mm(self.w(il, "ssm_beta"), cur, is_scaled=True)
        beta = self.unary(self.reshape(beta, *shape), "sigmoid")
        alpha = self.reshape(self.lora_mm(self.w(il, "ssm_alpha"), cur, is_scaled=True), *shape[1:])
        alpha = self.unary(self.add(alpha, self.need(self.b(il, "ssm_dt"))), "softplus")
        gate = self.mul(alpha, self.need(self.weight(f"blk.{il}.ssm_a", il)))
        return beta, self.reshape(gate, *shape)
