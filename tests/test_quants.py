"""Bytes of ggml types, against the table that gguf-py ships and by hand."""

import gguf
import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import InputError
from placement.inputs.quants import (
    BLOCKS,
    KV_CACHE_TYPES,
    TYPE_IDS,
    TYPE_NAMES,
    block,
    row_bytes,
    tensor_bytes,
)

# gguf-py counts Q8_1's sums as two floats; ggml-common.h holds two halves since 2024: 4 + 32 bytes.
WRONG_IN_GGUF_PY = {"Q8_1"}


@pytest.mark.parametrize("type_", [t for t in gguf.GGML_QUANT_SIZES if t.name not in WRONG_IN_GGUF_PY])
def test_blocks_are_those_of_gguf_py(type_: gguf.GGMLQuantizationType) -> None:
    """Each type of gguf-py has the same id, block length and block size here."""
    expected = (type_.value, *gguf.GGML_QUANT_SIZES[type_])
    assert expected == (TYPE_IDS[type_.name], *BLOCKS[type_.name])


def test_every_block_has_an_id() -> None:
    """The block table and the ids name the same types, each id once."""
    assert (set(BLOCKS), len(BLOCKS)) == (set(TYPE_IDS), len(TYPE_NAMES))


@pytest.mark.parametrize(
    ("shape", "type_", "expected"),
    [
        ((2048, 151936), "Q8_0", 2048 // 32 * 34 * 151936),
        ((2048, 512, 512), "Q5_K", 8 * 176 * 512 * 512),
        ((2880, 2880, 128), "MXFP4", 90 * 17 * 2880 * 128),
        ((7,), "F32", 28),
        ((32, 0), "Q8_0", 0),
    ],
)
def test_tensor_bytes_by_hand(shape: tuple[int, ...], type_: str, expected: int) -> None:
    """A tensor is its rows' whole blocks, one row after the other."""
    assert expected == tensor_bytes(shape, type_)


@given(st.sampled_from(sorted(BLOCKS)), st.integers(0, 100), st.lists(st.integers(0, 9), max_size=3))
def test_tensor_bytes_are_rows(type_: str, n_blocks: int, rest: list[int]) -> None:
    """A tensor has as many rows as its other dimensions multiply to."""
    elements = n_blocks * BLOCKS[type_][0]
    n_rows = 1
    for dimension in rest:
        n_rows *= dimension
    assert row_bytes(type_, elements) * n_rows == tensor_bytes([elements, *rest], type_)


@pytest.mark.parametrize("spelling", [*KV_CACHE_TYPES, "q4_K", "iq2_xxs", "TQ1_0"])
def test_llama_cpp_spelling_is_understood(spelling: str) -> None:
    """Types may be spelled as llama.cpp prints them and its options take them."""
    assert BLOCKS[spelling.upper()] == block(spelling)


def test_unknown_type_is_refused() -> None:
    """A type that ggml lacks is an input error that shows it."""
    with pytest.raises(InputError, match="'Q4_2'"):
        row_bytes("Q4_2", 32)


def test_partial_block_is_refused() -> None:
    """A row must be whole blocks."""
    with pytest.raises(InputError, match="blocks of 256"):
        tensor_bytes((128, 4), "Q4_K")
