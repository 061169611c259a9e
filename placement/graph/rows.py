"""One row per architecture: what its layers are made of, where the tensors' presence does not tell.

The defaults describe Llama: RMS norms before attention and feed-forward, rope on Q and K, SiLU-gated blocks.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Row:
    """How an architecture departs from Llama; tensors that exist (norms, biases, experts) need no feature."""

    attention: str = "plain"  # plain, mla, none: which block; recurrent layers have their own
    recurrent: str = ""  # block of recurrent layers: gdn, mamba, mamba2, shortconv, ...
    is_cached: bool = True
    norm: str = "rms"  # rms or layer
    norms_exist: bool = True  # False: norms without weights still run
    embedding_scale: str = ""  # "graph": a scale node; "rows": an input of one scale per token
    has_mixed_batch: bool = True
    qk_norm: str = "before"  # relative to rope; "flat": on whole rows, before heads are split
    qk_norm_kind: str = "rms"
    rope: str = "all"  # all, none, swa (windowed layers only), step (not every n_no_rope_layer_step-th)
    has_q_scale: bool = False
    has_wo_bias: bool = True
    post_attention_norm: str = ""  # applied to the attention's result before the residual sum
    ffn_norm: str = "ffn_norm"
    post_ffn_norm: str = ""
    parallel: str = ""  # feed-forward beside attention: the order of the sums, a = attention, f, r = residual
    activation: str = "silu"
    has_ffn_bias: bool = True
    gating: str = "softmax"  # or meta: as the metadata says
    has_expert_norm: bool | None = True  # None: as the metadata says
    is_expert_scaled: bool = True  # by expert_weights_scale, where it is neither 0 nor 1
    expert_activation: str = "silu"
    shared_gate: str = ""  # sigmoid or silu_div: how the shared expert is weighed
    is_shared_first: bool = False
    rows_at: str = "last_layer"  # or end: where the tokens without logits are dropped
    has_output_bias: bool = True
    logit_scale: str = ""  # "always", or "meta": where logit_scale is set
    softcap: str = ""  # "always", or "meta": where final_logit_softcapping is set
    residual_scale: str = ""  # "meta": where residual_scale is set; "always"
    has_position_table: bool = False
    has_embedding_norm: bool = False
    embedding_norm_pin: int = -1
    has_output_norm: bool = True
    scale_before_output: bool = False
    is_parallel_from_norm: bool = True
    is_post_ffn_norm_pinned: bool = False
    is_attention_capped: bool = False
    has_rope_factors: bool = True
    has_alibi: bool = False


LLAMA = Row()

ROWS: dict[str, Row] = {
    "llama": Row(),
    "qwen3moe": Row(),
    "gemma3": Row(
        embedding_scale="rows",
        has_q_scale=True,
        has_wo_bias=False,
        post_attention_norm="post_attention_norm",
        post_ffn_norm="post_ffw_norm",
        activation="gelu",
        has_ffn_bias=False,
        softcap="meta",
    ),
    "gpt-oss": Row(
        ffn_norm="post_attention_norm",
        gating="softmax_weight",
        has_expert_norm=False,
        expert_activation="swiglu_oai",
        rows_at="end",
    ),
    "deepseek2": Row(attention="mla", gating="meta", has_expert_norm=None),
    "qwen3next": Row(
        attention="gated_q",
        recurrent="gdn",
        ffn_norm="post_attention_norm",
        shared_gate="sigmoid",
        rows_at="end_normed",
    ),
}
