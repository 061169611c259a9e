"""The records of a GGUF header and the constants of the format (gguf.h, ggml.h)."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MAGIC = b"GGUF"
VERSION = 3
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
MAX_NAME_BYTES = 63  # GGML_MAX_NAME less its terminating zero
INT64_MAX = 2**63 - 1

# gguf_type: (name, struct code); strings and arrays have none
VALUE_TYPES: dict[int, tuple[str, str]] = {
    0: ("uint8", "B"),
    1: ("int8", "b"),
    2: ("uint16", "H"),
    3: ("int16", "h"),
    4: ("uint32", "I"),
    5: ("int32", "i"),
    6: ("float32", "f"),
    7: ("bool", "?"),
    8: ("string", ""),
    9: ("array", ""),
    10: ("uint64", "Q"),
    11: ("int64", "q"),
    12: ("float64", "d"),
}
STRING, ARRAY = 8, 9
VALUE_TYPE_IDS = {name: type_id for type_id, (name, _) in VALUE_TYPES.items()}
STRUCT_CODES = dict(VALUE_TYPES.values())


class TensorInfo(NamedTuple):
    """One tensor: `shape` in ggml `ne` order, `offset` in bytes from its part's `data_start`."""

    name: str
    shape: tuple[int, ...]
    type: str
    offset: int = 0
    part: int = 0


@dataclass(frozen=True, slots=True)
class FilePart:
    """One file of the set: where its data section starts and how long the file is, in bytes."""

    path: Path
    version: int
    alignment: int
    data_start: int
    n_bytes: int
    n_tensors: int


@dataclass(frozen=True, slots=True)
class Header:
    """Everything in the header of a model but its vocabulary.

    `metadata` maps keys to values (arrays as tuples), `metadata_types` the same keys to "uint32", "[string]"
    and so on. `skipped` holds the element counts of the arrays that were stepped over. Tensors keep the order
    of the files; the metadata of a split set is that of its first part.
    """

    parts: tuple[FilePart, ...]
    metadata: dict[str, Any]
    metadata_types: dict[str, str]
    skipped: dict[str, int]
    tensors: tuple[TensorInfo, ...]

    @property
    def files(self) -> tuple[Path, ...]:
        """The files of the set, first part first."""
        return tuple(part.path for part in self.parts)

    @property
    def n_bytes(self) -> int:
        """Bytes of all files."""
        return sum(part.n_bytes for part in self.parts)

    @property
    def alignment(self) -> int:
        """Alignment of the tensors of the first part, in bytes."""
        return self.parts[0].alignment

    @property
    def data_start(self) -> int:
        """Where the data section of the first part starts, in bytes."""
        return self.parts[0].data_start

    @property
    def n_vocab(self) -> int | None:
        """Tokens of the vocabulary, else `<architecture>.vocab_size`; None if neither."""
        n_tokens = self.skipped.get("tokenizer.ggml.tokens")
        said = self.metadata.get(f"{self.metadata.get('general.architecture', '')}.vocab_size")
        return n_tokens if n_tokens is not None or not isinstance(said, int) else said
