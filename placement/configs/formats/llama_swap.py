"""Launches → a llama-swap configuration.

llama-swap reads `cmd` as a shell would and expands `${NAME}` in it, `${PORT}` being its own. A single-quoted
YAML scalar says all that once its quotes are doubled.
"""

from __future__ import annotations

import shlex
from collections.abc import Sequence

from placement.configs.formats.launch import Launch, check_tokens, comment_lines
from placement.configs.formats.yaml import yaml_text
from placement.errors import InputError

_WHERE = "a llama-swap configuration"


def llama_swap(launches: Sequence[Launch]) -> str:
    """The configuration's `models:`, a model a launch.

    Raises:
        InputError: an argument that llama-swap would expand, or a control character.
    """
    lines = ["models:"]
    for launch in launches:
        check_tokens(_WHERE, [launch.name, *launch.tokens])
        for token in launch.tokens:
            if "${" in token:
                raise InputError(_WHERE, "would be expanded by llama-swap", value=token)
        command = shlex.join([launch.program, *launch.tokens]) + " --port ${PORT}"
        lines += [*(f"  {line}" for line in comment_lines(launch)), f"  {yaml_text(launch.name)}:"]
        lines.append(f"    cmd: {yaml_text(command)}")
    return "\n".join([*lines, ""])
