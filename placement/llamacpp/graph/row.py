"""One row per architecture: what its layers are made of, where the tensors' presence does not tell.

The defaults describe Llama: RMS norms before attention and feed-forward, rope on Q and K, SiLU-gated blocks.
Norms, biases, experts, shared experts, sinks and rope factors are used wherever their tensors exist.
Rows are checked where they are made: every field holds one of the codes that its type names.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args, get_origin, get_type_hints

Switch = Literal["meta", "always"]  # where the metadata key of that name is set, or without a key
EmbeddingScale = Literal[
    "graph", "meta", "always", "rows"
]  # a scale node; rows: an input, one scale per token
# in the last layer; before the last norm, with what they are taken of as an output or not; after it; elsewhere
RowsAt = Literal["last_layer", "end", "end_plain", "end_normed", "never"]
NormKind = Literal["rms", "layer"]
Attention = Literal[
    "plain",
    "no_cache",
    "blocks",
    "mla",
    "mla_plain",
    "mla_gated",
    "mla_plain_gated",
    "dsa",
    "compressed",
    "pools_latent",
    "gated_q",
    "gated_q_views",
]
# swa: layers with a window; step: all but each fourth; by_size: a layer count; pattern, finetuned: keys say it
Rope = Literal[
    "all",
    "none",
    "swa",
    "swa_if_any",
    "swa_or_dense",
    "step",
    "step_from_0",
    "by_size",
    "pattern",
    "finetuned",
]
# the order of the sums; neox and stablelm: beside attention only where the file says so
Parallel = Literal[
    "attention_feed_residual", "feed_attention_residual", "feed_residual_attention", "neox", "stablelm"
]
Activation = Literal["silu", "gelu", "relu", "relu_sqr", "swiglu", "swiglu_oai", "situ", "xielu"]
Feed = Literal[
    "usual",
    "none",
    "dense",
    "arctic",
    "grok",
    "grove",
    "layer",
    "latent",
    "router_first",
    "shared_first",
]
Clamp = Literal["split", "fused", "fused_experts"]
SelectsBy = Literal["probs", "logits", "sigmoid"]
Recurrent = Literal[
    "mamba",
    "mamba2",
    "mamba2_beside",
    "plamo2",
    "shortconv",
    "lightning",
    "gdn",
    "gdn_split",
    "gdn_padded",
    "kda",
    "kda_direct",
    "kda_bounded",
    "kda_bounded_low",
]
Structure = Literal[
    "usual",
    "altup",
    "cycles",
    "gated_streams",
    "gemma4",
    "hyper_cast",
    "hyper_expanded",
    "hyper_mean",
    "loops",
    "stack",
]
Unread = Literal["qkv_bias", "attention_output_bias", "ffn_bias", "logits_bias", "attention_scale"]
Scaled = Literal["ffn", "ffn_down", "experts", "shared_expert"]


@dataclass(frozen=True, slots=True)
class ArchitectureRow:
    """How an architecture departs from Llama.

    None in a field means: it has none. Raises: ValueError where a field holds a code that it does not know.
    """

    # the ends
    embedding_scale: EmbeddingScale | None = None
    embedding_norm: Literal["weights", "plain"] | None = None  # plain: without weights
    is_embedding_norm_pinned: bool = False  # to the first layer's device
    has_position_table: bool = False
    has_mixed_batch: bool = True
    n_pos_per_token: Literal[0, 1, 4] = 1  # 4 for multi-dimensional rope, 0: 4 where rope sections are set
    rows_at: RowsAt = "last_layer"  # where the tokens without logits are dropped
    has_output_norm: bool = True
    output_norm: Literal["output_norm.weight", "token_embd_norm.weight"] = "output_norm.weight"
    has_class_head: bool = False  # a classifier's matrix, where there is one
    is_norm_expanded: bool = False  # the layer's norm enters the graph before the layer is built
    has_output_scale: bool = False  # a scale before the output matrix
    logit_scale: Switch | None = None
    softcap: Switch | None = None
    has_image_logits: bool = False  # logits of image tokens are overwritten
    # attention
    attention: Attention = "plain"
    norm: NormKind = "rms"
    has_norm_weights: bool = True  # False: norms run without weights
    has_reshaped_qkv: bool = False  # Q, K and V are views of a reshaped projection
    qk_norm: Literal["before", "after", "flat", "mpt"] = "before"  # before or after rope; flat: on whole rows
    qk_norm_kind: NormKind = "rms"
    has_plain_qk_norm: bool = False  # a norm without weights on roped Q and K
    rope: Rope = "all"  # which layers rope Q and K
    has_rope_factors: bool = False  # rope_freqs, or the long and short factors, are used
    is_window_unfactored: bool = False  # but not in layers with a window
    has_alibi: bool = False
    has_q_scale: bool = False
    temperature: Literal["meta", "no_rope"] | None = None  # Q times a scale input; no_rope: unroped layers
    gate: Literal["sigmoid", "softplus"] | None = None  # attn_gate weighs the result before its projection
    value_scale: Literal["meta"] | None = None
    is_capped: bool = False  # attention scores have a soft cap
    post_attention_norm: Literal["post_attention_norm", "attn_output_norm"] | None = None  # before the sum
    is_post_attention_norm_pinned: bool = True
    has_rows_after_sum: bool = False  # the last layer's rows are selected after the sum with the residual
    has_rows_after_norm: bool = False  # the last layer's rows are selected after that norm
    is_residual_first: bool = False  # order of the sum after attention
    is_middle_first: bool = False  # order of the sum after the feed-forward block
    unread: tuple[Unread, ...] = ()  # tensors that are loaded and not used
    # feed-forward
    ffn_norm: Literal["ffn_norm", "attn_output_norm", "post_attention_norm"] = "ffn_norm"
    post_ffn_norm: tuple[Literal["post_ffw_norm", "layer_output_norm"], ...] = ()  # the first that is there
    is_post_ffn_norm_pinned: bool = False
    parallel: Parallel | None = None  # feed-forward beside attention: the order of the sums
    activation: Activation = "silu"
    residual_scale: Switch | None = None
    deepstack: Literal["before", "after"] | None = None  # where a layer adds its part of the input embeddings
    has_skip: bool = False  # the embeddings, scaled, are added after every layer
    # experts
    feed: Feed = "usual"
    gating: Literal["meta", "softmax", "sigmoid", "softmax_weight"] = "softmax"
    default_gating: Literal["sigmoid", "softmax"] = "sigmoid"  # of "meta", without a key
    has_expert_norm: bool | None = True  # None: as expert_weights_norm says
    is_expert_scaled: bool = True  # by expert_weights_scale, where it is neither 0 nor 1
    expert_activation: Activation = "silu"
    shared_activation: Activation = "silu"
    shared_gate: Literal["sigmoid", "silu_div"] | None = None  # how the shared expert is weighed
    is_weighted_before: bool = False
    selects_by: SelectsBy = "probs"
    is_sum_scaled: bool = False
    scaled: tuple[Scaled, ...] = ()  # whose `.scale` tensors are used
    has_exact_down: bool = False  # the experts' last projection asks for f32, which CUDA has not
    clamp: Clamp | None = None  # how swiglu_clamp_exp and _shexp limit SiLU; fused_experts: others split
    # recurrence and structure
    has_pools: bool = False  # an indexer scores pools of cells
    recurrent: Recurrent | None = None
    structure: Structure = "usual"

    def __post_init__(self) -> None:
        for name, codes in permitted_codes().items():
            value = getattr(self, name)
            is_many = name in _many_fields()
            if is_many and not isinstance(value, tuple):
                raise ValueError(f"{name}={value!r}: a tuple of {_listed(codes)}")
            for code in value if is_many else (value,):
                if not any(type(code) is type(each) and code == each for each in codes):
                    raise ValueError(f"{name}={code!r}: permitted are {_listed(codes)}")


@functools.cache
def permitted_codes() -> Mapping[str, tuple[object, ...]]:
    """What each field of a row may hold; of a tuple, what it may have in it."""
    return {name: _codes(hint) for name, hint in get_type_hints(ArchitectureRow).items()}


@functools.cache
def _many_fields() -> frozenset[str]:
    hints = get_type_hints(ArchitectureRow)
    return frozenset(name for name, hint in hints.items() if get_origin(hint) is tuple)


def _codes(hint: Any) -> tuple[object, ...]:
    if hint is bool:
        return (False, True)
    if hint is type(None):
        return (None,)
    if get_origin(hint) is Literal:
        return get_args(hint)
    return tuple(code for part in get_args(hint) if part is not ... for code in _codes(part))


def _listed(codes: tuple[object, ...]) -> str:
    return ", ".join(map(repr, codes))
