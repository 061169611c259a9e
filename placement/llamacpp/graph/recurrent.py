"""Recurrent state: reading, clearing and copying it, and the gated delta net.

Mirrors src/llama-graph.cpp (build_rs), src/models/delta-net-base.cpp, qwen3next.cpp, qwen35.cpp and qwen4exp.cpp.
"""

from __future__ import annotations

from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.tensor import GraphTensor


def state_ids(builder: Builder) -> GraphTensor:
    """rs_s_copy: which rows the batch's states are read from."""
    return builder.input_once("s_copy", "I32", builder.context.n_seq_max)


def main_ids(builder: Builder) -> GraphTensor:
    """The part of `state_ids` for the batch's own sequences."""
    if "s_copy_main" not in builder.inputs:
        builder.inputs["s_copy_main"] = builder.view_1d(state_ids(builder), builder.batch.n_seqs)
    return builder.inputs["s_copy_main"]


def read_state(builder: Builder, state: GraphTensor, size: int) -> GraphTensor:
    """The batch's states as [size, sequences]; the other sequences' are copied back (build_rs)."""
    states = cleared_states(builder, state, size)
    gathered = builder.get_rows(states, state_ids(builder))
    out = builder.view_2d(gathered, size, builder.batch.n_seqs, gathered.nb[1])
    builder.expand(out)
    _keep_extra_states(builder, gathered, state, size, builder.batch.n_seqs)
    return out


def cleared_states(builder: Builder, state: GraphTensor, size: int) -> GraphTensor:
    """The states as [size, rows], the row of new sequences cleared: the beginning of build_rs."""
    states = builder.reshape(state, size, state.ne[1])
    cleared = builder.view_1d(states, size)
    builder.expand(builder.in_place("SCALE", cleared, cleared))
    return states


def keep_tail_states(builder: Builder, states: GraphTensor, state: GraphTensor, size: int) -> None:
    """Copy the other sequences' states back where the caller has read the main rows itself."""
    if "s_copy_tail" not in builder.inputs:
        ids = state_ids(builder)
        builder.inputs["s_copy_tail"] = builder.view_1d(ids, builder.context.n_seq_max - 1, ids.nb[0])
    gathered = builder.get_rows(states, builder.inputs["s_copy_tail"])
    _keep_extra_states(builder, gathered, state, size, builder.batch.n_seqs - 1)


def _keep_extra_states(
    builder: Builder, gathered: GraphTensor, state: GraphTensor, size: int, n_skipped: int
) -> None:
    """Copy the states of the other sequences back to their rows: the end of build_rs."""
    n_seqs = builder.batch.n_seqs
    n_extra = builder.context.n_seq_max - n_seqs
    extra = builder.view_2d(gathered, size, n_extra, gathered.nb[1], n_skipped * gathered.nb[1])
    target = builder.view_2d(state, size, n_extra, state.nb[1], n_seqs * state.nb[1])
    builder.expand(builder.cpy(extra, target))


def conv_state(builder: Builder, il: int, mixed: GraphTensor, kernel: int, channels: int) -> GraphTensor:
    """The state and the batch side by side, and the new state stored (build_conv_state)."""
    n_seqs, state = builder.batch.n_seqs, builder.state(il, "r")
    past = read_state(builder, state, builder.layer(il).state_r)
    past = builder.reshape(past, kernel - 1, channels, n_seqs)
    joined = builder.concat(past, builder.transpose(mixed), 0)
    offset = (joined.ne[0] - past.ne[0]) * joined.nb[0]
    last = builder.view_3d(joined, kernel - 1, channels, n_seqs, joined.nb[1], joined.nb[2], offset)
    target = builder.view_2d(state, (kernel - 1) * channels, n_seqs, state.nb[1])
    builder.expand(builder.cpy(last, target))
    return joined


def joined_state(
    builder: Builder, stored: GraphTensor, width: int, cur: GraphTensor, past: int, channels: int
) -> GraphTensor:
    """The state and the batch side by side, and a copy of the new state stored (build_conv_state_at)."""
    n_seqs = builder.batch.n_seqs
    rows = builder.reshape(read_state(builder, stored, width), past, channels, n_seqs)
    joined = builder.concat(rows, builder.transpose(cur), 0)
    offset = 4 * (joined.ne[0] - past)
    last = builder.view_3d(joined, past, channels, n_seqs, joined.nb[1], joined.nb[2], offset)
    target = builder.view_2d(stored, past * channels, n_seqs, stored.nb[1])
    builder.expand(builder.cpy(builder.cont(last), target))
    return joined


def ssm_conv(builder: Builder, joined: GraphTensor, kernel: GraphTensor) -> GraphTensor:
    """The short convolution over the joined rows."""
    n_tokens = joined.ne[0] - kernel.ne[0] + 1
    return builder.op("SSM_CONV", "F32", (kernel.ne[1], n_tokens, joined.ne[2], 1), joined, kernel)


def delta_net(
    builder: Builder,
    il: int,
    q: GraphTensor,
    k: GraphTensor,
    v: GraphTensor,
    gate: GraphTensor,
    beta: GraphTensor,
    state: GraphTensor,
    *,
    is_flat: bool = False,
) -> GraphTensor:
    """The fused gated delta net; its new state is stored (build_recurrent_attn)."""
    head, n_head, n_tokens, n_seqs = v.ne
    rows = n_tokens * n_seqs + head * n_seqs
    out = builder.op("GATED_DELTA_NET", "F32", (head * n_head, rows, 1, 1), q, k, v, gate, beta, state)
    result = builder.view(
        out, (head, n_head, n_tokens, n_seqs), (4 * head, 4 * head * n_head, 4 * head * n_head * n_tokens)
    )
    new = builder.view(
        out,
        (head, head, n_head, n_seqs),
        (4 * head, 4 * head * head, 4 * head * head * n_head),
        4 * head * n_head * n_tokens * n_seqs,
    )
    stored = builder.state(il, "s")
    width = builder.layer(il).state_s
    flat = builder.view_1d(stored, width * n_seqs) if is_flat else None
    builder.expand(builder.cpy(new, flat or builder.view_2d(stored, width, n_seqs, stored.nb[1])))
    return result


# --- Qwen3-Next


def gated_delta_layer(
    builder: Builder, il: int, cur: GraphTensor, *, is_split: bool = False, is_padded: bool = False
) -> GraphTensor:
    """A linear attention layer of Qwen3-Next (build_layer_attn_linear).

    With `is_split` of Qwen 3.5, with `is_padded` of Qwen 4.
    """
    n_seqs, n_seq_tokens = builder.batch.n_seqs, builder.n_seq_tokens
    head_k, n_k = builder.integer("ssm.state_size"), builder.integer("ssm.group_count")
    n_v = builder.integer("ssm.time_step_rank")
    head_v = builder.integer("ssm.inner_size") // n_v
    mixed, z = _delta_projections(builder, il, cur, head_k, head_v, n_k, n_v, is_split)
    gates = _split_gates if is_split else _delta_gates
    beta, gate = gates(builder, il, cur, n_k, n_v)
    kernel = builder.need(builder.w(il, "ssm_conv1d"))
    channels = 2 * head_k * n_k + head_v * n_v
    if is_padded:
        past = kernel.ne[0] - 1
        joined = joined_state(
            builder, builder.state(il, "r"), builder.layer(il).state_r, mixed, past, channels
        )
    else:
        joined = conv_state(builder, il, mixed, kernel.ne[0], channels)
    state = read_state(builder, builder.state(il, "s"), builder.layer(il).state_s)
    state = builder.reshape(state, head_v, head_v, n_v, n_seqs)
    conv = builder.unary(ssm_conv(builder, joined, kernel), "silu")
    row = 4 * channels
    strides_k, strides_v = (4 * head_k, row, row * n_seq_tokens), (4 * head_v, row, row * n_seq_tokens)
    shape_k = (head_k, n_k, n_seq_tokens, n_seqs)
    q = delta_norm(builder, builder.view(conv, shape_k, strides_k))
    k = delta_norm(builder, builder.view(conv, shape_k, strides_k, 4 * head_k * n_k))
    v = builder.view(conv, (head_v, n_v, n_seq_tokens, n_seqs), strides_v, 8 * head_k * n_k)
    if n_k != n_v and not is_split:
        q, k = (_interleave(builder, tensor, n_v // n_k) for tensor in (q, k))
    out = delta_net(builder, il, q, k, v, gate, beta, state)
    z = builder.reshape(z, head_v, n_v, n_seq_tokens, n_seqs)
    normed = builder.build_norm(out, builder.w(il, "ssm_norm"), None, "rms", il)
    out = builder.mul(normed, builder.unary(z, "sigmoid" if is_padded else "silu"))
    out = builder.reshape(out, head_v * n_v, n_seq_tokens, n_seqs)
    out = builder.lora_mm(builder.w(il, "ssm_out"), out, is_scaled=is_split)
    return builder.reshape(out, builder.n_embd, n_seq_tokens * n_seqs)


def delta_norm(builder: Builder, cur: GraphTensor) -> GraphTensor:
    """build_gdn_l2_norm."""
    return builder.scale(builder.rms_norm(cur))


def _interleave(builder: Builder, cur: GraphTensor, n: int) -> GraphTensor:
    head, n_head, n_tokens, n_seqs = cur.ne
    spread = builder.repeat(
        builder.reshape(cur, head, 1, n_head, n_tokens * n_seqs), head, n, n_head, n_tokens * n_seqs
    )
    return builder.reshape(spread, head, n_head * n, n_tokens, n_seqs)


def _delta_projections(
    builder: Builder, il: int, cur: GraphTensor, head_k: int, head_v: int, n_k: int, n_v: int, is_scaled: bool
) -> tuple[GraphTensor, GraphTensor]:
    n_seqs, n_seq_tokens = builder.batch.n_seqs, builder.n_seq_tokens
    if (fused := builder.w(il, "attn_qkv")) is not None:
        mixed = builder.lora_mm(fused, cur, is_scaled=is_scaled)
        mixed = builder.reshape(mixed, mixed.ne[0], n_seq_tokens, n_seqs)
        return mixed, builder.lora_mm(builder.w(il, "attn_gate"), cur, is_scaled=is_scaled)
    per = n_v // n_k
    both = builder.lora_mm(builder.w(il, "ssm_in"), cur)
    both = builder.reshape(both, 2 * head_k + 2 * head_v * per, n_k, n_seq_tokens, n_seqs)
    sizes, parts, offset = (head_k, head_k, head_v * per, head_v * per), [], 0
    for size in sizes:
        parts.append(builder.view(both, (size, n_k, n_seq_tokens, n_seqs), both.nb[1:], offset))
        offset += 4 * size
    q, k, v, z = parts
    z = builder.cont(z)
    flat = [builder.cont(part, part.ne[0] * n_k, n_seq_tokens, n_seqs) for part in (q, k, v)]
    return builder.concat(builder.concat(flat[0], flat[1], 0), flat[2], 0), z


def _delta_gates(
    builder: Builder, il: int, cur: GraphTensor, n_k: int, n_v: int
) -> tuple[GraphTensor, GraphTensor]:
    n_seqs, n_seq_tokens = builder.batch.n_seqs, builder.n_seq_tokens
    per = n_v // n_k
    mixed = builder.lora_mm(builder.w(il, "ssm_ba"), cur)
    mixed = builder.reshape(mixed, 2 * per, n_k, n_seq_tokens, n_seqs)
    shape = (per, n_k, n_seq_tokens, n_seqs)
    b = builder.cont(builder.view(mixed, shape, mixed.nb[1:]))
    a = builder.view(mixed, shape, mixed.nb[1:], 4 * per)
    beta = builder.unary(b, "sigmoid")
    alpha = builder.cont(a, n_v, n_seq_tokens, n_seqs)
    alpha = builder.unary(builder.add(alpha, builder.need(builder.b(il, "ssm_dt"))), "softplus")
    gate = builder.mul(alpha, builder.need(builder.weight(f"blk.{il}.ssm_a", il)))
    shape4 = (1, n_v, n_seq_tokens, n_seqs)
    return builder.reshape(beta, *shape4), builder.reshape(gate, *shape4)


def _split_gates(
    builder: Builder, il: int, cur: GraphTensor, n_k: int, n_v: int
) -> tuple[GraphTensor, GraphTensor]:
    shape = (1, n_v, builder.n_seq_tokens, builder.batch.n_seqs)
    beta = builder.lora_mm(builder.w(il, "ssm_beta"), cur, is_scaled=True)
    beta = builder.unary(builder.reshape(beta, *shape), "sigmoid")
    alpha = builder.reshape(builder.lora_mm(builder.w(il, "ssm_alpha"), cur, is_scaled=True), *shape[1:])
    alpha = builder.unary(builder.add(alpha, builder.need(builder.b(il, "ssm_dt"))), "softplus")
    gate = builder.mul(alpha, builder.need(builder.weight(f"blk.{il}.ssm_a", il)))
    return beta, builder.reshape(gate, *shape)
