"""One row per architecture: what its layers are made of, where the tensors' presence does not tell.

The defaults describe Llama: RMS norms before attention and feed-forward, rope on Q and K, SiLU-gated blocks.
Norms, biases, experts, shared experts, sinks and rope factors are used wherever their tensors exist.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


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
    has_flash: bool = True
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


_META: dict[str, Any] = {"gating": "meta", "has_expert_norm": None}
_GEMMA: dict[str, Any] = {"has_q_scale": True, "activation": "gelu"}
_POST_NORMS: dict[str, Any] = {"post_attention_norm": "post_attention_norm", "post_ffn_norm": "post_ffw_norm"}
_GRANITE: dict[str, Any] = {"embedding_scale": "meta", "residual_scale": "meta", "logit_scale": "always"}
_LAYER_GELU: dict[str, Any] = {"norm": "layer", "activation": "gelu"}

LLAMA = Row()

ROWS: dict[str, Row] = {
    **dict.fromkeys((*("exaone", "qwen", "qwen2", "xverse", "internlm2", "pangu-embedded"), "deci"), LLAMA),
    "llama": Row(has_rope_factors=True, scaled="fe"),
    "exaone": Row(has_rope_factors=True),
    "deci": Row(has_rope_factors=True),
    "ernie4_5": Row(unread="o"),
    "ernie4_5-moe": Row(unread="o"),
    "bitnet": Row(scaled="f"),
    "mellum": Row(scaled="e"),
    "qwen3": Row(scaled="f"),
    "qwen3moe": Row(scaled="e"),
    "arctic": Row(feed="arctic"),
    "apertus": Row(has_rope_factors=True, activation="xielu"),
    "arcee": Row(has_rope_factors=True, activation="relu_sqr"),
    "afmoe": Row(
        embedding_scale="graph",
        rope="step",
        gate="sigmoid",
        is_post_ffn_norm_pinned=True,
        has_rows_after_norm=True,
        **_POST_NORMS,
        **_META,
    ),
    "baichuan": Row(rope="by_size"),
    "bailingmoe": Row(has_rope_factors=True, has_expert_norm=None),
    "bailingmoe2": Row(**_META),
    "bloom": Row(embedding_norm="weights", embedding_norm_pin=0, rope="none", has_alibi=True, **_LAYER_GELU),
    "chameleon": Row(qk_norm_kind="layer", structure="chameleon"),
    "chatglm": Row(activation="swiglu"),
    "codeshell": Row(**_LAYER_GELU),
    "cogvlm": Row(unread="s", has_mixed_batch=False, rows_at="never"),
    "cohere2": Row(
        has_rope_factors=True, scaled="f", norm="layer", rope="swa", parallel="fra", logit_scale="meta"
    ),
    "cohere2moe": Row(
        has_rope_factors=True,
        scaled="fes",
        rope="swa_or_dense",
        parallel="fra",
        logit_scale="meta",
        rows_at="end_normed",
        is_sum_scaled=True,
        **_META,
    ),
    "command-r": Row(norm="layer", qk_norm_kind="layer", parallel="fra", logit_scale="meta"),
    "dbrx": Row(norm="layer", ffn_norm="attn_output_norm"),
    "deepseek": Row(has_rope_factors=True, has_expert_norm=False),
    "deepseek2": Row(attention="mla", temperature="meta", default_gating="softmax", **_META),
    "deepseek2-ocr": Row(attention="plain", default_gating="softmax", **_META),
    "deepseek32": Row(scaled="fes", attention="dsa", **_META),
    "deepseek4": Row(
        unread="s",
        clamp="fused",
        has_mixed_batch=False,
        attention="compressed",
        structure="hyper_expanded",
        rows_at="never",
        **_META,
    ),
    "glm-dsa": Row(scaled="fes", attention="dsa", **_META),
    "dots3note": Row(scaled="fes", attention="dsa", gate="sigmoid", **_META),
    "dots1": Row(**_META),
    "dream": Row(unread="l", attention="no_cache"),
    "exaone-moe": Row(has_rope_factors=True, rope="swa", **_META),
    "exaone4": Row(has_rope_factors=True, rope="swa_if_any", **_POST_NORMS),
    "falcon": Row(parallel="far", **_LAYER_GELU),
    "gemma": Row(embedding_scale="graph", **_GEMMA),
    "gemma2": Row(embedding_scale="graph", softcap="always", is_capped=True, **_GEMMA, **_POST_NORMS),
    "gemma3": Row(embedding_scale="rows", softcap="meta", **_GEMMA, **_POST_NORMS),
    "gemma3n": Row(embedding_scale="rows", softcap="always", structure="altup", rows_at="end_plain"),
    "gemma4": Row(
        scaled="e",
        embedding_scale="rows",
        has_rope_factors=True,
        is_window_unfactored=True,
        expert_activation="gelu",
        is_expert_scaled=False,
        softcap="meta",
        structure="gemma4",
        rows_at="end_normed",
    ),
    "gemma-embedding": Row(
        attention="no_cache", embedding_scale="rows", structure="embedding", **_GEMMA, **_POST_NORMS
    ),
    "glm4": Row(
        activation="swiglu",
        n_pos_per_token=0,
        is_post_ffn_norm_pinned=True,
        **_POST_NORMS,
    ),
    "glm4moe": Row(ffn_norm="post_attention_norm", n_pos_per_token=0, **_META),
    "gpt-oss": Row(
        ffn_norm="post_attention_norm",
        gating="softmax_weight",
        has_expert_norm=False,
        expert_activation="swiglu_oai",
        rows_at="end",
    ),
    "gpt2": Row(has_position_table=True, rope="none", **_LAYER_GELU),
    "gptneox": Row(parallel="neox", **_LAYER_GELU),
    "granite": Row(has_rope_factors=True, deepstack="before", rope="finetuned", **_GRANITE),
    "granite_swa": Row(
        has_rope_factors=True, deepstack="before", rope="pattern", shared_activation="swiglu", **_GRANITE
    ),
    "granitemoe": Row(has_rope_factors=True, **_GRANITE),
    "grok": Row(
        has_flash=False,
        embedding_scale="always",
        logit_scale="always",
        softcap="meta",
        activation="gelu",
        expert_activation="gelu",
        feed="grok",
        post_attention_norm="attn_output_norm",
        post_ffn_norm="layer_output_norm|post_ffw_norm",
        is_post_ffn_norm_pinned=True,
    ),
    "grovemoe": Row(feed="grove", selects_by="sigmoid"),
    "hunyuan-dense": Row(has_rope_factors=True, qk_norm="after"),
    "hunyuan-moe": Row(has_rope_factors=True, qk_norm="after", feed="shared_first"),
    "hunyuan_vl": Row(has_rope_factors=True, qk_norm="after", n_pos_per_token=0),
    "step35": Row(
        has_rope_factors=True,
        is_window_unfactored=True,
        gate="sigmoid",
        clamp="split",
        rows_at="end",
        **_META,
    ),
    "hy_v4": Row(
        unread="s",
        attention="dsa",
        gate="sigmoid",
        clamp="fused_experts",
        structure="hyper_cast",
        rows_at="never",
        **_META,
    ),
    "hy_v3": Row(has_rope_factors=True, scaled="fes", rows_at="end_normed", **_META),
    "jais": Row(norm="layer", rope="none", has_alibi=True),
    "jais2": Row(norm="layer", activation="relu_sqr"),
    "laguna": Row(gate="softplus", **_META),
    "llada": Row(unread="of", attention="no_cache"),
    "llada-moe": Row(attention="no_cache", has_expert_norm=False),
    "llama-embed": Row(attention="no_cache", structure="embedding"),
    "llama4": Row(
        has_rope_factors=True,
        rope="step",
        temperature="no_rope",
        has_plain_qk_norm=True,
        gating="sigmoid",
        has_expert_norm=False,
        is_weighted_before=True,
        selects_by="logits",
    ),
    "maincoder": Row(qk_norm="after"),
    "maple": Row(rope="swa", clamp="fused_experts", is_expert_scaled=False),
    "mimo2": Row(unread="qs", value_scale="meta", gating="sigmoid"),
    "minicpm": Row(
        has_rope_factors=True, embedding_scale="always", residual_scale="always", logit_scale="always"
    ),
    "minicpm3": Row(
        has_rope_factors=True,
        attention="mla",
        embedding_scale="graph",
        residual_scale="always",
        output_scale="always",
    ),
    "minimax-m2": Row(qk_norm="flat", gating="meta"),
    "minimax-m3": Row(
        attention="blocks",
        activation="swiglu_oai",
        shared_activation="swiglu_oai",
        expert_activation="swiglu_oai",
        **_META,
    ),
    "mistral3": Row(has_rope_factors=True, scaled="fe", temperature="meta"),
    "mistral4": Row(
        has_exact_down=True, attention="mla", temperature="meta", default_gating="softmax", **_META
    ),
    "mpt": Row(
        has_position_table=True,
        rope="none",
        has_alibi=True,
        qk_norm="mpt",
        qk_norm_kind="layer",
        **_LAYER_GELU,
    ),
    "muse-glimmer": Row(
        embedding_norm="plain",
        rope="swa",
        gate="sigmoid",
        logit_scale="always",
        softcap="meta",
        is_post_attention_norm_pinned=False,
        has_rows_after_norm=True,
        **_POST_NORMS,
    ),
    "nanbeige": Row(has_rope_factors=True, scaled="f", structure="loops"),
    "nemotron": Row(norm="layer", activation="relu_sqr"),
    "olmo": Row(norm="layer", has_norm_weights=False),
    "olmo2": Row(qk_norm="flat", **_POST_NORMS),
    "olmoe": Row(qk_norm="flat", has_expert_norm=False),
    "openelm": Row(is_residual_first=True, qkv="reshaped"),
    "orion": Row(norm="layer"),
    "paddleocr": Row(n_pos_per_token=4),
    "phi2": Row(has_q_scale=True, parallel="afr", **_LAYER_GELU),
    "phi3": Row(is_middle_first=True, has_rope_factors=True, has_q_scale=True, activation="swiglu"),
    "phimoe": Row(is_middle_first=True, has_rope_factors=True, has_q_scale=True, activation="swiglu"),
    "plamo": Row(parallel="far"),
    "plamo3": Row(unread="s", activation="swiglu", is_post_ffn_norm_pinned=True, **_POST_NORMS),
    "plm": Row(attention="mla", activation="relu_sqr"),
    "pockettts": Row(**_LAYER_GELU),
    "qwen2moe": Row(has_expert_norm=False, shared_gate="silu_div"),
    "qwen2vl": Row(unread="l", n_pos_per_token=4),
    "qwen3next": Row(
        scaled="es",
        attention="gated_q",
        recurrent="gdn",
        is_norm_expanded=True,
        ffn_norm="post_attention_norm",
        shared_gate="sigmoid",
        rows_at="end_normed",
    ),
    "qwen3tts": Row(n_pos_per_token=4, deepstack="after"),
    "qwen3vl": Row(n_pos_per_token=4, deepstack="after"),
    "qwen3vlmoe": Row(n_pos_per_token=4, deepstack="after"),
    "falcon-h1": Row(unread="o", recurrent="mamba2_beside", has_rows_after_sum=True),
    "granitehybrid": Row(
        recurrent="mamba2",
        embedding_scale="meta",
        residual_scale="meta",
        logit_scale="meta",
        rope="finetuned",
        has_rope_factors=True,
    ),
    "jamba": Row(
        recurrent="mamba", rope="none", is_residual_first=True, is_middle_first=True, has_expert_norm=False
    ),
    "kimi-k3": Row(
        unread="s",
        attention="mla_plain_gated",
        recurrent="kda_bounded",
        gate="sigmoid",
        is_norm_expanded=True,
        activation="situ",
        shared_activation="situ",
        expert_activation="situ",
        feed="latent",
        structure="stack",
        rows_at="end_plain",
        **_META,
    ),
    "hrm_text": Row(
        embedding_scale="meta",
        has_norm_weights=False,
        gate="sigmoid",
        structure="cycles",
        has_output_norm=False,
        rows_at="end_plain",
    ),
    "glm5-next": Row(
        unread="s",
        attention="pools_latent",
        clamp="fused",
        has_pools=True,
        recurrent="kda_bounded_low",
        is_norm_expanded=True,
        structure="hyper_mean",
        rows_at="never",
        **_META,
    ),
    "kimi-linear": Row(attention="mla_plain", recurrent="kda", is_norm_expanded=True, gating="meta"),
    "bailingmoe3": Row(
        attention="mla_gated",
        recurrent="kda_direct",
        clamp="split",
        rows_at="end_normed",
        n_pos_per_token=0,
        **_META,
    ),
    **{
        name: Row(
            recurrent="shortconv",
            is_residual_first=True,
            is_middle_first=True,
            gating="meta",
            output_norm="token_embd_norm.weight",
        )
        for name in ("lfm2", "lfm2moe")
    },
    "mamba": Row(recurrent="mamba", feed="none"),
    "mamba2": Row(recurrent="mamba2", feed="none"),
    "minimax-01": Row(recurrent="lightning"),
    **{
        name: Row(
            scaled="fes",
            recurrent="mamba2",
            rope="none",
            feed="layer",
            rows_at="end_normed",
            activation="relu_sqr",
            shared_activation="relu_sqr",
            expert_activation="relu_sqr",
            gating="sigmoid",
            has_expert_norm=None,
        )
        for name in ("nemotron_h", "nemotron_h_moe")
    },
    "plamo2": Row(
        unread="s", recurrent="plamo2", activation="swiglu", is_post_ffn_norm_pinned=True, **_POST_NORMS
    ),
    "qwen4exp": Row(
        unread="q",
        scaled="es",
        attention="gated_q_views",
        has_pools=True,
        recurrent="gdn_padded",
        n_pos_per_token=4,
        shared_gate="sigmoid",
        structure="gated_streams",
        has_output_norm=False,
        rows_at="never",
    ),
    "qwen35": Row(
        scaled="f",
        has_class_head=True,
        attention="gated_q_views",
        recurrent="gdn_split",
        is_norm_expanded=True,
        n_pos_per_token=4,
        ffn_norm="post_attention_norm",
        rows_at="end_normed",
    ),
    "qwen35moe": Row(
        scaled="es",
        attention="gated_q_views",
        recurrent="gdn_split",
        is_norm_expanded=True,
        n_pos_per_token=4,
        ffn_norm="post_attention_norm",
        shared_gate="sigmoid",
        rows_at="end_normed",
    ),
    "refact": Row(feed="dense", unread="of", rope="none", has_alibi=True),
    "rnd1": Row(attention="no_cache"),
    "seed_oss": Row(ffn_norm="post_attention_norm"),
    "smallthinker": Row(rope="step_from_0", feed="router_first", expert_activation="relu", gating="meta"),
    "smollm3": Row(rope="step"),
    "spark2_5": Row(activation="gelu", gate="sigmoid"),
    "stablelm": Row(norm="layer", qk_norm_kind="layer", parallel="stablelm"),
    "starcoder": Row(has_position_table=True, rope="none", **_LAYER_GELU),
    "starcoder2": Row(**_LAYER_GELU),
    "talkie": Row(
        scaled="d",
        embedding_norm="plain",
        has_norm_weights=False,
        qk_norm="after",
        logit_scale="always",
        has_skip=True,
    ),
}
