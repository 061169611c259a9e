"""Mixture-of-experts blocks: routing, the experts' projections and their weighted sum (build_moe_ffn)."""

from __future__ import annotations

from dataclasses import dataclass

from placement.graph.attention import AttentionBuilder
from placement.graph.tensor import Tensor


@dataclass(frozen=True, slots=True)
class Routing:
    """How an architecture chooses and weighs its experts."""

    gating: str = "softmax"  # softmax, sigmoid, softmax_weight, sqrt_softplus
    has_norm: bool = True
    is_scaled: bool = False
    activation: str = "silu"
    is_weighted_before: bool = False  # Llama 4: weights applied to the input
    selects_by: str = "probs"  # or logits, sigmoid: what the best experts are chosen by
    clamp: str = ""
    is_scaled_by_tensor: bool = False
    has_exact_down: bool = False


GATING = {1: "softmax", 2: "sigmoid", 3: "softmax_weight", 4: "sqrt_softplus"}


class ExpertBuilder(AttentionBuilder):
    """Adds expert blocks."""

    def moe(
        self,
        cur: Tensor,
        il: int,
        routing: Routing,
        *,
        logits: Tensor | None = None,
        selected: Tensor | None = None,
        suffix: str = "_exps",
        n_used: int | None = None,
        is_shared_by_group: bool = False,
    ) -> Tensor:
        """Route the tokens through the experts and add up what they give.

        With `is_shared_by_group` the chosen experts' numbers are divided by their group's size.
        """
        n_expert = self.facts.n_expert
        n_used = n_used or self.layer(il).n_expert_used
        logits = self._routed(il, cur) if logits is None else logits
        if (bias := self.b(il, "ffn_gate_inp")) is not None:
            logits = self.add(logits, bias)
        probs = self._probabilities(logits, routing)
        if selected is None:
            selected = self._select(self._selection(probs, logits, il, routing), n_expert, n_used)
        if is_shared_by_group:
            selected = self.cast(self.scale(self.cast(selected, "F32")), "I32")
        weights = self._weights(probs, selected, n_expert, n_used, routing)
        self.expand(weights)
        cur = self.reshape(cur, cur.ne[0], 1, cur.ne[1])
        if routing.is_weighted_before:
            cur = self.mul(self.repeat(cur, cur.ne[0], n_used, cur.ne[2]), weights)
        out = self._experts(cur, il, selected, routing, suffix)
        if not routing.is_weighted_before:
            out = self.mul(out, weights)
        self.expand(out)
        return self._sum(out, n_used)

    def _routed(self, il: int, cur: Tensor) -> Tensor:
        return self.lora_mm(self.w(il, "ffn_gate_inp"), cur)

    def _probabilities(self, logits: Tensor, routing: Routing) -> Tensor:
        if routing.gating == "softmax":
            return self.soft_max(logits)
        if routing.gating == "sigmoid":
            return self.unary(logits, "sigmoid")
        if routing.gating == "sqrt_softplus":
            return self.like("SQRT", self.unary(logits, "softplus"))
        return logits

    def _selection(self, probs: Tensor, logits: Tensor, il: int, routing: Routing) -> Tensor:
        bias = self.b(il, "exp_probs_b") or self.w(il, "exp_probs_b")
        if bias is not None:
            probs = self.add(probs, bias)
        if routing.selects_by == "sigmoid":
            return self.unary(logits, "sigmoid")
        return logits if routing.selects_by == "logits" else probs

    def _select(self, scores: Tensor, n_expert: int, n_used: int) -> Tensor:
        n_groups = self.integer("expert_group_count")
        if n_groups > 1:
            scores = self._mask_groups(scores, n_expert, n_groups)
        return self.argsort_top_k(scores, n_used)

    def _mask_groups(self, scores: Tensor, n_expert: int, n_groups: int) -> Tensor:
        """Keep the experts of the best groups only (DeepSeek V3)."""
        n_tokens = scores.ne[1]
        groups = self.reshape(scores, n_expert // n_groups, n_groups, n_tokens)
        best = self.argsort_top_k(groups, 2)
        best = self.get_rows(self.reshape(groups, 1, *groups.ne[:3]), best)
        best = self.sum_rows(self.reshape(best, *best.ne[1:]))
        best = self.reshape(best, *best.ne[1:3])
        chosen = self.argsort_top_k(best, self.integer("expert_group_used_count"))
        kept = self.get_rows(groups, chosen)
        masked = self.set_rows(self.like("FILL", groups), kept, chosen)
        return self.reshape(masked, n_expert, n_tokens)

    def _weights(
        self, probs: Tensor, selected: Tensor, n_expert: int, n_used: int, routing: Routing
    ) -> Tensor:
        n_tokens = probs.ne[1]
        weights = self.get_rows(self.reshape(probs, 1, n_expert, n_tokens), selected)
        if routing.gating == "softmax_weight":
            weights = self.soft_max(self.reshape(weights, n_used, n_tokens))
            weights = self.reshape(weights, 1, n_used, n_tokens)
        if routing.has_norm:
            weights = self.reshape(weights, n_used, n_tokens)
            weights = self.div(weights, self.clamp(self.sum_rows(weights)))
            weights = self.reshape(weights, 1, n_used, n_tokens)
        return self.scale(weights) if routing.is_scaled else weights

    def _expert_mm(
        self,
        il: int,
        name: str,
        cur: Tensor,
        selected: Tensor,
        has_scale: bool,
        is_exact: bool = False,
    ) -> Tensor:
        """One stacked projection with its scale and bias (build_lora_mm_id)."""
        weight = self.need(self.w(il, name))
        out = self.mul_mat_id(weight, cur, selected)
        out.kind = "prec_f32" if is_exact else ""
        scale = self.weight(f"blk.{il}.{name}.scale", il) if has_scale else None
        if scale is not None:
            n_expert, n_tokens = scale.ne[0], cur.ne[2]
            rows = self.repeat(self.reshape(scale, 1, n_expert, 1), 1, n_expert, n_tokens)
            out = self.mul(out, self.get_rows(rows, selected))
        bias = self.b(il, name)
        return self.add_id(out, bias, selected) if bias is not None else out

    def _experts(self, cur: Tensor, il: int, selected: Tensor, routing: Routing, suffix: str) -> Tensor:
        has_scale = routing.is_scaled_by_tensor
        if self.w(il, f"ffn_gate_up{suffix}") is not None:
            both = self._expert_mm(il, f"ffn_gate_up{suffix}", cur, selected, has_scale)
            half = both.ne[0] // 2
            shape = (half, *both.ne[1:3])
            gate = self.view_3d(both, *shape, both.nb[1], both.nb[2])
            up = self.view_3d(both, *shape, both.nb[1], both.nb[2], half * both.nb[0])
            cur = self._expert_activation(gate, up, routing)
        else:
            up = self._expert_mm(il, f"ffn_up{suffix}", cur, selected, has_scale)
            if self.w(il, f"ffn_gate{suffix}") is not None:
                gate = self._expert_mm(il, f"ffn_gate{suffix}", cur, selected, has_scale)
                cur = self._expert_activation(gate, up, routing)
            else:
                cur = self.activate(up, routing.activation, il)
        return self._expert_mm(il, f"ffn_down{suffix}", cur, selected, has_scale, routing.has_exact_down)

    def _expert_activation(self, gate: Tensor, up: Tensor, routing: Routing) -> Tensor:
        return self.gated(gate, up, routing.activation, routing.clamp)

    def _sum(self, out: Tensor, n_used: int) -> Tensor:
        n_embd, n_tokens = out.ne[0], out.ne[2]
        views = [self.view_2d(out, n_embd, n_tokens, out.nb[2], i * out.nb[1]) for i in range(n_used)]
        for view in views:
            self.expand(view)
        total = views[0]
        for view in views[1:]:
            total = self.add(total, view)
            self.expand(total)
        return self.cont(total) if n_used == 1 else total
