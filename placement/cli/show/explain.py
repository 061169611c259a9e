"""An assignment → the layer map: where each layer, its experts and its memory live, as lines of segments.

A segment is a text and a role: a device's name, "CPU", or "" for plain text. Colour is the caller's; without
it the map reads by its letters: 0-9 and A-Z are the GPUs in the engine's order, c is the CPU.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from placement.inputs.groups import is_expert_stack
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import CPU, HOST, Assignment
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.architecture.records import LayerFacts
from placement.llamacpp.emit.resolve import tensor_home
from placement.predict.solution import DeviceUse
from placement.units import format_bytes

LETTERS = "0123456789ABDEFGHIJKLMNOPQRSTUVWXYZ"  # no C: it would be read as c, the CPU
CPU_LETTER, MIXED, NOTHING_LETTER = "c", "*", "."
_TITLE_WIDTH = 10


@dataclass(frozen=True, slots=True)
class Segment:
    """A piece of a line; `role` is the device that it speaks of, "" for none."""

    text: str
    role: str = ""


MapLine = tuple[Segment, ...]


def explain(
    model: Model,
    machine: Machine,
    assignment: Assignment,
    devices: Mapping[str, DeviceUse] | None = None,
    width: int = 80,
    notes: Sequence[str] = (),
) -> list[MapLine]:
    """The map of an assignment: a line per device, then a strip per question, wrapped to `width` columns.

    `notes` say why the memory on the devices is not exact.
    """
    letters = device_letters(assignment)
    title = map_title(model, machine)
    lines = [_plain(text) for text in textwrap.wrap(title, width, subsequent_indent="  ")]
    lines += _device_lines(model, machine, assignment, devices or {}, letters, width)
    for note in notes:
        lines += [_plain(text) for text in textwrap.wrap(f"coarse: {note}", width, subsequent_indent="  ")]
    lines.append(_plain(""))
    lines += _strips(model, assignment, letters, width)
    return lines


def text_of(lines: Sequence[MapLine]) -> str:
    """The map without colour."""
    return "\n".join("".join(segment.text for segment in line).rstrip() for line in lines)


def device_letters(assignment: Assignment) -> dict[str, str]:
    """The letter of every device and of the CPU, in the map's order."""
    letters = {name: LETTERS[i % len(LETTERS)] for i, name in enumerate(assignment.devices)}
    return {**letters, CPU: CPU_LETTER}


def map_title(model: Model, machine: Machine) -> str:
    """What the map is of: model, machine and the model's size."""
    return f"{model.name} on {machine.name}: {_size(model)}"


def layer_places(model: Model, assignment: Assignment) -> dict[str, list[set[str]]]:
    """The strips of the map: by title, the devices that hold that part of each layer; empty where none does."""
    facts = describe(model)
    layers = facts.layers[: facts.n_layer]
    experts, others = _expert_places(model, assignment), _other_places(model, assignment)
    homes = list(assignment.homes[: facts.n_layer])
    memory = [home if assignment.settings.is_kv_offloaded else CPU for home in homes]
    strips: dict[str, list[set[str]]] = {"home": [{home} for home in homes]}
    if any(experts.values()):
        strips["experts"] = [experts.get(i, set()) for i in range(len(layers))]
    if any(others.values()):
        strips["moved"] = [others.get(i, set()) for i in range(len(layers))]
    strips["KV"] = [{memory[i]} if layer.caches else set() for i, layer in enumerate(layers)]
    if any(_has_state(layer) for layer in layers):
        strips["state"] = [{memory[i]} if _has_state(layer) else set() for i, layer in enumerate(layers)]
    return strips


def layer_row(model: Model, assignment: Assignment) -> list[dict[str, Any]]:
    """The map as data: for each layer its home, and where its experts and its cache or state are."""
    facts = describe(model)
    experts = _expert_places(model, assignment)
    is_offloaded = assignment.settings.is_kv_offloaded
    return [
        {
            "layer": i,
            "home": assignment.homes[i],
            "experts": sorted(experts.get(i, ())),
            "context": (assignment.homes[i] if is_offloaded else CPU) if _has_memory(layer) else None,
        }
        for i, layer in enumerate(facts.layers[: facts.n_layer])
    ]


def _has_memory(layer: LayerFacts) -> bool:
    return bool(layer.caches) or _has_state(layer)


def _plain(text: str) -> MapLine:
    return (Segment(text),)


def _size(model: Model) -> str:
    facts = describe(model)
    experts = f", {facts.n_expert} experts of which {facts.n_expert_used} work" if facts.n_expert else ""
    return f"{format_bytes(model.n_bytes)}, {facts.n_layer} layers and the output{experts}"


def _device_lines(
    model: Model,
    machine: Machine,
    assignment: Assignment,
    uses: Mapping[str, DeviceUse],
    letters: Mapping[str, str],
    width: int,
) -> list[MapLine]:
    """For each device its letter, layers and experts; below, its memory where that is known."""
    facts = describe(model)
    experts = _expert_places(model, assignment)
    lines: list[MapLine] = []
    for name in [*assignment.devices, CPU]:
        homes = [i for i, home in enumerate(assignment.homes) if home == name and i < facts.n_layer]
        held = [i for i, places in experts.items() if name in places]
        what = [f"layers {_ranges(homes)}"] if homes else []
        what += ["output"] if assignment.homes[-1] == name else []
        what += ["embedding"] if name == CPU else []
        is_own = bool(held) and name != CPU and held == [i for i in homes if i in experts]
        what += ["with their experts"] if is_own else ([f"experts of {_ranges(held)}"] if held else [])
        head = f"{letters[name]} {name:<6} "
        lines += _wrapped(head, "; ".join(what) or "nothing", name, width)
        use = uses.get(HOST if name == CPU else name)
        if use is not None:
            indent = " " * len(head)
            pieces = textwrap.wrap(memory_text(use), width - len(indent), subsequent_indent="  ")
            lines += [(Segment(indent), Segment(piece, name)) for piece in pieces]
    return lines


def memory_text(use: DeviceUse) -> str:
    """What is taken of a device's cap, by its parts; over the cap it says by how much."""
    over = f", OVER by {-use.headroom_mib:,.0f}" if use.headroom_mib < 0 else ""
    runtime = f", runtime {use.runtime_mib:,.0f}" if use.runtime_mib else ""
    parts = f"weights {use.weights_mib:,.0f}, context {use.context_mib:,.0f}, compute {use.compute_mib:,.0f}"
    return f"{use.used_mib:,.0f} of {use.cap_mib:,.0f} MiB{over}: {parts}{runtime}"


def _wrapped(head: str, text: str, role: str, width: int) -> list[MapLine]:
    pieces = textwrap.wrap(text.replace(",", ", "), width - len(head)) or [""]
    heads = [head, *[" " * len(head)] * (len(pieces) - 1)]
    return [
        (Segment(start, role), Segment(piece.replace(", ", ",")))
        for start, piece in zip(heads, pieces, strict=True)
    ]


def _strips(model: Model, assignment: Assignment, letters: Mapping[str, str], width: int) -> list[MapLine]:
    """Layer numbers and, below them, homes, experts, other moved tensors, KV and state, a column a layer."""
    strips = layer_places(model, assignment)
    n_layers = len(strips["home"])
    step = max(10, (width - _TITLE_WIDTH) // 10 * 10)
    lines: list[MapLine] = []
    for start in range(0, n_layers, step):
        end = min(start + step, n_layers)
        lines.append(_plain("layer".ljust(_TITLE_WIDTH) + _scale(start, end)))
        lines += [_strip(title, places[start:end], letters) for title, places in strips.items()]
    return [*lines, _plain(""), _plain(_legend(assignment, letters, strips))]


def _has_state(layer: LayerFacts) -> bool:
    return bool(layer.state_r or layer.state_s or layer.state_extra)


def _scale(start: int, end: int) -> str:
    return "".join(str(i).ljust(10) for i in range(start, end, 10))[: end - start + 2].rstrip()


def _strip(title: str, places: Sequence[set[str]], letters: Mapping[str, str]) -> MapLine:
    """A column a layer; neighbours with one role share a segment."""
    segments = [Segment(title.ljust(_TITLE_WIDTH))]
    for held in places:
        role = next(iter(held)) if len(held) == 1 else ""
        letter = letters[role] if role else (MIXED if held else NOTHING_LETTER)
        if len(segments) > 1 and segments[-1].role == role:
            segments[-1] = Segment(segments[-1].text + letter, role)
        else:
            segments.append(Segment(letter, role))
    return tuple(segments)


def _legend(
    assignment: Assignment, letters: Mapping[str, str], strips: Mapping[str, Sequence[set[str]]]
) -> str:
    parts = [f"{letters[name]} = {name}" for name in [*assignment.devices, CPU]]
    places = [held for strip in strips.values() for held in strip]
    parts += [f"{MIXED} = on several"] if any(len(held) > 1 for held in places) else []
    parts += [f"{NOTHING_LETTER} = none"] if not all(places) else []
    return ", ".join(parts)


def _expert_places(model: Model, assignment: Assignment) -> dict[int, set[str]]:
    """The devices that hold each layer's experts."""
    moved, n_layer = dict(assignment.moved), describe(model).n_layer
    places: dict[int, set[str]] = {}
    for tensor in model.tensors:
        if tensor.layer is not None and tensor.layer < n_layer and is_expert_stack(tensor):
            at = moved.get(tensor.name) or tensor_home(model, tensor.name, assignment.homes)
            places.setdefault(tensor.layer, set()).add(at)
    return places


def _other_places(model: Model, assignment: Assignment) -> dict[int, set[str]]:
    """Where overrides put each layer's tensors that are not experts."""
    places: dict[int, set[str]] = {}
    for name, device in assignment.moved:
        tensor = model.by_name[name]
        if tensor.layer is not None and not is_expert_stack(tensor):
            places.setdefault(tensor.layer, set()).add(device)
    return places


def _ranges(layers: Sequence[int]) -> str:
    """Layer numbers as runs: "0-3,7"."""
    runs: list[list[int]] = []
    for layer in layers:
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)
