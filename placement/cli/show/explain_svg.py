"""An assignment → the layer map as an SVG picture: a bar of memory per device, then a cell per layer and strip.

The picture is complete in itself: no fonts, scripts or addresses of others. It follows the reader's light or dark
colours, and reads without colour by the letters of the text map.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

from placement.cli.show.explain import MIXED, device_letters, layer_places, map_title, memory_text
from placement.files import write_atomically
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import CPU, HOST, Assignment
from placement.predict.solution import DeviceUse

# white letters are readable on all of them, and they on white and on black
COLOURS = ("#1d6fb8", "#0f7b5f", "#8250df", "#bf3989", "#0e7490", "#4d7c0f")
CPU_COLOUR = "#b45309"
WIDTH, MARGIN, LABEL_WIDTH = 940, 16, 72
CELL, BAR_WIDTH, LINE = 16, 380, 22
LAYERS_PER_STRIP = (WIDTH - 2 * MARGIN - LABEL_WIDTH) // CELL // 10 * 10
_LEGEND = "of each cap, from full to pale colour: weights, context, compute buffers, runtime"
_STYLE = """
text { font: 12px ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; fill: #1f2328 }
.title { font-weight: 600; font-size: 13px }
.quiet { fill: #59636e }
.on { fill: #fff; font-size: 10px; text-anchor: middle }
.cap { fill: none; stroke: #8c959f }
.over { fill: #d1242f }
@media (prefers-color-scheme: dark) { text { fill: #e6edf3 } .quiet { fill: #9198a1 } .over { fill: #ff7b72 } }
"""


def save_layer_map(
    path: Path, model: Model, machine: Machine, assignment: Assignment, devices: Mapping[str, DeviceUse]
) -> None:
    """Write the map to a file.

    Raises:
        InputError: the file cannot be written.
    """
    write_atomically(path, layer_map_svg(model, machine, assignment, devices))


def layer_map_svg(
    model: Model, machine: Machine, assignment: Assignment, devices: Mapping[str, DeviceUse]
) -> str:
    """Draw the map; `devices` holds the memory of the GPUs and of "Host"."""
    letters, strips = device_letters(assignment), layer_places(model, assignment)
    n_strips = -(-len(strips["home"]) // LAYERS_PER_STRIP)
    height = 2 * MARGIN + LINE * (len(letters) + 3) + n_strips * (CELL * len(strips) + 2 * LINE)
    root = ElementTree.Element(
        "svg",
        {"xmlns": "http://www.w3.org/2000/svg", "viewBox": f"0 0 {WIDTH} {height}", "role": "img"},
    )
    ElementTree.SubElement(root, "title").text = map_title(model, machine)
    ElementTree.SubElement(root, "style").text = _STYLE
    _text(root, MARGIN, MARGIN + 12, map_title(model, machine), "title")
    y: float = MARGIN + LINE + 6
    for name in letters:
        _device(root, y, name, letters, devices.get(HOST if name == CPU else name))
        y += LINE
    _text(root, MARGIN + LABEL_WIDTH + CELL, y + 8, _LEGEND, "quiet")
    y += LINE - 8
    for start in range(0, len(strips["home"]), LAYERS_PER_STRIP):
        y = _strips(root, y + LINE, start, strips, letters)
    ElementTree.indent(root)
    return ElementTree.tostring(root, encoding="unicode") + "\n"


def _colour(name: str, letters: Mapping[str, str]) -> str:
    return CPU_COLOUR if name == CPU else COLOURS[list(letters).index(name) % len(COLOURS)]


def _text(parent: ElementTree.Element, x: float, y: float, text: str, kind: str = "") -> None:
    result = ElementTree.SubElement(parent, "text", {"x": f"{x:g}", "y": f"{y:g}"})
    result.text = text
    if kind:
        result.set("class", kind)


def _rect(
    parent: ElementTree.Element, box: tuple[float, float, float, float], **more: str
) -> ElementTree.Element:
    sizes = zip(("x", "y", "width", "height"), (f"{value:.4g}" for value in box), strict=True)
    return ElementTree.SubElement(parent, "rect", {**dict(sizes), **more})


def _device(
    root: ElementTree.Element, y: float, name: str, letters: Mapping[str, str], use: DeviceUse | None
) -> None:
    """A device's letter and name, and how much of its cap weights, context and compute buffers take."""
    colour, left = _colour(name, letters), MARGIN + LABEL_WIDTH + CELL
    _rect(root, (MARGIN, y, CELL, CELL), fill=colour, rx="2")
    _text(root, MARGIN + CELL / 2, y + 12, letters[name], "on")
    _text(root, MARGIN + CELL + 6, y + 12, name)
    if use is None:
        return
    scale, x = BAR_WIDTH / max(use.cap_mib, use.used_mib, 1.0), float(left)
    for mib, opacity in _parts(use):
        _rect(root, (x, y, mib * scale, CELL), fill=colour, opacity=opacity)
        x += mib * scale
    _rect(root, (left, y, use.cap_mib * scale, CELL), **{"class": "cap"})
    head = memory_text(use).partition(":")[0]
    _text(root, left + BAR_WIDTH + 10, y + 12, head, "over" if use.headroom_mib < 0 else "quiet")


def _parts(use: DeviceUse) -> Iterator[tuple[float, str]]:
    """(MiB, opacity): weights full, context and compute buffers paler, the runtime palest."""
    yield from zip(
        (use.weights_mib, use.context_mib, use.compute_mib, use.runtime_mib),
        ("1", "0.7", "0.45", "0.25"),
        strict=True,
    )


def _strips(
    root: ElementTree.Element,
    y: float,
    start: int,
    strips: Mapping[str, Sequence[set[str]]],
    letters: Mapping[str, str],
) -> float:
    """One row of cells per strip, below the numbers of the layers; returns where it ends."""
    left = MARGIN + LABEL_WIDTH
    end = min(start + LAYERS_PER_STRIP, len(strips["home"]))
    _text(root, MARGIN, y + 12, "layer", "quiet")
    for i in range(start, end, 10):
        _text(root, left + (i - start) * CELL + 3, y + 12, str(i), "quiet")
    y += CELL + 2
    for title, places in strips.items():
        _text(root, MARGIN, y + 12, title)
        for i in range(start, end):
            _cell(root, (left + (i - start) * CELL, y), f"layer {i}, {title}", places[i], letters)
        y += CELL
    return y


def _cell(
    root: ElementTree.Element,
    at: tuple[float, float],
    what: str,
    places: set[str],
    letters: Mapping[str, str],
) -> None:
    """A cell in its device's colour, or with a stripe of each device's."""
    names = [name for name in letters if name in places]
    if not names:
        return
    x, y = at
    group = ElementTree.SubElement(root, "g")
    ElementTree.SubElement(group, "title").text = f"{what}: {', '.join(names)}"
    size = CELL - 1
    for i, name in enumerate(names):
        part = size / len(names)
        _rect(group, (x, y + i * part, size, part), fill=_colour(name, letters))
    _text(group, x + size / 2, y + 11, letters[names[0]] if len(names) == 1 else MIXED, "on")
