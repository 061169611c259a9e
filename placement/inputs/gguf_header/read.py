"""Turns one GGUF file into its header facts; every length is checked against the file before it is used.

Strings of arrays are stepped over without making an object of each, which is what makes a real vocabulary
cheap. The rules, and what is refused, mirror gguf_init_from_reader (ggml/src/gguf.cpp).
"""

from __future__ import annotations

import math
import mmap
import struct
from pathlib import Path
from typing import Any

from placement.errors import InputError
from placement.inputs.gguf_header.facts import (
    ARRAY,
    DEFAULT_ALIGNMENT,
    INT64_MAX,
    MAGIC,
    MAX_DIMS,
    MAX_NAME_BYTES,
    STRING,
    VALUE_TYPES,
    VERSION,
    FilePart,
    Header,
    TensorInfo,
)
from placement.inputs.quants import TYPE_NAMES, tensor_bytes

# Limits that no real model comes near; they keep a damaged file from costing minutes or gigabytes.
MAX_HEADER_BYTES = 1 << 27
MAX_KEY_BYTES = 65535
MAX_KEYS = 1 << 16
MAX_TENSORS = 1 << 20
MAX_KEPT_ELEMENTS = 1 << 20
MAX_KEPT_STRINGS = 1024

_U32 = struct.Struct("<I")
_U64 = struct.Struct("<Q")
_OUTSIDE = (struct.error, OverflowError, IndexError)


def read_file(path: Path) -> Header:
    """Read the header of one file, without looking for further parts.

    Raises:
        InputError: the file cannot be read, is no GGUF, or breaks a rule of the format.
    """
    try:
        with path.open("rb") as file:
            n_bytes = file.seek(0, 2)
            if n_bytes < 24:
                raise InputError(path, f"must be a GGUF file; it has only {n_bytes} bytes")
            with mmap.mmap(file.fileno(), min(n_bytes, MAX_HEADER_BYTES), access=mmap.ACCESS_READ) as data:
                return _Reader(path, data, n_bytes).header()
    except OSError as exc:
        raise InputError(path, f"cannot be read: {exc.strerror or exc}") from exc


def shown(text: str) -> str:
    """A key or name from a file as an error may print it: one line, not too long."""
    text = text if len(text) <= 80 else text[:77] + "..."
    return text if text.isprintable() else repr(text)


class _Reader:
    """A position in the header of one file."""

    def __init__(self, path: Path, data: mmap.mmap, n_bytes: int) -> None:
        self.path, self.data, self.n_bytes, self.end = path, data, n_bytes, len(data)
        self.position = 0
        self.n_kept_elements = 0
        self.skipped: dict[str, int] = {}

    def header(self) -> Header:
        version, n_tensors, n_keys = self._preamble()
        metadata: dict[str, Any] = {}
        types: dict[str, str] = {}
        for _ in range(n_keys):
            key = self._string("metadata key", MAX_KEY_BYTES, is_strict=True)
            if not key or key in metadata or key in self.skipped:
                raise self._error("must be unique and not empty", "metadata key", shown(key))
            self._key_value(key, metadata, types)
        alignment = self._alignment(metadata, types)
        infos = tuple(self._tensor_info(i) for i in range(n_tensors))
        data_start = -(-self.position // alignment) * alignment if infos else self.position
        self._check_tensors(infos, alignment, data_start)
        part = FilePart(self.path, version, alignment, data_start, self.n_bytes, n_tensors)
        return Header((part,), metadata, types, self.skipped, infos)

    def _preamble(self) -> tuple[int, int, int]:
        magic = bytes(self.data[:4])
        if magic != MAGIC:
            raise self._error("must be a GGUF file, which begins with b'GGUF'", "magic", magic)
        self.position = 4
        version = self._u32("version")
        if version & 0xFFFF == 0:
            raise self._error("must be little-endian; big-endian models do not run here", "version", version)
        if version not in (2, VERSION):
            raise self._error("must be 2 or 3, the versions that llama.cpp reads", "version", version)
        n_tensors, n_keys = self._u64("tensor count"), self._u64("metadata count")
        # A tensor info takes 32 bytes at least, a metadata entry 13.
        self._check_count("tensor count", n_tensors, 32, MAX_TENSORS)
        self._check_count("metadata count", n_keys, 13, MAX_KEYS)
        return version, n_tensors, n_keys

    def _key_value(self, key: str, metadata: dict[str, Any], types: dict[str, str]) -> None:
        type_id = self._u32(key)
        if type_id == ARRAY:
            self._array(key, metadata, types)
        elif type_id == STRING:
            metadata[key], types[key] = self._string(key, MAX_HEADER_BYTES), "string"
        else:
            types[key], code = self._value_type(key, type_id)
            (metadata[key],) = self._numbers(key, code, 1)

    def _array(self, key: str, metadata: dict[str, Any], types: dict[str, str]) -> None:
        type_id, n_elements = self._u32(key), self._u64(key)
        if type_id == ARRAY:
            raise self._error("must not be an array of arrays, which llama.cpp refuses", shown(key))
        name, code = self._value_type(key, type_id)
        is_vocabulary = key.startswith("tokenizer.")
        self._check_count(
            key, n_elements, 8 if type_id == STRING else struct.calcsize(code), MAX_HEADER_BYTES
        )
        if type_id == STRING and (is_vocabulary or n_elements > MAX_KEPT_STRINGS):
            self._skip_strings(key, n_elements)
        elif is_vocabulary:
            self.position += n_elements * struct.calcsize(code)
        else:
            self._keep(key, n_elements)
            types[key] = f"[{name}]"
            if type_id == STRING:
                metadata[key] = tuple(self._string(key, MAX_HEADER_BYTES) for _ in range(n_elements))
            else:
                metadata[key] = self._numbers(key, code, n_elements)
            return
        self.skipped[key] = n_elements

    def _keep(self, key: str, n_elements: int) -> None:
        self.n_kept_elements += n_elements
        if self.n_kept_elements > MAX_KEPT_ELEMENTS:
            raise self._error(
                f"must leave at most {MAX_KEPT_ELEMENTS} array elements in all", shown(key), n_elements
            )

    def _skip_strings(self, key: str, n_strings: int) -> None:
        data, position, length_at = self.data, self.position, _U64.unpack_from
        try:
            for _ in range(n_strings):
                position += length_at(data, position)[0] + 8
        except _OUTSIDE as exc:
            raise self._outside(key) from exc
        if position > self.end:
            raise self._outside(key)
        self.position = position

    def _alignment(self, metadata: dict[str, Any], types: dict[str, str]) -> int:
        value = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if types.get("general.alignment", "uint32") != "uint32":
            raise self._error("must be a uint32", "general.alignment", shown(str(value)))
        if value <= 0 or value & (value - 1):
            raise self._error("must be a power of two", "general.alignment", value)
        return int(value)

    def _tensor_info(self, index: int) -> TensorInfo:
        name = self._string(f"name of tensor {index}", MAX_NAME_BYTES, is_strict=True)
        n_dims = self._u32(name)
        if not 1 <= n_dims <= MAX_DIMS:
            raise self._error(f"must have 1 to {MAX_DIMS} dimensions", shown(name), n_dims)
        shape = self._numbers(name, "Q", n_dims)
        if math.prod(max(n, 1) for n in shape) > INT64_MAX:
            raise self._error("must have fewer than 2**63 elements", shown(name), shape)
        type_id = self._u32(name)
        if type_id not in TYPE_NAMES:
            raise self._error("must have a ggml type that llama.cpp knows", shown(name), type_id)
        return TensorInfo(name, shape, TYPE_NAMES[type_id], self._u64(name))

    def _check_tensors(self, infos: tuple[TensorInfo, ...], alignment: int, data_start: int) -> None:
        names: set[str] = set()
        offset = end = 0
        for info in infos:
            if info.name in names:
                raise self._error("must be unique", "tensor name", shown(info.name))
            names.add(info.name)
            if info.offset != offset:
                rule = f"must have offset {offset}: llama.cpp wants the tensors packed in their order"
                raise self._error(rule, shown(info.name), info.offset)
            try:
                end = offset + tensor_bytes(info.shape, info.type)
            except InputError as exc:
                raise self._error(f"{exc.rule}, as {info.type}", shown(info.name), info.shape) from exc
            offset = -(-end // alignment) * alignment
        missing = data_start + end - self.n_bytes
        if missing > 0:
            rule = (
                f"is truncated: {missing} bytes of tensor data are missing from the {data_start + end} needed"
            )
            raise self._error(rule)

    def _value_type(self, key: str, type_id: int) -> tuple[str, str]:
        if type_id not in VALUE_TYPES:
            raise self._error("must have one of GGUF's thirteen value types", shown(key), type_id)
        return VALUE_TYPES[type_id]

    def _check_count(self, field: str, count: int, least_bytes: int, limit: int) -> None:
        most = min(limit, (self.end - self.position) // least_bytes)
        if count > most:
            raise self._error(
                f"must be at most {most}, which is all this file has room for", shown(field), count
            )

    def _string(self, field: str, limit: int, *, is_strict: bool = False) -> str:
        length = self._u64(field)
        if length > limit:
            raise self._error(f"must be at most {limit} bytes long", shown(field), length)
        start, self.position = self.position, self.position + length
        if self.position > self.end:
            raise self._outside(field)
        raw = bytes(self.data[start : self.position])
        try:
            return raw.decode("utf-8", "strict" if is_strict else "backslashreplace")
        except UnicodeDecodeError as exc:
            raise self._error("must be UTF-8", shown(field), raw[:40]) from exc

    def _numbers(self, field: str, code: str, count: int) -> tuple[Any, ...]:
        try:
            numbers = struct.unpack_from(f"<{count}{code}", self.data, self.position)
        except _OUTSIDE as exc:
            raise self._outside(field) from exc
        self.position += struct.calcsize(f"<{count}{code}")
        if code in "fd" and any(math.isnan(number) for number in numbers):
            raise self._error("must not hold NaN", shown(field))
        return numbers

    def _u32(self, field: str) -> int:
        return self._number(field, _U32)

    def _u64(self, field: str) -> int:
        return self._number(field, _U64)

    def _number(self, field: str, layout: struct.Struct) -> int:
        try:
            number: int = layout.unpack_from(self.data, self.position)[0]
        except _OUTSIDE as exc:
            raise self._outside(field) from exc
        self.position += layout.size
        return number

    def _outside(self, field: str) -> InputError:
        if self.end < self.n_bytes:
            return self._error(f"the header must end within {MAX_HEADER_BYTES} bytes", shown(field))
        return self._error(f"the file ends inside its header, after {self.n_bytes} bytes", shown(field))

    def _error(self, rule: str, field: str | None = None, value: object = None) -> InputError:
        return InputError(self.path, rule, field=field, value=value)
