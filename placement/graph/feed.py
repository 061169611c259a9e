"""Feed-forward blocks by row: dense, experts, a shared expert, and the few that differ."""

from __future__ import annotations

import functools

from placement.graph.experts import GATING, Routing
from placement.graph.pools import PoolBuilder
from placement.graph.row import Row
from placement.graph.tensor import Tensor

NO_LIMIT = 1e-6  # limits up to this are none


class FeedBuilder(PoolBuilder):
    """Adds the feed-forward block of a row."""

    row: Row
    layer_input: Tensor  # what the layer's first norm reads
    skip: Tensor  # the embeddings
    router_logits: Tensor | None = None  # of a router that reads the layer's input

    @functools.cached_property
    def has_windows(self) -> bool:
        """Whether any layer's attention has a sliding window."""
        return any(layer.window_tokens is not None for layer in self.facts.layers)

    def head_sizes(self, il: int) -> tuple[int, int]:
        """n_embd_head_k and n_embd_head_v of the layer."""
        owner = self.layer(il).cache_layer
        caches = self.layer(il if owner is None else owner).caches
        if caches:
            return caches[0].k_head, caches[0].v_head
        n_head = self.layer(il).n_head
        default = self.n_embd // n_head if n_head else 0
        return self.integer("attention.key_length", default), self.integer("attention.value_length", default)

    def feed_forward(self, il: int, cur: Tensor) -> Tensor:
        """The norm before the feed-forward block, and the block."""
        name = self.row.ffn_norm
        source = cur
        if self.w(il, name) is not None or not self.row.has_norm_weights:
            cur = self.layer_norm(cur, il, name, self.row.norm)
        if self.row.feed == "arctic":
            return self._arctic(il, cur, source)
        return self.feed(il, cur)

    def feed(self, il: int, cur: Tensor) -> Tensor:
        """The feed-forward block of the layer: dense, or experts with or without a shared one."""
        row = self.row
        if self.w(il, "ffn_gate_inp") is None or row.feed == "dense":
            clamp = self.clamp_of(il, "swiglu_clamp_shexp")
            return self.ffn(cur, il, row.activation, clamp=clamp, is_scaled="f" in row.scaled)
        if row.feed == "shared_first":
            shared = self.shared_expert(il, cur)
            return self.add(self.moe(cur, il, self.routing(il)), shared)
        if row.feed == "router_first":
            return self.moe(cur, il, self.routing(il), logits=self.router_logits)
        if row.feed == "grove":
            return self._grove(il, cur)
        if row.feed in ("layer", "latent"):
            return self._latent_experts(il, cur)
        out = self.moe(cur, il, self.routing(il), selected=self._hashed(il))
        if row.feed == "grok" and self.w(il, "ffn_up") is not None:
            return self.scale(self.add(self.ffn(cur, il, row.activation), out))
        if self.w(il, "ffn_up_shexp") is None:
            return out
        out = self.add(out, self.shared_expert(il, cur))
        return self.scale(out) if row.is_sum_scaled else out

    def _hashed(self, il: int) -> Tensor | None:
        """The experts that the tokens' numbers choose in DeepSeek 4's first layers."""
        if il >= self.integer("hash_layer_count"):
            return None
        return self.get_rows(self.need(self.w(il, "ffn_gate_tid2eid")), self.inputs["tokens"])

    def shared_expert(self, il: int, cur: Tensor) -> Tensor:
        """The expert that every token uses, weighed by its gate where there is one."""
        row = self.row
        out = self.ffn(
            cur,
            il,
            row.shared_activation,
            suffix="_shexp",
            clamp=self.clamp_of(il, "swiglu_clamp_shexp"),
            is_scaled="s" in row.scaled,
        )
        if not row.shared_gate:
            return out
        gate = self.lora_mm(self.w(il, "ffn_gate_inp_shexp"), cur)
        if row.shared_gate == "silu_div":
            return self.mul(out, self.div(self.unary(gate, "silu"), gate))
        return self.mul(out, self.unary(gate, "sigmoid"))

    def clamp_of(self, il: int, key: str) -> str:
        """How SiLU is limited in this layer: "", "split" or "fused"."""
        if not self.row.clamp:
            return ""
        limits = self.model.get(key, 0.0)
        limit = limits[il] if isinstance(limits, (tuple, list)) else limits
        if float(limit) <= NO_LIMIT:
            return ""
        is_fused = self.row.clamp == "fused" or (self.row.clamp == "fused_experts" and key.endswith("_exp"))
        return "fused" if is_fused else "split"

    def routing(self, il: int) -> Routing:
        """How the row's architecture routes."""
        row = self.row
        gating = GATING.get(self.integer("expert_gating_func"), row.default_gating)
        has_norm = bool(self.model.get("expert_weights_norm", False))
        return Routing(
            gating=gating if row.gating == "meta" else row.gating,
            has_norm=has_norm if row.has_expert_norm is None else row.has_expert_norm,
            is_scaled=self.number("expert_weights_scale") not in (0.0, 1.0) and row.is_expert_scaled,
            activation=row.expert_activation,
            is_weighted_before=row.is_weighted_before,
            selects_by=row.selects_by,
            clamp=self.clamp_of(il, "swiglu_clamp_exp"),
            is_scaled_by_tensor="e" in row.scaled,
            has_exact_down=row.has_exact_down,
        )

    def _latent_experts(self, il: int, cur: Tensor) -> Tensor:
        """Experts in a smaller space, and a shared expert outside it (Nemotron, Kimi K3)."""
        name = "ffn_latent" if self.row.feed == "layer" else "ffn_routed"
        down, up = self.w(il, f"{name}_down"), self.w(il, f"{name}_up")
        logits = self.lora_mm(self.w(il, "ffn_gate_inp"), cur)
        out = self.moe(cur if down is None else self.mul_mat(down, cur), il, self.routing(il), logits=logits)
        if self.w(il, f"{name}_norm") is not None:
            out = self.layer_norm(out, il, f"{name}_norm")
        out = out if up is None else self.mul_mat(up, out)
        return self.add(out, self.shared_expert(il, cur))

    def _arctic(self, il: int, normed: Tensor, source: Tensor) -> Tensor:
        """A dense block added to its input, and experts on the layer's input; residual included."""
        dense = self.add(self.ffn(normed, il, self.row.activation), source)
        routed = self.layer_norm(self.layer_input, il, "ffn_norm_exps")
        return self.add(self.moe(routed, il, self.routing(il)), dense)

    def _grove(self, il: int, cur: Tensor) -> Tensor:
        """Experts, and the smaller experts that a group of them shares."""
        logits = self.lora_mm(self.w(il, "ffn_gate_inp"), cur)
        routing = self.routing(il)
        out = self.moe(cur, il, routing, logits=logits)
        n_chunks = self.facts.n_expert // self.integer("experts_per_group", 1)
        n_used = min(self.layer(il).n_expert_used, n_chunks)
        shared = self.moe(
            out,
            il,
            routing,
            logits=logits,
            suffix="_chexps",
            n_used=n_used,
            is_shared_by_group=n_chunks != self.facts.n_expert,
        )
        return self.add(out, self.scale(shared))
