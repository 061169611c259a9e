"""Finds, reads and writes model files: names and paths to a `Model`, a `Model` to a description or a GGUF."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

from placement.errors import InputError
from placement.files import search_folders, write_atomically
from placement.inputs.gguf_header.facts import Header, TensorInfo
from placement.inputs.gguf_header.split import read_header, split_name
from placement.inputs.gguf_header.write import write_header
from placement.inputs.model import Model, Tensor
from placement.inputs.model_files.description import format_model, parse_model

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]{0,99}")
_MAX_DESCRIPTION_BYTES = 1 << 24
_TOKENIZER_KEY = "tokenizer.ggml.model"
_KEPT_TOKENIZER_KEYS = {_TOKENIZER_KEY, "tokenizer.ggml.token_type_count"}  # the latter sizes a BERT tensor


def resolve_model(name_or_path: str | Path) -> Model:
    """The model of a description's name, a `.toml` description or a GGUF file (any part of a split set).

    An existing file wins; names are then looked up in `./models`, the user's configuration folder and the
    package, in this order.

    Raises:
        InputError: there is no such file or name (the nearest names are suggested), or it cannot be read.
    """
    text = os.fspath(name_or_path)
    path = Path(text)
    if os.path.isfile(text):  # unlike Path.is_file, False for names that no file can have
        return read_model(path)
    looks_like_path = isinstance(name_or_path, Path) or path.suffix in (".toml", ".gguf") or path.name != text
    if looks_like_path:
        raise InputError("MODEL", "there is no such file", value=text[:100])
    if _NAME.fullmatch(text):
        for folder in search_folders("models"):
            if (folder / f"{text}.toml").is_file():
                return read_model(folder / f"{text}.toml")
    raise InputError("MODEL", f"there is no model of that name; {_suggestion(text)}", value=text[:100])


def read_model(path: str | Path) -> Model:
    """The model of a `.toml` description or a GGUF file (any part of a split set), named after the file.

    Raises:
        InputError: the file cannot be read, or breaks a rule of its format.
    """
    path = Path(path)
    if path.suffix != ".toml":
        return model_from_header(read_header(path))
    try:
        with path.open("rb") as file:
            raw = file.read(_MAX_DESCRIPTION_BYTES + 1)
    except OSError as exc:
        raise InputError(path, f"cannot be read: {exc.strerror or exc}") from exc
    if len(raw) > _MAX_DESCRIPTION_BYTES:
        raise InputError(path, f"must have at most {_MAX_DESCRIPTION_BYTES} bytes")
    try:
        return parse_model(path, raw.decode("utf-8"), path.stem)
    except UnicodeDecodeError as exc:
        raise InputError(path, f"must be UTF-8: {exc.reason} at byte {exc.start}") from exc


def model_names() -> dict[str, Path]:
    """Every model that a name can mean, with the description that it means, in alphabetical order."""
    found: dict[str, Path] = {}
    for folder in search_folders("models"):
        for path in folder.glob("*.toml"):
            if _NAME.fullmatch(path.stem):
                found.setdefault(path.stem, path)
    return dict(sorted(found.items()))


def _suggestion(name: str) -> str:
    import difflib  # lazily, as only a mistake needs it

    names = list(model_names())
    near = (
        difflib.get_close_matches(name, names, n=3, cutoff=0.5)
        or [n for n in names if name and name in n][:3]
    )
    if near:
        return "did you mean " + " or ".join(near) + "?"
    return "known are " + ", ".join(names) if names else "no descriptions were found"


def model_from_header(header: Header) -> Model:
    """The model of a GGUF header: its facts without the vocabulary and the numbering of its parts.

    Every `tokenizer.` key goes but the token type count; `tokenizer.ggml.model` becomes "none", and
    `<architecture>.vocab_size` the number of tokens, which is what llama.cpp takes from a real vocabulary.

    Raises:
        InputError: the header has no architecture or no tensors.
    """
    path = header.files[0]
    architecture = header.metadata.get("general.architecture")
    if not isinstance(architecture, str) or not architecture:
        raise InputError(path, "must be given, as text", field="general.architecture", value=architecture)
    if not header.tensors:
        raise InputError(path, "has no tensors: a vocabulary alone cannot be placed")
    metadata = {key: value for key, value in header.metadata.items() if _is_kept(key)}
    types = {key: header.metadata_types[key] for key in metadata}
    metadata[_TOKENIZER_KEY], types[_TOKENIZER_KEY] = "none", "string"
    if "tokenizer.ggml.tokens" in header.skipped:
        key = f"{architecture}.vocab_size"
        metadata[key], types[key] = header.skipped["tokenizer.ggml.tokens"], "uint32"
    tensors = tuple(Tensor(info.name, info.shape, info.type) for info in header.tensors)
    named = split_name(path)
    name = named[0] if named else path.stem
    return Model(name, metadata, types, tensors, files=tuple(str(file) for file in header.files))


def _is_kept(key: str) -> bool:
    return key in _KEPT_TOKENIZER_KEYS or not key.startswith(("tokenizer.", "split."))


def model_from_facts(path: str | Path) -> Model:
    """The model of a JSON file with `metadata`, `metadata_types` and `tensors` as [name, shape, type].

    An empty array's type, which such files give as "[array]", is taken for "[string]".
    """
    path = Path(path)
    facts = json.loads(path.read_text(encoding="utf-8"))
    metadata = {
        key: tuple(value) if isinstance(value, list) else value for key, value in facts["metadata"].items()
    }
    types = {key: name.replace("[array]", "[string]") for key, name in facts["metadata_types"].items()}
    tensors = tuple(Tensor(name, tuple(shape), type_) for name, shape, type_ in facts["tensors"])
    return Model(path.stem, metadata, types, tensors)


def save_model(model: Model, path: str | Path) -> None:
    """Write the description of a model, whole or not at all; one that differs is kept as `<path>.bak`.

    Raises:
        InputError: the file cannot be written, or a metadata value does not fit its type.
    """
    path = Path(path)
    try:
        raw = format_model(model).encode("utf-8")
        if not path.is_file() or path.read_bytes() != raw:
            write_atomically(path, raw)
    except UnicodeEncodeError as exc:
        raise InputError(path, f"must be UTF-8: {exc.reason}") from exc


def export_header(model: Model, path: str | Path, *, overwrite: bool = False) -> int:
    """Write a sparse header-only GGUF of a model that llama.cpp can plan; return its length in bytes.

    Raises:
        InputError: a file is there that is not header-only, the file cannot be written, or a metadata
            value does not fit its type.
    """
    metadata: dict[str, Any] = {**model.metadata, _TOKENIZER_KEY: "none"}
    types = {**model.metadata_types, _TOKENIZER_KEY: "string"}
    infos = (TensorInfo(tensor.name, tensor.shape, tensor.type) for tensor in model.tensors)
    return write_header(path, metadata, types, infos, overwrite=overwrite)
