from __future__ import annotations

import dataclasses
from typing import Any

import golden_sample
import pytest

from placement.inputs.model import Model, Tensor
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.architecture.records import Architecture
from placement.llamacpp.architecture.rules import RULES
from placement.llamacpp.architecture.tensors import TIED_OUTPUT, tensor_class, tensor_layer

WINDOW = {"attention__sliding_window": 9}


def tiny(architecture: str, tensors: dict[str, tuple[int, ...]] | None = None, **keys: Any) -> Model:
    """A four-layer model of that architecture; double underscores in a key stand for dots."""
    header: dict[str, Any] = {
        "block_count": 4,
        "embedding_length": 256,
        "context_length": 4096,
        "attention.head_count": 4,
        "attention.head_count_kv": 2,
        **{key.replace("__", "."): value for key, value in keys.items()},
    }
    metadata = {f"{architecture}.{key}": value for key, value in header.items()}
    shapes = {"token_embd.weight": (256, 1000), **(tensors or {})}
    return Model(
        "tiny",
        {"general.architecture": architecture, **metadata},
        {},
        tuple(Tensor(name, shape, "F32") for name, shape in shapes.items()),
    )


def windows(architecture: Architecture) -> list[int | None]:
    """Each layer's window."""
    return [layer.window_tokens for layer in architecture.layers]


def test_plain_widths() -> None:
    """Without key_length a cell of K is n_embd / n_head elements for each KV head."""
    layer = describe(tiny("llama")).layers[0]
    assert (layer.k_width, layer.v_width) == (128, 128)


def test_head_counts_per_layer() -> None:
    """An array of KV head counts gives every layer its own width."""
    found = describe(tiny("openelm", attention__head_count_kv=(1, 2, 3, 4))).layers
    assert [layer.k_width for layer in found] == [64, 128, 192, 256]


def test_description_is_kept() -> None:
    """A model is described once, as many objects as there are of it."""
    model = tiny("llama")
    assert describe(model) is describe(model) is describe(tiny("llama"))


def test_another_model_is_described_anew() -> None:
    """The name does not tell models apart: what they are made of does."""
    model = tiny("llama")
    assert describe(dataclasses.replace(model, tensors=model.tensors[:0])) != describe(model)


@pytest.mark.parametrize(
    ("architecture", "keys", "expected"),
    [
        ("gemma2", {}, [4096, None, 4096, None]),
        ("gpt-oss", {"attention__sliding_window": 128}, [128, None, 128, None]),
        ("llama4", {}, [8192, 8192, 8192, None]),
        ("llama4", {"attention__sliding_window": 0}, [None] * 4),
        ("gemma3", {}, [None] * 4),
        ("laguna", {"attention__sliding_window": 512}, [None, 512, 512, 512]),
        ("smallthinker", {"attention__sliding_window": 7}, [None, 4096, 4096, 4096]),
        ("cohere2", {**WINDOW, "attention__sliding_window_pattern": 2}, [9, None, 9, None]),
        ("mimo2", {**WINDOW, "attention__sliding_window_pattern": (0, 1, 1, 0)}, [None, 9, 9, None]),
        ("exaone4", {"attention__sliding_window": 9}, [None] * 4),
        ("phi3", {"attention__sliding_window": 2047}, [None] * 4),
    ],
)  # fmt: skip
def test_windows(architecture: str, keys: dict[str, Any], expected: list[int | None]) -> None:
    """Which layers have a sliding window follows the architecture's pattern and the header's keys."""
    assert expected == windows(describe(tiny(architecture, **keys)))


def test_exaone4_of_64_layers_has_windows() -> None:
    """EXAONE 4 has sliding windows only in its 64-layer size."""
    assert windows(describe(tiny("exaone4", block_count=64)))[0] == 4096


def test_window_layers_have_their_own_head_size() -> None:
    """key_length_swa holds in windowed layers only."""
    model = tiny(
        "mimo2",
        attention__sliding_window=128,
        attention__sliding_window_pattern=(1, 0, 1, 0),
        attention__key_length=64,
        attention__key_length_swa=32,
    )
    assert [layer.k_width for layer in describe(model).layers[:2]] == [64, 128]


def test_latent_attention_keeps_no_v() -> None:
    """With key_length_mla the cache holds K alone."""
    model = tiny(
        "deepseek2",
        attention__head_count_kv=1,
        attention__key_length=576,
        attention__key_length_mla=256,
        attention__value_length_mla=128,
    )
    layer = describe(model).layers[0]
    assert (layer.k_width, layer.v_width) == (576, 0)


@pytest.mark.parametrize("architecture", ["bert", "modern-bert", "llada", "dream", "gemma-embedding", "rnd1"])
def test_no_memory(architecture: str) -> None:
    """Encoders and diffusion models keep nothing between batches."""
    described = describe(tiny(architecture))
    assert (described.has_memory, described.layers[0].caches) == (False, ())


def test_nextn_layers() -> None:
    """NextN layers count as layers for the split, but are neither loaded nor cached."""
    model = tiny("glm4moe", {"blk.3.nextn.eh_proj.weight": (512, 256)}, nextn_predict_layers=1)
    described = describe(model)
    assert (
        described.n_layer_all,
        described.n_layer,
        described.layers[3].is_loaded,
        described.layers[3].caches,
    ) == (4, 3, False, ())


def test_nextn_tensors_are_left_in_the_file() -> None:
    """The tensors of a NextN layer are not allocated."""
    name = "blk.3.ffn_down_exps.weight"
    described = describe(tiny("glm4moe", {name: (64, 256, 8)}, nextn_predict_layers=1))
    assert [name] == [tensor.name for tensor in described.skipped]


def test_step35_loads_nextn_experts() -> None:
    """Step 3.5 loads the feed-forward tensors of its NextN layers although nothing reads them."""
    tensors = {"blk.3.ffn_down_exps.weight": (64, 256, 8), "blk.3.attn_q.weight": (256, 256)}
    described = describe(tiny("step35", tensors, nextn_predict_layers=1, attention__sliding_window=512))
    assert [tensor.name for tensor in described.skipped] == ["blk.3.attn_q.weight"]


def test_delta_net_interval() -> None:
    """Every fourth layer of Qwen3-Next has attention, the others state."""
    model = tiny("qwen3next", ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=64, ssm__group_count=2)
    found = describe(model).layers
    assert [layer.is_recurrent for layer in found] == [True, True, True, False]


def test_delta_net_state() -> None:
    """State is (d_conv-1)(d_inner+2 n_group d_state) elements of r and d_state d_inner of s."""
    model = tiny("qwen3next", ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=64, ssm__group_count=2)
    layer = describe(model).layers[0]
    assert (layer.state_r, layer.state_s, layer.caches) == (3 * (512 + 256), 64 * 512, ())


def test_parallel_hybrid() -> None:
    """Falcon-H1 has a cache and a state in every layer."""
    model = tiny("falcon-h1", ssm__conv_kernel=4, ssm__inner_size=512, ssm__state_size=64, ssm__group_count=1)
    assert all(layer.caches and layer.state_s for layer in describe(model).layers)


def test_nemotron_layers_are_one_thing_each() -> None:
    """In Nemotron-H a layer is a state, an attention or a feed-forward."""
    model = tiny(
        "nemotron_h",
        attention__head_count_kv=(0, 2, 0, 0),
        feed_forward_length=(0, 0, 512, 0),
        ssm__conv_kernel=4,
        ssm__inner_size=512,
        ssm__state_size=128,
    )
    found = describe(model).layers
    assert [(layer.is_recurrent, len(layer.caches)) for layer in found] == [
        (True, 0),
        (False, 1),
        (False, 0),
        (True, 0),
    ]


def test_rwkv_state() -> None:
    """RWKV keeps two shifted tokens and n_embd x head size."""
    layer = describe(tiny("rwkv7", wkv__head_size=64)).layers[0]
    assert (layer.state_r, layer.state_s) == (2 * 256, 256 * 64)


def test_reused_caches() -> None:
    """Gemma 3n's layers from 20 on read the last windowed or full cache before it."""
    found = describe(tiny("gemma3n", block_count=30, attention__sliding_window=512)).layers
    assert [found[20].cache_layer, found[24].cache_layer, found[24].caches] == [20 - 2, 20 - 1, ()]


def test_indexer_cache() -> None:
    """DeepSeek 3.2 caches indexer keys beside the latent ones."""
    model = tiny(
        "deepseek32",
        attention__key_length_mla=192,
        attention__value_length_mla=128,
        attention__indexer__key_length=128,
        attention__indexer__top_k=2048,
    )
    layer = describe(model).layers[0]
    assert (layer.indexer_k_width, len(layer.caches)) == (128, 2)


def test_compressed_caches() -> None:
    """A ratio-4 layer of DeepSeek-V4 has a raw, a compressed and an indexer cache."""
    model = tiny(
        "deepseek4",
        attention__sliding_window=128,
        attention__compress_ratios=(0, 0, 4, 128),
        attention__indexer__key_length=128,
    )
    assert [len(layer.caches) for layer in describe(model).layers] == [1, 1, 3, 2]


def test_router_layer() -> None:
    """Granite Switch adds a layer of one head behind its blocks."""
    described = describe(tiny("graniteswitch"))
    assert (described.n_layer_all, described.layers[4].k_width) == (5, 64)


def test_loops() -> None:
    """Nanbeige's loops each have their own caches, not their own tensors."""
    described = describe(tiny("nanbeige", num_loops=2))
    assert (described.n_layer_all, described.layers[7].k_width) == (8, 128)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("token_embd.weight", "input"),
        ("per_layer_token_embd.weight", "input"),
        ("output.weight", "output"),
        ("output_norm.bias", "output"),
        ("cls.output.weight", "output"),
        ("dec.output_norm.weight", "output"),
        ("token_embd_norm.weight", "repeating"),
        ("rope_freqs.weight", "repeating"),
        ("blk.11.ffn_up_exps.weight", "repeating"),
        ("dec.blk.3.cross_attn_k.weight", "repeating"),
    ],
)
def test_tensor_class(name: str, expected: str) -> None:
    """A tensor's class decides which device it goes to by default."""
    assert expected == tensor_class(name)


def test_lfm2_norm_is_output() -> None:
    """LFM2's token_embd_norm is its output norm."""
    assert tensor_class("token_embd_norm.weight", RULES["lfm2"]) == "output"


def test_tensor_layer_of_a_decoder() -> None:
    """An encoder-decoder's blocks have layer numbers too."""
    assert (tensor_layer("dec.blk.12.attn_q.weight"), tensor_layer("output.weight")) == (12, None)


def test_tied_output() -> None:
    """Without an output matrix the token embedding is loaded a second time."""
    described = describe(tiny("llama"))
    assert [placed.name for placed in described.tensors if placed.is_copy] == [TIED_OUTPUT]


def test_untied_output() -> None:
    """With an output matrix there is one token embedding."""
    assert not describe(tiny("llama", {"output.weight": (256, 1000)})).is_output_tied


def test_unknown_architecture() -> None:
    """An architecture without a rule is derived from its header, and says so."""
    described = describe(tiny("brand-new", attention__sliding_window=64, attention__sliding_window_pattern=2))
    assert (described.is_known, windows(described)) == (False, [64, None, 64, None])


def test_known_models_are_known() -> None:
    """Every recorded model's architecture has a rule."""
    names = {row["model"] for row in golden_sample.ROWS}
    assert [name for name in names if not describe(golden_sample.model(name)).is_known] == []


def test_ternary_weights_have_no_cuda_kernel() -> None:
    """CUDA multiplies no TQ2_0 weights, so the engine keeps them on the CPU."""
    model = tiny("bitnet")
    tensor = Tensor("blk.0.attn_q.weight", (256, 256), "TQ2_0")
    model = dataclasses.replace(model, tensors=(*model.tensors, tensor))
    placed = {placed.name: placed for placed in describe(model).tensors}
    assert not placed[tensor.name].has_cuda_kernel
