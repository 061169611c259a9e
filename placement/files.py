"""Where files are looked for and how they are written: atomically, with a backup beside what they replace."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from placement.errors import InputError

PLACE_VERSION = "0.1.0"  # of `place`, as pyproject.toml has it; written into what is written
PACKAGE_DATA = Path(__file__).resolve().parent / "inputs" / "data"


def user_config_folder() -> Path:
    """The user's configuration folder for `place`; it may not exist."""
    from platformdirs import user_config_path

    return user_config_path("place")


def search_folders(kind: str) -> list[Path]:
    """Existing folders for "models" or "machines", nearest first: ./KIND, the user's, what is shipped."""
    folders = [Path(kind), user_config_folder() / kind, PACKAGE_DATA / kind]
    if not (PACKAGE_DATA / kind).is_dir():
        folders.append(PACKAGE_DATA.parent.parent.parent / kind)
    return [folder for folder in folders if folder.is_dir()]


def write_atomically(path: Path, data: str | bytes) -> None:
    """Replace the file in one step, or leave it as it was; an older version stays as NAME.bak.

    Raises:
        InputError: the folder cannot be written.
    """
    payload = data.encode() if isinstance(data, str) else data
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(payload)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, _mode(path))
            if path.exists():
                shutil.copy2(path, path.with_name(path.name + ".bak"))
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise
    except OSError as exc:
        raise InputError(path, f"cannot be written: {exc.strerror}") from exc


def _mode(path: Path) -> int:
    """The permissions of the file that is replaced, or those of a new file under this umask."""
    try:
        return path.stat().st_mode & 0o7777
    except FileNotFoundError:
        mask = os.umask(0)
        os.umask(mask)
        return 0o666 & ~mask
