"""The ends of every decoder: token embeddings, with the parts that layers take of them, and the logits.

Mirrors src/llama-graph.cpp (build_inp_embd) and what the files of src/models/ begin and end with.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import assert_never

from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.tensor import GraphTensor

CHAMELEON_IMAGE_TOKENS = 8192


def embed(builder: Builder) -> GraphTensor:
    """The token embeddings with the unused branches for other inputs (build_inp_embd), scaled and normed."""
    row = builder.row
    cur = _embedded(builder)
    if row.embedding_scale == "graph":
        cur = builder.scale(cur)
    if row.has_position_table and (table := builder.weight("position_embd.weight")) is not None:
        cur = builder.add(cur, builder.get_rows(table, builder.positions))
    if row.embedding_norm is not None:
        weight = builder.weight("token_embd_norm.weight") if row.embedding_norm == "weights" else None
        bias = builder.weight("token_embd_norm.bias")
        cur = builder.build_norm(cur, weight, bias, row.norm, 0 if row.is_embedding_norm_pinned else -1)
    return cur


def _embedded(builder: Builder) -> GraphTensor:
    table = builder.need(builder.weight("token_embd.weight"))
    n_embd_inp = builder.n_embd * (1 + _n_deepstack(builder))
    tokens = builder.input_once("tokens", "I32", builder.n_tokens)
    cur = _token_rows(builder, table, tokens, n_embd_inp)
    branches = [cur, builder.input("F32", n_embd_inp, builder.n_tokens)]
    if builder.row.has_mixed_batch:
        n_rows = max(builder.n_tokens, 1)
        ids = builder.input("I32", n_rows)
        slots = builder.input("I64", n_rows)
        copy = builder.like("DUP", builder.input("F32", n_embd_inp, builder.n_tokens))
        branches.append(builder.set_rows(copy, _token_rows(builder, table, ids, n_embd_inp), slots))
    for branch in branches:
        builder.expand(branch)
    if n_embd_inp != builder.n_embd:
        cur = builder.view_2d(cur, builder.n_embd, builder.n_tokens, cur.nb[1])
        builder.shared.token_input = cur
    return _scaled_embeddings(builder, cur)


def _token_rows(builder: Builder, table: GraphTensor, ids: GraphTensor, n_embd_inp: int) -> GraphTensor:
    rows = builder.get_rows(table, ids)
    return builder.pad(rows, n_embd_inp - builder.n_embd) if n_embd_inp != builder.n_embd else rows


def _scaled_embeddings(builder: Builder, cur: GraphTensor) -> GraphTensor:
    has_scale = _has_embedding_scale(builder)
    is_token_only = has_scale and _n_deepstack(builder) > 0
    if has_scale and not is_token_only:
        cur = builder.scale(cur if cur.is_contiguous else builder.cont(cur))
    if is_token_only or builder.row.embedding_scale == "rows":
        rows = builder.input("F32", 1, builder.n_tokens)
        cur = builder.mul(cur if cur.is_contiguous else builder.cont(cur), rows)
    builder.expand(cur)
    return cur


def _has_embedding_scale(builder: Builder) -> bool:
    """Whether build_inp_embd itself scales."""
    match builder.row.embedding_scale:
        case "meta" | "always" as switch:
            return builder.is_on(switch, "embedding_scale")
        case "graph" | "rows" | None:
            return False
        case unknown:
            assert_never(unknown)


# --- deepstack


def _n_deepstack(builder: Builder) -> int:
    """Parts of the input embeddings beside the first."""
    match builder.row.deepstack:
        case "after":
            return builder.integer("n_deepstack_layers")
        case "before":
            return len({i for i in _deepstack_map(builder) if i >= 0})
        case None:
            return 0
        case unknown:
            assert_never(unknown)


def _deepstack_map(builder: Builder) -> Sequence[int]:
    mapping = builder.model.get("deepstack_mapping", ())
    return mapping if isinstance(mapping, (tuple, list)) else ()


def deepstacked(builder: Builder, il: int, cur: GraphTensor) -> GraphTensor:
    """The layer's part of the input embeddings added (deepstack)."""
    source, part = builder.shared.token_input, deepstack_part(builder, il)
    if source is None or part < 0:
        return cur
    view = builder.view_2d(source, builder.n_embd, builder.n_tokens, source.nb[1], part * builder.n_embd * 4)
    return builder.add(cur, view)


def deepstack_part(builder: Builder, il: int) -> int:
    """Which part of the input embeddings the layer adds; -1 for none."""
    if builder.row.deepstack == "after":
        return il + 1 if il < _n_deepstack(builder) else -1
    mapping = _deepstack_map(builder)
    return int(mapping[il]) if 0 < il < len(mapping) else -1


# --- the last norm and the logits


def output_head(builder: Builder, cur: GraphTensor) -> None:
    """The rows that give logits, the last norm, a classifier where there is one, and the logits."""
    row = builder.row
    if row.rows_at == "end":
        cur.is_output = True
    if row.rows_at in ("end", "end_plain"):
        (cur,) = builder.rows_out(cur)
    if row.has_output_norm:
        norm, bias = builder.weight(row.output_norm), builder.weight("output_norm.bias")
        cur = builder.build_norm(cur, norm, bias, row.norm)
    if row.rows_at == "end_normed":
        cur.is_output = True
        (cur,) = builder.rows_out(cur)
    weight = builder.weight("cls.output.weight") if row.has_class_head else None
    if weight is not None:
        classes = builder.lora_mm(weight, cur)
        bias = builder.weight("cls.output.bias")
        classes = builder.add(classes, bias) if bias is not None else classes
        classes.is_output = True
        builder.expand(classes)
    cur.is_output = weight is None
    _logits(builder, cur)


def _logits(builder: Builder, cur: GraphTensor) -> None:
    """The output matrix and what scales its result."""
    row = builder.row
    if row.has_output_scale:
        cur = builder.scale(cur)
    cur = builder.lora_mm(builder.output_weight(), cur)
    bias = builder.weight("output.bias") if "logits_bias" not in row.unread else None
    if bias is not None:
        cur = builder.add(cur, bias)
    if builder.is_on(row.logit_scale, "logit_scale"):
        cur = builder.scale(cur)
    if builder.is_on(row.softcap, "final_logit_softcapping"):
        cur = builder.soft_cap(cur)
    if row.has_image_logits:
        nothing = builder.clamp(builder.new("F32", CHAMELEON_IMAGE_TOKENS))
        cur = builder.like("SET", cur, nothing)
    cur.is_output = True
    builder.expand(cur)
