"""`Launch`: one model's selected arguments with what a consumer of them also needs."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from placement.configs.models_conf.models_conf import Word
from placement.configs.models_conf.options import parts_of
from placement.errors import InputError

_CONTROL = re.compile(r"[\x00-\x1f\x7f]")


@dataclass(frozen=True, slots=True)
class Launch:
    """A server to start: `args` place the model, `extra_args` are the profile's own (sampler, `--jinja`).

    `comments` are written where the format has comments. `host` and `port` are for the formats that own them.
    """

    name: str
    model_path: str
    args: tuple[str, ...]
    extra_args: tuple[str, ...] = ()
    program: str = "llama-server"
    comments: tuple[str, ...] = ()
    host: str = "127.0.0.1"
    port: int = 8080

    @property
    def tokens(self) -> tuple[str, ...]:
        """All that follows the program."""
        return ("-m", self.model_path, *self.args, *self.extra_args)


def check_tokens(where: str, tokens: Iterable[str], refused: str = "") -> None:
    """Refuse tokens with control characters, or with one of the characters that the format cannot say.

    Raises:
        InputError: a token has one.
    """
    for token in tokens:
        if _CONTROL.search(token):
            raise InputError(where, "cannot hold a control character", value=token)
        for char in refused:
            if char in token:
                raise InputError(where, f"cannot write {char!r} in a value", value=token)


def comment_lines(launch: Launch, mark: str = "# ") -> list[str]:
    """The comments, a line each."""
    return [f"{mark}{line}".rstrip() for text in launch.comments for line in text.splitlines()]


def options_of(tokens: Iterable[str]) -> list[tuple[str, list[str]]]:
    """Each option with the values that follow it."""
    parts = parts_of([Word(token, token) for token in tokens])
    return [(part.values[0], list(part.values[1:])) for part in parts]
