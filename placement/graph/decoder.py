"""The decoder that almost every architecture is: attention or state, feed-forward, residual sums by layer.

`Decoder.build` follows a `Row`; blocks that only some architectures have come from the builders it inherits.
"""

from __future__ import annotations

from collections.abc import Sequence

from placement.architecture import Architecture
from placement.graph.builder import UnknownGraph
from placement.graph.context import Batch, Context
from placement.graph.gemma import SPARSE_LAYERS
from placement.graph.heads import HeadBuilder
from placement.graph.row import Row
from placement.graph.tensor import Tensor
from placement.model import Model

CHAMELEON_IMAGE_TOKENS = 8192


class Decoder(HeadBuilder):
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
        if bool(self.model.get("swin_norm", False)):
            raise UnknownGraph("norms after the blocks")
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
        if self.row.structure in ("cycles", "loops"):
            return (self.block_of(il), il)
        if self.row.structure == "altup":
            return (il < SPARSE_LAYERS,)
        step = self.checkpoint_step
        checkpoint = (il // step, self.is_checkpoint(il)) if step else ()
        return self.has_rope(il), self._deepstack_part(il), checkpoint

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
        if row.has_image_logits:
            nothing = self.clamp(self.new("F32", CHAMELEON_IMAGE_TOKENS))
            cur = self.like("SET", cur, nothing)
        cur.is_output = True
        self.expand(cur)

    # --- a layer

    def build_layer(self, il: int, residual: Tensor, *, is_last: bool) -> Tensor:
        """One layer, its residual sums included."""
        structure, self.slot = self.row.structure, il
        if structure == "gated_streams":
            return self.gated_layer(il, residual, is_last=is_last)
        if structure == "cycles":
            return self.cycle_ended(il, self.usual_layer(il, self.cycle_begun(il, residual), is_last=is_last))
        if structure == "loops":
            return self.loop_ended(il, self.usual_layer(il, residual, is_last=is_last), is_last=is_last)
        layers = {
            "hyper": self.hyper_layer,
            "gemma4": self.gemma4_layer,
            "altup": self.altup_layer,
            "stack": self.stack_layer,
        }
        unusual = layers.get(structure.partition("_")[0])
        return unusual(il, residual) if unusual else self.usual_layer(il, residual, is_last=is_last)

    def usual_layer(self, il: int, residual: Tensor, *, is_last: bool) -> Tensor:
        """Norm, attention, sum, norm, feed-forward, sum, in the row's order."""
        row = self.row
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
