"""Which words of an argument list are about placement, and old arguments + chosen ones → new arguments.

The others keep their order and spelling; a placement option that stays keeps its place and the name it was
written with; what the choice adds follows at the end; what it does not have goes.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from placement.profiles.models_conf import Word, quoted

_NUMBER = re.compile(r"[+-]?(\d|\.\d)")
_FLASH = ("on", "enabled", "true", "1", "off", "disabled", "false", "0", "auto", "-1")

# The name that the choice is written with, and every name of the same option (common/arg.cpp).
VALUED = {
    "-ngl": ("-ngl", "--gpu-layers", "--n-gpu-layers"),
    "-ts": ("-ts", "--tensor-split"),
    "-sm": ("-sm", "--split-mode"),
    "-mg": ("-mg", "--main-gpu"),
    "-dev": ("-dev", "--device"),
    "--rpc": ("--rpc",),
    "-ot": ("-ot", "--override-tensor"),
    "-ncmoe": ("-ncmoe", "--n-cpu-moe"),
    "-ncffn": ("-ncffn", "--n-cpu-ffn"),
    "-c": ("-c", "--ctx-size"),
    "--kv-unified-per-slot": ("--kv-unified-per-slot",),
    "-b": ("-b", "--batch-size"),
    "-ub": ("-ub", "--ubatch-size"),
    "-np": ("-np", "--parallel"),
    "-ctk": ("-ctk", "--cache-type-k"),
    "-ctv": ("-ctv", "--cache-type-v"),
    "-fa": ("-fa", "--flash-attn"),
    "-lm": ("-lm", "--load-mode"),
    "-t": ("-t", "--threads"),
    "-fit": ("-fit", "--fit"),
    "-fitt": ("-fitt", "--fit-target"),
    "-fitc": ("-fitc", "--fit-ctx"),
}
FLAGS = {
    "-cmoe": ("-cmoe", "--cpu-moe"),
    "-kvo": ("-kvo", "--kv-offload", "-nkvo", "--no-kv-offload"),
    "-kvu": ("-kvu", "--kv-unified", "-no-kvu", "--no-kv-unified"),
    "--swa-full": ("--swa-full",),
    "--op-offload": ("--op-offload", "--no-op-offload"),
    "-lm": ("--mmap", "--no-mmap", "--mlock", "-dio", "--direct-io"),  # of older builds
}
KEPT_UNLESS_CHOSEN = ("-t",)  # threads are not placement, but an assignment may fix them
_BY_NAME = {name: (option, True) for option, names in VALUED.items() for name in names} | {
    name: (option, False) for option, names in FLAGS.items() for name in names
}


@dataclass(frozen=True, slots=True)
class Part:
    """An option with its values; `option` is its canonical name, None where it is not about placement."""

    words: tuple[Word, ...]
    option: str | None

    @property
    def values(self) -> tuple[str, ...]:
        """The words as the engine gets them."""
        return tuple(word.value for word in self.words)


def parts_of(given: Sequence[Word]) -> list[Part]:
    """The options in a list of words, each with the values that follow it."""
    parts, at = [], 0
    while at < len(given):
        name = given[at].value
        option, is_valued = _BY_NAME.get(
            name.replace("_", "-") if name.startswith("--") else name, (None, False)
        )
        end = at + 1
        if option == "-fa" and is_valued:
            end += end < len(given) and given[end].value in _FLASH
        elif option is not None:
            end += is_valued and end < len(given)
        else:
            while end < len(given) and not _is_option(given[end].value):
                end += 1
        parts.append(Part(tuple(given[at:end]), option))
        at = end
    return parts


def plain_words(tokens: Iterable[str]) -> list[Word]:
    """Words of tokens, quoted where they must be.

    Raises:
        InputError: a token that no quoting can say.
    """
    return [Word(quoted(token), token) for token in tokens]


def by_option(tokens: Sequence[str]) -> dict[str, Part]:
    """The options of chosen arguments by canonical name."""
    return {part.option or part.values[0]: part for part in parts_of(plain_words(tokens))}


def merged(old: Sequence[Word], chosen: dict[str, Part], elsewhere: Iterable[str]) -> list[Word]:
    """The old words with their placement replaced by the chosen; options in `elsewhere` are said by keys."""
    left = {option: part for option, part in chosen.items() if option not in set(elsewhere)}
    out: list[Word] = []
    for part in parts_of(old):
        if part.option is None or (part.option in KEPT_UNLESS_CHOSEN and part.option not in chosen):
            out += part.words
        elif part.option in left:
            out += _renewed(part, left.pop(part.option))
    for part in left.values():
        out += part.words
    return out


def _renewed(old: Part, new: Part) -> tuple[Word, ...]:
    """The new option under its old name; the old words where they say the same."""
    if old.values[1:] == new.values[1:] and len(new.words) > 1:
        return old.words
    return (old.words[0], *new.words[1:]) if len(old.words) == len(new.words) == 2 else new.words


def _is_option(word: str) -> bool:
    return word.startswith("-") and len(word) > 1 and not _NUMBER.match(word)
