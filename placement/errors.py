"""The exceptions that `place` raises on purpose; `cli` alone turns them into a line and an exit code.

PlacementError                1
├── InputError                2   a file, field or argument breaks a rule
└── EngineError               3   the user's llama.cpp
    ├── EngineMissing             none was found
    ├── EngineFailed              it exited non-zero or was killed
    ├── EngineTimeout             it did not answer in time
    └── EngineOutputError         it answered something that cannot be read
"""

from __future__ import annotations


class PlacementError(Exception):
    """Base of every error meant for the user; its text is one line."""

    exit_code = 1


class InputError(PlacementError):
    """Input that breaks a rule: says which file (or option), field, value and rule."""

    exit_code = 2

    def __init__(self, where: object, rule: str, *, field: str | None = None, value: object = None) -> None:
        self.where, self.field, self.value, self.rule = str(where), field, value, rule
        parts = [self.where]
        if field is not None:
            parts.append(field if value is None else f"{field} = {value!r}")
        elif value is not None:
            parts.append(repr(value))
        super().__init__(" ".join(": ".join([*parts, rule]).splitlines()))


class EngineError(PlacementError):
    """Something about the user's llama.cpp."""

    exit_code = 3


class EngineMissing(EngineError):
    """No llama.cpp binary was found, or the one named does not exist or cannot run."""


class EngineFailed(EngineError):
    """The engine exited non-zero, aborted, or refused an argument."""


class EngineTimeout(EngineError):
    """The engine did not finish in the time allowed and was stopped."""


class EngineOutputError(EngineError):
    """The engine finished, but what it printed cannot be read."""
