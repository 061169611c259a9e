"""Which words of an argument list are about placement, and old arguments + selected ones → new arguments.

The others keep their order and spelling; a placement option that stays keeps its place and the name it was
written with; what the choice adds follows at the end; what it does not have goes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from placement.configs.models_conf.models_conf import Word, quoted
from placement.inputs.engine_options import (
    FLASH_WORDS,
    OLDER_LOAD_FLAGS,
    OPTION_BY_NAME,
    is_option,
    option_name,
)

KEPT_UNLESS_PICKED = ("-t",)  # threads are not placement, but an assignment may fix them


def placement_option(word: str) -> tuple[str | None, bool]:
    """(canonical name of the option that a choice may replace, whether a value follows it); None for others."""
    name = option_name(word)
    if name in OLDER_LOAD_FLAGS:
        return "-lm", False
    option = OPTION_BY_NAME.get(name)
    if option is None or not (option.is_placement or option.name in KEPT_UNLESS_PICKED):
        return None, False
    return option.name, option.has_value


@dataclass(frozen=True, slots=True)
class OptionPart:
    """An option with its values; `option` is its canonical name, None where it is not about placement."""

    words: tuple[Word, ...]
    option: str | None

    @property
    def values(self) -> tuple[str, ...]:
        """The words as the engine gets them."""
        return tuple(word.value for word in self.words)


def parts_of(given: Sequence[Word]) -> list[OptionPart]:
    """The options in a list of words, each with the values that follow it."""
    parts, at = [], 0
    while at < len(given):
        option, is_valued = placement_option(given[at].value)
        end = at + 1
        if option == "-fa" and is_valued:
            end += end < len(given) and given[end].value in FLASH_WORDS
        elif option is not None:
            end += is_valued and end < len(given)
        else:
            while end < len(given) and not is_option(given[end].value):
                end += 1
        parts.append(OptionPart(tuple(given[at:end]), option))
        at = end
    return parts


def plain_words(tokens: Iterable[str]) -> list[Word]:
    """Words of tokens, quoted where they must be.

    Raises:
        InputError: a token that no quoting can say.
    """
    return [Word(quoted(token), token) for token in tokens]


def by_option(tokens: Sequence[str]) -> dict[str, OptionPart]:
    """The options of selected arguments by canonical name."""
    return {part.option or part.values[0]: part for part in parts_of(plain_words(tokens))}


def merged(old: Sequence[Word], picked: dict[str, OptionPart], elsewhere: Iterable[str]) -> list[Word]:
    """The old words with their placement replaced by the choice's; options in `elsewhere` are said by keys."""
    left = {option: part for option, part in picked.items() if option not in set(elsewhere)}
    out: list[Word] = []
    for part in parts_of(old):
        if part.option is None or (part.option in KEPT_UNLESS_PICKED and part.option not in picked):
            out += part.words
        elif part.option in left:
            out += _renewed(part, left.pop(part.option))
    for part in left.values():
        out += part.words
    return out


def _renewed(old: OptionPart, new: OptionPart) -> tuple[Word, ...]:
    """The new option under its old name; the old words where they say the same."""
    if old.values[1:] == new.values[1:] and len(new.words) > 1:
        return old.words
    return (old.words[0], *new.words[1:]) if len(old.words) == len(new.words) == 2 else new.words
