"""`Model`: what placement needs to know of an LLM, from a GGUF header or a `models/*.toml` description."""

from __future__ import annotations

import functools
import hashlib
import json
import re
from dataclasses import dataclass, field
from typing import Any

from placement.inputs.quants import tensor_bytes

_LAYER = re.compile(r"blk\.(\d+)\.")

MetadataValue = Any  # int, float, bool, str or a list of one of them, as the GGUF key's type says


@dataclass(frozen=True, slots=True)
class Tensor:
    """One tensor of the model file; `shape` is in ggml `ne` order: row length first, no trailing ones cut."""

    name: str
    shape: tuple[int, ...]
    type: str

    @property
    def n_bytes(self) -> int:
        """Bytes in the file: whole blocks of the type, row by row."""
        return tensor_bytes(self.shape, self.type)

    @property
    def layer(self) -> int | None:
        """N of a name that begins with `blk.N.`; None for input and output tensors."""
        match = _LAYER.match(self.name)
        return int(match.group(1)) if match else None


@dataclass(frozen=True, slots=True)
class Profile:
    """How its owner runs the model: what `solve` takes when no option says otherwise."""

    ctx_tokens: int | None = None
    kv_type: str | None = None
    n_slots: int = 1
    extra_args: tuple[str, ...] = ()


@dataclass(frozen=True)
class Model:
    """A GGUF model without its weights and vocabulary arrays.

    `metadata` maps the full GGUF key to its value (arrays as tuples); `metadata_types` maps the same keys to
    "uint32", "string", "[float32]" and so on. Tensors keep the order of the file.
    """

    name: str
    metadata: dict[str, MetadataValue]
    metadata_types: dict[str, str]
    tensors: tuple[Tensor, ...]
    profile: Profile = field(default_factory=Profile)
    description: str = ""
    files: tuple[str, ...] = ()  # GGUF files on this disk, first part first; empty for a description

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def architecture(self) -> str:
        """`general.architecture`, e.g. "qwen3moe"."""
        return str(self.metadata.get("general.architecture", ""))

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `<architecture>.<key>`, or `default` where the header has none."""
        return self.metadata.get(f"{self.architecture}.{key}", default)

    @functools.cached_property
    def by_name(self) -> dict[str, Tensor]:
        """Tensor name to tensor."""
        return {tensor.name: tensor for tensor in self.tensors}

    @functools.cached_property
    def digest(self) -> str:
        """16 hex digits that change with any metadata value or tensor (not with name, profile or files)."""
        facts = [sorted(self.metadata.items()), [(t.name, t.shape, t.type) for t in self.tensors]]
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]

    @functools.cached_property
    def n_bytes(self) -> int:
        """Bytes of all tensors in the file."""
        return sum(tensor.n_bytes for tensor in self.tensors)
