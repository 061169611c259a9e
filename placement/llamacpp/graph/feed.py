"""Feed-forward blocks by row: dense, experts, a shared expert, and the few that differ.

Mirrors the feed-forward parts of src/models/*.cpp: arctic.cpp, grok.cpp, grovemoe.cpp, nemotron-h.cpp, ...
"""

from __future__ import annotations

from typing import Literal, assert_never

from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.experts import GATING, Routing, SiluClamp, ffn, moe
from placement.llamacpp.graph.tensor import GraphTensor

ClampKey = Literal["swiglu_clamp_exp", "swiglu_clamp_shexp"]
NO_LIMIT = 1e-6  # limits up to this are none


def feed_forward(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """The norm before the feed-forward block, and the block."""
    name = builder.row.ffn_norm
    source = cur
    if builder.w(il, name) is not None or not builder.row.has_norm_weights:
        cur = builder.layer_norm(cur, il, name, builder.row.norm)
    if builder.row.feed == "arctic":
        return _arctic(builder, il, cur, source)
    return feed(builder, il, cur)


def feed(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """The feed-forward block of the layer: dense, or experts with or without a shared one."""
    row = builder.row
    if builder.w(il, "ffn_gate_inp") is None or row.feed == "dense":
        clamp = clamp_of(builder, il, "swiglu_clamp_shexp")
        return ffn(builder, cur, il, row.activation, clamp=clamp, is_scaled="ffn" in row.scaled)
    match row.feed:
        case "shared_first":
            shared = shared_expert(builder, il, cur)
            return builder.add(moe(builder, cur, il, routing_of(builder, il)), shared)
        case "router_first":
            return moe(builder, cur, il, routing_of(builder, il), logits=builder.shared.router_logits)
        case "grove":
            return _grove(builder, il, cur)
        case "layer":
            return _latent_experts(builder, il, cur, "ffn_latent")
        case "latent":
            return _latent_experts(builder, il, cur, "ffn_routed")
        case "grok" if builder.w(il, "ffn_up") is not None:
            out = moe(builder, cur, il, routing_of(builder, il), selected=_hashed(builder, il))
            return builder.scale(builder.add(ffn(builder, cur, il, row.activation), out))
        case "usual" | "none" | "dense" | "arctic" | "grok":
            return _experts(builder, il, cur)
        case unknown:
            assert_never(unknown)


def _experts(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Experts, and a shared one where the layer has it."""
    out = moe(builder, cur, il, routing_of(builder, il), selected=_hashed(builder, il))
    if builder.w(il, "ffn_up_shexp") is None:
        return out
    out = builder.add(out, shared_expert(builder, il, cur))
    return builder.scale(out) if builder.row.is_sum_scaled else out


def _hashed(builder: Builder, il: int) -> GraphTensor | None:
    """The experts that the tokens' numbers choose in DeepSeek 4's first layers."""
    if il >= builder.integer("hash_layer_count"):
        return None
    return builder.get_rows(builder.need(builder.w(il, "ffn_gate_tid2eid")), builder.inputs["tokens"])


def shared_expert(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """The expert that every token uses, weighed by its gate where there is one."""
    row = builder.row
    out = ffn(
        builder,
        cur,
        il,
        row.shared_activation,
        suffix="_shexp",
        clamp=clamp_of(builder, il, "swiglu_clamp_shexp"),
        is_scaled="shared_expert" in row.scaled,
    )
    if row.shared_gate is None:
        return out
    gate = builder.lora_mm(builder.w(il, "ffn_gate_inp_shexp"), cur)
    match row.shared_gate:
        case "silu_div":
            return builder.mul(out, builder.div(builder.unary(gate, "silu"), gate))
        case "sigmoid":
            return builder.mul(out, builder.unary(gate, "sigmoid"))
        case unknown:
            assert_never(unknown)


def clamp_of(builder: Builder, il: int, key: ClampKey) -> SiluClamp | None:
    """How SiLU is limited in this layer; None where it is not."""
    kind = builder.row.clamp
    if kind is None:
        return None
    limits = builder.model.get(key, 0.0)
    limit = limits[il] if isinstance(limits, (tuple, list)) else limits
    if float(limit) <= NO_LIMIT:
        return None
    match kind:
        case "fused_experts":
            return "fused" if key == "swiglu_clamp_exp" else "split"
        case "fused" | "split" as clamp:
            return clamp
        case unknown:
            assert_never(unknown)


def routing_of(builder: Builder, il: int) -> Routing:
    """How the row's architecture routes."""
    row = builder.row
    gating = GATING.get(builder.integer("expert_gating_func"), row.default_gating)
    has_norm = bool(builder.model.get("expert_weights_norm", False))
    return Routing(
        gating=gating if row.gating == "meta" else row.gating,
        has_norm=has_norm if row.has_expert_norm is None else row.has_expert_norm,
        is_scaled=builder.number("expert_weights_scale") not in (0.0, 1.0) and row.is_expert_scaled,
        activation=row.expert_activation,
        is_weighted_before=row.is_weighted_before,
        selects_by=row.selects_by,
        clamp=clamp_of(builder, il, "swiglu_clamp_exp"),
        is_scaled_by_tensor="experts" in row.scaled,
        has_exact_down=row.has_exact_down,
    )


def _latent_experts(builder: Builder, il: int, cur: GraphTensor, name: str) -> GraphTensor:
    """Experts in a smaller space, and a shared expert outside it (Nemotron, Kimi K3)."""
    down, up = builder.w(il, f"{name}_down"), builder.w(il, f"{name}_up")
    logits = builder.lora_mm(builder.w(il, "ffn_gate_inp"), cur)
    out = moe(
        builder,
        cur if down is None else builder.mul_mat(down, cur),
        il,
        routing_of(builder, il),
        logits=logits,
    )
    if builder.w(il, f"{name}_norm") is not None:
        out = builder.layer_norm(out, il, f"{name}_norm")
    out = out if up is None else builder.mul_mat(up, out)
    return builder.add(out, shared_expert(builder, il, cur))


def _arctic(builder: Builder, il: int, normed: GraphTensor, source: GraphTensor) -> GraphTensor:
    """A dense block added to its input, and experts on the layer's input; residual included."""
    dense = builder.add(ffn(builder, normed, il, builder.row.activation), source)
    routed = builder.layer_norm(builder.shared.layer_input, il, "ffn_norm_exps")
    return builder.add(moe(builder, routed, il, routing_of(builder, il)), dense)


def _grove(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Experts, and the smaller experts that a group of them shares."""
    logits = builder.lora_mm(builder.w(il, "ffn_gate_inp"), cur)
    routing = routing_of(builder, il)
    out = moe(builder, cur, il, routing, logits=logits)
    n_chunks = builder.facts.n_expert // builder.integer("experts_per_group", 1)
    n_used = min(builder.layer(il).n_expert_used, n_chunks)
    shared = moe(
        builder,
        out,
        il,
        routing,
        logits=logits,
        suffix="_chexps",
        n_used=n_used,
        is_shared_by_group=n_chunks != builder.facts.n_expert,
    )
    return builder.add(out, builder.scale(shared))
