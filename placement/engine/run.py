"""Runs a program to its end or to a time-out and returns what it printed; the only importer of subprocess.

What holds afterwards: the process and everything it started (its whole process group) have ended, also after
an exception, Ctrl-C or the death of this process. Programs are given as argument lists, never to a shell, in
an environment without the settings that llama.cpp reads by itself.
"""

from __future__ import annotations

import contextlib
import functools
import os
import selectors
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TypeVar

from placement.engine.failure_logs import keep_record
from placement.errors import EngineFailed, EngineMissing, EngineOutputError, EngineTimeout

MAX_OUTPUT_BYTES = 64 * 1024 * 1024  # a plan at the highest verbosity prints half a MiB
_POLL_S = 0.05
_DRAIN_S = 1.0  # for output still in the pipe when the process has ended
_NO_CONFIG = "/dev/null/no-config"  # below a file, so nothing can be there

Process = subprocess.Popen[bytes]
Item = TypeVar("Item")
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True)
class Finished:
    """What a program left: exit status (negative: the signal), text, and whether `stop_when` ended it."""

    arguments: tuple[str, ...]
    returncode: int
    stdout: str
    stderr: str
    wall_s: float
    is_stopped: bool = False

    @property
    def text(self) -> str:
        """Standard output followed by standard error."""
        return self.stdout + ("" if self.stdout.endswith("\n") or not self.stdout else "\n") + self.stderr


def isolated_environment(base: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment (default: this process's) without what would change the engine's arguments.

    LLAMA_* and GGML_* go, the user's config.ini is hidden; PATH, LD_LIBRARY_PATH, LD_PRELOAD,
    CUDA_VISIBLE_DEVICES and the rest stay. /etc/llama.cpp/config.ini cannot be hidden: plans name it.
    """
    source = os.environ if base is None else base
    kept = {name: value for name, value in source.items() if not name.startswith(("LLAMA_", "GGML_"))}
    return kept | {"GGML_NO_BACKTRACE": "1", "XDG_CONFIG_HOME": _NO_CONFIG}


@functools.cache
def _death_signal() -> tuple[str, ...]:
    """The prefix that has the kernel kill a program when the thread that started it ends; () without one.

    Not `preexec_fn`: that forks with Python's own hooks, in which a Ctrl-C is lost.
    """
    tool = shutil.which("setpriv")
    is_known = tool is not None and Path(tool).resolve().name == "setpriv"  # that of busybox cannot
    return (str(tool), "--pdeathsig", "KILL", "--") if is_known else ()


def _start(arguments: Sequence[str | Path], *, stdout: int | IO[bytes], stderr: int) -> Process:
    """Start a program in its own session; it is killed when the thread that called this ends.

    Raises:
        EngineMissing: it is not there, not executable, or not a program for this machine.
    """
    command = [str(argument) for argument in arguments]
    program = shutil.which(command[0])
    if program is None:
        reason = "is not executable" if Path(command[0]).exists() else "is not there any more"
        raise EngineMissing(f"{command[0]} {reason}")
    try:
        return subprocess.Popen(
            [*_death_signal(), program, *command[1:]],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            env=isolated_environment(),
            start_new_session=True,
            # an RPC worker whose client is ended in the middle of an answer writes on, and would die of SIGPIPE
            restore_signals=False,
        )
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise EngineMissing(f"{command[0]}: cannot be run: {reason}") from error


def start_logged(arguments: Sequence[str | Path], log: Path) -> Process:
    """Start a program that writes to `log`; it is killed when the thread that called this ends.

    Raises:
        EngineMissing: it cannot be run.
    """
    with log.open("ab") as file:
        return _start(arguments, stdout=file, stderr=subprocess.STDOUT)


def kill_group(process: Process, grace_s: float = 0.0) -> int:
    """End the process and its whole group, asking first if `grace_s` is positive; return its exit status."""
    if grace_s > 0 and process.poll() is None:
        _signal_group(process, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(grace_s)
    _signal_group(process, signal.SIGKILL)
    return process.wait()


def _signal_group(process: Process, number: int) -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


class _Collector:
    """Both output pipes of a process, read without blocking, bounded, and watched for a line."""

    def __init__(self, process: Process, stop_when: Callable[[str], bool] | None) -> None:
        self.texts: dict[str, bytearray] = {"stdout": bytearray(), "stderr": bytearray()}
        self.is_stopped = self.is_too_long = False
        self._stop_when = stop_when
        self._partial = {"stdout": b"", "stderr": b""}
        self._selector = selectors.DefaultSelector()
        for name, pipe in (("stdout", process.stdout), ("stderr", process.stderr)):
            assert pipe is not None
            os.set_blocking(pipe.fileno(), False)
            self._selector.register(pipe, selectors.EVENT_READ, name)

    @property
    def is_open(self) -> bool:
        return bool(self._selector.get_map())

    @property
    def is_enough(self) -> bool:
        return self.is_stopped or self.is_too_long

    def read(self, wait_s: float) -> bool:
        """Take what has arrived within `wait_s`; whether anything has."""
        events = self._selector.select(wait_s)
        for key, _ in events:
            chunk = os.read(key.fd, 1 << 18)
            if not chunk:
                self._selector.unregister(key.fileobj)
                continue
            self.texts[key.data] += chunk
            self.is_too_long |= len(self.texts[key.data]) > MAX_OUTPUT_BYTES
            if self._stop_when is not None and not self.is_stopped:
                self._watch(key.data, chunk)
        return bool(events)

    def _watch(self, name: str, chunk: bytes) -> None:
        assert self._stop_when is not None
        *lines, self._partial[name] = (self._partial[name] + chunk).split(b"\n")
        self.is_stopped = any(self._stop_when(line.decode(errors="replace")) for line in lines)

    def text(self, name: str) -> str:
        return self.texts[name].decode(errors="replace")

    def close(self) -> None:
        self._selector.close()


def run(
    arguments: Sequence[str | Path],
    *,
    timeout_s: float = 60.0,
    stop_when: Callable[[str], bool] | None = None,
    cancel: threading.Event | None = None,
) -> Finished:
    """Run a program, and end it at the first line for which `stop_when` is true.

    A non-zero exit status is returned, not raised: `check` refuses it.

    Raises:
        EngineMissing: it cannot be run.
        EngineTimeout: it has not ended within `timeout_s`.
        EngineOutputError: it printed more than MAX_OUTPUT_BYTES.
        EngineFailed: `cancel` was set.
    """
    began_s = time.monotonic()
    process = _start(arguments, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    collector = _Collector(process, stop_when)
    is_late = False
    try:
        is_late = _collect(process, collector, began_s + timeout_s, cancel)
    finally:
        returncode = kill_group(process)
        collector.close()
        for pipe in (process.stdout, process.stderr):
            assert pipe is not None
            pipe.close()
    finished = Finished(
        arguments=tuple(str(argument) for argument in arguments),
        returncode=returncode,
        stdout=collector.text("stdout"),
        stderr=collector.text("stderr"),
        wall_s=time.monotonic() - began_s,
        is_stopped=collector.is_stopped,
    )
    _refuse(finished, is_late, collector.is_too_long, cancel, timeout_s)
    return finished


def _collect(
    process: Process,
    collector: _Collector,
    deadline_s: float,
    cancel: threading.Event | None,
) -> bool:
    """Read until the process ends or is to be ended; whether the time ran out."""
    ended_s: float | None = None
    while collector.is_open and not collector.is_enough:
        has_read = collector.read(_POLL_S)
        now_s = time.monotonic()
        if cancel is not None and cancel.is_set():
            return False
        if ended_s is None and process.poll() is not None:
            ended_s = now_s
        if ended_s is not None and (not has_read or now_s - ended_s > _DRAIN_S):
            return False  # what it started may hold the pipe open for ever
        if now_s > deadline_s:
            return True
    while not collector.is_enough and process.poll() is None:
        if time.monotonic() > deadline_s:
            return True
        time.sleep(_POLL_S / 10)
    return False


def _refuse(
    finished: Finished, is_late: bool, is_too_long: bool, cancel: threading.Event | None, timeout_s: float
) -> None:
    name = Path(finished.arguments[0]).name
    if cancel is not None and cancel.is_set():
        raise _Cancelled(f"{name}: stopped")
    if is_late:
        kept = keep_record(finished.arguments, finished.text, "time-out")
        raise EngineTimeout(f"{name} did not finish within {timeout_s:g} s and was stopped{kept}")
    if is_too_long:
        kept = keep_record(finished.arguments, finished.text, "endless output")
        raise EngineOutputError(
            f"{name} printed more than {MAX_OUTPUT_BYTES >> 20} MiB and was stopped{kept}"
        )


class _Cancelled(EngineFailed):
    """Ended or not started because of another run's error; never the one to report."""


def run_many(
    function: Callable[[Item, threading.Event], _Result], items: Iterable[Item], *, n_side_by_side: int = 4
) -> list[_Result]:
    """Return `function(item, cancel)` of each item in order, at most `n_side_by_side` at a time.

    The first exception (Ctrl-C too) sets `cancel`, which ends the runs in progress, and is raised.
    """
    cancel = threading.Event()

    def guarded(item: Item) -> _Result:
        if cancel.is_set():
            raise _Cancelled("not started")
        try:
            return function(item, cancel)
        except BaseException:
            cancel.set()
            raise

    with ThreadPoolExecutor(max_workers=max(1, n_side_by_side)) as pool:
        futures = [pool.submit(guarded, item) for item in items]
        try:
            errors = [future.exception() for future in futures]
        except BaseException:
            cancel.set()
            raise
    for error in errors:
        if error is not None and not isinstance(error, _Cancelled):
            raise error
    return [future.result() for future in futures]
