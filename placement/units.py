"""Bytes and MiB; the only module that multiplies by 1024."""

from __future__ import annotations

import re

from placement.errors import InputError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]i?b?|b)?\s*", re.IGNORECASE)
_MOST = 1e15
_FACTORS = {"": 1, "b": 1, "k": KIB, "m": MIB, "g": GIB, "t": 1024 * GIB}


def parse_bytes(text: str) -> int:
    """Bytes in "512MiB", "24 GiB", "1k" or a plain number; decimal and binary prefixes mean the same.

    Raises:
        InputError: the text is not a size.
    """
    match = _SIZE.fullmatch(text)
    if match is None:
        raise InputError("size", "must be a number with an optional KiB, MiB, GiB or TiB", value=text)
    unit, number = (match.group(2) or "").lower(), float(match.group(1))
    if number > _MOST:
        raise InputError("size", f"must be at most {_MOST:g}", value=text)
    return round(number * _FACTORS[unit[:1]])


def format_bytes(n_bytes: float) -> str:
    """ "1.5 GiB", "12 MiB": the largest unit that leaves a number of at least one."""
    for name, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(n_bytes) >= factor:
            return f"{n_bytes / factor:.1f} {name}"
    return f"{n_bytes:.0f} B"


def mib(n_bytes: float) -> float:
    """Bytes as MiB."""
    return n_bytes / MIB


def pad(value: int, multiple: int) -> int:
    """The smallest multiple of `multiple` that is at least `value` (llama.cpp's GGML_PAD)."""
    return -(-value // multiple) * multiple
