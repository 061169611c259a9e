"""The layer map as a picture."""

from dataclasses import replace
from xml.etree import ElementTree

import pytest

from placement.cli.show.explain import explain as explain_text
from placement.cli.show.explain import text_of
from placement.cli.show.explain_svg import CELL, COLOURS, CPU_COLOUR, layer_map_svg
from placement.inputs.machine_files import resolve_machine
from placement.inputs.model_files.files import resolve_model
from placement.llamacpp.arguments import parse
from placement.predict.check import check_arguments

SVG = "{http://www.w3.org/2000/svg}"
MACHINE = resolve_machine("rtx4090-rtx5070ti")
EXPERTS_ON_CPU = r"-ngl 37 -ts 25,12 -ot blk\.(3[0-5])\.ffn_.*_exps=CPU"
_TAIL = "-c 8192 -np 1 -ctk q8_0 -ctv q8_0 -fa on -fit off"


def _picture(name: str, arguments: str, title: str | None = None) -> ElementTree.Element:
    model = resolve_model(name)
    result = check_arguments(model, MACHINE, parse(f"{arguments} {_TAIL}".split()))
    named = replace(model, name=title or model.name)
    return ElementTree.fromstring(layer_map_svg(named, MACHINE, result.assignment, result.devices))


def _cells(picture: ElementTree.Element, strip: str) -> list[tuple[str, str]]:
    """(tool tip, letter) of every cell of a strip, in order."""
    cells = [
        (group.findtext(f"{SVG}title") or "", group.findtext(f"{SVG}text") or "")
        for group in picture.iter(f"{SVG}g")
    ]
    return [cell for cell in cells if f", {strip}: " in cell[0]]


@pytest.mark.parametrize(("name", "n_layers"), [("gpt-oss-120b", 36), ("llama-3.3-70b-q4", 80)])
def test_every_layer_has_a_cell(name: str, n_layers: int) -> None:
    """The strip of homes names each layer once, in order, also where it wraps."""
    tips = [tip for tip, _ in _cells(_picture(name, "-ngl 60 -ts 2,1"), "home")]
    assert [tip.partition(",")[0] for tip in tips] == [f"layer {i}" for i in range(n_layers)]


def test_letters_are_those_of_the_text_map() -> None:
    """Homes and experts read as in the terminal."""
    model, picture = resolve_model("gpt-oss-120b"), _picture("gpt-oss-120b", EXPERTS_ON_CPU)
    result = check_arguments(model, MACHINE, parse(f"{EXPERTS_ON_CPU} {_TAIL}".split()))
    text = text_of(explain_text(model, MACHINE, result.assignment, result.devices))
    drawn = {strip: "".join(letter for _, letter in _cells(picture, strip)) for strip in ("home", "experts")}
    assert drawn == {line[:10].strip(): line[10:] for line in text.splitlines() if line[:10].strip() in drawn}


def test_a_layer_on_two_devices_has_a_stripe_of_each() -> None:
    """Experts split between a card and the CPU share their cell, and the tool tip names both."""
    picture = _picture("gpt-oss-120b", r"-ngl 37 -ts 25,12 -ot blk\.0\.ffn_down_exps=CPU")
    cell = next(
        g for g in picture.iter(f"{SVG}g") if (g.findtext(f"{SVG}title") or "").startswith("layer 0, experts")
    )
    assert cell.findtext(f"{SVG}title") == "layer 0, experts: CUDA0, CPU"
    assert [rect.get("fill") for rect in cell.iter(f"{SVG}rect")] == [COLOURS[0], CPU_COLOUR]


def test_a_name_is_escaped() -> None:
    """What a model is called cannot become markup: it is read back as it was."""
    picture = _picture("gpt-oss-120b", "-ngl 37", title="<b>&\"'</b>")
    assert (picture.findtext(f"{SVG}title") or "").startswith("<b>&\"'</b> on ")
    assert picture.find(f".//{SVG}b") is None


def test_over_the_cap_is_marked() -> None:
    """A device that would be over its cap says so in its own colour."""
    texts = [
        text.text or ""
        for text in _picture("gpt-oss-120b", "-ngl 37 -ts 25,12").iter(f"{SVG}text")
        if text.get("class") == "over"
    ]
    assert texts and all("OVER by" in text for text in texts)


def test_nothing_is_drawn_outside() -> None:
    """Every rectangle lies within the view box, with as many layers as a row holds and more."""
    picture = _picture("llama-3.3-70b-q4", "-ngl 81 -ts 2,1")
    _, _, width, height = map(float, (picture.get("viewBox") or "").split())
    boxes = [
        [float(rect.get(key) or "nan") for key in ("x", "y", "width", "height")]
        for rect in picture.iter(f"{SVG}rect")
    ]
    assert all(x >= 0 and y >= 0 and x + w <= width and y + h <= height for x, y, w, h in boxes)


def test_a_bar_is_never_longer_than_its_frame_where_all_fits() -> None:
    """What is used of a cap adds up to less than the cap's frame."""
    picture = _picture("gpt-oss-120b", "-ngl 37 -ts 25,12 -ot exps=CPU")
    frame = next(rect for rect in picture.iter(f"{SVG}rect") if rect.get("class") == "cap")
    parts = [
        rect for rect in picture.iter(f"{SVG}rect") if rect.get("opacity") and rect.get("y") == frame.get("y")
    ]
    assert 0 < sum(float(rect.get("width") or 0) for rect in parts) < float(frame.get("width") or 0)
    assert frame.get("height") == str(CELL)


def test_it_needs_nothing_from_elsewhere() -> None:
    """No address but SVG's own name: no fonts, scripts or images are loaded."""
    model = resolve_model("gpt-oss-120b")
    result = check_arguments(model, MACHINE, parse(f"-ngl 37 {_TAIL}".split()))
    text = layer_map_svg(model, MACHINE, result.assignment, result.devices)
    assert (text.count("http"), text.count("<script"), text.count("url(")) == (1, 0, 0)
