"""Keeps what a failed engine printed in a file, and says which; the newest files stay, old ones go."""

from __future__ import annotations

import contextlib
import os
import shlex
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

_N_FILES = 50
_KEPT_BYTES = 256 * 1024


def records_folder() -> Path:
    """Return the folder of the records, in the user's cache directory."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("place")) / "engine-failures"


def keep_record(arguments: Sequence[str], text: str, reason: str) -> str:
    """Write the command, the reason and the end of `text`; return "; its last lines are in FILE", or ""."""
    folder = records_folder()
    body = f"$ {shlex.join(arguments)}\n# {reason}\n{text[-_KEPT_BYTES:]}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stamp = time.strftime("%Y%m%d-%H%M%S")
        handle, name = tempfile.mkstemp(
            prefix=f"{stamp}-{Path(arguments[0]).name}-", suffix=".log", dir=folder
        )
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(body)
    except OSError:
        return ""  # a full or read-only disk must not hide the engine's own error
    with contextlib.suppress(OSError):
        for old in sorted(folder.glob("*.log"))[:-_N_FILES]:
            old.unlink(missing_ok=True)
    return f"; its last lines are in {name}"
