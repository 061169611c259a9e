"""Hyper-connections: a residual several streams wide, mixed into one before a block, spread after it."""

from __future__ import annotations

from placement.graph.feed import FeedBuilder
from placement.graph.tensor import Tensor

MIX, COMBINE, SPREAD = "DSV4_HC_PRE", "DSV4_HC_COMB", "DSV4_HC_POST"
FUSED_HYPER = (MIX, COMBINE, SPREAD)  # in the order in which the engine probes them


class HyperBuilder(FeedBuilder):
    """Adds hyper-connections; residuals come as [width, streams, tokens]."""

    @property
    def n_wide(self) -> int:
        """Streams of the residual."""
        return self.integer("hyper_connection.count")

    def widened(self, cur: Tensor) -> Tensor:
        """The embeddings, once per stream."""
        cur = self.reshape(cur, self.n_embd, 1, self.n_tokens)
        return self.repeat(cur, self.n_embd, self.n_wide, self.n_tokens, 1)

    def hyper_rows(self, wide: Tensor) -> Tensor:
        """The rows of the tokens that give logits."""
        flat = self.reshape(wide, self.n_embd * self.n_wide, self.n_tokens)
        (flat,) = self.rows_out(flat)
        return self.reshape(flat, self.n_embd, self.n_wide, self.batch.n_outputs)

    def hyper_mean(self, wide: Tensor) -> Tensor:
        """The mean of the streams (GLM 5 Next's head)."""
        ne, nb = wide.ne, wide.nb
        cur = self.view_2d(wide, ne[0], ne[2], nb[2])
        for i in range(1, ne[1]):
            cur = self.add(cur, self.view_2d(wide, ne[0], ne[2], nb[2], i * nb[1]))
        return self.scale(cur)

    def hyper_head(self, wide: Tensor) -> Tensor:
        """The streams mixed by the output's own weights."""
        mixes = self._mixes(wide, self.need(self.weight("output_hc_fn.weight")))
        scale, base = (self.need(self.weight(f"output_hc_{name}.weight")) for name in ("scale", "base"))
        pre = self.scale(self.unary(self.add(self.mul(mixes, scale), base), "sigmoid"))
        return self._cast_mix(wide, pre) if self.row.structure == "hyper_cast" else self._mix(wide, pre)

    def hyper_before(self, il: int, wide: Tensor, name: str) -> tuple[Tensor, Tensor, Tensor | None]:
        """The block's input, and what spreads its result: weights per stream, and how streams mix."""
        hc, is_cast = self.n_wide, self.row.structure == "hyper_cast"
        mixes = self._mixes(wide, self.need(self.w(il, f"{name}_fn")))
        scale, base = self.need(self.w(il, f"{name}_scale")), self.need(self.w(il, f"{name}_base"))
        pre = self.scale(self._gate(mixes, scale, base, 0))
        post = self.scale(self._gate(mixes, scale, base, 1))
        if is_cast:
            return self._cast_mix(wide, pre), self.scale(post), None
        comb = self._combination(il, mixes, scale, base, hc)
        if MIX in self.context.unfused:
            return self._mix(wide, pre), post, comb
        out = self.op(MIX, "F32", (self.n_embd, wide.ne[2], 1, 1), wide, pre)
        self.fused_nodes.append((MIX, out, il))
        return out, post, comb

    def hyper_after(self, il: int, cur: Tensor, wide: Tensor, post: Tensor, comb: Tensor | None) -> Tensor:
        """The residual after a block."""
        if comb is None:
            return self._cast_spread(cur, wide, post)
        if SPREAD in self.context.unfused:
            return self._spread(cur, wide, post, comb)
        out = self.op(SPREAD, "F32", wide.ne, cur, wide, post, comb)
        self.fused_nodes.append((SPREAD, out, il))
        return out

    def _mixes(self, wide: Tensor, weight: Tensor) -> Tensor:
        flat = self.reshape(wide, wide.ne[0] * wide.ne[1], wide.ne[2])
        return self.mul_mat(weight, self.rms_norm(flat))

    def _gate(self, mixes: Tensor, scale: Tensor, base: Tensor, part: int) -> Tensor:
        hc = self.n_wide
        view = self.view_2d(mixes, hc, mixes.ne[1], mixes.nb[1], 4 * part * hc)
        scaled = self.mul(view, self.view_1d(scale, 1, 4 * part))
        return self.unary(self.add(scaled, self.view_1d(base, hc, 4 * part * hc)), "sigmoid")

    def _streams(self, wide: Tensor) -> list[Tensor]:
        return [
            self.view_2d(wide, wide.ne[0], wide.ne[2], wide.nb[2], i * wide.nb[1]) for i in range(wide.ne[1])
        ]

    def _mix(self, wide: Tensor, weights: Tensor) -> Tensor:
        """The weighted sum of the streams, product by product."""
        total: Tensor | None = None
        for i, stream in enumerate(self._streams(wide)):
            weight = self.view_2d(weights, 1, weights.ne[1], weights.nb[1], i * weights.nb[0])
            product = self.mul(stream, weight)
            total = product if total is None else self.add(total, product)
        return self.need(total)

    def _cast_mix(self, wide: Tensor, weights: Tensor) -> Tensor:
        return self.cast(self._mix(self.cast(wide, "F32"), weights), "F32")

    def _cast_spread(self, cur: Tensor, wide: Tensor, post: Tensor) -> Tensor:
        cur, post, wide = (self.cast(tensor, "F32") for tensor in (cur, post, wide))
        out: Tensor | None = None
        for i, stream in enumerate(self._streams(wide)):
            weight = self.view_2d(post, 1, post.ne[1], post.nb[1], i * post.nb[0])
            part = self.reshape(self.add(stream, self.mul(cur, weight)), self.n_embd, 1, cur.ne[1])
            out = part if out is None else self.concat(out, part, 1)
        return self.cast(self.need(out), "F32")

    def _spread(self, cur: Tensor, wide: Tensor, post: Tensor, comb: Tensor) -> Tensor:
        out: Tensor | None = None
        for i in range(self.n_wide):
            part = self.mul(cur, self.view_2d(post, 1, post.ne[1], post.nb[1], i * post.nb[0]))
            for j, stream in enumerate(self._streams(wide)):
                offset = i * comb.nb[0] + j * comb.nb[1]
                weight = self.view_2d(comb, 1, comb.ne[2], comb.nb[2], offset)
                part = self.add(part, self.mul(stream, weight))
            part = self.reshape(part, self.n_embd, 1, cur.ne[1])
            out = part if out is None else self.concat(out, part, 1)
        return self.need(out)

    def _combination(self, il: int, mixes: Tensor, scale: Tensor, base: Tensor, hc: int) -> Tensor:
        n = mixes.ne[1]
        if COMBINE not in self.context.unfused:
            out = self.op(COMBINE, "F32", (hc, hc, n, 1), mixes, scale, base)
            self.fused_nodes.append((COMBINE, out, il))
            return out
        comb = self.view_2d(mixes, hc * hc, n, mixes.nb[1], 8 * hc)
        comb = self.mul(comb, self.view_1d(scale, 1, 8))
        comb = self.add(comb, self.view_1d(base, hc * hc, 8 * hc))
        return self._sinkhorn(self.reshape(comb, hc, hc, n))

    def _sinkhorn(self, comb: Tensor) -> Tensor:
        eps = self.like("FILL", self.new("F32", 1))
        comb = self.add(self.soft_max(comb), eps)
        for i in range(self.integer("hyper_connection.sinkhorn_iterations")):
            if i > 0:
                comb = self.div(comb, self.add(self.sum_rows(comb), eps))
            columns = self.sum_rows(self.cont(self.permute(comb, 1, 0, 2, 3)))
            comb = self.div(comb, self.permute(self.add(columns, eps), 1, 0, 2, 3))
        return comb
