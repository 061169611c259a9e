"""Turns metadata and tensor shapes into a header-only GGUF: a header, and a hole as long as the weights."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from placement.errors import InputError
from placement.inputs.gguf_header.facts import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    MAGIC,
    MAX_DIMS,
    MAX_NAME_BYTES,
    STRUCT_CODES,
    VALUE_TYPE_IDS,
    VERSION,
    TensorInfo,
)
from placement.inputs.quants import TYPE_IDS, tensor_bytes


def write_header(
    path: str | Path,
    metadata: Mapping[str, Any],
    metadata_types: Mapping[str, str],
    tensors: Iterable[TensorInfo],
    *,
    overwrite: bool = False,
) -> int:
    """Write a sparse header-only GGUF, whole or not at all, and return its length in bytes.

    Offsets are computed here; those of `tensors` are ignored. A file that is there is replaced when it is itself
    header-only, any other only with `overwrite`.

    Raises:
        InputError: another file is there, this one cannot be written, or a value does not fit its type.
    """
    path = Path(path)
    if not overwrite and path.exists() and not is_header_only(path):
        raise InputError(path, "exists and is not a header-only GGUF; it is not replaced unless told to")
    header, n_bytes = encode_header(path, metadata, metadata_types, tensors)
    try:
        _replace(path, header, n_bytes)
    except OSError as exc:
        raise InputError(path, f"cannot be written: {exc.strerror or exc}") from exc
    return n_bytes


def is_header_only(path: Path) -> bool:
    """Whether a file is a GGUF whose data is a hole; False where the file system does not tell."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
        stat = path.stat()
    except OSError:
        return False
    allocated = getattr(stat, "st_blocks", None)
    return magic == MAGIC and allocated is not None and 2 * allocated * 512 < stat.st_size


def encode_header(
    where: object,
    metadata: Mapping[str, Any],
    metadata_types: Mapping[str, str],
    tensors: Iterable[TensorInfo],
) -> tuple[bytes, int]:
    """The header up to the data section, padding included, and the length of the whole file in bytes.

    Raises:
        InputError: a value does not fit its type, or a tensor its limits; `where` names the source.
    """
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
        raise InputError(where, "must be a power of two", field="general.alignment", value=alignment)
    pairs = [
        _string(key) + _value(where, key, metadata_types.get(key), value) for key, value in metadata.items()
    ]
    infos, offset = [], 0
    for tensor in tensors:
        infos.append(_tensor_info(where, tensor, offset))
        end = offset + tensor_bytes(tensor.shape, tensor.type)
        offset = -(-end // alignment) * alignment
    header = b"".join([MAGIC, struct.pack("<IQQ", VERSION, len(infos), len(pairs)), *pairs, *infos])
    header += b"\0" * (-len(header) % alignment)
    return header, len(header) + offset


def _replace(path: Path, header: bytes, n_bytes: int) -> None:
    import tempfile  # lazily, as few commands write

    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(header)
            file.truncate(n_bytes)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's 0600 would hide the file from a server's user
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _string(text: str) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(where: object, key: str, type_name: str | None, value: Any) -> bytes:
    name = type_name.strip("[]") if type_name else ""
    is_array = type_name == f"[{name}]"
    if name not in VALUE_TYPE_IDS or name == "array" or (type_name != name and not is_array):
        raise InputError(where, "must have a GGUF value type", field=f"type of {key}", value=type_name)
    try:
        values = tuple(value) if is_array else (value,)
        if name == "string":
            encoded = b"".join(map(_string, values))
        else:
            encoded = struct.pack(f"<{len(values)}{STRUCT_CODES[name]}", *values)
    except (struct.error, OverflowError, TypeError, AttributeError) as exc:
        raise InputError(where, f"must be a {type_name}", field=key, value=value) from exc
    if is_array:
        return struct.pack("<IIQ", ARRAY, VALUE_TYPE_IDS[name], len(values)) + encoded
    return struct.pack("<I", VALUE_TYPE_IDS[name]) + encoded


def _tensor_info(where: object, tensor: TensorInfo, offset: int) -> bytes:
    if len(tensor.name.encode()) > MAX_NAME_BYTES:
        raise InputError(
            where, f"must be at most {MAX_NAME_BYTES} bytes", field="tensor name", value=tensor.name
        )
    if tensor.type not in TYPE_IDS:
        raise InputError(where, "must have a ggml type", field=tensor.name, value=tensor.type)
    n_dims = len(tensor.shape)
    if not 1 <= n_dims <= MAX_DIMS:
        raise InputError(
            where, f"must have 1 to {MAX_DIMS} dimensions", field=tensor.name, value=tensor.shape
        )
    shape = struct.pack(f"<I{n_dims}Q", n_dims, *tensor.shape)
    return _string(tensor.name) + shape + struct.pack("<IQ", TYPE_IDS[tensor.type], offset)
