"""Turns names, `models/*.toml` descriptions and GGUF files into a `Model`, and a `Model` into a description."""

from __future__ import annotations

import json
from pathlib import Path

from placement.model import Model, Tensor


def model_from_facts(path: str | Path) -> Model:
    """The model of a JSON file with `metadata`, `metadata_types` and `tensors` as [name, shape, type]."""
    path = Path(path)
    facts = json.loads(path.read_text(encoding="utf-8"))
    metadata = {
        key: tuple(value) if isinstance(value, list) else value for key, value in facts["metadata"].items()
    }
    tensors = tuple(Tensor(name, tuple(shape), type_) for name, shape, type_ in facts["tensors"])
    return Model(path.stem, metadata, dict(facts["metadata_types"]), tensors)
