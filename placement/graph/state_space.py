"""State-space layers: Mamba, Mamba 2, PLaMo 2's and LFM2's short convolution (mamba-base, plamo2, lfm2)."""

from __future__ import annotations

from placement.graph.recurrent import RecurrentBuilder
from placement.graph.tensor import Tensor


class StateSpaceBuilder(RecurrentBuilder):
    """Adds state-space layers."""

    def bare(self, il: int, name: str) -> Tensor:
        """The tensor `blk.<il>.<name>`, which has no further part in its name."""
        return self.need(self.weight(f"blk.{il}.{name}", il))

    def scan(
        self, il: int, x: Tensor, dt: Tensor, a: Tensor, b: Tensor, c: Tensor, shape: tuple[int, int, int]
    ) -> Tensor:
        """Read the states, scan the batch through them, and store what they become."""
        state = self.state(il, "s")
        size = self.layer(il).state_s
        states = self.read_state(state, size, is_own_read=True)
        ssm = self.reshape(states, *shape, self.context.n_seq_max)
        ids = self.main_ids
        n = x.n_elements + shape[0] * shape[1] * shape[2] * ids.ne[0]
        y = self.op("SSM_SCAN", "F32", (n, 1, 1, 1), ssm, x, dt, a, b, c, ids)
        self.expand(y)
        self.keep_extra_states()
        return y

    def mamba_layer(self, il: int, cur: Tensor) -> Tensor:
        """Mamba (build_mamba_layer)."""
        n_seqs, n = self.batch.n_seqs, self.n_seq_tokens
        d_conv, d_inner = self.integer("ssm.conv_kernel"), self.integer("ssm.inner_size")
        d_state, dt_rank = self.integer("ssm.state_size"), self.integer("ssm.time_step_rank")
        stored = self.state(il, "r")
        past = self.reshape(self.read_state(stored, self.layer(il).state_r), d_conv - 1, d_inner, n_seqs)
        cur = self.reshape(cur, cur.ne[0], n, n_seqs)
        xz = self.lora_mm(self.w(il, "ssm_in"), cur, is_scaled=True)
        x = self.view_3d(xz, d_inner, xz.ne[1], xz.ne[2], xz.nb[1], xz.nb[2])
        z = self.view_3d(xz, d_inner, xz.ne[1], xz.ne[2], xz.nb[1], xz.nb[2], 4 * d_inner)
        joined = self.concat(past, self.transpose(x), 0)
        last = self.view_3d(joined, d_conv - 1, d_inner, n_seqs, joined.nb[1], joined.nb[2], n * joined.nb[0])
        self.expand(self.cpy(last, self.view_1d(stored, (d_conv - 1) * d_inner * n_seqs)))
        x = self.ssm_conv(joined, self.need(self.w(il, "ssm_conv1d")))
        x = self.unary(self.add(x, self.need(self.b(il, "ssm_conv1d"))), "silu")
        both = self.lora_mm(self.w(il, "ssm_x"), x)
        dt = self.view_3d(both, dt_rank, n, n_seqs, both.nb[1], both.nb[2])
        shape, strides = (d_state, 1, n, n_seqs), (4 * d_state, both.nb[1], both.nb[2])
        b = self.view(both, shape, strides, 4 * dt_rank)
        c = self.view(both, shape, strides, 4 * (dt_rank + d_state))
        if bool(self.model.get("ssm.dt_b_c_rms", False)) or self.w(il, "ssm_dt_norm") is not None:
            dt, b, c = (
                self.layer_norm(tensor, il, f"ssm_{name}_norm")
                for tensor, name in ((dt, "dt"), (b, "b"), (c, "c"))
            )
        else:
            dt = self.cont(dt)
        dt = self.add(self.lora_mm(self.w(il, "ssm_dt"), dt), self.need(self.b(il, "ssm_dt")))
        heads = self.reshape(x, 1, d_inner, n, n_seqs)
        y = self.scan(il, heads, dt, self.bare(il, "ssm_a"), b, c, (d_state, 1, d_inner))
        size = d_state * d_inner * n_seqs
        new = self.view_1d(y, size, heads.nb[3] * heads.ne[3])
        self.expand(self.cpy(new, self.view_1d(self.state(il, "s"), size)))
        out = self.view_3d(y, d_inner, n, n_seqs, heads.nb[2], heads.nb[3])
        out = self.add(out, self.mul(x, self.bare(il, "ssm_d")))
        out = self.glu(self.cont(z), out, "swiglu")
        out = self.lora_mm(self.w(il, "ssm_out"), out, is_scaled=True)
        return self.reshape(out, out.ne[0], n * n_seqs)

    def mamba2_layer(self, il: int, cur: Tensor) -> Tensor:
        """Mamba 2 (build_mamba2_layer)."""
        n_seqs, n = self.batch.n_seqs, self.n_seq_tokens
        d_conv, d_inner = self.integer("ssm.conv_kernel"), self.integer("ssm.inner_size")
        d_state, n_head = self.integer("ssm.state_size"), self.integer("ssm.time_step_rank")
        n_group, head = self.integer("ssm.group_count"), self.integer("ssm.inner_size") // n_head
        channels = d_inner + 2 * n_group * d_state
        stored = self.state(il, "r")
        past = self.reshape(self.read_state(stored, self.layer(il).state_r), d_conv - 1, channels, n_seqs)
        all_in = self.lora_mm(self.w(il, "ssm_in"), cur, is_scaled=True)
        all_in = self.reshape(all_in, all_in.ne[0], n, n_seqs)
        nb1, nb2 = all_in.nb[1], all_in.nb[2]
        heads_shape, heads_strides = (head, n_head, n, n_seqs), (4 * head, nb1, nb2)
        z = self.view(all_in, heads_shape, heads_strides)
        mixed = self.view_3d(all_in, channels, n, n_seqs, nb1, nb2, 4 * d_inner)
        dt = self.view_3d(all_in, n_head, n, n_seqs, nb1, nb2, 4 * (2 * d_inner + 2 * n_group * d_state))
        joined = self.concat(past, self.transpose(mixed), 0)
        last = self.view_3d(
            joined, d_conv - 1, channels, n_seqs, joined.nb[1], joined.nb[2], n * joined.nb[0]
        )
        target = self.view_2d(stored, (d_conv - 1) * channels, n_seqs, stored.nb[1])
        self.expand(self.cpy(last, target))
        mixed = self.ssm_conv(joined, self.need(self.w(il, "ssm_conv1d")))
        mixed = self.unary(self.add(mixed, self.need(self.b(il, "ssm_conv1d"))), "silu")
        x = self.view(mixed, heads_shape, (4 * head, mixed.nb[1], mixed.nb[2]))
        shape, strides = (d_state, n_group, n, n_seqs), (4 * d_state, mixed.nb[1], mixed.nb[2])
        b = self.view(mixed, shape, strides, 4 * d_inner)
        c = self.view(mixed, shape, strides, 4 * (d_inner + n_group * d_state))
        dt = self.add(self.cont(dt), self.need(self.b(il, "ssm_dt")))
        y = self.scan(il, x, dt, self.bare(il, "ssm_a"), b, c, (d_state, head, n_head))
        size = d_state * d_inner
        new = self.view_3d(y, size, n_seqs, 1, 4 * size, 4 * size * n_seqs, 4 * x.n_elements)
        kept = self.state(il, "s")
        rows = self.context.n_seq_max * 4 * size
        self.expand(self.cpy(new, self.view_3d(kept, size, n_seqs, 1, kept.nb[1], rows)))
        out = self.view(y, heads_shape, (x.nb[1], n_head * x.nb[1], n * n_head * x.nb[1]))
        out = self.add(out, self.mul(x, self.bare(il, "ssm_d")))
        out = self.glu(self.cont(z), out, "swiglu")
        if self.w(il, "ssm_norm") is not None:
            out = self.reshape(out, d_inner // n_group, n_group, n, n_seqs)
            out = self.layer_norm(out, il, "ssm_norm")
        out = self.reshape(out, d_inner, n * n_seqs)
        return self.lora_mm(self.w(il, "ssm_out"), out, is_scaled=True)

    def plamo2_layer(self, il: int, cur: Tensor) -> Tensor:
        """PLaMo 2's Mamba (build_plamo2_mamba_layer)."""
        n_seqs, n = self.batch.n_seqs, self.n_seq_tokens
        d_conv, d_inner = self.integer("ssm.conv_kernel"), self.integer("ssm.inner_size")
        d_state, n_head = self.integer("ssm.state_size"), self.integer("ssm.time_step_rank")
        head, n_group = d_inner // n_head, self.integer("ssm.group_count")
        channels = d_inner + 2 * n_group * d_state
        stored = self.state(il, "r")
        past = self.reshape(self.read_state(stored, self.layer(il).state_r), d_conv - 1, channels, n_seqs)
        cur = self.reshape(cur, cur.ne[0], n, n_seqs)
        zx = self.permute(self.lora_mm(self.w(il, "ssm_in"), cur), 0, 2, 1, 3)
        zx = self.cont(zx, 2 * head, n_head, n, n_seqs)
        x = self.view(zx, (head, n_head, n, n_seqs), zx.nb[1:], 4 * head)
        x = self.cont(x, head * n_head, n, n_seqs)
        z = self.view(zx, (head, n_head, n, n_seqs), zx.nb[1:])
        joined = self.concat(past, self.transpose(x), 0)
        last = self.view_3d(joined, d_conv - 1, d_inner, n_seqs, joined.nb[1], joined.nb[2], n * joined.nb[0])
        self.expand(self.cpy(last, self.view_1d(stored, (d_conv - 1) * channels * n_seqs)))
        x = self.unary(self.ssm_conv(joined, self.need(self.w(il, "ssm_conv1d"))), "silu")
        y, x = self._plamo2_scan(il, x, head, n_head, d_state)
        out = self.add(y, self.mul(x, self.reshape(self.bare(il, "ssm_d"), 1, n_head)))
        out = self.glu(self.cont(z), out, "swiglu")
        out = self.view_3d(out, head * n_head, n, n_seqs, out.nb[2], out.nb[3])
        out = self.lora_mm(self.w(il, "ssm_out"), out)
        return self.reshape(out, out.ne[0], n * n_seqs)

    def _plamo2_scan(self, il: int, x: Tensor, head: int, n_head: int, d_state: int) -> tuple[Tensor, Tensor]:
        n_seqs, n = self.batch.n_seqs, self.n_seq_tokens
        all_in = self.lora_mm(self.w(il, "ssm_x"), x)
        nb1, nb2 = all_in.nb[1], all_in.nb[2]
        dt_dim = max(64, self.n_embd // 16)
        b = self.layer_norm(self.view_3d(all_in, d_state, n, n_seqs, nb1, nb2), il, "ssm_b_norm")
        c = self.layer_norm(self.view_3d(all_in, d_state, n, n_seqs, nb1, nb2, 4 * d_state), il, "ssm_c_norm")
        dt = self.view_3d(all_in, dt_dim, n, n_seqs, nb1, nb2, 8 * d_state)
        dt = self.lora_mm(self.w(il, "ssm_dt"), self.layer_norm(dt, il, "ssm_dt_norm"))
        dt = self.add(dt, self.need(self.b(il, "ssm_dt")))
        a = self.reshape(self.bare(il, "ssm_a"), 1, n_head)
        row = 4 * head * n_head
        shape, strides = (head, n_head, n, n_seqs), (4 * head, row, row * n)
        x = self.view(x, shape, strides)
        b, c = (self.view(t, (d_state, 1, n, n_seqs), (4 * d_state, t.nb[1], t.nb[2])) for t in (b, c))
        y = self.scan(il, x, dt, a, b, c, (d_state, head, n_head))
        size = n_head * head * d_state * n_seqs
        new = self.view_1d(y, size, row * n * n_seqs)
        self.expand(self.cpy(new, self.view_1d(self.state(il, "s"), size)))
        return self.view(y, shape, strides), x

    def shortconv_layer(self, il: int, cur: Tensor) -> Tensor:
        """LFM2's gated short convolution."""
        n_seqs, n = self.batch.n_seqs, self.n_seq_tokens
        d_conv = self.integer("shortconv.l_cache") - 1
        cur = self.reshape(cur, cur.ne[0], n, n_seqs)
        bcx = self.lora_mm(self.w(il, "shortconv.in_proj"), cur)
        chunk = bcx.ne[0] // 3
        b, c, x = (
            self.view_3d(bcx, chunk, bcx.ne[1], bcx.ne[2], bcx.nb[1], bcx.nb[2], 4 * i * chunk)
            for i in range(3)
        )
        gated = self.transpose(self.mul(b, x))
        stored = self.state(il, "r")
        past = self.reshape(self.read_state(stored, self.layer(il).state_r), d_conv, self.n_embd, n_seqs)
        joined = self.concat(past, gated, 0)
        last = self.view_3d(
            joined,
            d_conv,
            joined.ne[1],
            joined.ne[2],
            joined.nb[1],
            joined.nb[2],
            4 * (joined.ne[0] - d_conv),
        )
        target = self.view_2d(stored, d_conv * self.n_embd, n_seqs, stored.nb[1])
        self.expand(self.cpy(last, target))
        out = self.mul(c, self.ssm_conv(joined, self.need(self.w(il, "shortconv.conv"))))
        out = self.lora_mm(self.w(il, "shortconv.out_proj"), out)
        return self.reshape(out, out.ne[0], n * n_seqs)
