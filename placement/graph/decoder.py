"""The decoder that almost every architecture is: attention or state, feed-forward, residual sums by layer.

`Decoder.build` follows a `Row`; blocks that only some architectures have come from the builders it inherits.
"""

from __future__ import annotations

from collections.abc import Sequence

from placement.architecture import Architecture
from placement.graph.context import Batch, Context
from placement.graph.gemma import SPARSE_LAYERS, GemmaBuilder
from placement.graph.rows import Row
from placement.graph.tensor import Tensor
from placement.model import Model

NO_ROPE_STEP = 4  # n_no_rope_layer_step
ROPED_BAICHUAN_LAYERS = 32
UNNORMED_LLAMA4_EXPERTS = 128


class Decoder(GemmaBuilder):
    """Builds the graph of one batch; `layers` may leave out layers that repeat others."""

    def __init__(self, model: Model, facts: Architecture, row: Row, context: Context, batch: Batch) -> None:
        super().__init__(model, facts, context, batch)
        self.row = row
        self.has_mixed_batch = row.has_mixed_batch
        self.has_embedding_scale = self.is_on(row.embedding_scale, "embedding_scale")
        self.n_deepstack = self._n_deepstack()
        self.n_pos_per_token = row.n_pos_per_token or self._n_pos()
        self.unread = row.unread
        self.has_rope_factors = row.has_rope_factors
        self.is_window_unfactored = row.is_window_unfactored
        self.is_down_scaled = "d" in row.scaled
        self.layer_starts: list[int] = []
        self.leaf_starts: list[int] = []

    def build(self, layers: Sequence[int]) -> None:
        """Emit the whole graph; `layer_starts` then holds where in `nodes` each layer begins."""
        cur = self.embeddings()
        if self.row.attention == "compressed":
            self.expand(self.mask(0))
        if self.row.has_pools and self.row.structure != "gated_streams":
            self.pool_inputs()
        for i, il in enumerate(layers):
            self._mark_start()
            cur = self.build_layer(il, cur, is_last=i == len(layers) - 1)
        self._mark_start()
        self.head(cur)

    def _mark_start(self) -> None:
        self.layer_starts.append(len(self.nodes))
        self.leaf_starts.append(len(self.leafs))

    def layer_traits(self, il: int) -> tuple[object, ...]:
        """What the layer's number decides beyond its facts and tensors."""
        if self.row.structure == "cycles":
            return (il,)
        if self.row.structure == "altup":
            return (il < SPARSE_LAYERS,)
        step = self.checkpoint_step
        checkpoint = (il // step, self.is_checkpoint(il)) if step else ()
        return self.has_rope(il), self._deepstack_part(il), checkpoint

    def is_on(self, feature: str, key: str) -> bool:
        """Whether a feature holds: "always", or "meta" and its metadata key is set."""
        return feature == "always" or (feature == "meta" and self.number(key) != 0.0)

    def _n_pos(self) -> int:
        sections = self.model.get("rope.dimension_sections", ())
        return 4 if isinstance(sections, (tuple, list)) and any(sections[:2]) else 1

    def _n_deepstack(self) -> int:
        if self.row.deepstack == "after":
            return self.integer("n_deepstack_layers")
        return len({i for i in self._deepstack_map() if i >= 0}) if self.row.deepstack else 0

    def _deepstack_map(self) -> Sequence[int]:
        mapping = self.model.get("deepstack_mapping", ())
        return mapping if isinstance(mapping, (tuple, list)) else ()

    # --- the ends

    def embeddings(self) -> Tensor:
        """The first layer's input."""
        row = self.row
        cur = self.embed(2.0 if row.embedding_scale == "rows" else 1.0)
        if row.embedding_scale == "graph":
            cur = self.scale(cur)
        if row.has_position_table and (table := self.weight("position_embd.weight")) is not None:
            cur = self.add(cur, self.get_rows(table, self.positions))
        if row.embedding_norm:
            weight = self.weight("token_embd_norm.weight") if row.embedding_norm == "weights" else None
            bias = self.weight("token_embd_norm.bias")
            cur = self.build_norm(cur, weight, bias, row.norm, row.embedding_norm_pin)
        self.skip = cur
        if row.structure in ("gemma4", "altup"):
            self.per_layer_inputs(cur)
        if row.structure == "altup":
            return self.altup_widened(cur)
        if row.structure == "gated_streams":
            return self.gated_widened(cur)
        return self.widened(cur) if row.structure.startswith("hyper") else cur

    def head(self, cur: Tensor) -> None:
        """The last norm and the logits."""
        row = self.row
        if row.structure.startswith("hyper"):
            cur = self.hyper_rows(cur)
            cur = self.hyper_mean(cur) if row.structure == "hyper_mean" else self.hyper_head(cur)
        if row.structure == "altup":
            cur = self.altup_head(cur)
        if row.structure == "gated_streams":
            cur = self.gated_head(cur)
        if row.structure == "stack":
            cur = self.stack_mixed(cur, self.weight("output_res_score.weight"))
        if row.rows_at == "end_plain":
            (cur,) = self.rows_out(cur)
        if row.rows_at == "end":
            cur.is_output = True
            (cur,) = self.rows_out(cur)
        if row.has_output_norm:
            weight, bias = self.weight(row.output_norm), self.weight("output_norm.bias")
            cur = self.build_norm(cur, weight, bias, row.norm)
        if row.rows_at == "end_normed":
            cur.is_output = True
            (cur,) = self.rows_out(cur)
        weight = self.weight("cls.output.weight") if row.has_class_head else None
        if weight is not None:
            classes = self.lora_mm(weight, cur)
            bias = self.weight("cls.output.bias")
            classes = self.add(classes, bias) if bias is not None else classes
            classes.is_output = True
            self.expand(classes)
        cur.is_output = weight is None
        self.logits(cur)

    def logits(self, cur: Tensor) -> None:
        """The output matrix and what scales its result."""
        row = self.row
        if row.output_scale:
            cur = self.scale(cur)
        cur = self.lora_mm(self.output_weight(), cur)
        bias = self.weight("output.bias") if "l" not in row.unread else None
        if bias is not None:
            cur = self.add(cur, bias)
        if self.is_on(row.logit_scale, "logit_scale"):
            cur = self.scale(cur)
        if self.is_on(row.softcap, "final_logit_softcapping"):
            cur = self.soft_cap(cur)
        cur.is_output = True
        self.expand(cur)

    # --- a layer

    def build_layer(self, il: int, residual: Tensor, *, is_last: bool) -> Tensor:
        """One layer, its residual sums included."""
        row = self.row
        if row.structure.startswith("hyper"):
            return self.hyper_layer(il, residual)
        if row.structure == "gated_streams":
            return self.gated_layer(il, residual, is_last=is_last)
        if row.structure == "gemma4":
            return self.gemma4_layer(il, residual)
        if row.structure == "altup":
            return self.altup_layer(il, residual)
        if row.structure == "stack":
            return self.stack_layer(il, residual)
        if row.structure == "cycles":
            residual = self.cycle_begun(il, residual)
        if row.deepstack == "before":
            residual = self._deepstacked(il, residual)
        self.layer_input = residual
        if row.feed == "router_first":
            self.router_logits = self.lora_mm(self.w(il, "ffn_gate_inp"), residual)
        normed = self.input_norm(il, residual)
        cur = self.mix(il, normed)
        skip = self.skip
        if row.has_rows_after_norm:
            cur = self.attention_normed(il, cur)
        if row.has_rows_after_sum:
            residual = self.add(cur, residual)
        if is_last and row.rows_at == "last_layer":
            cur, residual, normed, skip = self._last_rows(cur, residual, normed, skip)
        if row.parallel and self._is_parallel(il):
            cur = self.parallel_sum(il, cur, residual, normed)
        elif row.recurrent == "lightning":
            cur = self.normed_sum(il, cur, normed)
        else:
            cur = self.serial_sum(il, cur, residual)
        if row.has_skip:
            cur = self.add(cur, self.mul(skip, self.need(self.w(il, "layer_output_scale"))))
        if row.structure == "cycles":
            cur = self.cycle_ended(il, cur)
        return self._deepstacked(il, cur) if row.deepstack == "after" else cur

    def stack_layer(self, il: int, residual: Tensor) -> Tensor:
        """A layer whose blocks read a mix of the residual and its checkpoints."""
        cur = self.stack_mixed(residual, self.w(il, "attn_res_score"))
        if self.is_checkpoint(il):
            self.keep_checkpoint(residual)
        cur = self.mix(il, self.input_norm(il, cur))
        residual = cur if self.is_checkpoint(il) else self.add(residual, cur)
        cur = self.stack_mixed(residual, self.w(il, "ffn_res_score"))
        return self.add(residual, self.feed_forward(il, cur))

    def hyper_layer(self, il: int, wide: Tensor) -> Tensor:
        """A layer whose blocks read and write the streams of a wide residual."""
        cur, post, comb = self.hyper_before(il, wide, "hc_attn")
        cur = self.mix(il, self.input_norm(il, cur))
        wide = self.hyper_after(il, cur, wide, post, comb)
        cur, post, comb = self.hyper_before(il, wide, "hc_ffn")
        if self.row.structure == "hyper_expanded":
            for tensor in (wide, post, self.need(comb)):
                self.expand(tensor)
        return self.hyper_after(il, self.feed_forward(il, cur), wide, post, comb)

    def _last_rows(self, cur: Tensor, residual: Tensor, normed: Tensor, skip: Tensor) -> list[Tensor]:
        """The rows that give logits, of all that the layer still reads; unread ones never enter the graph."""
        cur, residual, normed, skip, self.router_logits = self.rows_out(
            cur, residual, normed, skip, self.router_logits or cur
        )
        self.layer_input = residual
        return [cur, residual, normed, skip]

    def serial_sum(self, il: int, cur: Tensor, residual: Tensor) -> Tensor:
        """Attention added to the residual, then feed-forward added to that."""
        row = self.row
        if row.feed in ("none", "layer"):
            return self.add(cur, residual)
        if not row.has_rows_after_norm:
            cur = self.attention_normed(il, cur)
        cur = self.residual_scaled(cur)
        middle = residual
        if not row.has_rows_after_sum:
            middle = self.add(residual, cur) if row.is_residual_first else self.add(cur, residual)
        cur = self.feed_forward(il, middle)
        if row.post_ffn_norm:
            name = next(n for n in row.post_ffn_norm.split("|") if self.w(il, n) is not None)
            cur = self.layer_norm(cur, il, name, row.norm, is_pinned=row.is_post_ffn_norm_pinned)
        if row.feed == "arctic":
            return cur
        cur = self.residual_scaled(cur)
        return self.add(middle, cur) if row.is_middle_first else self.add(cur, middle)

    def normed_sum(self, il: int, cur: Tensor, normed: Tensor) -> Tensor:
        """Sums with what the norms gave instead of what they read (MiniMax-01)."""
        middle = self.layer_norm(self.add(cur, self.scale(normed)), il, "ffn_norm")
        return self.add(self.feed(il, middle), self.scale(middle))

    def attention_normed(self, il: int, cur: Tensor) -> Tensor:
        """The attention's result after its norm, where the row has one."""
        row = self.row
        if not row.post_attention_norm:
            return cur
        is_pinned = row.is_post_attention_norm_pinned
        return self.layer_norm(cur, il, row.post_attention_norm, row.norm, is_pinned=is_pinned)

    def residual_scaled(self, cur: Tensor) -> Tensor:
        """The block's result, scaled where the metadata has a residual scale."""
        return self.scale(cur) if self.is_on(self.row.residual_scale, "residual_scale") else cur

    def _is_parallel(self, il: int) -> bool:
        if self.row.parallel == "neox":
            return bool(self.model.get("use_parallel_residual", True))
        return self.row.parallel != "stablelm" or self.w(il, "ffn_norm") is None

    def parallel_sum(self, il: int, attn: Tensor, residual: Tensor, normed: Tensor) -> Tensor:
        """Feed-forward beside attention: the three sums in the row's order."""
        order = self.row.parallel
        if order == "stablelm":
            return self.add(self.feed(il, normed), self.add(attn, residual))
        if order == "neox":
            order, normed = "fra", self.layer_norm(residual, il, "ffn_norm", self.row.norm)
        parts = {"a": attn, "f": self.feed(il, normed), "r": residual}
        first, second, third = (parts[letter] for letter in order)
        return self.add(self.add(first, second), third)

    def _deepstacked(self, il: int, cur: Tensor) -> Tensor:
        """The layer's part of the input embeddings added (deepstack)."""
        source, part = self.token_input, self._deepstack_part(il)
        if source is None or part < 0:
            return cur
        view = self.view_2d(source, self.n_embd, self.n_tokens, source.nb[1], part * self.n_embd * 4)
        return self.add(cur, view)

    def _deepstack_part(self, il: int) -> int:
        """Which part of the input embeddings the layer adds; -1 for none."""
        if self.row.deepstack == "after":
            return il + 1 if il < self.n_deepstack else -1
        mapping = self._deepstack_map()
        return int(mapping[il]) if 0 < il < len(mapping) else -1

    def input_norm(self, il: int, cur: Tensor) -> Tensor:
        """The norm before attention."""
        if self.w(il, "attn_norm") is None and self.row.has_norm_weights:
            return cur
        return self.layer_norm(cur, il, "attn_norm", self.row.norm)

    def mix(self, il: int, cur: Tensor) -> Tensor:
        """Attention, or the layer's recurrent block."""
        row = self.row
        if row.is_norm_expanded:
            self.expand(cur)
        if row.recurrent == "mamba2_beside":
            attn = self.plain_attention(il, cur)
            return self.add(attn, self.mamba2_layer(il, self.input_norm(il, self.layer_input)))
        if self.layer(il).is_recurrent:
            return self.recurrent_layer(il, cur)
        if row.feed == "layer" and self.layer(il).n_ff:
            return self.feed(il, cur)
        if row.attention == "mla":
            return self.latent_attention(il, cur)
        if row.attention == "mla_plain":
            return self.latent_attention(il, cur, has_rope=False, is_reshaped=False)
        if row.attention == "mla_gated":
            out = self.latent_attention(il, cur, is_reshaped=False, wo=None)
            return self.head_gated(il, out, cur)
        if row.attention == "compressed":
            return self.compressed_attention(il, cur)
        if row.attention == "pools_latent":
            return self.pooled_latent_attention(il, cur)
        if row.attention in ("dsa", "mla_plain_gated"):
            return self.sparse_attention(il, cur)
        if row.attention in ("gated_q", "gated_q_views"):
            return self.gated_query_attention(il, cur)
        if self.layer(il).n_head_kv == 0:
            return self.lora_mm(self.w(il, "attn_output"), cur) if self.layer(il).n_head else cur
        return self.plain_attention(il, cur)

    def recurrent_layer(self, il: int, cur: Tensor) -> Tensor:
        """The row's recurrent block."""
        kind = self.row.recurrent
        if kind.startswith("gdn"):
            return self.gated_delta_layer(il, cur, is_split=kind != "gdn", is_padded=kind == "gdn_padded")
        if kind.startswith("kda"):
            return self.kda_layer(il, cur, kind)
        blocks = {
            "mamba": self.mamba_layer,
            "mamba2": self.mamba2_layer,
            "plamo2": self.plamo2_layer,
            "shortconv": self.shortconv_layer,
            "lightning": self.lightning_layer,
        }
        return blocks[kind](il, cur)

    # --- attention

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
