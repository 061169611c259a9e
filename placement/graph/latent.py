"""Multi-head latent attention: compressed K and V, absorbed projections (deepseek2 and its kin)."""

from __future__ import annotations

from placement.graph.blocks import BlockSparseBuilder
from placement.graph.tensor import Tensor, row_size


class LatentBuilder(BlockSparseBuilder):
    """Adds latent attention."""

    def latent_attention(
        self,
        il: int,
        cur: Tensor,
        *,
        has_rope: bool = True,
        is_reshaped: bool = True,
        wo: str | None = "attn_output",
    ) -> Tensor:
        """DeepSeek V2's attention, absorbed where the model has wk_b, else decompressed."""
        facts, n = self.layer(il), self.n_tokens
        rope, factors = self.integer("rope.dimension_count"), self.rope_factors(il)
        narrow, q = self._latent_query(il, cur)
        top_k = self.choose_cells(il, cur, narrow)
        head = q.ne[0] // facts.n_head
        q = self.reshape(q, head, facts.n_head, n) if is_reshaped else q
        both = self.mul_mat(self.need(self.w(il, "attn_kv_a_mqa")), cur)
        lora = both.ne[0] - rope
        row = row_size("F32", lora + rope)
        compressed = self.view_2d(both, lora, n, row)
        k_pe = self.view_3d(both, rope, 1, n, row, row, row_size("F32", lora))
        if self.w(il, "attn_k_norm") is not None:
            k_pe = self.layer_norm(k_pe, il, "attn_k_norm")
        k_pe = self.rope(k_pe, self.positions, factors) if has_rope else k_pe
        compressed = self.layer_norm(compressed, il, "attn_kv_a_norm")
        if not self.facts.is_mla:
            return self._decompressed(il, q, compressed, k_pe, head - rope)
        query = self._tempered(self._absorbed(il, q, head, rope, factors, has_rope=has_rope))
        compressed = self.reshape(compressed, lora, 1, n)
        key = self.concat(compressed, k_pe, 0)
        mask = None if top_k is None else self.sparse_mask(self.mask(il), top_k)
        return self.attention_latent(il, query, key, compressed, self.w(il, "attn_v_b"), wo=wo, mask=mask)

    def _absorbed(
        self, il: int, q: Tensor, head: int, rope: int, factors: Tensor | None, *, has_rope: bool
    ) -> Tensor:
        """Q in the space of the compressed rows, and its roped part behind."""
        n_head, nope = self.layer(il).n_head, head - rope
        strides = (row_size("F32", head), row_size("F32", head) * n_head)
        q_nope = self.view_3d(q, nope, n_head, self.n_tokens, *strides)
        q_pe = self.view_3d(q, rope, n_head, self.n_tokens, *strides, row_size("F32", nope))
        q_pe = self.rope(q_pe, self.positions, factors) if has_rope else q_pe
        absorbed = self.mul_mat(self.need(self.w(il, "attn_k_b")), self.permute(q_nope, 0, 2, 1, 3))
        return self.concat(self.permute(absorbed, 0, 2, 1, 3), q_pe, 0)

    def _tempered(self, query: Tensor) -> Tensor:
        return self.tempered(query) if self.number("attention.temperature_scale") != 0.0 else query

    def tempered(self, query: Tensor) -> Tensor:
        """Q times the temperature of its position."""
        return self.mul(query, self.input_once("attn_scale", "F32", 1, 1, self.n_tokens))

    def rope_factors(self, il: int) -> Tensor | None:
        """The layer's copy of the rope factors for the context in use (get_rope_factors)."""
        if not self.has_rope_factors or (
            self.is_window_unfactored and self.layer(il).window_tokens is not None
        ):
            return None
        il = self.block_of(il)
        home = self.homes[il] if self.homes else 0
        original = self.integer("rope.scaling.original_context_length", self.facts.n_ctx_train)
        kind = "long" if self.context.n_ctx_seq > original else "short"
        for name in ("rope_freqs.weight", f"rope_factors_{kind}.weight"):
            if (leaf := self.weight(name, il, key=f"{name}@{home}")) is not None:
                return leaf
        return None

    def head_gated(self, il: int, out: Tensor, source: Tensor) -> Tensor:
        """The result weighed by a gate per head, then projected (bailingmoe3)."""
        n_head, n, width = self.layer(il).n_head, self.n_tokens, out.ne[0]
        gate = self.mul_mat(self.need(self.w(il, "attn_gate")), source)
        gate = self.unary(self.reshape(gate, 1, n_head, n), "sigmoid")
        out = self.mul(self.reshape(out, width // n_head, n_head, n), gate)
        return self.mul_mat(self.need(self.w(il, "attn_output")), self.cont(out, width, n))

    def _latent_query(self, il: int, cur: Tensor) -> tuple[Tensor, Tensor]:
        """Q compressed (what it is made from, without compression) and in full."""
        if (direct := self.w(il, "attn_q")) is not None:
            return cur, self.mul_mat(direct, cur)
        narrow = self.layer_norm(self.mul_mat(self.need(self.w(il, "attn_q_a")), cur), il, "attn_q_a_norm")
        return narrow, self.mul_mat(self.need(self.w(il, "attn_q_b")), narrow)

    def _decompressed(self, il: int, q: Tensor, compressed: Tensor, k_pe: Tensor, nope: int) -> Tensor:
        """Full heads from the compressed rows (models without absorbed projections)."""
        n_head, n = self.layer(il).n_head, self.n_tokens
        v_head = self.integer("attention.value_length_mla") or self.integer("attention.value_length")
        kv = self.mul_mat(self.need(self.w(il, "attn_kv_b")), compressed)
        step = row_size("F32", nope + v_head)
        k_nope = self.view_3d(kv, nope, n_head, n, step, step * n_head)
        v = self.cont(self.view_3d(kv, v_head, n_head, n, step, step * n_head, row_size("F32", nope)))
        q = self.rope(q, self.positions, self.rope_factors(il))
        k = self.concat(k_nope, self.repeat(k_pe, k_pe.ne[0], n_head, n, 1), 0)
        return self.attention(il, self._tempered(q), k, v)
