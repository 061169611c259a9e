"""Rules of the engine that several modules need: each stands once, and its users agree."""

from __future__ import annotations

import ast
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.inputs.machine import Device
from placement.inputs.machine_files import resolve_machine
from placement.inputs.model import Tensor
from placement.inputs.model_files.files import resolve_model
from placement.inputs.problem import DEFAULT_BATCH_TOKENS, DEFAULT_UBATCH_TOKENS, Settings
from placement.inputs.quants import KV_CACHE_TYPES
from placement.llamacpp import backend_rules
from placement.llamacpp.allocator import CPU_BUFFER, CUDA_BUFFER
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.arguments import parse
from placement.llamacpp.backend_rules import (
    CPU_ALIGNMENT_BYTES,
    CUDA_ALIGNMENT_BYTES,
    CUDA_FLASH_TYPES,
    cuda_padding_bytes,
    has_scan_kernel,
    has_vector_kernel,
)
from placement.llamacpp.context_rules import (
    SERVER_SLOTS,
    can_pipeline,
    compressed_cells,
    rounded_context,
    window_cells,
)
from placement.llamacpp.emit.arguments import emit_arguments
from placement.llamacpp.emit.resolve import resolve
from placement.llamacpp.graph import cuda
from placement.llamacpp.graph.context import make_context
from placement.llamacpp.graph.tensor import GraphTensor as Node
from placement.llamacpp.graph.tensor import contiguous_strides
from placement.llamacpp.memory import context_size, weight_bytes

PACKAGE = Path(__file__).parent.parent / "placement"
CARD = Device("CUDA0", 24_000, 24_000, 0, 900, 25)
SIZES = st.builds(
    Settings,
    ctx_tokens=st.integers(0, 300_000),
    n_slots=st.integers(-1, 9),
    is_kv_unified=st.booleans(),
    batch_tokens=st.integers(1, 8192),
    ubatch_tokens=st.integers(0, 8192),
)


def numbers_named() -> list[tuple[str, str, int]]:
    """(file, name, number) of every module constant that is one number above 1."""
    return [
        (path.name, node.targets[0].id, node.value.value)
        for path in PACKAGE.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Assign)
        and isinstance(node.targets[0], ast.Name)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, int)
        and node.value.value > 1
    ]


@pytest.mark.parametrize(
    ("words", "home"),
    [
        (("ALIGNMENT_BYTES",), "backend_rules.py"),
        (("ROW_PADDING",), "backend_rules.py"),
        (("OFFLOAD",), "backend_rules.py"),
        (("CELL", "PAD"), "context_rules.py"),
        (("SLOTS",), "context_rules.py"),
        (("COPIES",), "scheduler.py"),
    ],
)
def test_a_number_of_the_engine_is_named_in_its_home(words: tuple[str, ...], home: str) -> None:
    """No second module gives one of these numbers a name of its own."""
    results = {file for file, name, _ in numbers_named() if all(word in name for word in words)}
    assert results == {home}


@given(SIZES)
def test_memory_and_graph_round_a_context_alike(settings: Settings) -> None:
    """Caches are counted and graphs are built for the same cells, streams and batches."""
    model = resolve_model("qwen3-coder-q5")
    size, context = context_size(model, settings), make_context(settings, describe(model), True, True)
    assert (size.cells, size.n_sequences, size.n_streams, size.batch_tokens, size.ubatch_tokens) == (
        context.n_ctx_seq,
        context.n_seq_max,
        context.n_stream,
        context.n_batch,
        context.n_ubatch,
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (Settings(1000), (1024, 1, 1, 1000, 512)),
        (Settings(1000, n_slots=3), (512, 3, 3, 1000, 512)),
        (Settings(1000, n_slots=3, is_kv_unified=True), (1024, 1, 3, 1000, 512)),
        (Settings(0), (8192, 1, 1, 2048, 512)),
        (Settings(4096, batch_tokens=256, ubatch_tokens=0), (4096, 1, 1, 256, 256)),
    ],
)
def test_contexts_are_rounded(settings: Settings, expected: tuple[int, ...]) -> None:
    """Cells in blocks of 256, per slot where slots are apart; batches no larger than the context."""
    size = rounded_context(settings, 8192)
    streams = (size.cells, size.n_streams, size.n_sequences, size.batch_tokens, size.ubatch_tokens)
    assert expected == streams


def test_windows_and_compressed_caches_are_rounded() -> None:
    """A window holds its tokens and a batch, no more than the context; a compressed cache a share of it."""
    assert (window_cells(4096, 128, 1, 512), window_cells(512, 1024, 4, 512)) == (768, 512)
    assert (compressed_cells(65_536, 128), compressed_cells(100, 128)) == (512, 256)


@pytest.mark.parametrize("type", ["Q8_0", "Q4_K", "F16", "IQ4_NL"])
@pytest.mark.parametrize("row", [256, 512, 768, 1024, 2816])
def test_weights_and_buffers_pad_rows_alike(type: str, row: int) -> None:
    """A weight takes what the compute buffer would take for a tensor of its shape."""
    node = Node("NONE", type, (row, 3, 1, 1), contiguous_strides(type, (row, 3, 1, 1)), [])
    size = CUDA_BUFFER.alloc_bytes(node)
    padded = -(-size // CUDA_BUFFER.alignment) * CUDA_BUFFER.alignment
    assert padded == weight_bytes(Tensor("blk.0.x.weight", (row, 3), type), CARD)


def test_a_row_lacks_what_a_multiple_of_512_needs() -> None:
    """Half a row of Q8_0 lacks eight blocks; a whole one nothing."""
    assert (cuda_padding_bytes("Q8_0", 256), cuda_padding_bytes("Q8_0", 1024)) == (272, 0)


def test_buffers_align_as_weights_do() -> None:
    """The allocator's buffer types have the alignments of the rules."""
    assert (CPU_ALIGNMENT_BYTES, CUDA_ALIGNMENT_BYTES) == (CPU_BUFFER.alignment, CUDA_BUFFER.alignment)


def test_one_kv_type_has_no_flash_attention_on_cuda() -> None:
    """Of what -ctk takes, CUDA's flash attention lacks IQ4_NL alone."""
    assert {type for type in KV_CACHE_TYPES if type.upper() not in CUDA_FLASH_TYPES} == {"iq4_nl"}


def test_heads_with_a_vector_kernel() -> None:
    """Multiples of 64 up to 256, 192 left out."""
    assert [head for head in range(-64, 600) if has_vector_kernel(head)] == [64, 128, 256]


def test_scans_with_a_kernel() -> None:
    """Mamba-2 by its states and heads; Mamba by its channels."""
    assert [has_scan_kernel(1, 128, 64, 80, 8), has_scan_kernel(1, 64, 64, 80, 8)] == [True, False]
    assert [has_scan_kernel(16, 16, 1, 5120, 0), has_scan_kernel(16, 16, 1, 100, 1)] == [True, False]


def test_types_that_no_card_multiplies_are_no_weights_there() -> None:
    """The graph refuses what the loader keeps on the CPU, and integers besides."""
    assert cuda._NO_MUL_MAT - backend_rules.NO_CUDA_TYPES == {"I32", "I64"}


@pytest.mark.parametrize(
    ("changed", "n_devices", "expected"),
    [
        ({}, 2, True),
        ({}, 1, False),
        ({"has_overrides": True}, 2, False),
        ({"is_kv_offloaded": False}, 2, False),
        ({"split_mode": "none"}, 2, False),
    ],
)
def test_what_pipelines(changed: dict[str, object], n_devices: int, expected: bool) -> None:
    """Several devices, split by layers, with their caches and without overrides."""
    settings = replace(Settings(), **changed)  # type: ignore[arg-type]
    assert expected == can_pipeline(settings, n_devices)


def test_the_servers_own_slots_come_back() -> None:
    """What is not said of slots is what llama-server takes without it."""
    model, machine = resolve_model("qwen3-coder-q5"), resolve_machine("rtx4090-rtx5070ti")
    assignment = resolve(model, machine, parse("-c 8192"))
    assert assignment.settings.n_slots == SERVER_SLOTS
    assert "-np" not in emit_arguments(model, machine, assignment)


def test_silence_means_the_default_batches() -> None:
    """Without -b and -ub the settings hold the engine's defaults."""
    model, machine = resolve_model("qwen3-coder-q5"), resolve_machine("rtx4090-rtx5070ti")
    settings = resolve(model, machine, parse("")).settings
    assert (settings.batch_tokens, settings.ubatch_tokens) == (DEFAULT_BATCH_TOKENS, DEFAULT_UBATCH_TOKENS)
