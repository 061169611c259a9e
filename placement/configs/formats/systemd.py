"""A launch → a systemd service unit.

In `ExecStart=` a backslash begins an escape, `%` a specifier and `$` a variable: each is doubled. A word
with spaces, quotes or a separator stands in double quotes (systemd.service(5), systemd.syntax(7)).
"""

from __future__ import annotations

import re

from placement.configs.formats.launch import Launch, check_tokens, comment_lines
from placement.errors import InputError

_BARE = re.compile(r"[^\s\"'\\;]+")


def systemd(launch: Launch) -> str:
    """A unit that runs the server for the machine; `launch.program` must be a full path or on systemd's PATH.

    Raises:
        InputError: an argument holds a control character, or the program's name begins as a prefix would.
    """
    check_tokens("a systemd unit", [launch.name, launch.program, *launch.tokens])
    if launch.program[:1] in "@-:+!|":
        raise InputError("a systemd unit", "must not begin with a prefix of ExecStart=", value=launch.program)
    address = ("--host", launch.host, "--port", str(launch.port))
    words = [_word(token) for token in (launch.program, *launch.tokens, *address)]
    lines = [
        *comment_lines(launch),
        "[Unit]",
        f"Description=llama-server with {launch.name.replace('%', '%%')}",
        "After=network-online.target",
        "Wants=network-online.target",
        "",
        "[Service]",
        f"ExecStart={' '.join(words)}",
        "Restart=on-failure",
        "LimitMEMLOCK=infinity",
        "",
        "[Install]",
        "WantedBy=multi-user.target",
    ]
    return "\n".join([*lines, ""])


def _word(token: str) -> str:
    escaped = token.replace("\\", "\\\\").replace("%", "%%").replace("$", "$$")
    if token and _BARE.fullmatch(token):
        return escaped
    return '"' + escaped.replace('"', '\\"') + '"'
