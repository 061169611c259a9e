"""Turns a `Model` into the text of a `models/*.toml` description and back, losing nothing.

Metadata types follow from the TOML value (text: string, true: bool, fraction: float32, whole number: uint32,
and lists of them); those that do not stand in `[metadata_types]`. A float32 is written with the fewest digits
that give it back.
"""

from __future__ import annotations

import json
import math
import struct
import tomllib
from collections.abc import Iterator
from typing import Any

from placement.errors import InputError
from placement.inputs.gguf_header.facts import STRUCT_CODES, VALUE_TYPE_IDS
from placement.inputs.model import Model, Profile
from placement.inputs.model_files.rows import format_ranges, from_rows, parse_ranges, to_rows
from placement.inputs.quants import KV_CACHE_TYPES

_TOP_KEYS = {"description", "layer_order", "profile", "metadata", "metadata_types", "tensors"}
_PROFILE_KEYS = ("ctx_tokens", "kv_type", "n_slots", "extra_args")


def parse_model(where: object, text: str, name: str) -> Model:
    """The model that a description says; `where` names the file in errors.

    Raises:
        InputError: the text is not TOML, or a field is unknown, missing, of a wrong type or out of range.
    """
    try:
        data = tomllib.loads(text)
    except (ValueError, RecursionError) as exc:  # ValueError: also an endless integer
        raise InputError(where, f"must be TOML: {exc}") from exc
    unknown = sorted(data.keys() - _TOP_KEYS)
    if unknown:
        raise InputError(where, f"is not one of {', '.join(sorted(_TOP_KEYS))}", field=unknown[0])
    description = data.get("description", "")
    if not isinstance(description, str):
        raise InputError(where, "must be text", field="description", value=description)
    metadata, types = _parse_metadata(
        where, _table(where, data, "metadata"), _table(where, data, "metadata_types")
    )
    order = data.get("layer_order")
    layers = None if order is None else parse_ranges(where, "layer_order", order)
    rows = data.get("tensors")
    if not isinstance(rows, list) or not rows:
        raise InputError(where, "must be [[tensors]] rows, one at least", field="tensors")
    profile = _parse_profile(where, _table(where, data, "profile"))
    return Model(name, metadata, types, from_rows(where, rows, layers), profile, description)


def _table(where: object, data: dict[str, Any], key: str) -> dict[str, Any]:
    table = data.get(key, {})
    if not isinstance(table, dict):
        raise InputError(where, f"must be a table, [{key}]", field=key)
    return table


def _parse_profile(where: object, table: dict[str, Any]) -> Profile:
    for key in table.keys() - set(_PROFILE_KEYS):
        raise InputError(where, f"is not one of {', '.join(_PROFILE_KEYS)}", field=f"profile.{key}")
    for key in ("ctx_tokens", "n_slots"):
        if key in table and (type(table[key]) is not int or not 1 <= table[key] < 2**31):
            raise InputError(
                where, "must be a whole number, one or more", field=f"profile.{key}", value=table[key]
            )
    kv_type = table.get("kv_type")
    if kv_type is not None and kv_type not in KV_CACHE_TYPES:
        rule = f"must be one of {', '.join(KV_CACHE_TYPES)}"
        raise InputError(where, rule, field="profile.kv_type", value=kv_type)
    extra = table.get("extra_args", [])
    if not isinstance(extra, list) or not all(isinstance(item, str) for item in extra):
        raise InputError(where, "must be a list of texts", field="profile.extra_args", value=extra)
    return Profile(table.get("ctx_tokens"), kv_type, table.get("n_slots", 1), tuple(extra))


def _parse_metadata(
    where: object, table: dict[str, Any], said: dict[str, Any]
) -> tuple[dict[str, Any], dict[str, str]]:
    if not isinstance(table.get("general.architecture"), str):
        raise InputError(where, "must be given, as text", field='metadata."general.architecture"')
    for key in said.keys() - table.keys():
        raise InputError(where, "must belong to a key of [metadata]", field=f'metadata_types."{key}"')
    metadata: dict[str, Any] = {}
    types: dict[str, str] = {}
    for key, value in table.items():
        type_name = said.get(key, _default_type(value))
        if not isinstance(type_name, str) or type_name.strip("[]") not in VALUE_TYPE_IDS:
            rule = 'must have a GGUF value type in [metadata_types], such as "uint32" or "[float32]"'
            raise InputError(where, rule, field=f'metadata."{key}"', value=type_name)
        metadata[key], types[key] = _checked_value(where, key, type_name, value), type_name
    return metadata, types


def _default_type(value: Any) -> str | None:
    if isinstance(value, list):
        inner = {_default_type(item) for item in value}
        only = inner.pop() if len(inner) == 1 else None
        return None if only is None or only.startswith("[") else f"[{only}]"
    for kind, name in ((bool, "bool"), (str, "string"), (float, "float32"), (int, "uint32")):
        if isinstance(value, kind):
            return name
    return None


def _checked_value(where: object, key: str, type_name: str, value: Any) -> Any:
    name = type_name.strip("[]")
    is_list = type_name == f"[{name}]"
    if (not is_list and type_name != name) or name == "array" or is_list != isinstance(value, list):
        raise InputError(where, f"must be a {type_name}", field=f'metadata."{key}"', value=value)
    try:
        return tuple(_scalar(name, item) for item in value) if is_list else _scalar(name, value)
    except (struct.error, OverflowError, TypeError) as exc:
        raise InputError(where, f"must be a {type_name}", field=f'metadata."{key}"', value=value) from exc


def _scalar(name: str, value: Any) -> Any:
    """The value as a GGUF file holds it; a TypeError, struct.error or OverflowError where it cannot."""
    kinds = {"string": (str,), "bool": (bool,), "float32": (float, int), "float64": (float, int)}.get(
        name, (int,)
    )
    if not isinstance(value, kinds) or (isinstance(value, bool) and name != "bool"):
        raise TypeError(name)
    if name in ("string", "bool"):
        return value
    number = struct.unpack(f"<{STRUCT_CODES[name]}", struct.pack(f"<{STRUCT_CODES[name]}", value))[0]
    if math.isnan(number):
        raise TypeError(name)
    return number


def format_model(model: Model) -> str:
    """The description of a model, the same for the same facts.

    Raises:
        InputError: a metadata value does not fit its type.
    """
    rows, order = to_rows(model.tensors)
    head = {"description": _text(model.description)} if model.description else {}
    if order is not None:
        head["layer_order"] = _text(format_ranges(order))
    tables = [("", head), ("[profile]", _profile_lines(model.profile)), *_metadata_tables(model)]
    tables += [("[[tensors]]", {key: _plain(value) for key, value in row.items()}) for row in rows]
    return "\n".join(_format_tables(tables))


def _format_tables(tables: list[tuple[str, dict[str, str]]]) -> Iterator[str]:
    for title, lines in tables:
        if lines:
            yield "".join(
                [*([f"{title}\n"] if title else []), *(f"{key} = {value}\n" for key, value in lines.items())]
            )


def _profile_lines(profile: Profile) -> dict[str, str]:
    values = {key: getattr(profile, key) for key in _PROFILE_KEYS}
    return {key: _plain(value) for key, value in values.items() if value not in (None, ())}


def _metadata_tables(model: Model) -> list[tuple[str, dict[str, str]]]:
    values: dict[str, str] = {}
    types: dict[str, str] = {}
    for key in model.metadata.keys() ^ model.metadata_types.keys():
        raise InputError(model.name, "must have both a value and a type", field=key)
    for key, value in model.metadata.items():
        name = model.metadata_types[key]
        listed = list(value) if isinstance(value, tuple) else value
        if _checked_value(model.name, key, name, listed) != value:
            raise InputError(model.name, f"must be a {name}", field=f'metadata."{key}"', value=value)
        is_float32 = name.strip("[]") == "float32"
        values[_text(key)] = _plain(listed, float_text=_float32 if is_float32 else repr)
        if name != _default_type(listed):
            types[_text(key)] = _text(name)
    return [("[metadata]", values), ("[metadata_types]", types)]


def _plain(value: Any, float_text: Any = repr) -> str:
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_plain(item, float_text) for item in value) + "]"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return _text(value)
    text: str = float_text(value) if isinstance(value, float) else repr(value)
    return text


def _text(value: str) -> str:
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _float32(value: float) -> str:
    if math.isinf(value):
        return repr(value)
    candidates = (repr(float(f"{value:.{digits}g}")) for digits in range(6, 10))
    return next(text for text in candidates if _scalar("float32", float(text)) == value)
