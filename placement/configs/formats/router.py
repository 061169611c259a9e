"""Launches → the preset file of llama-server's router mode (`--models-preset`, common/preset.cpp).

A value is taken as it stands: no quotes, no escapes, so a regular expression's backslashes stay single. It
ends at a `#` or `;`, which therefore cannot be said. A key is an option without its dashes; each stands once.
"""

from __future__ import annotations

from collections.abc import Sequence

from placement.configs.formats.launch import Launch, check_tokens, comment_lines, options_of
from placement.errors import InputError

_WHERE = "a llama-server preset"
_JOINED = ("ot", "override-tensor")
_CONTROLLED = ("host", "port", "api-key", "alias", "a", "hf-repo")  # the router sets these itself


def router_ini(launches: Sequence[Launch]) -> str:
    """The preset file's text, a section a launch.

    Raises:
        InputError: a name, option or value that the format cannot hold; two launches of one name.
    """
    names = [launch.name for launch in launches]
    for name in names:
        if names.count(name) > 1:
            raise InputError(_WHERE, "must name each model once", value=name)
        if not name.strip() or name != name.strip() or "]" in name or name in ("*", "default"):
            raise InputError(_WHERE, "must have a model name without ] or spaces around", value=name)
    check_tokens(_WHERE, names)
    lines = ["version = 1"]
    for launch in launches:
        lines += ["", *comment_lines(launch, "; "), f"[{launch.name}]", *_pairs(launch)]
    return "\n".join([*lines, ""])


def _pairs(launch: Launch) -> list[str]:
    check_tokens(_WHERE, launch.tokens, "#;")
    values: dict[str, str] = {"model": launch.model_path}
    for option, words in options_of((*launch.args, *launch.extra_args)):
        key = option.lstrip("-")
        if not option.startswith("-") or not key:
            raise InputError(_WHERE, "must have options only", value=option)
        if len(words) > 1:
            raise InputError(_WHERE, f"takes one value for {option}", value=" ".join(words))
        value = words[0] if words else "true"
        if value != value.strip() or not value:
            raise InputError(_WHERE, f"cannot hold a value with spaces around for {option}", value=value)
        if key in _CONTROLLED:
            raise InputError(_WHERE, f"leaves {option} to the router", value=value)
        if key in values and key not in _JOINED:
            raise InputError(_WHERE, f"takes {option} once", value=value)
        values[key] = f"{values[key]},{value}" if key in values else value
    return [f"{key} = {value}" for key, value in values.items()]
