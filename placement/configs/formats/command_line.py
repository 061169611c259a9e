"""A launch → one POSIX shell line."""

from __future__ import annotations

import shlex

from placement.configs.formats.launch import Launch, check_tokens, comment_lines


def command_line(launch: Launch) -> str:
    """The comments, and the command as a POSIX shell reads it.

    Raises:
        InputError: an argument holds a control character.
    """
    tokens = [launch.program, *launch.tokens]
    check_tokens("a command line", tokens)
    return "\n".join([*comment_lines(launch), shlex.join(tokens), ""])
