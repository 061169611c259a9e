"""Turns GGUF files into their header facts, and facts into header-only GGUF files; never touches weights.

`read` holds the bounds-checked reader of one file, `split` joins the parts of a set, `write` makes sparse
files that llama.cpp can plan.
"""

from placement.gguf_header.facts import Header, Part, TensorInfo
from placement.gguf_header.split import read_header, split_name
from placement.gguf_header.write import encode_header, is_header_only, write_header

__all__ = [
    "Header",
    "Part",
    "TensorInfo",
    "encode_header",
    "is_header_only",
    "read_header",
    "split_name",
    "write_header",
]
