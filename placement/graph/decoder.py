"""The decoder that almost every architecture is: attention or state, feed-forward, residual sums by layer.

`Decoder.build` follows a `Row`; blocks that only some architectures have come from the builders it inherits.
"""

from __future__ import annotations

from collections.abc import Sequence

from placement.architecture import Architecture
from placement.graph.context import Batch, Context
from placement.graph.experts import Routing
from placement.graph.latent import LatentBuilder
from placement.graph.rows import Row
from placement.graph.tensor import Tensor
from placement.model import Model


class Decoder(LatentBuilder):
    """Builds the graph of one batch; `layers` may leave out layers that repeat others."""

    def __init__(self, model: Model, facts: Architecture, row: Row, context: Context, batch: Batch) -> None:
        super().__init__(model, facts, context, batch)
        self.row = row
        self.has_mixed_batch = row.has_mixed_batch
        self.layer_starts: list[int] = []

    def build(self, layers: Sequence[int]) -> None:
        """Emit the whole graph; `layer_starts` then holds where in `nodes` each layer begins."""
        cur = self.embeddings()
        for i, il in enumerate(layers):
            self.layer_starts.append(len(self.nodes))
            cur = self.build_layer(il, cur, is_last=i == len(layers) - 1)
        self.layer_starts.append(len(self.nodes))
        self.head(cur)

    # --- the ends

    def embeddings(self) -> Tensor:
        """The first layer's input."""
        row = self.row
        cur = self.embed(2.0 if row.embedding_scale == "rows" else 1.0)
        if row.embedding_scale == "graph":
            cur = self.scale(cur)
        if (table := self.weight("position_embd.weight")) is not None and row.has_position_table:
            cur = self.add(cur, self.get_rows(table, self.positions))
        if row.has_embedding_norm and (norm := self.weight("token_embd_norm.weight")) is not None:
            cur = self.build_norm(
                cur, norm, self.weight("token_embd_norm.bias"), row.norm, row.embedding_norm_pin
            )
        return cur

    def head(self, cur: Tensor) -> None:
        """The last norm and the logits."""
        row = self.row
        if row.rows_at == "end":
            cur.is_output = True
            (cur,) = self.rows_out(cur)
        if row.has_output_norm:
            cur = self.build_norm(
                cur, self.weight("output_norm.weight"), self.weight("output_norm.bias"), row.norm
            )
        if row.rows_at == "end_normed":
            cur.is_output = True
            (cur,) = self.rows_out(cur)
        cur.is_output = True
        softcap = row.softcap == "always" or (
            row.softcap == "meta" and self.number("final_logit_softcapping") != 0.0
        )
        if row.scale_before_output:
            cur = self.scale(cur)
        cur = self.lora_mm(self.output_weight(), cur)
        if row.has_output_bias and (bias := self.weight("output.bias")) is not None:
            cur = self.add(cur, bias)
        if row.logit_scale == "always" or (row.logit_scale == "meta" and self.number("logit_scale") != 0.0):
            cur = self.scale(cur)
        if softcap:
            cur = self.soft_cap(cur)
        cur.is_output = True
        self.expand(cur)

    # --- a layer

    def build_layer(self, il: int, residual: Tensor, *, is_last: bool) -> Tensor:
        """One layer, its residual sums included."""
        row = self.row
        normed = self.input_norm(il, residual)
        cur = self.mix(il, normed)
        if is_last and row.rows_at == "last_layer":
            if row.parallel and row.is_parallel_from_norm:
                cur, residual, normed = self.rows_out(cur, residual, normed)
            else:
                cur, residual = self.rows_out(cur, residual)
        if row.parallel:
            return self.parallel_sum(il, cur, residual, normed)
        if row.post_attention_norm:
            cur = self.layer_norm(cur, il, row.post_attention_norm, row.norm)
        cur = self.residual_scaled(cur)
        middle = self.add(cur, residual)
        cur = self.feed_forward(il, middle)
        if row.post_ffn_norm:
            cur = self.layer_norm(cur, il, row.post_ffn_norm, row.norm, is_pinned=row.is_post_ffn_norm_pinned)
        return self.add(self.residual_scaled(cur), middle)

    def residual_scaled(self, cur: Tensor) -> Tensor:
        """The block's result, scaled where the metadata has a residual scale."""
        row = self.row
        has_scale = row.residual_scale == "always" or (
            row.residual_scale == "meta" and self.number("residual_scale") != 0.0
        )
        return self.scale(cur) if has_scale else cur

    def parallel_sum(self, il: int, attn: Tensor, residual: Tensor, normed: Tensor) -> Tensor:
        """Feed-forward beside attention: the three sums in the row's order."""
        source = normed if self.row.is_parallel_from_norm else residual
        if not self.row.is_parallel_from_norm:
            source = self.layer_norm(source, il, self.row.ffn_norm, self.row.norm)
        parts = {"a": attn, "f": self.feed(il, source), "r": residual}
        first, second, third = (parts[letter] for letter in self.row.parallel)
        return self.add(self.add(first, second), third)

    def input_norm(self, il: int, cur: Tensor) -> Tensor:
        """The norm before attention."""
        if self.w(il, "attn_norm") is None and self.row.norms_exist:
            return cur
        return self.layer_norm(cur, il, "attn_norm", self.row.norm)

    def mix(self, il: int, cur: Tensor) -> Tensor:
        """Attention, or the layer's recurrent block."""
        if self.layer(il).is_recurrent and self.row.recurrent == "gdn":
            self.expand(cur)
            return self.gated_delta_layer(il, cur)
        if self.row.attention == "mla":
            return self.latent_attention(il, cur)
        if self.row.attention == "gated_q":
            self.expand(cur)
            return self.gated_query_attention(il, cur)
        return self.plain_attention(il, cur)

    # --- attention

    def plain_attention(self, il: int, cur: Tensor) -> Tensor:
        """Q, K and V, their norms and rope, attention, output projection."""
        row, facts = self.row, self.layer(il)
        q, k, v = self.split_heads(il, cur)
        q, k = self.positioned(il, q, k)
        if row.has_q_scale:
            q = self.scale(q)
        if not row.is_cached:
            return self.attention_no_cache(il, q, k, v)
        sinks = self.w(il, "attn_sinks")
        return self.attention(
            il,
            q,
            k,
            v,
            has_wo_bias=row.has_wo_bias,
            sinks=sinks,
            is_windowed=any(layer.window_tokens is not None for layer in self.facts.layers),
            is_capped=row.is_attention_capped or facts.n_head < 0,
        )

    def head_size(self, il: int) -> int:
        """n_embd_head_k of the layer."""
        owner = self.layer(il).cache_layer
        caches = self.layer(il if owner is None else owner).caches
        if caches:
            return caches[0].k_head
        n_head = self.layer(il).n_head
        return self.integer("attention.key_length", self.n_embd // n_head if n_head else 0)

    def split_heads(self, il: int, cur: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Q, K and V by head."""
        facts = self.layer(il)
        size = self.head_size(il)
        heads, sizes = (facts.n_head, facts.n_head_kv, facts.n_head_kv), (size, size, size)
        if self.row.qk_norm != "flat":
            return self.qkv(cur, il, heads, sizes)
        q, k, v = self.qkv(cur, il, heads, sizes, is_flat=True)
        q, k = self.qk_normed(il, q, k)
        q, k, v = (self.reshape(t, size, n, self.n_tokens) for t, n in zip((q, k, v), heads, strict=True))
        return q, k, v

    def qk_normed(self, il: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Q and K after their norms, where the layer has them."""
        kind = self.row.qk_norm_kind
        if self.w(il, "attn_q_norm") is not None:
            q = self.layer_norm(q, il, "attn_q_norm", kind)
        if self.w(il, "attn_k_norm") is not None:
            k = self.layer_norm(k, il, "attn_k_norm", kind)
        return q, k

    def positioned(self, il: int, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Q and K normed and roped in the row's order."""
        if self.row.qk_norm == "before":
            q, k = self.qk_normed(il, q, k)
        if self.has_rope(il):
            factors = self.rope_factors(il)
            q, k = self.rope(q, self.positions, factors), self.rope(k, self.positions, factors)
        if self.row.qk_norm == "after":
            q, k = self.qk_normed(il, q, k)
        return q, k

    def has_rope(self, il: int) -> bool:
        """Whether the layer's Q and K are roped."""
        rope = self.row.rope
        if rope == "swa":
            return self.layer(il).window_tokens is not None
        return rope == "all"

    def rope_factors(self, il: int) -> Tensor | None:
        """The layer's copy of the rope factors for the context in use (get_rope_factors)."""
        if not self.row.has_rope_factors:
            return None
        original = self.integer("rope.scaling.original_context_length", self.facts.n_ctx_train)
        kind = "long" if self.context.n_ctx_seq > original else "short"
        for name in ("rope_freqs.weight", f"rope_factors_{kind}.weight"):
            if (leaf := self.weight(name, il, key=f"{name}@{il}")) is not None:
                return leaf
        return None

    # --- feed-forward

    def feed_forward(self, il: int, cur: Tensor) -> Tensor:
        """The norm before the feed-forward block, and the block."""
        name = self.row.ffn_norm
        if self.w(il, name) is not None or not self.row.norms_exist:
            cur = self.layer_norm(cur, il, name, self.row.norm)
        return self.feed(il, cur)

    def feed(self, il: int, cur: Tensor) -> Tensor:
        """The feed-forward block of the layer: dense, or experts with or without a shared one."""
        row = self.row
        if self.w(il, "ffn_gate_inp") is None:
            return self.ffn(cur, il, row.activation, has_bias=row.has_ffn_bias)
        if row.is_shared_first and self.w(il, "ffn_up_shexp") is not None:
            shared = self.ffn(cur, il, row.activation, suffix="_shexp")
            return self.add(self.moe(cur, il, self.routing()), shared)
        out = self.moe(cur, il, self.routing())
        if self.w(il, "ffn_up_shexp") is None:
            return out
        return self.add(out, self.shared_expert(il, cur))

    def shared_expert(self, il: int, cur: Tensor) -> Tensor:
        """The expert that every token uses, weighed by its gate where there is one."""
        out = self.ffn(cur, il, self.row.activation, suffix="_shexp", has_bias=False)
        if not self.row.shared_gate:
            return out
        gate = self.lora_mm(self.w(il, "ffn_gate_inp_shexp"), cur)
        if self.row.shared_gate == "silu_div":
            return self.mul(out, self.div(self.unary(gate, "silu"), gate))
        return self.mul(out, self.unary(gate, "sigmoid"))

    def routing(self) -> Routing:
        """How the row's architecture routes."""
        row = self.row
        meta = self.meta_routing()
        return Routing(
            gating=meta.gating if row.gating == "meta" else row.gating,
            has_norm=meta.has_norm if row.has_expert_norm is None else row.has_expert_norm,
            is_scaled=meta.is_scaled and row.is_expert_scaled,
            activation=row.expert_activation,
        )

    def gated_query_attention(self, il: int, cur: Tensor) -> Tensor:
        """Attention whose Q projection also gives a gate for the result (Qwen3-Next)."""
        facts, size = self.layer(il), self.head_size(il)
        heads, n = (facts.n_head, facts.n_head_kv, facts.n_head_kv), self.n_tokens
        full, k, v = self.qkv(cur, il, heads, (2 * size, size, size), is_flat=True)
        full = self.reshape(full, 2 * size, facts.n_head, n, 1)
        shape = (size, facts.n_head, n, 1)
        q = self.view(full, shape, full.nb[1:])
        gate = self.view(full, shape, full.nb[1:], 4 * size)
        k = self.reshape(k, size, facts.n_head_kv, n)
        v = self.reshape(v, size, facts.n_head_kv, n)
        q, k = self.positioned(il, q, k)
        cur = self.attention(il, q, k, v, wo=None)
        gate = self.unary(self.cont(gate, size * facts.n_head, n), "sigmoid")
        return self.lora_mm(self.w(il, "attn_output"), self.mul(cur, gate))
