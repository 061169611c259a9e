"""Which flags a llama.cpp program has, from its own help, and today's spelling of arguments turned into its.

Nothing is decided by version numbers: builds are patched and forked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from placement.inputs.engine_options import (
    FALSE_WORDS,
    FLASH_WORDS,
    LOAD_MODE_AS_OLDER_FLAGS,
    OLDER_LOAD_FLAGS,
    TRUE_WORDS,
    names_of,
)

# Flags that planning and running use, with the oldest other spelling that does the same.
WANTED = {
    "llama-fit-params": (("-fitp",), ("-lv",), ("--log-jsonl",), ("-ot",), ("-ncmoe",), ("-lm",), ("--rpc",)),
    "llama-server": (
        ("-fit",),
        ("-fitt",),
        ("-lv",),
        ("--log-jsonl",),
        ("-ot",),
        ("-ncmoe",),
        ("-lm",),
        ("--rpc",),
    ),
}
_FLAG = re.compile(r"(?<![\w-])--?[A-Za-z][\w-]*")


@dataclass(frozen=True, slots=True)
class Flags:
    """The flags in a program's help, and those of them that take no value."""

    names: frozenset[str]
    bare: frozenset[str] = frozenset()

    def __contains__(self, name: str) -> bool:
        return name in self.names

    def spell(self, arguments: Sequence[str]) -> tuple[str, ...]:
        """Return the arguments as this program spells them; what it cannot know is left for it to refuse."""
        spelt: list[str] = []
        rest = list(arguments)
        while rest:
            flag = rest.pop(0)
            value = rest[0] if rest else ""
            if flag in names_of("-fa") and flag in self.bare and value in FLASH_WORDS:
                spelt += [flag] if rest.pop(0) in TRUE_WORDS else []
            elif flag in names_of("-lm") and flag not in self and value in LOAD_MODE_AS_OLDER_FLAGS:
                spelt += LOAD_MODE_AS_OLDER_FLAGS[rest.pop(0)]
            elif flag in names_of("-fit") and flag not in self and value in TRUE_WORDS + FALSE_WORDS:
                rest.pop(0)  # a build that cannot fit does not
            elif flag in OLDER_LOAD_FLAGS and flag not in self and "-lm" in self:
                # every build with -lm takes "mlock", not every one "mmap+mlock"
                spelt += ["-lm", OLDER_LOAD_FLAGS[flag].removeprefix("mmap+")]
            else:
                spelt.append(flag)
        return tuple(spelt)


def read_flags(help_text: str) -> Flags:
    """Read every option line of a help text; descriptions may name other flags and are left out."""
    names: set[str] = set()
    bare: set[str] = set()
    for line in help_text.splitlines():
        head = line.strip()
        if not head.startswith("-"):
            continue
        head = re.split(r"\s{2,}(?=[^-\s])|\s{2,}(?=- )|\t", head)[0]
        result = _FLAG.findall(re.sub(r"[<{\[(].*", "", head))
        names.update(result)
        if result and re.fullmatch(r"(?:--?[\w-]+(?:,\s*|\s+)?)+", head):
            bare.update(result)
    return Flags(frozenset(names), frozenset(bare))
