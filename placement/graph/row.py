"""One row per architecture: what its layers are made of, where the tensors' presence does not tell.

The defaults describe Llama: RMS norms before attention and feed-forward, rope on Q and K, SiLU-gated blocks.
Norms, biases, experts, shared experts, sinks and rope factors are used wherever their tensors exist.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """How an architecture departs from Llama.

    "meta" in a field means: where the metadata key of that name is set; "always" needs no key.
    """

    # the ends
    embedding_scale: str = ""  # graph, meta, always: a scale node; rows: an input of one scale per token
    embedding_norm: str = ""  # weights, or plain (without weights)
    embedding_norm_pin: int = -1
    has_position_table: bool = False
    has_mixed_batch: bool = True
    n_pos_per_token: int = 1  # 4 for multi-dimensional rope, 0: 4 where rope sections are set
    rows_at: str = "last_layer"  # end, end_normed, never: where the tokens without logits are dropped
    has_output_norm: bool = True
    output_norm: str = "output_norm.weight"
    has_class_head: bool = False  # a classifier's matrix, where there is one
    is_norm_expanded: bool = False  # the layer's norm enters the graph before the layer is built
    output_scale: str = ""  # a scale before the output matrix
    logit_scale: str = ""
    softcap: str = ""
    has_image_logits: bool = False  # logits of image tokens are overwritten
    # attention
    attention: str = "plain"  # plain, mla, gated_q, no_cache
    norm: str = "rms"  # rms or layer
    has_norm_weights: bool = True  # False: norms run without weights
    qkv: str = ""  # reshaped: Q, K and V are views of a reshaped projection
    qk_norm: str = "before"  # relative to rope; "flat": on whole rows, before heads are split
    qk_norm_kind: str = "rms"
    has_plain_qk_norm: bool = False  # a norm without weights on roped Q and K
    rope: str = "all"  # none, swa, swa_if_any, swa_or_dense, step, step_from_0, by_size, pattern, finetuned
    has_rope_factors: bool = False  # rope_freqs, or the long and short factors, are used
    is_window_unfactored: bool = False  # but not in layers with a window
    has_alibi: bool = False
    has_q_scale: bool = False
    temperature: str = ""  # Q times a scale input: meta, or no_rope (layers without rope)
    gate: str = ""  # sigmoid or softplus: attn_gate weighs the result before the output projection
    value_scale: str = ""
    is_capped: bool = False  # attention scores have a soft cap
    post_attention_norm: str = ""  # applied to the attention's result before the residual sum
    is_post_attention_norm_pinned: bool = True
    has_rows_after_sum: bool = False  # and after the sum with the residual
    has_rows_after_norm: bool = False  # the last layer's rows are chosen after that norm
    is_residual_first: bool = False  # order of the sum after attention
    is_middle_first: bool = False  # order of the sum after the feed-forward block
    unread: str = (
        ""  # loaded, not used: q, o, f biases of QKV, output and feed-forward, l of the logits, s scales
    )
    # feed-forward
    ffn_norm: str = "ffn_norm"
    post_ffn_norm: str = ""
    is_post_ffn_norm_pinned: bool = False
    parallel: str = ""  # feed-forward beside attention: order of the sums; a attention, f, r residual
    is_parallel_of_norm: bool = True  # the feed-forward reads the attention's norm
    activation: str = "silu"
    residual_scale: str = ""
    deepstack: str = ""  # before or after: where a layer adds its part of the input embeddings
    has_skip: bool = False  # the embeddings, scaled, are added after every layer
    # experts
    feed: str = ""  # arctic, grok, grove, router_first: how the block differs
    gating: str = "softmax"  # or meta
    default_gating: str = "sigmoid"
    has_expert_norm: bool | None = True  # None: as expert_weights_norm says
    is_expert_scaled: bool = True  # by expert_weights_scale, where it is neither 0 nor 1
    expert_activation: str = "silu"
    shared_activation: str = "silu"
    shared_gate: str = ""  # sigmoid or silu_div: how the shared expert is weighed
    is_weighted_before: bool = False
    selects_by: str = "probs"  # or logits, sigmoid
    is_sum_scaled: bool = False
    scaled: str = ""  # whose `.scale` tensors are used: f feed-forward, d its last part, e experts, s shared
    has_exact_down: bool = False  # the experts' last projection asks for f32, which CUDA has not
    clamp: str = (
        ""  # how swiglu_clamp_exp and _shexp limit SiLU: split, fused, or fused_experts (others split)
    )
    # recurrence and structure
    has_pools: bool = False  # an indexer scores pools of cells
    recurrent: str = ""  # gdn, mamba, mamba2, shortconv, ...
    structure: str = ""  # builds the whole graph in its own way
