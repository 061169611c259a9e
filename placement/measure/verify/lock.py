"""One verify per machine: a lock that dies with its holder, and a reaper for servers that outlived theirs."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import signal
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from placement.errors import PlacementError

_ALIAS = re.compile(r"place-[0-9a-f]{12}")
_REAP_S = 5.0


class MachineBusy(PlacementError):
    """Another verify runs on this machine; its measurements would spoil both."""


def default_lock_path() -> Path:
    """Return the lock's path: one for all users of this machine."""
    return Path(tempfile.gettempdir()) / "place-verify.lock"


class MachineLock:
    """A held lock; its file says who holds it and which servers it has started."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self._state: dict[str, Any] = {"pid": os.getpid(), "since": time.time(), "servers": []}
        self._save()

    def note_server(self, pid: int) -> None:
        """Write down a server that has started, for the reaper."""
        born = _born(pid)
        if born is not None and [pid, born] not in self._state["servers"]:
            self._state["servers"].append([pid, born])
            self._save()

    def _save(self) -> None:
        data = json.dumps(self._state).encode()
        os.pwrite(self._handle, data, 0)
        os.ftruncate(self._handle, len(data))

    def clear(self) -> None:
        """Leave nothing behind for the next holder."""
        os.ftruncate(self._handle, 0)


@contextlib.contextmanager
def machine_lock(path: Path | None = None) -> Iterator[tuple[MachineLock, int]]:
    """Hold the machine while the context lasts; yields the lock and how many orphaned servers were ended.

    The kernel frees the lock when its holder dies, however it dies; then the servers it left are ended here.

    Raises:
        MachineBusy: another process holds it.
    """
    handle = _open(path or default_lock_path())
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = _state(handle).get("pid")
            who = f" (process {holder})" if holder else ""
            raise MachineBusy(f"another place verify runs on this machine{who}; one at a time") from None
        n_reaped = reap(_state(handle).get("servers") or [])
        lock = MachineLock(handle)
        try:
            yield lock, n_reaped
        finally:
            lock.clear()
    finally:
        os.close(handle)


def require_free(path: Path | None = None) -> int:
    """Refuse at once what would have to wait for the lock; return how many orphaned servers were ended.

    Raises:
        MachineBusy: another process holds it.
    """
    with machine_lock(path) as (_, n_reaped):
        return n_reaped


def _open(path: Path) -> int:
    flags = os.O_RDWR | os.O_CLOEXEC
    try:
        return os.open(path, flags)  # not O_CREAT: /tmp refuses that for another user's file
    except FileNotFoundError:
        pass
    except PermissionError as error:
        raise MachineBusy(f"the lock {path} belongs to another user and cannot be opened") from error
    handle = os.open(path, flags | os.O_CREAT, 0o666)
    with contextlib.suppress(OSError):
        os.fchmod(handle, 0o666)
    return handle


def _state(handle: int) -> dict[str, Any]:
    try:
        result = json.loads(os.pread(handle, 1 << 16, 0) or b"{}")
    except ValueError:
        return {}  # the holder was killed while writing it
    return result if isinstance(result, dict) else {}


def reap(servers: list[list[float]]) -> int:
    """End the servers (pid and birth) that still run, and those of ours whose place has died; count them."""
    import psutil

    orphans = {int(pid) for pid, born in servers if _born(int(pid)) == born}
    for process in psutil.process_iter(["pid", "ppid", "cmdline"]):
        words = process.info["cmdline"] or []
        if process.info["ppid"] == 1 and os.getpid() != 1 and any(_ALIAS.fullmatch(word) for word in words):
            orphans.add(process.info["pid"])
    return sum(_end(pid) for pid in orphans)


def _end(pid: int) -> bool:
    """Kill a server and its group, and wait until it is gone; whether it was ours to kill."""
    import psutil

    try:
        process = psutil.Process(pid)
        if os.getpgid(pid) == pid:
            os.killpg(pid, signal.SIGKILL)
        else:
            process.kill()
        process.wait(_REAP_S)
    except (psutil.NoSuchProcess, ProcessLookupError, psutil.TimeoutExpired):
        return True
    except (psutil.AccessDenied, PermissionError):
        return False  # another user's
    return True


def _born(pid: int) -> float | None:
    """When a process was started; None if there is none (a zombie is none)."""
    import psutil

    try:
        process = psutil.Process(pid)
        if process.status() == psutil.STATUS_ZOMBIE:
            return None
        return float(process.create_time())
    except psutil.Error:
        return None
