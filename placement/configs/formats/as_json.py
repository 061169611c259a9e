"""Launches → plain JSON, for whatever reads none of the other formats."""

from __future__ import annotations

import json
from collections.abc import Sequence

from placement.configs.formats.launch import Launch


def as_json(launches: Sequence[Launch]) -> str:
    """A list of objects with name, program, model, args, extra_args and the whole command as a list."""
    rows = [
        {
            "name": launch.name,
            "program": launch.program,
            "model": launch.model_path,
            "args": list(launch.args),
            "extra_args": list(launch.extra_args),
            "command": [launch.program, *launch.tokens],
            "comments": list(launch.comments),
        }
        for launch in launches
    ]
    return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
