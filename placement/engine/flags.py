"""Which flags a llama.cpp program has, from its own help, and today's spelling of arguments turned into its.

Nothing is decided by version numbers: builds are patched and forked.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

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
_LOAD_MODES = {
    "none": ("--no-mmap",),
    "mlock": ("--mlock",),
    "mmap+mlock": ("--mlock",),
    "auto": (),
    "mmap": (),
}


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
            if (
                flag in ("-fa", "--flash-attn")
                and flag in self.bare
                and rest
                and rest[0] in ("on", "off", "auto")
            ):
                spelt += [flag] if rest.pop(0) == "on" else []
            elif flag in ("-lm", "--load-mode") and flag not in self and rest and rest[0] in _LOAD_MODES:
                spelt += _LOAD_MODES[rest.pop(0)]
            elif flag in ("-fit", "--fit") and flag not in self and rest and rest[0] in ("on", "off"):
                rest.pop(0)  # a build that cannot fit does not
            elif flag in ("--mmap", "--no-mmap", "--mlock") and flag not in self and "-lm" in self:
                spelt += ["-lm", {"--mmap": "mmap", "--no-mmap": "none", "--mlock": "mlock"}[flag]]
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
        found = _FLAG.findall(re.sub(r"[<{\[(].*", "", head))
        names.update(found)
        if found and re.fullmatch(r"(?:--?[\w-]+(?:,\s*|\s+)?)+", head):
            bare.update(found)
    return Flags(frozenset(names), frozenset(bare))
