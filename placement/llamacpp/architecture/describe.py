"""A model → its layers, caches and states, and where each tensor belongs; computed once per model."""

from __future__ import annotations

import functools

from placement.inputs.model import Model
from placement.llamacpp.architecture.header import HeaderFacts
from placement.llamacpp.architecture.records import Architecture
from placement.llamacpp.architecture.rules import RULES, Rule, Window
from placement.llamacpp.architecture.tensors import (
    place_tensors,
)


@functools.lru_cache(maxsize=8)
def describe(model: Model) -> Architecture:
    """What the model's architecture needs; kept for the models asked for lately."""
    rule = RULES.get(model.architecture)
    header = HeaderFacts(model, rule or _derive(model))
    facts = tuple(header.layer(i) for i in range(header.n_layer_all))
    placed, skipped = place_tensors(model, header)
    return Architecture(
        name=model.architecture,
        is_known=rule is not None,
        rule=header.rule,
        n_layer_all=header.n_layer_all,
        n_layer=header.n_layer,
        n_embd=header.integer("embedding_length"),
        n_vocab=_n_vocab(model),
        n_ctx_train=header.integer("context_length"),
        n_expert=header.integer("expert_count"),
        n_expert_used=max((layer.n_expert_used for layer in facts), default=0),
        is_mla=header.is_mla,
        v_width_max=max((header.v_width(i) for i in range(header.n_layer_all)), default=0),
        indexer_top_k=header.integer("attention.indexer.top_k"),
        sparse_tokens=header.integer("attention.indexer.top_k")
        * header.integer("attention.indexer.block_size", 1),
        layers=facts,
        tensors=placed,
        skipped=skipped,
    )


def _derive(model: Model) -> Rule:
    """The likeliest rule of an architecture without one, from its header and tensors."""
    has_window = bool(model.get("attention.sliding_window"))
    pattern = model.get("attention.sliding_window_pattern")
    is_patterned = isinstance(pattern, (tuple, list, int)) and has_window
    is_mla = bool(model.get("attention.key_length_mla")) and bool(model.get("attention.value_length_mla"))
    window = Window(is_always_on=False) if is_patterned else None
    heads_kv = model.get("attention.head_count_kv")
    has_state = any(".ssm_" in tensor.name or ".shortconv" in tensor.name for tensor in model.tensors)
    has_attention = any("attn_k" in tensor.name or "attn_qkv" in tensor.name for tensor in model.tensors)
    if not has_state:
        return Rule(window=window, has_mla=is_mla)
    if not has_attention:
        return Rule(memory="recurrent")
    by_heads = isinstance(heads_kv, (tuple, list)) and 0 in heads_kv
    recurrent_by = "kv_heads" if by_heads else "interval"
    return Rule(memory="hybrid", recurrent_by=recurrent_by, window=window, has_mla=is_mla)


def _n_vocab(model: Model) -> int:
    for name in ("token_embd.weight", "output.weight"):
        if name in model.by_name:
            return model.by_name[name].shape[1]
    return int(model.get("vocab_size", 0))
