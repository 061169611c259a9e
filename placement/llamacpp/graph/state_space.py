"""State-space layers: Mamba, Mamba 2, PLaMo 2's, and LFM2's short convolution.

Mirrors src/models/mamba-base.cpp, plamo2.cpp and lfm2.cpp.
"""

from __future__ import annotations

from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.recurrent import (
    cleared_states,
    keep_tail_states,
    main_ids,
    read_state,
    ssm_conv,
)
from placement.llamacpp.graph.tensor import GraphTensor


def scan(
    builder: Builder,
    il: int,
    x: GraphTensor,
    dt: GraphTensor,
    a: GraphTensor,
    b: GraphTensor,
    c: GraphTensor,
    shape: tuple[int, int, int],
) -> GraphTensor:
    """Read the states, scan the batch through them, and store what they become."""
    state = builder.state(il, "s")
    size = builder.layer(il).state_s
    states = cleared_states(builder, state, size)
    ssm = builder.reshape(states, *shape, builder.context.n_seq_max)
    ids = main_ids(builder)
    n = x.n_elements + shape[0] * shape[1] * shape[2] * ids.ne[0]
    y = builder.op("SSM_SCAN", "F32", (n, 1, 1, 1), ssm, x, dt, a, b, c, ids)
    builder.expand(y)
    keep_tail_states(builder, states, state, size)
    return y


def mamba_layer(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Mamba (build_mamba_layer)."""
    n_seqs, n = builder.batch.n_seqs, builder.n_seq_tokens
    d_conv, d_inner = builder.integer("ssm.conv_kernel"), builder.integer("ssm.inner_size")
    d_state, dt_rank = builder.integer("ssm.state_size"), builder.integer("ssm.time_step_rank")
    stored = builder.state(il, "r")
    past = builder.reshape(
        read_state(builder, stored, builder.layer(il).state_r), d_conv - 1, d_inner, n_seqs
    )
    cur = builder.reshape(cur, cur.ne[0], n, n_seqs)
    xz = builder.lora_mm(builder.w(il, "ssm_in"), cur, is_scaled=True)
    x = builder.view_3d(xz, d_inner, xz.ne[1], xz.ne[2], xz.nb[1], xz.nb[2])
    z = builder.view_3d(xz, d_inner, xz.ne[1], xz.ne[2], xz.nb[1], xz.nb[2], 4 * d_inner)
    joined = builder.concat(past, builder.transpose(x), 0)
    last = builder.view_3d(joined, d_conv - 1, d_inner, n_seqs, joined.nb[1], joined.nb[2], n * joined.nb[0])
    builder.expand(builder.cpy(last, builder.view_1d(stored, (d_conv - 1) * d_inner * n_seqs)))
    x = ssm_conv(builder, joined, builder.need(builder.w(il, "ssm_conv1d")))
    x = builder.unary(builder.add(x, builder.need(builder.b(il, "ssm_conv1d"))), "silu")
    both = builder.lora_mm(builder.w(il, "ssm_x"), x)
    dt = builder.view_3d(both, dt_rank, n, n_seqs, both.nb[1], both.nb[2])
    shape, strides = (d_state, 1, n, n_seqs), (4 * d_state, both.nb[1], both.nb[2])
    b = builder.view(both, shape, strides, 4 * dt_rank)
    c = builder.view(both, shape, strides, 4 * (dt_rank + d_state))
    if bool(builder.model.get("ssm.dt_b_c_rms", False)) or builder.w(il, "ssm_dt_norm") is not None:
        dt, b, c = (
            builder.layer_norm(tensor, il, f"ssm_{name}_norm")
            for tensor, name in ((dt, "dt"), (b, "b"), (c, "c"))
        )
    else:
        dt = builder.cont(dt)
    dt = builder.add(builder.lora_mm(builder.w(il, "ssm_dt"), dt), builder.need(builder.b(il, "ssm_dt")))
    heads = builder.reshape(x, 1, d_inner, n, n_seqs)
    y = scan(builder, il, heads, dt, builder.bare(il, "ssm_a"), b, c, (d_state, 1, d_inner))
    size = d_state * d_inner * n_seqs
    new = builder.view_1d(y, size, heads.nb[3] * heads.ne[3])
    builder.expand(builder.cpy(new, builder.view_1d(builder.state(il, "s"), size)))
    out = builder.view_3d(y, d_inner, n, n_seqs, heads.nb[2], heads.nb[3])
    out = builder.add(out, builder.mul(x, builder.bare(il, "ssm_d")))
    out = builder.glu(builder.cont(z), out, "swiglu")
    out = builder.lora_mm(builder.w(il, "ssm_out"), out, is_scaled=True)
    return builder.reshape(out, out.ne[0], n * n_seqs)


def mamba2_layer(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """Mamba 2 (build_mamba2_layer)."""
    n_seqs, n = builder.batch.n_seqs, builder.n_seq_tokens
    d_conv, d_inner = builder.integer("ssm.conv_kernel"), builder.integer("ssm.inner_size")
    d_state, n_head = builder.integer("ssm.state_size"), builder.integer("ssm.time_step_rank")
    n_group, head = builder.integer("ssm.group_count"), builder.integer("ssm.inner_size") // n_head
    channels = d_inner + 2 * n_group * d_state
    stored = builder.state(il, "r")
    past = builder.reshape(
        read_state(builder, stored, builder.layer(il).state_r), d_conv - 1, channels, n_seqs
    )
    all_in = builder.lora_mm(builder.w(il, "ssm_in"), cur, is_scaled=True)
    all_in = builder.reshape(all_in, all_in.ne[0], n, n_seqs)
    nb1, nb2 = all_in.nb[1], all_in.nb[2]
    heads_shape, heads_strides = (head, n_head, n, n_seqs), (4 * head, nb1, nb2)
    z = builder.view(all_in, heads_shape, heads_strides)
    mixed = builder.view_3d(all_in, channels, n, n_seqs, nb1, nb2, 4 * d_inner)
    dt = builder.view_3d(all_in, n_head, n, n_seqs, nb1, nb2, 4 * (2 * d_inner + 2 * n_group * d_state))
    joined = builder.concat(past, builder.transpose(mixed), 0)
    last = builder.view_3d(joined, d_conv - 1, channels, n_seqs, joined.nb[1], joined.nb[2], n * joined.nb[0])
    target = builder.view_2d(stored, (d_conv - 1) * channels, n_seqs, stored.nb[1])
    builder.expand(builder.cpy(last, target))
    mixed = ssm_conv(builder, joined, builder.need(builder.w(il, "ssm_conv1d")))
    mixed = builder.unary(builder.add(mixed, builder.need(builder.b(il, "ssm_conv1d"))), "silu")
    x = builder.view(mixed, heads_shape, (4 * head, mixed.nb[1], mixed.nb[2]))
    shape, strides = (d_state, n_group, n, n_seqs), (4 * d_state, mixed.nb[1], mixed.nb[2])
    b = builder.view(mixed, shape, strides, 4 * d_inner)
    c = builder.view(mixed, shape, strides, 4 * (d_inner + n_group * d_state))
    dt = builder.add(builder.cont(dt), builder.need(builder.b(il, "ssm_dt")))
    y = scan(builder, il, x, dt, builder.bare(il, "ssm_a"), b, c, (d_state, head, n_head))
    size = d_state * d_inner
    new = builder.view_3d(y, size, n_seqs, 1, 4 * size, 4 * size * n_seqs, 4 * x.n_elements)
    kept = builder.state(il, "s")
    rows = builder.context.n_seq_max * 4 * size
    builder.expand(builder.cpy(new, builder.view_3d(kept, size, n_seqs, 1, kept.nb[1], rows)))
    out = builder.view(y, heads_shape, (x.nb[1], n_head * x.nb[1], n * n_head * x.nb[1]))
    out = builder.add(out, builder.mul(x, builder.bare(il, "ssm_d")))
    out = builder.glu(builder.cont(z), out, "swiglu")
    if builder.w(il, "ssm_norm") is not None:
        out = builder.reshape(out, d_inner // n_group, n_group, n, n_seqs)
        out = builder.layer_norm(out, il, "ssm_norm")
    out = builder.reshape(out, d_inner, n * n_seqs)
    return builder.lora_mm(builder.w(il, "ssm_out"), out, is_scaled=True)


def plamo2_layer(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """PLaMo 2's Mamba (build_plamo2_mamba_layer)."""
    n_seqs, n = builder.batch.n_seqs, builder.n_seq_tokens
    d_conv, d_inner = builder.integer("ssm.conv_kernel"), builder.integer("ssm.inner_size")
    d_state, n_head = builder.integer("ssm.state_size"), builder.integer("ssm.time_step_rank")
    head, n_group = d_inner // n_head, builder.integer("ssm.group_count")
    channels = d_inner + 2 * n_group * d_state
    stored = builder.state(il, "r")
    past = builder.reshape(
        read_state(builder, stored, builder.layer(il).state_r), d_conv - 1, channels, n_seqs
    )
    cur = builder.reshape(cur, cur.ne[0], n, n_seqs)
    zx = builder.permute(builder.lora_mm(builder.w(il, "ssm_in"), cur), 0, 2, 1, 3)
    zx = builder.cont(zx, 2 * head, n_head, n, n_seqs)
    x = builder.view(zx, (head, n_head, n, n_seqs), zx.nb[1:], 4 * head)
    x = builder.cont(x, head * n_head, n, n_seqs)
    z = builder.view(zx, (head, n_head, n, n_seqs), zx.nb[1:])
    joined = builder.concat(past, builder.transpose(x), 0)
    last = builder.view_3d(joined, d_conv - 1, d_inner, n_seqs, joined.nb[1], joined.nb[2], n * joined.nb[0])
    builder.expand(builder.cpy(last, builder.view_1d(stored, (d_conv - 1) * channels * n_seqs)))
    x = builder.unary(ssm_conv(builder, joined, builder.need(builder.w(il, "ssm_conv1d"))), "silu")
    y, x = _plamo2_scan(builder, il, x, head, n_head, d_state)
    out = builder.add(y, builder.mul(x, builder.reshape(builder.bare(il, "ssm_d"), 1, n_head)))
    out = builder.glu(builder.cont(z), out, "swiglu")
    out = builder.view_3d(out, head * n_head, n, n_seqs, out.nb[2], out.nb[3])
    out = builder.lora_mm(builder.w(il, "ssm_out"), out)
    return builder.reshape(out, out.ne[0], n * n_seqs)


def _plamo2_scan(
    builder: Builder, il: int, x: GraphTensor, head: int, n_head: int, d_state: int
) -> tuple[GraphTensor, GraphTensor]:
    n_seqs, n = builder.batch.n_seqs, builder.n_seq_tokens
    all_in = builder.lora_mm(builder.w(il, "ssm_x"), x)
    nb1, nb2 = all_in.nb[1], all_in.nb[2]
    dt_dim = max(64, builder.n_embd // 16)
    b = builder.layer_norm(builder.view_3d(all_in, d_state, n, n_seqs, nb1, nb2), il, "ssm_b_norm")
    c = builder.layer_norm(
        builder.view_3d(all_in, d_state, n, n_seqs, nb1, nb2, 4 * d_state), il, "ssm_c_norm"
    )
    dt = builder.view_3d(all_in, dt_dim, n, n_seqs, nb1, nb2, 8 * d_state)
    dt = builder.lora_mm(builder.w(il, "ssm_dt"), builder.layer_norm(dt, il, "ssm_dt_norm"))
    dt = builder.add(dt, builder.need(builder.b(il, "ssm_dt")))
    a = builder.reshape(builder.bare(il, "ssm_a"), 1, n_head)
    row = 4 * head * n_head
    shape, strides = (head, n_head, n, n_seqs), (4 * head, row, row * n)
    x = builder.view(x, shape, strides)
    b, c = (builder.view(t, (d_state, 1, n, n_seqs), (4 * d_state, t.nb[1], t.nb[2])) for t in (b, c))
    y = scan(builder, il, x, dt, a, b, c, (d_state, head, n_head))
    size = n_head * head * d_state * n_seqs
    new = builder.view_1d(y, size, row * n * n_seqs)
    builder.expand(builder.cpy(new, builder.view_1d(builder.state(il, "s"), size)))
    return builder.view(y, shape, strides), x


def shortconv_layer(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """LFM2's gated short convolution."""
    n_seqs, n = builder.batch.n_seqs, builder.n_seq_tokens
    d_conv = builder.integer("shortconv.l_cache") - 1
    cur = builder.reshape(cur, cur.ne[0], n, n_seqs)
    bcx = builder.lora_mm(builder.w(il, "shortconv.in_proj"), cur)
    chunk = bcx.ne[0] // 3
    b, c, x = (
        builder.view_3d(bcx, chunk, bcx.ne[1], bcx.ne[2], bcx.nb[1], bcx.nb[2], 4 * i * chunk)
        for i in range(3)
    )
    gated = builder.transpose(builder.mul(b, x))
    stored = builder.state(il, "r")
    past = builder.reshape(
        read_state(builder, stored, builder.layer(il).state_r), d_conv, builder.n_embd, n_seqs
    )
    joined = builder.concat(past, gated, 0)
    last = builder.view_3d(
        joined,
        d_conv,
        joined.ne[1],
        joined.ne[2],
        joined.nb[1],
        joined.nb[2],
        4 * (joined.ne[0] - d_conv),
    )
    target = builder.view_2d(stored, d_conv * builder.n_embd, n_seqs, stored.nb[1])
    builder.expand(builder.cpy(last, target))
    out = builder.mul(c, ssm_conv(builder, joined, builder.need(builder.w(il, "shortconv.conv"))))
    out = builder.lora_mm(builder.w(il, "shortconv.out_proj"), out)
    return builder.reshape(out, out.ne[0], n * n_seqs)
