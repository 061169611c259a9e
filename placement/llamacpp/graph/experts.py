"""Feed-forward blocks, dense and of experts: routing, the experts' projections and their weighted sum.

Mirrors src/llama-graph.cpp (build_ffn, build_moe_ffn).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, assert_never

from placement.llamacpp.graph.builder import Builder, UnknownGraph
from placement.llamacpp.graph.row import Activation, SelectsBy
from placement.llamacpp.graph.tensor import GraphTensor

Gating = Literal["softmax", "sigmoid", "softmax_weight", "sqrt_softplus"]
SiluClamp = Literal["split", "fused"]  # in one operation or in several


@dataclass(frozen=True, slots=True)
class Routing:
    """How an architecture chooses and weighs its experts."""

    gating: Gating = "softmax"
    has_norm: bool = True
    is_scaled: bool = False
    activation: Activation = "silu"
    is_weighted_before: bool = False  # Llama 4: weights applied to the input
    selects_by: SelectsBy = "probs"  # what the best experts are selected by
    clamp: SiluClamp | None = None
    is_scaled_by_tensor: bool = False
    has_exact_down: bool = False


GATED_GLU = {"silu": "swiglu", "gelu": "geglu", "relu": "reglu", "swiglu_oai": "swiglu_oai"}
GATING: dict[int, Gating] = {1: "softmax", 2: "sigmoid", 3: "softmax_weight", 4: "sqrt_softplus"}


def ffn(
    builder: Builder,
    cur: GraphTensor,
    il: int,
    activation: Activation,
    *,
    suffix: str = "",
    clamp: SiluClamp | None = None,
    is_scaled: bool = False,
) -> GraphTensor:
    """A dense feed-forward block of `ffn_{up,gate,down}<suffix>`, parallel gate (build_ffn)."""
    if builder.w(il, f"ffn_up{suffix}") is None:  # nothing but the activation
        return activate(builder, cur, activation, il)
    up = linear(builder, cur, il, f"ffn_up{suffix}", is_scaled=is_scaled)
    if builder.w(il, f"ffn_gate{suffix}") is not None:
        gate = linear(builder, cur, il, f"ffn_gate{suffix}", is_scaled=is_scaled)
        cur = gated(builder, gate, up, activation, clamp)
    else:
        cur = activate(builder, up, activation, il)
    if builder.w(il, "ffn_sub_norm") is not None:
        cur = builder.layer_norm(cur, il, "ffn_sub_norm")
    return linear(
        builder, cur, il, f"ffn_down{suffix}", is_scaled=is_scaled or "ffn_down" in builder.row.scaled
    )


def linear(builder: Builder, cur: GraphTensor, il: int, name: str, *, is_scaled: bool = False) -> GraphTensor:
    """The projection `blk.<il>.<name>`, with its bias where there is one."""
    weight = builder.need(builder.w(il, name))
    cur = builder.mul_mat(weight, cur)
    bias = builder.b(il, name) if "ffn_bias" not in builder.row.unread else None
    cur = builder.add(cur, bias) if bias is not None else cur
    return builder.scaled(cur, weight) if is_scaled else cur


def gated(
    builder: Builder,
    gate: GraphTensor,
    up: GraphTensor,
    activation: Activation,
    clamp: SiluClamp | None = None,
) -> GraphTensor:
    """The activation of a gated block; `clamp` limits SiLU in one operation ("fused") or in several."""
    match activation:
        case "silu" if clamp == "fused":
            return builder.glu(gate, up, "swiglu_clamp")
        case "silu" if clamp == "split":
            up = builder.clamp(up)
            return builder.mul(builder.clamp(builder.unary(gate, "silu")), up)
        case "silu" | "gelu" | "relu" | "swiglu_oai":
            return builder.glu(gate, up, GATED_GLU[activation])
        case "situ":
            out = builder.scale(builder.unary(builder.scale(gate), "tanh"))
            out = builder.mul(out, builder.unary(gate, "sigmoid"))
            if builder.number("activation.situ_linear_beta") > 0.0:
                up = builder.scale(builder.unary(builder.scale(up), "tanh"))
            return builder.mul(out, up)
        case "swiglu" | "relu_sqr" | "xielu":
            raise UnknownGraph(f"a gate before {activation}, which has none elsewhere")
        case unknown:
            assert_never(unknown)


def activate(builder: Builder, cur: GraphTensor, activation: Activation, il: int) -> GraphTensor:
    """The activation of a block without a gate, or with gate and up in one tensor."""
    match activation:
        case "swiglu":
            return builder.glu(cur, None, activation)
        case "relu_sqr":
            return builder.like("SQR", builder.unary(cur, "relu"))
        case "gelu":
            cur = builder.unary(cur, activation)
            scales = builder.weight(f"blk.{il}.ffn.act.scales", il)
            return builder.div(cur, scales) if scales is not None else cur
        case "silu" | "relu" | "xielu" | "swiglu_oai" | "situ":
            return builder.unary(cur, activation)
        case unknown:
            assert_never(unknown)


def moe(
    builder: Builder,
    cur: GraphTensor,
    il: int,
    routing: Routing,
    *,
    logits: GraphTensor | None = None,
    selected: GraphTensor | None = None,
    suffix: str = "_exps",
    n_used: int | None = None,
    is_shared_by_group: bool = False,
) -> GraphTensor:
    """Route the tokens through the experts and add up what they give.

    With `is_shared_by_group` the selected experts' numbers are divided by their group's size.
    """
    n_expert = builder.facts.n_expert
    n_used = n_used or builder.layer(il).n_expert_used
    logits = _routed(builder, il, cur) if logits is None else logits
    if (bias := builder.b(il, "ffn_gate_inp")) is not None:
        logits = builder.add(logits, bias)
    probs = _probabilities(builder, logits, routing)
    if selected is None:
        selected = _select(builder, _selection(builder, probs, logits, il, routing), n_expert, n_used)
    if is_shared_by_group:
        selected = builder.cast(builder.scale(builder.cast(selected, "F32")), "I32")
    weights = _weights(builder, probs, selected, n_expert, n_used, routing)
    builder.expand(weights)
    cur = builder.reshape(cur, cur.ne[0], 1, cur.ne[1])
    if routing.is_weighted_before:
        cur = builder.mul(builder.repeat(cur, cur.ne[0], n_used, cur.ne[2]), weights)
    out = _experts(builder, cur, il, selected, routing, suffix)
    if not routing.is_weighted_before:
        out = builder.mul(out, weights)
    builder.expand(out)
    return _sum(builder, out, n_used)


def _routed(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    return builder.lora_mm(builder.w(il, "ffn_gate_inp"), cur)


def _probabilities(builder: Builder, logits: GraphTensor, routing: Routing) -> GraphTensor:
    match routing.gating:
        case "softmax":
            return builder.soft_max(logits)
        case "sigmoid":
            return builder.unary(logits, "sigmoid")
        case "sqrt_softplus":
            return builder.like("SQRT", builder.unary(logits, "softplus"))
        case "softmax_weight":  # of the selected ones, later
            return logits
        case unknown:
            assert_never(unknown)


def _selection(
    builder: Builder, probs: GraphTensor, logits: GraphTensor, il: int, routing: Routing
) -> GraphTensor:
    bias = builder.b(il, "exp_probs_b") or builder.w(il, "exp_probs_b")
    if bias is not None:
        probs = builder.add(probs, bias)
    match routing.selects_by:
        case "sigmoid":
            return builder.unary(logits, "sigmoid")
        case "logits":
            return logits
        case "probs":
            return probs
        case unknown:
            assert_never(unknown)


def _select(builder: Builder, scores: GraphTensor, n_expert: int, n_used: int) -> GraphTensor:
    n_groups = builder.integer("expert_group_count")
    if n_groups > 1:
        scores = _mask_groups(builder, scores, n_expert, n_groups)
    return builder.argsort_top_k(scores, n_used)


def _mask_groups(builder: Builder, scores: GraphTensor, n_expert: int, n_groups: int) -> GraphTensor:
    """Keep the experts of the best groups only (DeepSeek V3)."""
    n_tokens = scores.ne[1]
    groups = builder.reshape(scores, n_expert // n_groups, n_groups, n_tokens)
    best = builder.argsort_top_k(groups, 2)
    best = builder.get_rows(builder.reshape(groups, 1, *groups.ne[:3]), best)
    best = builder.sum_rows(builder.reshape(best, *best.ne[1:]))
    best = builder.reshape(best, *best.ne[1:3])
    picked = builder.argsort_top_k(best, builder.integer("expert_group_used_count"))
    kept = builder.get_rows(groups, picked)
    masked = builder.set_rows(builder.like("FILL", groups), kept, picked)
    return builder.reshape(masked, n_expert, n_tokens)


def _weights(
    builder: Builder, probs: GraphTensor, selected: GraphTensor, n_expert: int, n_used: int, routing: Routing
) -> GraphTensor:
    n_tokens = probs.ne[1]
    weights = builder.get_rows(builder.reshape(probs, 1, n_expert, n_tokens), selected)
    if routing.gating == "softmax_weight":
        weights = builder.soft_max(builder.reshape(weights, n_used, n_tokens))
        weights = builder.reshape(weights, 1, n_used, n_tokens)
    if routing.has_norm:
        weights = builder.reshape(weights, n_used, n_tokens)
        weights = builder.div(weights, builder.clamp(builder.sum_rows(weights)))
        weights = builder.reshape(weights, 1, n_used, n_tokens)
    return builder.scale(weights) if routing.is_scaled else weights


def _expert_mm(
    builder: Builder,
    il: int,
    name: str,
    cur: GraphTensor,
    selected: GraphTensor,
    has_scale: bool,
    is_exact: bool = False,
) -> GraphTensor:
    """One stacked projection with its scale and bias (build_lora_mm_id)."""
    weight = builder.need(builder.w(il, name))
    out = builder.mul_mat_id(weight, cur, selected)
    out.kind = "prec_f32" if is_exact else ""
    scale = builder.weight(f"blk.{il}.{name}.scale", il) if has_scale else None
    if scale is not None:
        n_expert, n_tokens = scale.ne[0], cur.ne[2]
        rows = builder.repeat(builder.reshape(scale, 1, n_expert, 1), 1, n_expert, n_tokens)
        out = builder.mul(out, builder.get_rows(rows, selected))
    bias = builder.b(il, name)
    return builder.add_id(out, bias, selected) if bias is not None else out


def _experts(
    builder: Builder, cur: GraphTensor, il: int, selected: GraphTensor, routing: Routing, suffix: str
) -> GraphTensor:
    has_scale = routing.is_scaled_by_tensor
    if builder.w(il, f"ffn_gate_up{suffix}") is not None:
        both = _expert_mm(builder, il, f"ffn_gate_up{suffix}", cur, selected, has_scale)
        half = both.ne[0] // 2
        shape = (half, *both.ne[1:3])
        gate = builder.view_3d(both, *shape, both.nb[1], both.nb[2])
        up = builder.view_3d(both, *shape, both.nb[1], both.nb[2], half * both.nb[0])
        cur = _expert_activation(builder, gate, up, routing)
    else:
        up = _expert_mm(builder, il, f"ffn_up{suffix}", cur, selected, has_scale)
        if builder.w(il, f"ffn_gate{suffix}") is not None:
            gate = _expert_mm(builder, il, f"ffn_gate{suffix}", cur, selected, has_scale)
            cur = _expert_activation(builder, gate, up, routing)
        else:
            cur = activate(builder, up, routing.activation, il)
    return _expert_mm(builder, il, f"ffn_down{suffix}", cur, selected, has_scale, routing.has_exact_down)


def _expert_activation(builder: Builder, gate: GraphTensor, up: GraphTensor, routing: Routing) -> GraphTensor:
    return gated(builder, gate, up, routing.activation, routing.clamp)


def _sum(builder: Builder, out: GraphTensor, n_used: int) -> GraphTensor:
    n_embd, n_tokens = out.ne[0], out.ne[2]
    views = [builder.view_2d(out, n_embd, n_tokens, out.nb[2], i * out.nb[1]) for i in range(n_used)]
    for view in views:
        builder.expand(view)
    total = views[0]
    for view in views[1:]:
        total = builder.add(total, view)
        builder.expand(total)
    return builder.cont(total) if n_used == 1 else total
