"""The table of architectures: one row each; what most have in common is in `ArchitectureRow`'s defaults and `LLAMA`."""

from __future__ import annotations

from typing import Any

from placement.llamacpp.graph.row import ArchitectureRow, Scaled

_ALL_FFN: tuple[Scaled, ...] = ("ffn", "experts", "shared_expert")
_META: dict[str, Any] = {"gating": "meta", "has_expert_norm": None}
_GEMMA: dict[str, Any] = {"has_q_scale": True, "activation": "gelu"}
_POST_NORMS: dict[str, Any] = {
    "post_attention_norm": "post_attention_norm",
    "post_ffn_norm": ("post_ffw_norm",),
}
_GRANITE: dict[str, Any] = {"embedding_scale": "meta", "residual_scale": "meta", "logit_scale": "always"}
_LAYER_GELU: dict[str, Any] = {"norm": "layer", "activation": "gelu"}

LLAMA = ArchitectureRow()

ROWS: dict[str, ArchitectureRow] = {
    **dict.fromkeys(("qwen", "qwen2", "xverse", "internlm2", "pangu-embedded"), LLAMA),
    "llama": ArchitectureRow(has_rope_factors=True, scaled=("ffn", "experts")),
    **dict.fromkeys(("exaone", "deci"), ArchitectureRow(has_rope_factors=True)),
    **dict.fromkeys(("ernie4_5", "ernie4_5-moe"), ArchitectureRow(unread=("attention_output_bias",))),
    **dict.fromkeys(("bitnet", "qwen3"), ArchitectureRow(scaled=("ffn",))),
    **dict.fromkeys(("mellum", "qwen3moe"), ArchitectureRow(scaled=("experts",))),
    "arctic": ArchitectureRow(feed="arctic"),
    "apertus": ArchitectureRow(has_rope_factors=True, activation="xielu"),
    "arcee": ArchitectureRow(has_rope_factors=True, activation="relu_sqr"),
    "afmoe": ArchitectureRow(
        embedding_scale="graph",
        rope="step",
        gate="sigmoid",
        is_post_ffn_norm_pinned=True,
        has_rows_after_norm=True,
        **_POST_NORMS,
        **_META,
    ),
    "baichuan": ArchitectureRow(rope="by_size"),
    "bailingmoe": ArchitectureRow(has_rope_factors=True, has_expert_norm=None),
    "bailingmoe2": ArchitectureRow(**_META),
    "bloom": ArchitectureRow(
        embedding_norm="weights", is_embedding_norm_pinned=True, rope="none", has_alibi=True, **_LAYER_GELU
    ),
    "chameleon": ArchitectureRow(qk_norm_kind="layer", has_image_logits=True),
    "chatglm": ArchitectureRow(activation="swiglu"),
    "codeshell": ArchitectureRow(**_LAYER_GELU),
    "cogvlm": ArchitectureRow(unread=("attention_scale",), has_mixed_batch=False, rows_at="never"),
    "cohere2": ArchitectureRow(
        has_rope_factors=True,
        scaled=("ffn",),
        norm="layer",
        rope="swa",
        parallel="feed_residual_attention",
        logit_scale="meta",
    ),
    "cohere2moe": ArchitectureRow(
        has_rope_factors=True,
        scaled=_ALL_FFN,
        rope="swa_or_dense",
        parallel="feed_residual_attention",
        logit_scale="meta",
        rows_at="end_normed",
        is_sum_scaled=True,
        **_META,
    ),
    "command-r": ArchitectureRow(
        norm="layer", qk_norm_kind="layer", parallel="feed_residual_attention", logit_scale="meta"
    ),
    "dbrx": ArchitectureRow(norm="layer", ffn_norm="attn_output_norm"),
    "deepseek": ArchitectureRow(has_rope_factors=True, has_expert_norm=False),
    "deepseek2": ArchitectureRow(attention="mla", temperature="meta", default_gating="softmax", **_META),
    "deepseek2-ocr": ArchitectureRow(default_gating="softmax", **_META),
    **dict.fromkeys(("deepseek32", "glm-dsa"), ArchitectureRow(scaled=_ALL_FFN, attention="dsa", **_META)),
    "deepseek4": ArchitectureRow(
        unread=("attention_scale",),
        clamp="fused",
        has_mixed_batch=False,
        attention="compressed",
        structure="hyper_expanded",
        rows_at="never",
        **_META,
    ),
    "dots3note": ArchitectureRow(scaled=_ALL_FFN, attention="dsa", gate="sigmoid", **_META),
    "dots1": ArchitectureRow(**_META),
    "dream": ArchitectureRow(unread=("logits_bias",), attention="no_cache"),
    "exaone-moe": ArchitectureRow(has_rope_factors=True, rope="swa", **_META),
    "exaone4": ArchitectureRow(has_rope_factors=True, rope="swa_if_any", **_POST_NORMS),
    "falcon": ArchitectureRow(parallel="feed_attention_residual", **_LAYER_GELU),
    "gemma": ArchitectureRow(embedding_scale="graph", **_GEMMA),
    "gemma2": ArchitectureRow(
        embedding_scale="graph", softcap="always", is_capped=True, **_GEMMA, **_POST_NORMS
    ),
    "gemma3": ArchitectureRow(embedding_scale="rows", softcap="meta", **_GEMMA, **_POST_NORMS),
    "gemma3n": ArchitectureRow(
        embedding_scale="rows", softcap="always", structure="altup", rows_at="end_plain"
    ),
    "gemma4": ArchitectureRow(
        scaled=("experts",),
        embedding_scale="rows",
        has_rope_factors=True,
        is_window_unfactored=True,
        expert_activation="gelu",
        is_expert_scaled=False,
        softcap="meta",
        structure="gemma4",
        rows_at="end_normed",
    ),
    "glm4": ArchitectureRow(
        activation="swiglu",
        n_pos_per_token=0,
        is_post_ffn_norm_pinned=True,
        **_POST_NORMS,
    ),
    "glm4moe": ArchitectureRow(ffn_norm="post_attention_norm", n_pos_per_token=0, **_META),
    "gpt-oss": ArchitectureRow(
        ffn_norm="post_attention_norm",
        gating="softmax_weight",
        has_expert_norm=False,
        expert_activation="swiglu_oai",
        rows_at="end",
    ),
    "gpt2": ArchitectureRow(has_position_table=True, rope="none", **_LAYER_GELU),
    "gptneox": ArchitectureRow(parallel="neox", **_LAYER_GELU),
    "granite": ArchitectureRow(has_rope_factors=True, deepstack="before", rope="finetuned", **_GRANITE),
    "granite_swa": ArchitectureRow(
        has_rope_factors=True, deepstack="before", rope="pattern", shared_activation="swiglu", **_GRANITE
    ),
    "granitemoe": ArchitectureRow(has_rope_factors=True, **_GRANITE),
    "grok": ArchitectureRow(
        embedding_scale="always",
        logit_scale="always",
        softcap="meta",
        activation="gelu",
        expert_activation="gelu",
        feed="grok",
        post_attention_norm="attn_output_norm",
        post_ffn_norm=("layer_output_norm", "post_ffw_norm"),
        is_post_ffn_norm_pinned=True,
    ),
    "grovemoe": ArchitectureRow(feed="grove", selects_by="sigmoid"),
    "hunyuan-dense": ArchitectureRow(has_rope_factors=True, qk_norm="after"),
    "hunyuan-moe": ArchitectureRow(has_rope_factors=True, qk_norm="after", feed="shared_first"),
    "hunyuan_vl": ArchitectureRow(has_rope_factors=True, qk_norm="after", n_pos_per_token=0),
    "step35": ArchitectureRow(
        has_rope_factors=True,
        is_window_unfactored=True,
        gate="sigmoid",
        clamp="split",
        rows_at="end",
        **_META,
    ),
    "hy_v4": ArchitectureRow(
        unread=("attention_scale",),
        attention="dsa",
        gate="sigmoid",
        clamp="fused_experts",
        structure="hyper_cast",
        rows_at="never",
        **_META,
    ),
    "hy_v3": ArchitectureRow(has_rope_factors=True, scaled=_ALL_FFN, rows_at="end_normed", **_META),
    "jais": ArchitectureRow(norm="layer", rope="none", has_alibi=True),
    "laguna": ArchitectureRow(gate="softplus", **_META),
    "llada": ArchitectureRow(unread=("attention_output_bias", "ffn_bias"), attention="no_cache"),
    "llada-moe": ArchitectureRow(attention="no_cache", has_expert_norm=False),
    "llama4": ArchitectureRow(
        has_rope_factors=True,
        rope="step",
        temperature="no_rope",
        has_plain_qk_norm=True,
        gating="sigmoid",
        has_expert_norm=False,
        is_weighted_before=True,
        selects_by="logits",
    ),
    "maincoder": ArchitectureRow(qk_norm="after"),
    "maple": ArchitectureRow(rope="swa", clamp="fused_experts", is_expert_scaled=False),
    "mimo2": ArchitectureRow(unread=("qkv_bias", "attention_scale"), value_scale="meta", gating="sigmoid"),
    "minicpm": ArchitectureRow(
        has_rope_factors=True, embedding_scale="always", residual_scale="always", logit_scale="always"
    ),
    "minicpm3": ArchitectureRow(
        has_rope_factors=True,
        attention="mla",
        embedding_scale="graph",
        residual_scale="always",
        has_output_scale=True,
    ),
    "minimax-m2": ArchitectureRow(qk_norm="flat", gating="meta"),
    "minimax-m3": ArchitectureRow(
        attention="blocks",
        activation="swiglu_oai",
        shared_activation="swiglu_oai",
        expert_activation="swiglu_oai",
        **_META,
    ),
    "mistral3": ArchitectureRow(has_rope_factors=True, scaled=("ffn", "experts"), temperature="meta"),
    "mistral4": ArchitectureRow(
        has_exact_down=True, attention="mla", temperature="meta", default_gating="softmax", **_META
    ),
    "mpt": ArchitectureRow(
        has_position_table=True,
        rope="none",
        has_alibi=True,
        qk_norm="mpt",
        qk_norm_kind="layer",
        **_LAYER_GELU,
    ),
    "muse-glimmer": ArchitectureRow(
        embedding_norm="plain",
        rope="swa",
        gate="sigmoid",
        logit_scale="always",
        softcap="meta",
        is_post_attention_norm_pinned=False,
        has_rows_after_norm=True,
        **_POST_NORMS,
    ),
    "nanbeige": ArchitectureRow(has_rope_factors=True, scaled=("ffn",), structure="loops"),
    **dict.fromkeys(("jais2", "nemotron"), ArchitectureRow(norm="layer", activation="relu_sqr")),
    "olmo": ArchitectureRow(norm="layer", has_norm_weights=False),
    "olmo2": ArchitectureRow(qk_norm="flat", **_POST_NORMS),
    "olmoe": ArchitectureRow(qk_norm="flat", has_expert_norm=False),
    "openelm": ArchitectureRow(is_residual_first=True, has_reshaped_qkv=True),
    "orion": ArchitectureRow(norm="layer"),
    "paddleocr": ArchitectureRow(n_pos_per_token=4),
    "phi2": ArchitectureRow(has_q_scale=True, parallel="attention_feed_residual", **_LAYER_GELU),
    **dict.fromkeys(
        ("phi3", "phimoe"),
        ArchitectureRow(is_middle_first=True, has_rope_factors=True, has_q_scale=True, activation="swiglu"),
    ),
    "plamo": ArchitectureRow(parallel="feed_attention_residual"),
    "plamo3": ArchitectureRow(
        unread=("attention_scale",), activation="swiglu", is_post_ffn_norm_pinned=True, **_POST_NORMS
    ),
    "pockettts": ArchitectureRow(**_LAYER_GELU),
    "qwen2moe": ArchitectureRow(has_expert_norm=False, shared_gate="silu_div"),
    "qwen2vl": ArchitectureRow(unread=("logits_bias",), n_pos_per_token=4),
    "qwen3next": ArchitectureRow(
        scaled=("experts", "shared_expert"),
        attention="gated_q",
        recurrent="gdn",
        is_norm_expanded=True,
        ffn_norm="post_attention_norm",
        shared_gate="sigmoid",
        rows_at="end_normed",
    ),
    **dict.fromkeys(
        ("qwen3tts", "qwen3vl", "qwen3vlmoe"), ArchitectureRow(n_pos_per_token=4, deepstack="after")
    ),
    "falcon-h1": ArchitectureRow(
        unread=("attention_output_bias",), recurrent="mamba2_beside", has_rows_after_sum=True
    ),
    "granitehybrid": ArchitectureRow(
        recurrent="mamba2",
        embedding_scale="meta",
        residual_scale="meta",
        logit_scale="meta",
        rope="finetuned",
        has_rope_factors=True,
    ),
    "jamba": ArchitectureRow(
        recurrent="mamba", rope="none", is_residual_first=True, is_middle_first=True, has_expert_norm=False
    ),
    "kimi-k3": ArchitectureRow(
        unread=("attention_scale",),
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
    "hrm_text": ArchitectureRow(
        embedding_scale="meta",
        has_norm_weights=False,
        gate="sigmoid",
        structure="cycles",
        has_output_norm=False,
        rows_at="end_plain",
    ),
    "glm5-next": ArchitectureRow(
        unread=("attention_scale",),
        attention="pools_latent",
        clamp="fused",
        has_pools=True,
        recurrent="kda_bounded_low",
        is_norm_expanded=True,
        structure="hyper_mean",
        rows_at="never",
        **_META,
    ),
    "kimi-linear": ArchitectureRow(
        attention="mla_plain", recurrent="kda", is_norm_expanded=True, gating="meta"
    ),
    "bailingmoe3": ArchitectureRow(
        attention="mla_gated",
        recurrent="kda_direct",
        clamp="split",
        rows_at="end_normed",
        n_pos_per_token=0,
        **_META,
    ),
    **dict.fromkeys(
        ("lfm2", "lfm2moe"),
        ArchitectureRow(
            recurrent="shortconv",
            is_residual_first=True,
            is_middle_first=True,
            gating="meta",
            output_norm="token_embd_norm.weight",
        ),
    ),
    "mamba": ArchitectureRow(recurrent="mamba", feed="none"),
    "mamba2": ArchitectureRow(recurrent="mamba2", feed="none"),
    "minimax-01": ArchitectureRow(recurrent="lightning"),
    **dict.fromkeys(
        ("nemotron_h", "nemotron_h_moe"),
        ArchitectureRow(
            scaled=_ALL_FFN,
            recurrent="mamba2",
            rope="none",
            feed="layer",
            rows_at="end_normed",
            activation="relu_sqr",
            shared_activation="relu_sqr",
            expert_activation="relu_sqr",
            gating="sigmoid",
            has_expert_norm=None,
        ),
    ),
    "plamo2": ArchitectureRow(
        unread=("attention_scale",),
        recurrent="plamo2",
        activation="swiglu",
        is_post_ffn_norm_pinned=True,
        **_POST_NORMS,
    ),
    "qwen4exp": ArchitectureRow(
        unread=("qkv_bias",),
        scaled=("experts", "shared_expert"),
        attention="gated_q_views",
        has_pools=True,
        recurrent="gdn_padded",
        n_pos_per_token=4,
        shared_gate="sigmoid",
        structure="gated_streams",
        has_output_norm=False,
        rows_at="never",
    ),
    "qwen35": ArchitectureRow(
        scaled=("ffn",),
        has_class_head=True,
        attention="gated_q_views",
        recurrent="gdn_split",
        is_norm_expanded=True,
        n_pos_per_token=4,
        ffn_norm="post_attention_norm",
        rows_at="end_normed",
    ),
    "qwen35moe": ArchitectureRow(
        scaled=("experts", "shared_expert"),
        attention="gated_q_views",
        recurrent="gdn_split",
        is_norm_expanded=True,
        n_pos_per_token=4,
        ffn_norm="post_attention_norm",
        shared_gate="sigmoid",
        rows_at="end_normed",
    ),
    "refact": ArchitectureRow(
        feed="dense", unread=("attention_output_bias", "ffn_bias"), rope="none", has_alibi=True
    ),
    "rnd1": ArchitectureRow(attention="no_cache"),
    "seed_oss": ArchitectureRow(ffn_norm="post_attention_norm"),
    "smallthinker": ArchitectureRow(
        rope="step_from_0", feed="router_first", expert_activation="relu", gating="meta"
    ),
    "smollm3": ArchitectureRow(rope="step"),
    "spark2_5": ArchitectureRow(activation="gelu", gate="sigmoid"),
    "stablelm": ArchitectureRow(norm="layer", qk_norm_kind="layer", parallel="stablelm"),
    "starcoder": ArchitectureRow(has_position_table=True, rope="none", **_LAYER_GELU),
    "starcoder2": ArchitectureRow(**_LAYER_GELU),
    "talkie": ArchitectureRow(
        scaled=("ffn_down",),
        embedding_norm="plain",
        has_norm_weights=False,
        qk_norm="after",
        logit_scale="always",
        has_skip=True,
    ),
}
