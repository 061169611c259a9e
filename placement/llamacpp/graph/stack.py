"""Residuals that are more than one sum: checkpoints (Kimi K3), states in cycles (HRM), loops (Nanbeige).

Mirrors src/models/kimi-k3.cpp, hrm-text.cpp and nanbeige.cpp.
"""

from __future__ import annotations

from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.hyper import MIX
from placement.llamacpp.graph.tensor import GraphTensor


def checkpoint_step(builder: Builder) -> int:
    """Layers between two checkpoints; 0 without any."""
    return builder.integer("attn_res.block_size") if builder.row.structure == "stack" else 0


def is_checkpoint(builder: Builder, il: int) -> bool:
    """Whether the layer's input is kept as a checkpoint instead of being summed further."""
    return checkpoint_step(builder) > 0 and il % checkpoint_step(builder) == 0


def keep_checkpoint(builder: Builder, cur: GraphTensor) -> None:
    """Push the residual onto the stack."""
    cur = builder.reshape(cur, builder.n_embd, 1, builder.n_tokens)
    builder.shared.checkpoints = (
        cur if builder.shared.checkpoints is None else builder.concat(builder.shared.checkpoints, cur, 1)
    )


def stack_mixed(builder: Builder, cur: GraphTensor, scores: GraphTensor | None) -> GraphTensor:
    """The residual and its checkpoints, weighed by how well they score."""
    stack = builder.shared.checkpoints
    if stack is None or checkpoint_step(builder) == 0:
        return cur
    n, n_tokens, weight = stack.ne[1], builder.n_tokens, builder.need(scores)
    kept = builder.sum_rows(builder.mul(builder.rms_norm(stack), weight))
    kept = builder.reshape(kept, n, n_tokens)
    own = builder.sum_rows(builder.mul(builder.rms_norm(cur), weight))
    shares = builder.soft_max(builder.concat(kept, own, 0))
    of_stack = builder.cont(builder.view_2d(shares, n, n_tokens, shares.nb[1]))
    of_own = builder.cont(builder.view_2d(shares, 1, n_tokens, shares.nb[1], 4 * n))
    mixed = builder.op(MIX, "F32", (builder.n_embd, n_tokens, 1, 1), stack, of_stack)
    return builder.add(mixed, builder.mul(cur, of_own))


# --- cycles


def cycle_begun(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """The input of a layer: the sum of both states where a stack begins."""
    n_layer, _ = builder.cycle
    if il == 0:
        builder.shared.states = (cur, builder.need(builder.weight("hrm.z_l_init")))
    return builder.add(*builder.shared.states) if il % n_layer == 0 else cur


def cycle_ended(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """The result of a layer; where a stack ends it is normed and becomes one of the states."""
    n_layer, n_stacks = builder.cycle
    if (il + 1) % n_layer:
        return cur
    cur = builder.rms_norm(cur)
    high, low = builder.shared.states
    is_high = il // n_layer % n_stacks == n_stacks - 1
    builder.shared.states = (cur, low) if is_high else (high, cur)
    return cur


def loop_ended(builder: Builder, il: int, cur: GraphTensor, *, is_last: bool) -> GraphTensor:
    """The result of a layer; normed where a pass over all blocks ends and another follows."""
    is_end = (il + 1) % builder.integer("block_count") == 0
    if is_last or not is_end or bool(builder.model.get("skip_loop_final_norm", False)):
        return cur
    return builder.build_norm(cur, builder.weight("output_norm.weight"), None, "rms", il)
