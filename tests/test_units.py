from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from placement.errors import InputError
from placement.units import GIB, KIB, MIB, format_bytes, mib, pad, parse_bytes


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("512MiB", 512 * MIB),
        ("24 GiB", 24 * GIB),
        ("1k", KIB),
        ("1.5g", 3 * GIB // 2),
        ("7", 7),
        ("2 TB", 2048 * GIB),
    ],
)
def test_parse_bytes(text: str, expected: int) -> None:
    """A size is a number and a prefix, with or without i and B."""
    assert expected == parse_bytes(text)


@pytest.mark.parametrize("text", ["", "GiB", "-1", "1 XiB", "1e3", "1.2.3", "0x10", "1 MiB free", "9" * 400])
def test_not_a_size(text: str) -> None:
    """Anything else is an input error, numbers beyond all memory included."""
    with pytest.raises(InputError, match="size"):
        parse_bytes(text)


@given(st.integers(1, 1000), st.sampled_from([("KiB", KIB), ("MiB", MIB), ("GiB", GIB)]))
def test_format_reads_back(n: int, unit: tuple[str, int]) -> None:
    """A whole number of a unit is printed so that it reads back the same."""
    assert n * unit[1] == parse_bytes(format_bytes(n * unit[1]))


@pytest.mark.parametrize(
    ("n_bytes", "expected"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (3 * GIB // 2, "1.5 GiB"), (-MIB, "-1.0 MiB")],
)
def test_format_bytes(n_bytes: int, expected: str) -> None:
    """The largest unit that leaves at least one is used."""
    assert expected == format_bytes(n_bytes)


@given(st.integers(0, 2**50), st.integers(1, 2**20))
def test_pad(value: int, multiple: int) -> None:
    """Padding gives the next multiple: less than one more than the value."""
    padded = pad(value, multiple)
    assert padded % multiple == 0
    assert 0 <= padded - value < multiple


def test_mib() -> None:
    """A MiB is 2^20 bytes."""
    assert mib(3 << 19) == 1.5
