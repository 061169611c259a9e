"""What llama.cpp decides per architecture and no header says: one row each, read from its src/models/*.cpp.

`describe` reads this table together with the header. An architecture that is listed without a
rule of its own (`PLAIN`) keeps one KV cache per layer of the trunk. Build b11434.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Window:
    """How the layers with sliding-window attention are told (load_swa_pattern, set_swa_pattern).

    A pattern array in the header wins; otherwise every `period`-th layer is full, the last of each group or,
    with `is_dense_first`, the first. `period` None: the architecture demands the array. Without
    `is_always_on` a window of 0 or none turns sliding windows off; `forced_tokens` replaces the header's
    window and `default_tokens` a missing one.
    """

    period: int | None = None
    is_dense_first: bool = False
    is_always_on: bool = True
    default_tokens: int | None = None
    forced_tokens: int | None = None
    only_n_layer: int | None = None
    is_all_attention: bool = False
    kind: str = "standard"


@dataclass(frozen=True, slots=True)
class Rule:
    """One architecture.

    `memory`: "kv" (a cache per layer), "none" (no memory at all), "recurrent" (state only), "hybrid" (a cache
    or a state per layer), "parallel" (both in every layer), "dsv4" (DeepSeek-V4's compressed caches).
    `recurrent_by`: "kv_heads" (no KV heads in that layer), "kv_heads_and_ffn" (nor a feed-forward), or
    "interval" (all but every `full_attention_interval`-th, whose default is `interval`).
    `has_mla`: the header's key_length_mla makes the cache K-only. `indexer`: which layers also cache indexer
    keys: "trunk", "typed" (attention.indexer.types), "sparse" (after the leading dense ones, with V) or
    "attention" (those that are not recurrent); `indexer_pool_row` slots of the key length per cell when the
    header pools keys. `n_kv_from_start`: layers after it reuse a cache, "shared_kv_layers" from the header.
    `is_tied_copy_separate`: the output's copy of a tied embedding is a second one even on the same device.
    `is_nextn_cached`: NextN layers have a cache although the trunk never reads it; `nextn_loaded`: the
    tensors of NextN layers that are loaded all the same.
    """

    memory: str = "kv"
    window: Window | None = None
    recurrent_by: str | None = None
    interval: int = 4
    has_linear_attention: bool = False
    has_mla: bool = False
    indexer: str | None = None
    indexer_pool_row: int = 1
    n_kv_from_start: int | str | None = None
    is_nextn_cached: bool = False
    nextn_loaded: frozenset[str] = frozenset()
    is_output_tied: bool = True
    is_tied_copy_separate: bool = False
    has_router_layer: bool = False
    has_loops: bool = False
    has_token_norm_as_output: bool = False
    has_flash_attention: bool = True


_HEADS = frozenset({"nextn.embed_tokens", "nextn.shared_head_head", "nextn.shared_head_norm"})
_ROUTER_BIAS = frozenset({"exp_probs_b"})
_FFN = _ROUTER_BIAS.union(
    {"ffn_gate", "ffn_down", "ffn_up", "ffn_gate_inp"},
    {"ffn_gate_exps", "ffn_down_exps", "ffn_up_exps", "ffn_gate_up_exps"},
    {"ffn_gate_shexp", "ffn_down_shexp", "ffn_up_shexp"},
)

PLAIN = Rule()
_ENCODER = Rule(memory="none", is_output_tied=False)
_DIFFUSION = Rule(memory="none")
_STATE = Rule(memory="recurrent")
_PATTERN = Rule(window=Window())  # the pattern array is mandatory
_KV_HEADS = Rule(memory="hybrid", recurrent_by="kv_heads", is_nextn_cached=True)
_KDA = replace(_KV_HEADS, has_mla=True)
_NEMOTRON = Rule(memory="hybrid", recurrent_by="kv_heads_and_ffn", is_nextn_cached=True)
_DELTA_NET = Rule(memory="hybrid", recurrent_by="interval")
_MLA = Rule(has_mla=True)
_OPTIONAL_4 = Rule(window=Window(4, is_always_on=False))
_LFM2 = replace(_KV_HEADS, has_token_norm_as_output=True)

_PLAIN_NAMES = (
    "llama deci falcon gpt2 gptj gptneox mpt baichuan starcoder bloom stablelm qwen qwen2 qwen2moe "
    "qwen2vl qwen3 qwen3moe qwen3vl qwen3vlmoe phi2 phi3 phimoe plamo codeshell orion internlm2 "
    "minicpm minicpm3 gemma starcoder2 xverse command-r dbrx olmo olmoe openelm arctic deepseek "
    "deepseek2-ocr chatglm glm4 glm4moe t5 t5encoder jais jais2 nemotron exaone granite "
    "granitemoe chameleon plm bailingmoe bailingmoe2 dots1 arcee ernie4_5 ernie4_5-moe hunyuan-moe "
    "hunyuan-dense hunyuan_vl smollm3 seed_oss grovemoe apertus hrm_text minimax-m2 cogvlm "
    "pangu-embedded mistral3 paddleocr llama-embed maincoder talkie qwen3tts pockettts refact "
)

RULES: dict[str, Rule] = {
    **dict.fromkeys(_PLAIN_NAMES.split(), PLAIN),
    "bert": _ENCODER,
    "modern-bert": _ENCODER,
    "nomic-bert": _ENCODER,
    "nomic-bert-moe": _ENCODER,
    "neo-bert": _ENCODER,
    "jina-bert-v2": _ENCODER,
    "jina-bert-v3": _ENCODER,
    "eurobert": _ENCODER,
    "wavtokenizer-dec": _ENCODER,
    "clef": _ENCODER,
    "gemma-embedding": _DIFFUSION,
    "dream": _DIFFUSION,
    "llada": _DIFFUSION,
    "llada-moe": _DIFFUSION,
    "rnd1": _DIFFUSION,
    "mamba": _STATE,
    "mamba2": _STATE,
    "rwkv6": _STATE,
    "rwkv6qwen2": _STATE,
    "rwkv7": _STATE,
    "arwkv7": _STATE,
    "grok": Rule(has_flash_attention=False),
    # the embedding serves as the output where it is, or a target model's output does
    "bitnet": Rule(is_output_tied=False),
    "eagle3": Rule(is_output_tied=False),
    # sliding windows
    "afmoe": _OPTIONAL_4,
    "cohere2": Rule(window=Window(4)),
    "cohere2moe": Rule(window=Window(4, is_dense_first=True), nextn_loaded=_HEADS),
    "exaone4": Rule(window=Window(4, default_tokens=4096, only_n_layer=64)),
    "exaone-moe": Rule(window=Window(4, default_tokens=128)),
    "gemma2": Rule(window=Window(2, default_tokens=4096)),
    "gemma3": Rule(window=Window(6, is_always_on=False)),
    "gemma3n": Rule(window=Window(5), n_kv_from_start=20, is_tied_copy_separate=True),
    "gemma4": Rule(window=Window(), n_kv_from_start="shared_kv_layers", is_tied_copy_separate=True),
    "gemma4-assistant": _PATTERN,
    "gpt-oss": Rule(window=Window(2)),
    "granite_swa": _PATTERN,
    "laguna": Rule(window=Window(4, is_dense_first=True, is_always_on=False)),
    "llama4": Rule(window=Window(4, forced_tokens=8192, kind="chunked")),
    "maple": _PATTERN,
    "mellum": _OPTIONAL_4,
    "mimo2": _PATTERN,
    "muse-glimmer": Rule(window=Window(4)),
    "olmo2": _OPTIONAL_4,
    "plamo3": Rule(window=Window(8, is_always_on=False)),
    "smallthinker": Rule(window=Window(4, is_dense_first=True, is_always_on=False, forced_tokens=4096)),
    "spark2_5": _PATTERN,
    "step35": Rule(window=Window(), nextn_loaded=_FFN | _HEADS | {"attn_q_norm", "attn_k_norm", "attn_gate"}),
    "dflash": Rule(window=Window(is_always_on=False)),
    # state in some or all layers
    "jamba": _KV_HEADS,
    "plamo2": _KV_HEADS,
    "granitehybrid": _KV_HEADS,
    "lfm2": replace(_LFM2, window=Window(is_always_on=False, is_all_attention=True)),
    "lfm2moe": _LFM2,
    "nemotron_h": _NEMOTRON,
    "nemotron_h_moe": _NEMOTRON,
    "falcon-h1": Rule(memory="parallel"),
    "qwen3next": _DELTA_NET,
    "qwen35": _DELTA_NET,
    "qwen35moe": _DELTA_NET,
    "qwen4exp": Rule(memory="hybrid", recurrent_by="interval", indexer="attention", indexer_pool_row=2),
    "minimax-01": Rule(memory="hybrid", recurrent_by="interval", interval=8, has_linear_attention=True),
    "kimi-linear": _KDA,
    "kimi-k3": _KDA,
    "bailingmoe3": _KDA,
    "glm5-next": Rule(
        memory="hybrid", recurrent_by="kv_heads", has_mla=True, indexer="typed", indexer_pool_row=3
    ),
    # latent attention and sparse-attention indexers
    "deepseek2": _MLA,
    "mistral4": _MLA,
    "deepseek32": Rule(has_mla=True, indexer="trunk", nextn_loaded=_ROUTER_BIAS),
    "glm-dsa": Rule(has_mla=True, indexer="typed", nextn_loaded=_ROUTER_BIAS),
    "dots3note": Rule(has_mla=True, indexer="typed", window=Window()),
    "hy_v4": Rule(has_mla=True, indexer="typed", is_nextn_cached=True),
    "minimax-m3": Rule(indexer="sparse", is_nextn_cached=True),
    "deepseek4": Rule(memory="dsv4", window=Window(0)),
    "hy_v3": Rule(nextn_loaded=_FFN | _HEADS),
    # more layers than blocks
    "graniteswitch": Rule(has_router_layer=True),
    "nanbeige": Rule(has_loops=True),
}

# GLM-5.2 ships no attention.indexer.types: two full indexers, then one in four.
GLM_5_2_N_CTX_TRAIN = 1048576
GLM_5_2_FULL = (True, True)
GLM_5_2_PERIOD = 4

# Tensors without a block number, by class; every other name without one repeats with the layers.
INPUT_TENSORS = frozenset(
    {
        "token_embd",
        "position_embd",
        "token_types",
        "per_layer_token_embd",
        "masked_embd_centroids",
        "masked_embd_ordering",
    }
)
FIRST_LAYER_TENSORS = frozenset(
    {
        "token_embd_norm",
        "hrm.z_l_init",
        "per_layer_model_proj",
        "per_layer_proj_norm",
        "conv1d",
        "nextn.pre_projection",
    }
)
ROPE_TENSORS = frozenset({"rope_freqs", "rope_factors_long", "rope_factors_short"})
UNUSED_TENSORS = frozenset({"masked_embd_centroids", "masked_embd_ordering", "cross_attn_rel_b"})
LAZY_TENSORS = frozenset({"per_layer_token_embd"})
LAZY_ARCHITECTURES = frozenset({"gemma4", "qwen4exp"})
LAZY_MIN_BYTES = 4 * 1024**3

# Where ggml-cuda has no kernel for a weight, the loader keeps it on the CPU (weight_buft_supported).
SCAN_ARCHITECTURES = frozenset(
    {"mamba", "mamba2", "jamba", "plamo2", "granitehybrid", "falcon-h1", "nemotron_h", "nemotron_h_moe"}
)
CONV_TENSORS = frozenset({"ssm_conv1d", "shortconv.conv", "ple_conv1d"})
