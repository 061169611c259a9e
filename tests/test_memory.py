from __future__ import annotations

import dataclasses

import golden_sample
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_architecture import tiny

from placement.inputs.machine import Cpu, Device, Machine
from placement.inputs.model import Model, Tensor
from placement.inputs.problem import CPU, Assignment, Settings
from placement.llamacpp.memory import (
    context_size,
    kv_bytes_read,
    layer_context_bytes,
    layer_kv_bytes,
    placed_tensors,
    static_memory,
    tensor_devices,
    weight_bytes,
)
from placement.units import MIB, pad

CUDA = Device("CUDA0", 24576, 24000, 480, 1000, 25)
OTHER = Device("CUDA1", 16384, 12800, 480, 900, 25)
MACHINE = Machine("two", (CUDA, OTHER), Cpu(65536, 50, 16))
NAMES = ("CUDA0", "CUDA1")


def spread(model: Model, *homes: str, **settings: object) -> Assignment:
    """An assignment with these homes and no tensor moved."""
    return Assignment(NAMES, homes, settings=dataclasses.replace(Settings(), **settings))  # type: ignore[arg-type]


@pytest.mark.parametrize("row", golden_sample.ROWS, ids=golden_sample.row_id)
def test_recorded_plan(row: golden_sample.Row) -> None:
    """Every device's weights and context agree with what the engine printed, floored to MiB."""
    memory = static_memory(
        golden_sample.model(row["model"]),
        golden_sample.machine(row["machine"]),
        golden_sample.assignment(row),
    )
    ours = {
        name: {"model": part.weights_bytes // MIB, "context": part.context_bytes // MIB}
        for name, part in memory.items()
        if name in row["devices"]
    }
    assert {name: {k: v[k] for k in ("model", "context")} for name, v in row["devices"].items()} == ours


@pytest.mark.parametrize("row", golden_sample.ROWS, ids=golden_sample.row_id)
def test_recorded_caches(row: golden_sample.Row) -> None:
    """All caches together agree with the engine's log to its last digit."""
    settings = golden_sample.assignment(row).settings
    ours = sum(layer_kv_bytes(golden_sample.model(row["model"]), settings)) / MIB
    assert sum(row.get("kv_mib") or [0]) == pytest.approx(ours, abs=0.011)


def test_cuda_pads_quantised_rows() -> None:
    """A quantised row of 640 elements gets the 384 that it lacks to 1024, once per tensor."""
    tensor = Tensor("blk.0.ffn_down.weight", (640, 100), "Q8_0")
    assert weight_bytes(tensor, CUDA) == pad(68000 + 408, 128)


def test_cpu_pads_to_32() -> None:
    """Host memory aligns a tensor to 32 bytes and pads no rows."""
    assert weight_bytes(Tensor("x", (170,), "F32"), None) == 704


def test_cuda_pads_to_128() -> None:
    """CUDA aligns a tensor to 128 bytes."""
    assert weight_bytes(Tensor("x", (1,), "F32"), CUDA) == 128


def test_plain_cache() -> None:
    """4096 cells of 128 + 128 half-precision elements are 2 MiB a layer."""
    assert layer_context_bytes(tiny("llama"), Settings(ctx_tokens=4096)) == (2 * MIB,) * 4


def test_quantised_cache() -> None:
    """q8_0 takes 34 bytes for 32 elements."""
    settings = Settings(ctx_tokens=4096, kv_type_k="q8_0", kv_type_v="q8_0")
    assert layer_context_bytes(tiny("llama"), settings)[0] == 2 * MIB * 34 // 64


def test_slots_share_the_context() -> None:
    """Three slots of 10,000 tokens get 3,584 cells each: a third, rounded up to 256."""
    size = context_size(tiny("llama"), Settings(ctx_tokens=10000, n_slots=3))
    assert (size.cells, size.n_streams) == (3584, 3)


def test_unified_context() -> None:
    """A unified cache is one stream of the whole context, rounded up to 256."""
    size = context_size(tiny("llama"), Settings(ctx_tokens=10000, n_slots=3, is_kv_unified=True))
    assert (size.cells, size.n_streams) == (10240, 1)


def test_trained_context() -> None:
    """A context of 0 means the trained one."""
    assert context_size(tiny("llama"), Settings(ctx_tokens=0)).cells == 4096


def test_ubatch_is_capped_by_the_context() -> None:
    """A ubatch is no larger than the context before its rounding."""
    assert context_size(tiny("llama"), Settings(ctx_tokens=300, ubatch_tokens=512)).ubatch_tokens == 300


@pytest.mark.parametrize(
    ("settings", "cells"),
    [
        (Settings(ctx_tokens=8192), 128 + 512 + 128),
        (Settings(ctx_tokens=8192, ubatch_tokens=2048), 2304),
        (Settings(ctx_tokens=8192, n_slots=4, is_kv_unified=True), 1024),
        (Settings(ctx_tokens=8192, is_swa_full=True), 8192),
        (Settings(ctx_tokens=512), 512),
    ],
)
def test_window_cells(settings: Settings, cells: int) -> None:
    """A windowed layer has window + ubatch cells, a window for each unified slot, rounded up to 256."""
    model = tiny("gpt-oss", attention__sliding_window=128)
    assert cells * 512 == layer_context_bytes(model, settings)[0]


def test_v_without_flash_attention() -> None:
    """Without flash attention V is padded to the widest layer's."""
    model = tiny("openelm", attention__head_count_kv=(1, 2, 2, 2))
    assert layer_context_bytes(model, Settings(flash_attention="off"))[0] == 4096 * 2 * (64 + 128)


def test_states_are_per_slot() -> None:
    """Two slots have two states, whatever the context."""
    model = tiny("rwkv7", wkv__head_size=64)
    assert layer_context_bytes(model, Settings(n_slots=2))[0] == 2 * 4 * (512 + 256 * 64)


def test_context_stays_home() -> None:
    """A layer's cache is on its home wherever its tensors go."""
    model = tiny("llama", {"blk.0.ffn_up.weight": (256, 512)})
    plan = spread(model, *["CUDA0"] * 4, "CUDA1")
    moved = dataclasses.replace(plan, moved=(("blk.0.ffn_up.weight", "CUDA1"),))
    assert static_memory(model, MACHINE, moved)["CUDA0"].context_bytes == 8 * MIB


def test_context_in_host_memory() -> None:
    """-nkvo puts every cache in host memory."""
    model = tiny("llama")
    plan = spread(model, *["CUDA0"] * 5, is_kv_offloaded=False)
    assert static_memory(model, MACHINE, plan)["Host"].context_bytes == 8 * MIB


def test_tied_copy_is_on_the_output_device() -> None:
    """The second copy of a tied embedding is the output's, the first the host's."""
    model = tiny("llama")
    result = tensor_devices(model, MACHINE, spread(model, *["CUDA0"] * 4, "CUDA1"))
    assert result == {"token_embd.weight": CPU, "output.weight": "CUDA1"}


def test_tied_embedding_on_the_cpu_is_one() -> None:
    """With the output on the CPU a tied embedding is loaded once."""
    model = tiny("llama")
    assert list(tensor_devices(model, MACHINE, spread(model, *[CPU] * 5))) == ["token_embd.weight"]


def test_moved_tied_embedding_is_one() -> None:
    """An override of a tied embedding moves input and output together."""
    model = tiny("llama")
    plan = dataclasses.replace(spread(model, *["CUDA0"] * 5), moved=(("token_embd.weight", "CUDA1"),))
    assert tensor_devices(model, MACHINE, plan) == {"token_embd.weight": "CUDA1"}


def test_rope_factors_are_on_every_device_with_layers() -> None:
    """Rope frequencies have a copy on each device that has layers."""
    model = tiny("llama", {"rope_freqs.weight": (32,)})
    result = placed_tensors(model, MACHINE, spread(model, "CUDA0", "CUDA0", "CUDA1", CPU, CPU))
    assert [device for placed, device in result if placed.is_shared] == ["CUDA0", "CUDA1", CPU]


def test_read_bytes_are_padded() -> None:
    """A token at depth 300 reads 512 cells."""
    assert kv_bytes_read(tiny("llama"), Settings(ctx_tokens=4096), 300)[0] == 512 * 512


def test_window_limits_reading() -> None:
    """A windowed layer reads no more than its cells however deep the context."""
    model = tiny("gpt-oss", attention__sliding_window=128)
    assert kv_bytes_read(model, Settings(ctx_tokens=8192), 4000)[:2] == (768 * 512, 4096 * 512)


def test_state_is_read_and_written() -> None:
    """A state moves twice, at any depth."""
    model = tiny("rwkv7", wkv__head_size=64)
    assert kv_bytes_read(model, Settings(), 100000)[0] == 2 * 4 * (512 + 256 * 64)


def test_reused_cache_is_read_again() -> None:
    """A layer that reuses a cache reads it although it has none."""
    model = tiny("gemma3n", block_count=30, attention__sliding_window=512)
    assert kv_bytes_read(model, Settings(), 100)[29] > 0


@given(st.lists(st.sampled_from(["CUDA0", "CUDA1", CPU]), min_size=37, max_size=37))
def test_caches_are_conserved(homes: list[str]) -> None:
    """However layers are spread, the devices' contexts add up to all layers'."""
    model = golden_sample.model("gpt-oss-120b")
    plan = spread(model, *homes, ctx_tokens=65536)
    total = sum(part.context_bytes for part in static_memory(model, MACHINE, plan).values())
    assert sum(layer_context_bytes(model, plan.settings)) == total


@given(st.lists(st.sampled_from(["CUDA0", "CUDA1", CPU]), min_size=37, max_size=37))
def test_weights_are_conserved(homes: list[str]) -> None:
    """However layers are spread, weights never fall below the file's and padding stays under 0.1 %."""
    model = golden_sample.model("gpt-oss-120b")
    total = sum(part.weights_bytes for part in static_memory(model, MACHINE, spread(model, *homes)).values())
    assert model.n_bytes <= total <= 1.001 * model.n_bytes


def test_sparse_attention_reads_what_it_chose() -> None:
    """With an indexer a token reads all its keys but only top_k cells of K."""
    model = tiny(
        "deepseek32",
        attention__head_count_kv=1,
        attention__key_length=576,
        attention__key_length_mla=192,
        attention__value_length_mla=128,
        attention__indexer__key_length=128,
        attention__indexer__top_k=2048,
    )
    settings = Settings(ctx_tokens=65536)
    assert kv_bytes_read(model, settings, 32000)[0] == 2 * (2048 * 576 + 32256 * 128)


def test_lazy_tensor_counts_as_host_memory() -> None:
    """A per-layer embedding above 4 GiB stays on the CPU whatever an override says."""
    model = tiny("gemma4", {"per_layer_token_embd.weight": (10752, 262144)})
    plan = spread(model, *["CUDA0"] * 5)
    moved = dataclasses.replace(plan, moved=(("per_layer_token_embd.weight", "CUDA1"),))
    assert tensor_devices(model, MACHINE, moved)["per_layer_token_embd.weight"] == CPU


def test_gemma4_loads_a_tied_embedding_twice() -> None:
    """Gemma 4 loads a tied embedding twice even where both copies are in host memory."""
    model = tiny("gemma4")
    assert list(tensor_devices(model, MACHINE, spread(model, *[CPU] * 5))) == [
        "token_embd.weight",
        "output.weight",
    ]
