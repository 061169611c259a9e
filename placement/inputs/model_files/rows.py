"""Turns a tensor list into few rows, one for all layers that share a tensor, and the rows into the list.

A row is a dict of `name`, `shape`, `type`, and for layers `layers` ("0-3,5") with `{i}` in the name.
Consecutive rows with `layers` are a section: it lists its layers one after the other, and in each layer its
rows in their order. A row without `layers`, and one that says `starts_section`, ends the section before it.
Layers follow `layer_order`, by default ascending.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from placement.errors import InputError
from placement.inputs.gguf_header.facts import MAX_DIMS, MAX_NAME_BYTES
from placement.inputs.gguf_header.read import MAX_TENSORS
from placement.inputs.model import Tensor
from placement.inputs.quants import BLOCKS, tensor_bytes

MAX_LAYER = 65535
_ROW_KEYS = {"name", "layers", "shape", "type", "starts_section"}

_Kind = tuple[str, tuple[int, ...], str]  # name with {i}, shape, type


@dataclass
class _Section:
    """Rows of consecutive layers; a single tensor outside the layers has no layers."""

    kinds: list[_Kind]
    layers: list[int] = field(default_factory=list)
    layers_of: dict[_Kind, list[int]] = field(default_factory=dict)

    def merge(self, layer: int, kinds: Sequence[_Kind], rank: dict[int, int]) -> bool:
        """Take a layer in, unless its order contradicts the section's; say whether it was taken."""
        if self.layers and rank[layer] <= rank[self.layers[-1]]:
            return False
        merged, position = list(self.kinds), 0
        for kind in kinds:
            if kind in self.layers_of:
                if kind not in merged[position:]:
                    return False
                position = merged.index(kind, position) + 1
            else:
                merged.insert(position, kind)
                position += 1
        self.kinds = merged
        self.layers.append(layer)
        for kind in kinds:
            self.layers_of.setdefault(kind, []).append(layer)
        return True


def to_rows(tensors: Iterable[Tensor]) -> tuple[list[dict[str, Any]], list[int] | None]:
    """The rows of a tensor list, and the order of its layers where that is not ascending."""
    runs = _layer_runs(tensors)
    order = list(dict.fromkeys(layer for layer, _ in runs if layer is not None))
    rank = {layer: i for i, layer in enumerate(order)}
    sections: list[_Section] = []
    for layer, kinds in runs:
        if layer is None:
            sections.append(_Section(kinds))
        elif not (sections and sections[-1].layers and sections[-1].merge(layer, kinds, rank)):
            sections.append(_Section([]))
            sections[-1].merge(layer, kinds, rank)
    return _section_rows(sections), None if order == sorted(order) else order


def _layer_runs(tensors: Iterable[Tensor]) -> list[tuple[int | None, list[_Kind]]]:
    """The list cut where the layer changes, or where a layer repeats one of its tensors."""
    runs: list[tuple[int | None, list[_Kind]]] = []
    for tensor in tensors:
        prefix = f"blk.{tensor.layer}."
        layer = tensor.layer if tensor.name.startswith(prefix) and (tensor.layer or 0) <= MAX_LAYER else None
        name = tensor.name if layer is None else "blk.{i}." + tensor.name.removeprefix(prefix)
        if layer is None or not runs or runs[-1][0] != layer:
            runs.append((layer, []))
        runs[-1][1].append((name, tensor.shape, tensor.type))
    return runs


def _section_rows(sections: list[_Section]) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for section, before in zip(sections, [None, *sections], strict=False):
        for i, kind in enumerate(section.kinds):
            name, shape, type_ = kind
            row: dict[str, Any] = {"name": name}
            if section.layers:
                row["layers"] = format_ranges(sorted(section.layers_of[kind]))
            row |= {"shape": list(shape), "type": type_}
            if i == 0 and section.layers and before is not None and before.layers:
                row["starts_section"] = True
            rows.append(row)
    return rows


def from_rows(where: object, rows: Sequence[Any], layer_order: Sequence[int] | None) -> tuple[Tensor, ...]:
    """The tensor list that the rows stand for.

    Raises:
        InputError: a row has an unknown, missing or wrong field, or two rows give the same tensor.
    """
    tensors: list[Tensor] = []
    section: list[tuple[Tensor, frozenset[int]]] = []
    for i, row in enumerate(rows):
        template, layers = _checked_row(where, f"tensors[{i}]", row)
        if section and (layers is None or row.get("starts_section", False)):
            tensors += _expand(section, layer_order)
            section = []
        if layers is None:
            tensors.append(template)
        else:
            section.append((template, frozenset(layers)))
        if len(tensors) + sum(len(layers) for _, layers in section) > MAX_TENSORS:
            raise InputError(where, f"must give at most {MAX_TENSORS} tensors", field=f"tensors[{i}]")
    tensors += _expand(section, layer_order)
    _check_names(where, tensors)
    return tuple(tensors)


def _expand(section: list[tuple[Tensor, frozenset[int]]], layer_order: Sequence[int] | None) -> list[Tensor]:
    used = set().union(*(layers for _, layers in section))
    named = [layer for layer in layer_order or () if layer in used]
    order = [*named, *sorted(used.difference(named))]
    return [
        Tensor(template.name.replace("{i}", str(layer), 1), template.shape, template.type)
        for layer in order
        for template, layers in section
        if layer in layers
    ]


def _check_names(where: object, tensors: Sequence[Tensor]) -> None:
    seen: set[str] = set()
    for tensor in tensors:
        if tensor.name in seen:
            raise InputError(where, "must be given by one row only", field="tensors", value=tensor.name)
        if not 1 <= len(tensor.name.encode()) <= MAX_NAME_BYTES:
            raise InputError(
                where, f"must have 1 to {MAX_NAME_BYTES} bytes", field="tensors", value=tensor.name
            )
        seen.add(tensor.name)


def _checked_row(where: object, field: str, row: Any) -> tuple[Tensor, list[int] | None]:
    if not isinstance(row, dict) or not {"name", "shape", "type"} <= row.keys() <= _ROW_KEYS:
        rule = "must be a table of name, shape, type and at most layers and starts_section"
        raise InputError(where, rule, field=field)
    name, shape, type_, layers = row["name"], row["shape"], row["type"], row.get("layers")
    if not isinstance(name, str) or (layers is not None) != name.startswith("blk.{i}."):
        raise InputError(
            where, 'must begin with "blk.{i}." exactly if it has layers', field=f"{field}.name", value=name
        )
    if type_ not in BLOCKS:
        raise InputError(where, "must be a ggml type such as Q4_K", field=f"{field}.type", value=type_)
    is_shape = isinstance(shape, list) and all(type(n) is int and 0 <= n < 2**63 for n in shape)
    if not is_shape or not 1 <= len(shape) <= MAX_DIMS:
        rule = f"must be 1 to {MAX_DIMS} whole numbers, the row length first"
        raise InputError(where, rule, field=f"{field}.shape", value=shape)
    if not isinstance(row.get("starts_section", False), bool):
        raise InputError(
            where, "must be true or false", field=f"{field}.starts_section", value=row["starts_section"]
        )
    try:
        tensor_bytes(shape, type_)
    except InputError as exc:
        raise InputError(where, exc.rule, field=f"{field}.shape", value=shape) from exc
    parsed = None if layers is None else sorted(parse_ranges(where, f"{field}.layers", layers))
    return Tensor(name, tuple(shape), type_), parsed


def format_ranges(numbers: Sequence[int]) -> str:
    """Whole numbers in their order as "0-3,5,7-9"; runs that count up by one become a range."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def parse_ranges(where: object, field: str, text: Any) -> list[int]:
    """The whole numbers of "0-3,5,7-9", in that order.

    Raises:
        InputError: the text is no such list, or names a number twice.
    """
    numbers: list[int] = []
    rule = f'must list layers from 0 to {MAX_LAYER}, each once, as "0-3,5,7-9"'
    for item in text.split(",") if isinstance(text, str) else [""]:
        first, dash, last = item.partition("-")
        ends = (first, last if dash else first)
        if not all(end.isascii() and end.isdigit() and len(end) <= 5 for end in ends):
            raise InputError(where, rule, field=field, value=text)
        numbers += range(int(ends[0]), min(int(ends[1]), MAX_LAYER + 1) + 1)
        if int(ends[1]) < int(ends[0]) or int(ends[1]) > MAX_LAYER or len(numbers) > MAX_LAYER + 1:
            raise InputError(where, rule, field=field, value=text)
    if len(set(numbers)) != len(numbers):
        raise InputError(where, rule, field=field, value=text)
    return numbers
