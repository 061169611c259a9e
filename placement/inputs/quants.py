"""Turns a ggml type and a shape into bytes, by the block table of ggml.c (build b11434)."""

from __future__ import annotations

import math
from collections.abc import Sequence

from placement.errors import InputError

# name: (elements per block, bytes per block). Q8_1 is 36 bytes in ggml-common.h; gguf-py 0.19 says 40.
BLOCKS: dict[str, tuple[int, int]] = {
    "F32": (1, 4),
    "F16": (1, 2),
    "Q4_0": (32, 18),
    "Q4_1": (32, 20),
    "Q5_0": (32, 22),
    "Q5_1": (32, 24),
    "Q8_0": (32, 34),
    "Q8_1": (32, 36),
    "Q2_K": (256, 84),
    "Q3_K": (256, 110),
    "Q4_K": (256, 144),
    "Q5_K": (256, 176),
    "Q6_K": (256, 210),
    "Q8_K": (256, 292),
    "IQ2_XXS": (256, 66),
    "IQ2_XS": (256, 74),
    "IQ3_XXS": (256, 98),
    "IQ1_S": (256, 50),
    "IQ4_NL": (32, 18),
    "IQ3_S": (256, 110),
    "IQ2_S": (256, 82),
    "IQ4_XS": (256, 136),
    "I8": (1, 1),
    "I16": (1, 2),
    "I32": (1, 4),
    "I64": (1, 8),
    "F64": (1, 8),
    "IQ1_M": (256, 56),
    "BF16": (1, 2),
    "TQ1_0": (256, 54),
    "TQ2_0": (256, 66),
    "MXFP4": (32, 17),
    "NVFP4": (64, 36),
    "Q1_0": (128, 18),
    "Q2_0": (64, 18),
}

# The enum of ggml.h; gaps are types that were removed from GGUF files.
TYPE_IDS: dict[str, int] = {
    **{name: i for i, name in enumerate(("F32", "F16", "Q4_0", "Q4_1"))},
    **{name: 6 + i for i, name in enumerate(list(BLOCKS)[4:29])},
    "TQ1_0": 34,
    "TQ2_0": 35,
    "MXFP4": 39,
    "NVFP4": 40,
    "Q1_0": 41,
    "Q2_0": 42,
}

# What -ctk and -ctv take, in llama.cpp's spelling (common/arg.cpp).
KV_CACHE_TYPES = ("f32", "f16", "bf16", "q8_0", "q4_0", "q4_1", "iq4_nl", "q5_0", "q5_1")

TYPE_NAMES: dict[int, str] = {type_id: name for name, type_id in TYPE_IDS.items()}


def block(type: str) -> tuple[int, int]:
    """The elements and bytes of one block; llama.cpp's own spelling ("q8_0", "q4_K") is understood.

    Raises:
        InputError: ggml has no such type.
    """
    result = BLOCKS.get(type) or BLOCKS.get(type.upper())
    if result is None:
        raise InputError("ggml type", "must be one of " + ", ".join(BLOCKS), value=type)
    return result


def row_bytes(type: str, n_elements: int) -> int:
    """Bytes of a row of that many elements (ggml_row_size).

    Raises:
        InputError: the type is unknown, or the row is not a whole number of blocks.
    """
    block_elements, block_bytes = block(type)
    n_blocks, rest = divmod(n_elements, block_elements)
    if rest:
        rule = f"must be a whole number of {type} blocks of {block_elements} elements"
        raise InputError("row length", rule, value=n_elements)
    return n_blocks * block_bytes


def tensor_bytes(shape: Sequence[int], type: str) -> int:
    """Bytes of a contiguous tensor; `shape` in ggml `ne` order: row length first (ggml_nbytes).

    Raises:
        InputError: the type is unknown, or a row is not a whole number of blocks.
    """
    if not shape:
        raise InputError("tensor shape", "must have at least one dimension")
    return row_bytes(type, shape[0]) * math.prod(shape[1:])
