"""Turns any part of a split set into the header of the whole (llama-model-loader.cpp, llama_split_path)."""

from __future__ import annotations

import re
from pathlib import Path

from placement.errors import InputError
from placement.inputs.gguf_header.facts import Header
from placement.inputs.gguf_header.read import read_file, shown

_PART = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")


def split_name(path: Path) -> tuple[str, int, int] | None:
    """The stem, part number (from 1) and part count that a file name like `x-00001-of-00003.gguf` says."""
    match = _PART.fullmatch(path.name)
    return (match["stem"], int(match["number"]), int(match["count"])) if match else None


def read_header(path: str | Path) -> Header:
    """Read the header of a GGUF file, and of all other parts where it is one of a split set.

    Raises:
        InputError: a file cannot be read or breaks a rule of the format, a part is missing, or the parts do
            not belong together.
    """
    path = Path(path)
    header = read_file(path)
    number, count = _number(path, header, "split.no", 0) + 1, max(_number(path, header, "split.count", 1), 1)
    named = split_name(path)
    if named is None and count == 1:
        return header
    if named is None or named[1:] != (number, count):
        rule = (
            f"must have a name that ends as split.no and split.count say: -{number:05d}-of-{count:05d}.gguf"
        )
        raise InputError(path, rule)
    return _merged(_read_parts(path, header, *named)) if count > 1 else header


def _number(path: Path, header: Header, key: str, default: int) -> int:
    value = header.metadata.get(key, default)
    if not isinstance(value, int):
        raise InputError(path, "must be a whole number", field=key, value=shown(str(value)))
    return value


def _read_parts(path: Path, given: Header, stem: str, number: int, count: int) -> list[Header]:
    files = [path.with_name(f"{stem}-{i:05d}-of-{count:05d}.gguf") for i in range(1, count + 1)]
    missing = [file.name for file in files if not file.exists()]
    if missing:
        more = f" and {len(missing) - 3} more" if len(missing) > 3 else ""
        raise InputError(path, f"needs all {count} parts beside it; missing: {', '.join(missing[:3])}{more}")
    parts = [given if i == number - 1 else read_file(file) for i, file in enumerate(files)]
    for i, part in enumerate(parts):
        said = (part.metadata.get("split.no"), part.metadata.get("split.count"))
        if said != (i, count):
            rule = f"must be {(i, count)}, as its name and the other parts say"
            raise InputError(files[i], rule, field="(split.no, split.count)", value=said)
    return parts


def _merged(parts: list[Header]) -> Header:
    first = parts[0]
    tensors = tuple(info._replace(part=i) for i, part in enumerate(parts) for info in part.tensors)
    owners: dict[str, int] = {}
    for info in tensors:
        if owners.setdefault(info.name, info.part) != info.part:
            raise InputError(parts[info.part].files[0], "is also in another part", field=shown(info.name))
    n_said = first.metadata.get("split.tensors.count")
    if n_said != len(tensors):
        rule = f"must be {len(tensors)}, the number of tensors in all parts"
        raise InputError(first.files[0], rule, field="split.tensors.count", value=n_said)
    files = tuple(part.parts[0] for part in parts)
    return Header(files, first.metadata, first.metadata_types, first.skipped, tensors)
