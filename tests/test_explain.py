"""The layer map as text."""

from collections.abc import Sequence

import pytest

from placement.cli.show.explain import MapLine, explain, layer_row, text_of
from placement.inputs.machine_files import resolve_machine
from placement.inputs.model_files.files import resolve_model
from placement.llamacpp.arguments import parse
from placement.predict.check import check_arguments

MACHINE = resolve_machine("rtx4090-rtx5070ti")
_TAIL = "-c 8192 -np 1 -ctk q8_0 -ctv q8_0 -fa on -fit off"


def _map(name: str, arguments: str, width: int = 80) -> Sequence[MapLine]:
    model = resolve_model(name)
    result = check_arguments(model, MACHINE, parse(f"{arguments} {_TAIL}".split()))
    return explain(model, MACHINE, result.assignment, result.devices, width)


def _row(lines: Sequence[MapLine], title: str) -> str:
    """All strips of that title, joined."""
    return "".join(line[10:] for line in text_of(lines).splitlines() if line.split(" ")[0] == title)


def test_homes_are_a_letter_a_layer() -> None:
    """25 layers of the first card, 11 of the second; the output is no column."""
    assert _row(_map("gpt-oss-120b", "-ngl 37 -ts 25,12"), "home") == "0" * 25 + "1" * 11


def test_experts_on_the_cpu_are_c() -> None:
    """Experts that an override sends to the CPU leave their home."""
    lines = _map("gpt-oss-120b", r"-ngl 37 -ts 25,12 -ot blk\.(3[0-5])\.ffn_.*_exps=CPU")
    assert _row(lines, "experts") == "0" * 25 + "1" * 5 + "c" * 6


def test_experts_on_two_devices_are_a_star() -> None:
    """A layer whose down experts alone moved is marked, and the legend says what the mark is."""
    lines = _map("gpt-oss-120b", r"-ngl 37 -ts 25,12 -ot blk\.0\.ffn_down_exps=CPU")
    assert _row(lines, "experts")[:2] == "*0" and "* = on several" in text_of(lines)


def test_kv_stays_home_when_the_layer_is_overridden() -> None:
    """A whole layer moved by -ot has its tensors elsewhere and its KV at home."""
    lines = _map("gpt-oss-120b", r"-ngl 37 -ts 25,12 -ot blk\.0\.=CUDA1")
    assert (_row(lines, "home")[0], _row(lines, "moved")[0], _row(lines, "KV")[0]) == ("0", "1", "0")


def test_kv_on_the_host_is_c() -> None:
    """-nkvo keeps every layer's KV on the CPU."""
    assert set(_row(_map("gpt-oss-120b", "-ngl 37 -ts 25,12 -nkvo"), "KV")) == {"c"}


def test_recurrent_layers_have_a_state_and_no_kv() -> None:
    """Three layers of four have a state, the fourth has KV."""
    lines = _map("qwen3-coder-q5", "-ngl 49 -ts 36,13 -ot exps=CPU")
    assert _row(lines, "KV")[:8] == "...0...0" and _row(lines, "state")[:8] == "000.000."


@pytest.mark.parametrize("name", ["llama-3.3-70b-q4", "qwen3-coder-q5", "gpt-oss-120b", "gemma-3-27b-q4"])
@pytest.mark.parametrize("width", [80, 100])
def test_no_line_is_wider_than_asked(name: str, width: int) -> None:
    """The map fits 80 columns, and so does every alternating placement."""
    lines = _map(name, r"-ngl 60 -ts 2,1 -ot blk\.([0-9]*[02468])\.ffn_.*=CPU", width)
    assert max(map(len, text_of(lines).splitlines())) <= width


def test_strips_wrap_without_losing_a_layer() -> None:
    """80 layers in 80 columns are two strips, numbered on."""
    lines = _map("llama-3.3-70b-q4", "-ngl 60")
    assert len(_row(lines, "home")) == 80 and "layer     70" in text_of(lines)


def test_memory_is_on_every_device() -> None:
    """Each device's line adds up to what is used, under its cap."""
    text = text_of(_map("gpt-oss-120b", "-ngl 37 -ts 25,12 -ot exps=CPU"))
    assert text.count(" of 24,000 MiB") == 1 and text.count(" of 12,800 MiB") == 1


def test_over_the_cap_is_said() -> None:
    """Without the experts on the CPU the cards cannot hold the model."""
    assert "OVER by" in text_of(_map("gpt-oss-120b", "-ngl 37 -ts 25,12"))


def test_notes_stand_below_the_devices() -> None:
    """Why the memory is not exact is told between the devices and the strips, within the width."""
    model = resolve_model("gpt-oss-120b")
    result = check_arguments(model, MACHINE, parse(f"-ngl 37 -ts 25,12 -ot exps=CPU {_TAIL}".split()))
    lines = text_of(
        explain(model, MACHINE, result.assignment, result.devices, 60, ["word " * 20])
    ).splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith("coarse: word"))
    assert lines.index("") > start > next(i for i, line in enumerate(lines) if line.startswith("c CPU"))
    assert max(map(len, lines[start : lines.index("")])) <= 60


def test_roles_name_devices() -> None:
    """Colour can go by roles: the devices and the CPU, nothing else."""
    roles = {
        segment.role for line in _map("gpt-oss-120b", "-ngl 37 -ts 25,12 -ot exps=CPU") for segment in line
    }
    assert roles == {"", "CUDA0", "CUDA1", "CPU"}


def test_layer_row_is_the_map_as_data() -> None:
    """Each layer's home, experts and context."""
    model = resolve_model("gpt-oss-120b")
    result = check_arguments(model, MACHINE, parse(f"-ngl 37 -ts 25,12 -ot exps=CPU {_TAIL}".split()))
    rows = layer_row(model, result.assignment)
    assert rows[30] == {"layer": 30, "home": "CUDA1", "experts": ["CPU"], "context": "CUDA1"}
