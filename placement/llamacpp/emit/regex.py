"""Tensor-name regexes read and written: the engine's ECMAScript into Python's, and tensor sets into patterns.

Patterns made here contain no comma and no "=", because the engine splits `-ot` at them.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Collection, Iterable, Sequence

from placement.errors import InputError

MAX_PATTERN_CHARS = 4096
_INDEXED = re.compile(r"(.*?blk\.)(\d+)\.(.*)")
_CLASSES = {
    "alpha": "a-zA-Z",
    "digit": "0-9",
    "d": "0-9",
    "alnum": "a-zA-Z0-9",
    "w": "a-zA-Z0-9_",
    "upper": "A-Z",
    "lower": "a-z",
    "xdigit": "0-9A-Fa-f",
    "space": r"\s",
    "s": r"\s",
    "blank": r" \t",
    "punct": r"!-/:-@\[-`{-~",
    "cntrl": r"\x00-\x1f\x7f",
    "graph": "!-~",
    "print": " -~",
}
_REPEAT = re.compile(r"(?:[*+?]|\{\d+(?:,\d*)?\})\??")
_SAME_ESCAPES = frozenset("dDsSwWbBfnrtv0123456789xu")


@functools.lru_cache(maxsize=4096)
def compile_pattern(pattern: str) -> re.Pattern[str]:
    """Compile a pattern of `std::regex` (ECMAScript) for the same matches on tensor names with `search`.

    Raises:
        InputError: the engine could not compile it.
    """
    try:
        return re.compile(_to_python(pattern), re.ASCII)
    except (re.error, OverflowError) as error:
        raise InputError(
            "-ot", f"must be an ECMAScript regular expression ({error})", value=pattern
        ) from error


def _to_python(pattern: str) -> str:
    """Python's spelling; a repeat of a repeat, which Python refuses or reads otherwise, is wrapped."""
    out: list[str] = []
    opened: list[int] = []  # where in `out` each open group begins
    atom = 0  # where the last atom begins
    at, is_repeated = 0, False
    while at < len(pattern):
        char = pattern[at]
        repeat = _REPEAT.match(pattern, at)
        if repeat:
            if is_repeated:
                out[atom:] = [f"(?:{''.join(out[atom:])})"]
            out.append(repeat.group())
            at, is_repeated = repeat.end(), True
            continue
        is_repeated = False
        if char != ")":
            atom = len(out)
        text, at = _piece(pattern, at)
        if char == "(":
            opened.append(len(out))
        elif char == ")" and opened:
            atom = opened.pop()
        out.append(text)
    return "".join(out)


def _piece(pattern: str, at: int) -> tuple[str, int]:
    """The piece at `at` that is no repeat, and where the next begins."""
    char = pattern[at]
    if char == "\\":
        return _escape(pattern, at)
    if char == "[":
        return _bracket(pattern, at)
    if char == "(" and re.match(r"\(\?[^:=!]", pattern[at:]):
        raise re.error("only (?:, (?= and (?! begin with a question mark", pattern, at)
    if char == "{":
        raise re.error("a brace must be a count such as {2}", pattern, at)
    width = 3 if re.match(r"\(\?[:=!]", pattern[at:]) else 1
    return pattern[at : at + width], at + width


def _escape(pattern: str, at: int) -> tuple[str, int]:
    """The escape at `at`; letters without a meaning in ECMAScript stand for themselves."""
    char = pattern[at + 1 : at + 2]
    if not char:
        raise re.error("a backslash must be followed by a character", pattern, at)
    if char == "c" and at + 2 < len(pattern):
        return re.escape(chr(ord(pattern[at + 2]) % 32)), at + 3
    if char.isalnum() and char not in _SAME_ESCAPES:
        return char, at + 2
    return "\\" + char, at + 2


def _bracket(pattern: str, at: int) -> tuple[str, int]:
    """The bracket expression at `at`, POSIX classes spelled out, with every character taken literally."""
    at += 1
    negated = pattern.startswith("^", at)
    at += negated
    out: list[str] = []
    while not pattern.startswith("]", at):
        if at >= len(pattern):
            raise re.error("a bracket must be closed", pattern, at)
        posix = re.match(r"\[:(\w+):\]", pattern[at:])
        if posix:
            if posix.group(1) not in _CLASSES:
                raise re.error(f"[:{posix.group(1)}:] is not a character class", pattern, at)
            text, at = _CLASSES[posix.group(1)], at + posix.end()
        elif pattern[at] == "\\":
            text, at = _escape(pattern, at)
        else:
            text, at = ("\\" if pattern[at] in "[&~|^" else "") + pattern[at], at + 1
        out.append(text)
    if not out:
        return (r"[\s\S]" if negated else "(?!)"), at + 1
    return f"[{'^' if negated else ''}{''.join(out).replace('--', '-' + chr(92) + '-')}]", at + 1


def layer_ranges(layers: Collection[int]) -> str:
    """A pattern for exactly these numbers, written in decimal: {18..34} is "(1[8-9]|2[0-9]|3[0-4])".

    Raises:
        ValueError: there are none, or one is negative.
    """
    if not layers or min(layers) < 0:
        raise ValueError("layers must be a set of numbers from 0")
    by_length: dict[int, set[str]] = {}
    for layer in layers:
        by_length.setdefault(len(str(layer)), set()).add(str(layer))
    return _group([part for length in sorted(by_length) for part in _digits(by_length[length])])


def _group(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"({'|'.join(parts)})"


def _digits(words: Collection[str]) -> list[str]:
    """Alternatives for words of one length: first digits that allow the same rest share a class."""
    if words == {""}:
        return [""]
    rests: dict[str, set[str]] = {}
    for word in words:
        rests.setdefault(word[0], set()).add(word[1:])
    by_rest: dict[frozenset[str], list[str]] = {}
    for first in sorted(rests):
        by_rest.setdefault(frozenset(rests[first]), []).append(first)
    return [_digit_class(firsts) + _group(_digits(rest)) for rest, firsts in by_rest.items()]


def _digit_class(digits: Sequence[str]) -> str:
    if len(digits) == 1:
        return digits[0]
    text = ""
    start = previous = digits[0]
    for digit in [*digits[1:], ""]:
        if digit and int(digit) == int(previous) + 1:
            previous = digit
            continue
        text += start if start == previous else f"{start}-{previous}"
        start = previous = digit
    return f"[{text}]"


def patterns_for(meant: Collection[str], names: Iterable[str]) -> list[str]:
    """Few compact patterns that together match exactly `meant` among `names`.

    Suffixes whose layers can be written as one set share a pattern; each is tried against every name.

    Raises:
        ValueError: no pattern could be built (two names differ only where the engine's syntax cannot say).
    """
    everything = list(names)
    wanted = set(meant)
    stacks: dict[str, dict[str, set[int]]] = {}
    plain: list[str] = []
    for name in (name for name in everything if name in wanted):
        match = _INDEXED.fullmatch(name)
        if match is None:
            plain.append(name)
        else:
            stacks.setdefault(match.group(1), {}).setdefault(match.group(3), set()).add(int(match.group(2)))
    patterns = [_exact([f"^{_words(plain)}"], set(plain), everything)] if plain else []
    for prefix, stack in stacks.items():
        patterns += _stack_patterns(prefix, stack, everything)
    return patterns


def _stack_patterns(prefix: str, stack: dict[str, set[int]], names: list[str]) -> list[str]:
    existing: dict[str, set[int]] = {}
    for match in filter(None, map(_INDEXED.fullmatch, names)):
        if match.group(1) == prefix:
            existing.setdefault(match.group(3), set()).add(int(match.group(2)))
    groups: list[tuple[list[str], set[int]]] = []
    for suffix, layers in stack.items():
        for i, (suffixes, shared) in enumerate(groups):
            union = shared | layers
            if all(union & existing[s] == stack[s] for s in [*suffixes, suffix]):
                groups[i] = ([*suffixes, suffix], union)
                break
        else:
            groups.append(([suffix], layers))
    patterns = []
    for suffixes, layers in groups:
        head = f"^{_literal(prefix)}{layer_ranges(layers)}\\."
        wanted = {f"{prefix}{layer}.{suffix}" for suffix in suffixes for layer in stack[suffix]}
        patterns.append(_exact([head, head + _words(suffixes)], wanted, names))
    return patterns


def _exact(candidates: Iterable[str], wanted: set[str], names: list[str]) -> str:
    """The first candidate, or candidate ending in "$", that matches exactly the names wanted."""
    for candidate in candidates:
        for pattern in (candidate, candidate + "$"):
            search = compile_pattern(pattern).search
            if len(pattern) < MAX_PATTERN_CHARS and {name for name in names if search(name)} == wanted:
                return pattern
    raise ValueError(f"no pattern matches exactly {sorted(wanted)[:3]}")


def _literal(text: str) -> str:
    """The text, special characters escaped; "," and "=", which end a pattern, become any character."""
    return re.sub("[,=]", ".", re.sub(r"[.^$*+?()\[\]{}|\\]", r"\\\g<0>", text))


def _words(words: Sequence[str]) -> str:
    """Alternatives for dotted names: stems times endings where that is all of them."""
    by_ending: dict[str, list[str]] = {}
    for word in words:
        stem, dot, ending = word.rpartition(".")
        by_ending.setdefault(dot + ending, []).append(stem)
    shared: dict[frozenset[str], list[str]] = {}
    for ending, stems in by_ending.items():
        shared.setdefault(frozenset(stems), []).append(ending)
    parts = []
    for endings in shared.values():
        tails = [_literal(ending.removeprefix(".")) for ending in endings]
        dot = r"\." if all(ending.startswith(".") for ending in endings) else ""
        parts.append(_stems(by_ending[endings[0]]) + dot + _group(tails))
    return _group(parts)


def _stems(stems: Sequence[str]) -> str:
    """Alternatives for stems, common words at their two ends written once: "ffn_(up|gate)_exps"."""
    split = [stem.split("_") for stem in stems]
    n_head = n_tail = 0
    shortest = min(map(len, split))
    while n_head < shortest - 1 and len({words[n_head] for words in split}) == 1:
        n_head += 1
    while n_tail < shortest - n_head - 1 and len({words[-1 - n_tail] for words in split}) == 1:
        n_tail += 1
    if len(stems) == 1:
        return _literal(stems[0])
    head = "".join(f"{word}_" for word in split[0][:n_head])
    tail = "".join(f"_{word}" for word in split[0][len(split[0]) - n_tail :])
    middles = ["_".join(words[n_head : len(words) - n_tail]) for words in split]
    return _literal(head) + _group([_literal(middle) for middle in middles]) + _literal(tail)
