"""Gemma 3n and 4: embeddings per layer, shared caches, experts beside a dense block, alternating updates."""

from __future__ import annotations

from placement.graph.compressed import CompressedBuilder
from placement.graph.tensor import Tensor

ALTUP_INPUTS = 4  # planes of Gemma 3n's residual
SPARSE_LAYERS = 10  # its first layers keep only large gates


class GemmaBuilder(CompressedBuilder):
    """Adds the blocks of Gemma 3n (alternating updates, low-rank residuals) and Gemma 4."""

    per_layer: Tensor | None = None  # [width, tokens, layers]

    # --- embeddings per layer

    def per_layer_inputs(self, cur: Tensor) -> None:
        """What each layer gets of its own from the tokens (build_inp_per_layer, project_per_layer_inputs)."""
        table = self.weight("per_layer_token_embd.weight")
        if table is None:
            return
        n, n_layer = self.n_tokens, self.facts.n_layer
        size = table.ne[0] // n_layer
        rows = self.get_rows(table, self.input_once("layer_tokens", "I32", n))
        rows = self.scale(self.reshape(rows, size, n_layer, n))
        self.expand(rows)
        projected = self.scale(self.mul_mat(self.need(self.weight("per_layer_model_proj.weight")), cur))
        projected = self.reshape(projected, size, n_layer, n)
        projected = self.build_norm(projected, self.weight("per_layer_proj_norm.weight"))
        total = self.scale(self.add(projected, rows))
        self.per_layer = self.cont(self.permute(total, 0, 2, 1, 3))

    def _slice(self, cur: Tensor, i: int) -> Tensor:
        """The i-th plane of a tensor with contiguous planes."""
        size, n = cur.ne[:2]
        return self.view_2d(cur, size, n, 4 * size, 4 * i * size * n)

    def _per_layer_part(self, il: int, cur: Tensor) -> Tensor:
        gate = self.unary(self.lora_mm(self.w(il, "inp_gate"), cur), "gelu")
        part = self.mul(gate, self._slice(self.need(self.per_layer), il))
        return self.layer_norm(self.lora_mm(self.w(il, "proj"), part), il, "post_norm")

    # --- attention

    def gemma_attention(self, il: int, cur: Tensor) -> Tensor:
        """Attention whose layers may share the cache of an earlier one, and use K as V."""
        facts, (size, _) = self.layer(il), self.head_sizes(il)
        q, k, v = self._gemma_heads(il, cur, size, has_own=facts.cache_layer == il)
        factors = self.rope_factors(il)
        q = self.rope(self.layer_norm(q, il, "attn_q_norm"), self.positions, factors)
        if k is not None and v is not None:
            k = self.layer_norm(k, il, "attn_k_norm")
            v = self.rms_norm(v)
            k = self.rope(k, self.positions, factors)
        return self.attention(il, q, k, v, is_windowed=True)

    def _gemma_heads(
        self, il: int, cur: Tensor, size: int, *, has_own: bool
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        facts, n = self.layer(il), self.n_tokens
        heads = (facts.n_head, facts.n_head_kv, facts.n_head_kv)
        parts: list[Tensor | None] = []
        if (fused := self.w(il, "attn_qkv")) is not None:
            qkv, offset = self.lora_mm(fused, cur, is_scaled=True), 0
            for n_head in heads:
                parts.append(self.cont(self.view_2d(qkv, size * n_head, n, qkv.nb[1], offset)))
                offset += 4 * size * n_head
        else:
            names = ("attn_q", "attn_k", "attn_v") if has_own else ("attn_q",)
            parts = [
                None if (weight := self.w(il, name)) is None else self.lora_mm(weight, cur, is_scaled=True)
                for name in names
            ]
        q, k, v = [*parts, None, None][:3]
        q = self.reshape(self.need(q), size, heads[0], n)
        if not has_own or k is None:
            return q, None, None
        v = k if v is None else v
        return q, self.reshape(k, size, heads[1], n), self.reshape(v, size, heads[2], n)

    # --- Gemma 4

    def gemma4_layer(self, il: int, residual: Tensor) -> Tensor:
        """A layer of Gemma 4."""
        cur = self.gemma_attention(il, self.layer_norm(residual, il, "attn_norm"))
        middle = self.add(self.layer_norm(cur, il, "post_attention_norm"), residual)
        cur = self.layer_norm(self._gemma4_feed(il, middle), il, "post_ffw_norm", is_pinned=False)
        cur = self.add(cur, middle)
        if self.per_layer is not None:
            cur = self.add(cur, self._per_layer_part(il, cur))
        scale = self.w(il, "layer_output_scale")
        return cur if scale is None else self.mul(cur, scale)

    def _gemma4_feed(self, il: int, middle: Tensor) -> Tensor:
        dense = self.ffn(self.layer_norm(middle, il, "ffn_norm"), il, "gelu", is_scaled=True)
        if self.w(il, "ffn_gate_inp") is None:
            return dense
        dense = self.layer_norm(dense, il, "post_ffw_norm_1")
        routed = self.layer_norm(middle, il, "pre_ffw_norm_2")
        scale = self.need(self.weight(f"blk.{il}.ffn_gate_inp.scale", il))
        logits = self.mul(self.scale(self.rms_norm(middle)), scale)
        logits = self.lora_mm(self.w(il, "ffn_gate_inp"), logits)
        routed = self.moe(routed, il, self.routing(il), logits=logits)
        return self.add(dense, self.layer_norm(routed, il, "post_ffw_norm_2"))

    # --- Gemma 3n

    @property
    def _n_altup(self) -> int:
        return ALTUP_INPUTS

    @property
    def _active(self) -> int:
        return 0

    def _magnitude(self, cur: Tensor) -> Tensor:
        return self.like("SQRT", self.sum_rows(self.like("SQR", cur)))

    def _matched(self, cur: Tensor, like: Tensor) -> Tensor:
        """A tensor with the magnitude of another."""
        return self.div(self.mul(cur, like), self._magnitude(cur))

    def altup_widened(self, cur: Tensor) -> Tensor:
        """The embeddings and their projections, as planes."""
        like = self._magnitude(cur)
        repeated = self.repeat(cur, self.n_embd, self.n_tokens, self._n_altup - 1, 1)
        added = self.mul_mat(self.need(self.weight("altup_proj.weight")), repeated)
        return self.concat(cur, self._matched(added, like), 2)

    def altup_head(self, cur: Tensor) -> Tensor:
        """The planes merged into one."""
        like = self._magnitude(self._slice(cur, self._active))
        out = self.mul_mat(self.need(self.weight("altup_unembd_proj.weight")), self._rest(cur))
        out = self._matched(out, like)
        total = self._slice(cur, 0)
        for i in range(self._n_altup - 1):
            total = self.add(total, self._slice(out, i))
        return self.scale(total)

    def _rest(self, cur: Tensor) -> Tensor:
        row, plane = 4 * self.n_embd, 4 * self.n_embd * self.n_tokens
        return self.view_3d(cur, self.n_embd, self.n_tokens, self._n_altup - 1, row, plane, plane)

    def altup_layer(self, il: int, cur: Tensor) -> Tensor:
        """A layer of Gemma 3n."""
        predictions = self._predicted(il, cur)
        active = self._slice(predictions, self._active)
        normed = self.layer_norm(active, il, "attn_norm")
        laurel = self.lora_mm(self.w(il, "laurel_r"), self.lora_mm(self.w(il, "laurel_l"), normed))
        laurel = self.add(self.layer_norm(laurel, il, "laurel_post_norm"), normed)
        out = self.layer_norm(self.gemma_attention(il, normed), il, "post_attention_norm")
        middle = self.scale(self.add(self.add(out, active), laurel))
        out = self._sparse_feed(il, self.layer_norm(middle, il, "ffn_norm"))
        out = self.add(self.layer_norm(out, il, "post_ffw_norm", is_pinned=False), middle)
        corrected = self._corrected(il, predictions, out)
        first = self.mul(self._slice(corrected, self._active), self.need(self.w(il, "altup_correct_scale")))
        rest = self.add(self._rest(corrected), self._per_layer_part(il, first))
        return self.concat(self._slice(corrected, 0), rest, 2)

    def _sparse_feed(self, il: int, cur: Tensor) -> Tensor:
        up, gate = self.lora_mm(self.w(il, "ffn_up"), cur), self.lora_mm(self.w(il, "ffn_gate"), cur)
        if il < SPARSE_LAYERS:
            mean = self.op("MEAN", "F32", (1, *gate.ne[1:]), gate)
            spread = self.sum_rows(self.like("SQR", self.sub(gate, mean)))
            cutoff = self.add(mean, self.scale(self.like("SQRT", self.scale(spread))))
            gate = self.unary(self.sub(gate, cutoff), "relu")
        return self.lora_mm(self.w(il, "ffn_down"), self.mul(up, self.unary(gate, "gelu")))

    def _modalities(self, il: int, cur: Tensor) -> Tensor:
        normed = self.scale(self.layer_norm(cur, il, "altup_router_norm"))
        return self.unary(self.mul_mat(self.need(self.w(il, "altup_router")), normed), "tanh")

    def _predicted(self, il: int, cur: Tensor) -> Tensor:
        modalities = self._modalities(il, self._slice(cur, self._active))
        n = self._n_altup
        coefficients = self.lora_mm(self.w(il, "altup_predict_coef"), modalities)
        coefficients = self.reshape(coefficients, n, n, self.n_tokens)
        out = self.mul_mat(self.cont(self.permute(cur, 1, 2, 0, 3)), coefficients)
        return self.add(self.cont(self.permute(out, 0, 2, 1, 3)), cur)

    def _corrected(self, il: int, predictions: Tensor, active: Tensor) -> Tensor:
        modalities = self._modalities(il, active)
        innovation = self.sub(active, self._slice(predictions, self._active))
        coefficients = self.scale(self.lora_mm(self.w(il, "altup_correct_coef"), modalities))
        coefficients = self.cont(self.transpose(coefficients), 1, self.n_tokens, self._n_altup)
        innovation = self.repeat(innovation, self.n_embd, self.n_tokens, self._n_altup, 1)
        return self.add(self.mul(innovation, coefficients), predictions)
