"""Attention by row: Q, K and V split into heads, their norms, rope and gates, and the attention itself."""

from __future__ import annotations

from placement.graph.gemma import GemmaBuilder
from placement.graph.tensor import Tensor

NO_ROPE_STEP = 4  # n_no_rope_layer_step
ROPED_BAICHUAN_LAYERS = 32
UNNORMED_LLAMA4_EXPERTS = 128


class HeadBuilder(GemmaBuilder):
    """Adds the attention of a row."""

    def is_on(self, feature: str, key: str) -> bool:
        """Whether a feature holds: "always", or "meta" and its metadata key is set."""
        return feature == "always" or (feature == "meta" and self.number(key) != 0.0)

    def plain_attention(self, il: int, cur: Tensor) -> Tensor:
        """Q, K and V, their norms and rope, attention, output projection."""
        row = self.row
        source = self.norm_beside(il) if self.w(il, "attn_norm_2") is not None else cur
        q, k, v = self.split_heads(il, source)
        q, k = self.positioned(il, q, k)
        if row.has_q_scale:
            q = self.scale(q)
        if row.attention == "no_cache":
            return self.attention_no_cache(il, q, k, v)
        if row.attention == "blocks" and self.has_blocks(il):
            return self.block_attention(il, cur, q, k, v)
        out = self.attention(
            il,
            q,
            k,
            v,
            wo=None if row.gate else "attn_output",
            sinks=self.w(il, "attn_sinks"),
            is_windowed=self.has_windows,
            is_capped=row.is_capped,
        )
        if row.gate:
            out = self.gated_result(il, out, cur)
            out = self.lora_mm(self.w(il, "attn_output"), out, is_scaled=True)
        return self.scale(out) if self.is_on(row.value_scale, "attention.value_scale") else out

    def sparse_attention(self, il: int, cur: Tensor) -> Tensor:
        """Latent attention over the cells that an indexer chose, gated where the row says so."""
        if not self.row.gate:
            return self.latent_attention(il, cur, is_reshaped=False)
        has_rope = self.row.attention == "dsa"
        out = self.latent_attention(il, cur, has_rope=has_rope, is_reshaped=False, wo=None)
        out = self.gated_result(il, out, cur)
        return self.lora_mm(self.w(il, "attn_output"), out, is_scaled="s" not in self.unread)

    def norm_beside(self, il: int) -> Tensor:
        """Falcon's second norm: attention reads it, the feed-forward block the first."""
        return self.layer_norm(self.layer_input, il, "attn_norm_2", self.row.norm)

    def gated_result(self, il: int, out: Tensor, source: Tensor) -> Tensor:
        """The attention's result times a gate per element or per head."""
        weight = self.need(self.w(il, "attn_gate"))
        gate = self.unary(self.lora_mm(weight, source), self.row.gate)
        n_head, n = self.layer(il).n_head, out.ne[1]
        if weight.ne[1] != n_head:
            return self.mul(out, gate)
        width = out.ne[0]
        heads = self.reshape(out, width // n_head, n_head, n)
        return self.reshape(self.mul(heads, self.reshape(gate, 1, n_head, n)), width, n)

    def split_heads(self, il: int, cur: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V by head."""
        facts = self.layer(il)
        k_size, v_size = self.head_sizes(il)
        heads, sizes = (facts.n_head, facts.n_head_kv, facts.n_head_kv), (k_size, k_size, v_size)
        if self.row.qkv == "reshaped":
            return self._reshaped_heads(il, cur, heads, k_size)
        if self.row.qk_norm != "flat":
            return self.qkv(cur, il, heads, sizes)
        q, k, v = self.qkv(cur, il, heads, sizes, is_flat=True)
        q, k = self.qk_normed(il, q, k)
        parts = zip((q, k, v), sizes, heads, strict=True)
        q, k, v = (self.reshape(tensor, size, n, self.n_tokens) for tensor, size, n in parts)
        return q, k, v

    def _reshaped_heads(
        self, il: int, cur: Tensor, heads: tuple[int, int, int], size: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.lora_mm(self.w(il, "attn_qkv"), cur)
        qkv = self.reshape(qkv, size, sum(heads), self.n_tokens)
        parts, offset = [], 0
        for n in heads:
            parts.append(self.view_3d(qkv, size, n, self.n_tokens, qkv.nb[1], qkv.nb[2], offset))
            offset += n * qkv.nb[1]
        return parts[0], parts[1], parts[2]

    def qk_normed(self, il: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Q and K after their norms, where the layer has them."""
        kind, is_bare = self.row.qk_norm_kind, not self.row.has_norm_weights and self.row.qk_norm == "after"
        if is_bare or self.w(il, "attn_q_norm") is not None:
            q = self.layer_norm(q, il, "attn_q_norm", kind)
        if is_bare or self.w(il, "attn_k_norm") is not None:
            k = self.layer_norm(k, il, "attn_k_norm", kind)
        return q, k

    def positioned(self, il: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Q and K normed, roped and tempered in the row's order."""
        row = self.row
        if row.qk_norm == "mpt" and self.w(il, "attn_q_norm") is not None:
            q, k = self._flat_normed(il, q, k)
        if row.qk_norm == "before":
            q, k = self.qk_normed(il, q, k)
        has_rope = self.has_rope(il)
        if has_rope:
            factors = self.rope_factors(il)
            q, k = self.roped(q, factors), self.roped(k, factors)
        if row.qk_norm == "after":
            q, k = self.qk_normed(il, q, k)
        if self.is_on(row.temperature, "attention.temperature_scale") or (
            row.temperature == "no_rope" and not has_rope
        ):
            q = self.tempered(q)
        if has_rope and row.has_plain_qk_norm and self.facts.n_expert != UNNORMED_LLAMA4_EXPERTS:
            q, k = self.rms_norm(q), self.rms_norm(k)
        return q, k

    def roped(self, cur: Tensor, factors: Tensor | None) -> Tensor:
        """Rope at the batch's positions."""
        return self.rope(cur, self.positions, factors)

    def _flat_normed(self, il: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        out = []
        for tensor, name in ((q, "attn_q_norm"), (k, "attn_k_norm")):
            flat = self.reshape(tensor, tensor.ne[0] * tensor.ne[1], self.n_tokens)
            out.append(self.reshape(self.layer_norm(flat, il, name, "layer"), *tensor.ne[:3]))
        return out[0], out[1]

    def has_rope(self, il: int) -> bool:
        """Whether the layer's Q and K are roped."""
        rope, is_windowed = self.row.rope, self.layer(il).window_tokens is not None
        if rope in ("all", "none"):
            return rope == "all"
        if rope == "finetuned":  # Granite uses the key as a switch
            return bool(self.model.get("rope.scaling.finetuned", True))
        if rope == "pattern":
            pattern = self.model.get("attention.rope_pattern", ())
            return bool(pattern[il]) if isinstance(pattern, (tuple, list)) and il < len(pattern) else True
        step = NO_ROPE_STEP if self.has_windows or self.row.temperature != "no_rope" else self.facts.n_layer
        answers = {
            "swa": is_windowed,
            "swa_if_any": is_windowed or not self.has_windows,
            "swa_or_dense": is_windowed or il < self.integer("leading_dense_block_count"),
            "step": (il + 1) % step != 0,
            "step_from_0": not self.has_windows or il % NO_ROPE_STEP != 0,
            "by_size": self.facts.n_layer == ROPED_BAICHUAN_LAYERS,
        }
        return answers[rope]

    def gated_query_attention(self, il: int, cur: Tensor) -> Tensor:
        """Attention whose Q projection also gives a gate for the result (Qwen3-Next)."""
        facts, (size, _) = self.layer(il), self.head_sizes(il)
        is_pooled = self.row.has_pools and self.indexer_cache(il) is not None
        mask = self.pool_mask_of(il, cur) if is_pooled else None
        heads, n = (facts.n_head, facts.n_head_kv, facts.n_head_kv), self.n_tokens
        full, k, v = self.qkv(cur, il, heads, (2 * size, size, size), is_flat=True)
        if self.row.attention == "gated_q":
            full = self.reshape(full, 2 * size, facts.n_head, n, 1)
        strides = (8 * size, 8 * size * facts.n_head)
        q = self.view_3d(full, size, facts.n_head, n, *strides)
        gate = self.view_3d(full, size, facts.n_head, n, *strides, 4 * size)
        k = self.reshape(k, size, facts.n_head_kv, n)
        v = self.reshape(v, size, facts.n_head_kv, n)
        q, k = self.positioned(il, q, k)
        if mask is not None:
            mask = self.reshape(mask, *mask.ne)
        cur = self.attention(il, q, k, v, wo=None, mask=mask)
        gate = self.unary(self.cont(gate, size * facts.n_head, n), "sigmoid")
        return self.lora_mm(self.w(il, "attn_output"), self.mul(cur, gate), is_scaled=True)
