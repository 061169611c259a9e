"""Turns names, `models/*.toml` descriptions and GGUF files into a `Model`, and a `Model` into either file.

`rows` packs the tensor list into rows and back, `description` is the TOML text, `files` finds, reads, writes.
GGUF → description → header-only GGUF → description gives the same facts, the tensors in the same order.
"""

from placement.model_files.description import format_model, parse_model
from placement.model_files.files import (
    export_header,
    load_model,
    model_from_facts,
    model_from_header,
    model_names,
    resolve_model,
    save_model,
)

__all__ = [
    "export_header",
    "format_model",
    "load_model",
    "model_from_facts",
    "model_from_header",
    "model_names",
    "parse_model",
    "resolve_model",
    "save_model",
]
