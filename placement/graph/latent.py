"""Multi-head latent attention: compressed K and V, absorbed projections (deepseek2 and its kin)."""

from __future__ import annotations

from placement.graph.recurrent import RecurrentBuilder
from placement.graph.tensor import Tensor, row_size


class LatentBuilder(RecurrentBuilder):
    """Adds latent attention."""

    def latent_attention(self, il: int, cur: Tensor) -> Tensor:
        """DeepSeek V2's attention, absorbed where the model has wk_b, else decompressed."""
        facts, n = self.layer(il), self.n_tokens
        rope = self.integer("rope.dimension_count")
        lora = self.integer("attention.kv_lora_rank")
        head = self.integer("attention.key_length_mla") or self.integer("attention.key_length")
        nope = head - rope
        factors = self.rope_factors(il)
        q = self._latent_query(il, cur, head)
        both = self.mul_mat(self.need(self.w(il, "attn_kv_a_mqa")), cur)
        row = row_size("F32", lora + rope)
        compressed = self.view_2d(both, lora, n, row)
        k_pe = self.view_3d(both, rope, 1, n, row, row, row_size("F32", lora))
        k_pe = self.rope(k_pe, self.positions, factors)
        compressed = self.layer_norm(compressed, il, "attn_kv_a_norm")
        if not self.facts.is_mla:
            return self._decompressed(il, q, compressed, k_pe, nope)
        q_nope = self.view_3d(q, nope, facts.n_head, n, q.nb[1], q.nb[2])
        q_pe = self.view_3d(q, rope, facts.n_head, n, q.nb[1], q.nb[2], row_size("F32", nope))
        q_pe = self.rope(q_pe, self.positions, factors)
        absorbed = self.mul_mat(self.need(self.w(il, "attn_k_b")), self.permute(q_nope, 0, 2, 1, 3))
        query = self.concat(self.permute(absorbed, 0, 2, 1, 3), q_pe, 0)
        compressed = self.reshape(compressed, lora, 1, n)
        key = self.concat(compressed, k_pe, 0)
        query = self._tempered(query)
        return self.attention_latent(il, query, key, compressed, self.w(il, "attn_v_b"))

    def _tempered(self, query: Tensor) -> Tensor:
        return self.tempered(query) if self.number("attention.temperature_scale") != 0.0 else query

    def tempered(self, query: Tensor) -> Tensor:
        """Q times the temperature of its position."""
        return self.mul(query, self.input_once("attn_scale", "F32", 1, 1, self.n_tokens))

    def rope_factors(self, il: int) -> Tensor | None:
        """The layer's copy of the rope factors for the context in use (get_rope_factors)."""
        original = self.integer("rope.scaling.original_context_length", self.facts.n_ctx_train)
        kind = "long" if self.context.n_ctx_seq > original else "short"
        for name in ("rope_freqs.weight", f"rope_factors_{kind}.weight"):
            if (leaf := self.weight(name, il, key=f"{name}@{il}")) is not None:
                return leaf
        return None

    def _latent_query(self, il: int, cur: Tensor, head: int) -> Tensor:
        if (direct := self.w(il, "attn_q")) is not None:
            q = self.mul_mat(direct, cur)
        else:
            q = self.mul_mat(self.need(self.w(il, "attn_q_a")), cur)
            q = self.layer_norm(q, il, "attn_q_a_norm")
            q = self.mul_mat(self.need(self.w(il, "attn_q_b")), q)
        return self.reshape(q, head, self.layer(il).n_head, self.n_tokens)

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
