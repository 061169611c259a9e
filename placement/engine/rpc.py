"""llama.cpp's RPC workers: started and ended for tests and local clusters, and kept to one client."""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import hashlib
import itertools
import os
import re
import socket
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from placement.engine.failures import last_line
from placement.engine.find import Engine
from placement.engine.run import Process, kill_group, start_logged
from placement.errors import EngineFailed, EngineTimeout
from placement.inputs.problem import CPU

_LOCAL = "127.0.0.1"
_POLL_S = 0.02
_START_TRIES = 5  # another process may take the port that was free a moment ago


@dataclass(frozen=True)
class RpcWorker:
    """A running worker: its "host:port", the process and the file with its output."""

    endpoint: str
    process: Process
    log: Path

    def is_alive(self) -> bool:
        """Whether it still runs."""
        return self.process.poll() is None


def endpoints_of(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the "host:port" of every worker that the arguments' last `--rpc` names."""
    found: tuple[str, ...] = ()
    for flag, value in itertools.pairwise(arguments):
        if flag in ("--rpc", "-rpc"):
            found = tuple(part for part in value.split(",") if part)
    return found


@contextlib.contextmanager
def exclusive(endpoints: Sequence[str], timeout_s: float) -> Iterator[None]:
    """Hold the workers at `endpoints` against other users of this function, in any thread or process.

    Raises:
        EngineTimeout: someone else held one for `timeout_s`.
    """
    with contextlib.ExitStack() as stack:
        deadline_s = time.monotonic() + timeout_s
        for endpoint in sorted(set(endpoints)):
            _lock(stack, endpoint, deadline_s)
        yield


def _lock(stack: contextlib.ExitStack, endpoint: str, deadline_s: float) -> None:
    name = f"place-rpc-{getpass.getuser()}-{hashlib.sha256(endpoint.encode()).hexdigest()[:12]}.lock"
    handle = os.open(Path(tempfile.gettempdir()) / name, os.O_CREAT | os.O_RDWR | os.O_CLOEXEC, 0o600)
    stack.callback(os.close, handle)
    while True:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() > deadline_s:
                raise EngineTimeout(f"the RPC worker at {endpoint} stayed busy with another plan") from None
            time.sleep(_POLL_S)


def free_port() -> int:
    """Return a TCP port of this machine that is free now."""
    with socket.socket() as probe:
        probe.bind((_LOCAL, 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def rpc_workers(
    engine: Engine, n_workers: int = 2, *, devices_each: int = 1, timeout_s: float = 20.0
) -> Iterator[tuple[RpcWorker, ...]]:
    """Run workers on free local ports while the context lasts, each with that many CPU devices.

    Raises:
        EngineMissing: the engine has no ggml-rpc-server.
        EngineFailed, EngineTimeout: one did not start.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="place-rpc-")))
        yield tuple(_start_worker(stack, engine, folder, devices_each, timeout_s) for _ in range(n_workers))


def _start_worker(
    stack: contextlib.ExitStack, engine: Engine, folder: Path, devices_each: int, timeout_s: float
) -> RpcWorker:
    program = engine.program("ggml-rpc-server")
    said = ""
    for _ in range(_START_TRIES):
        port = free_port()
        log = folder / f"{port}.log"
        command: list[str | Path] = [program, "-H", _LOCAL, "-p", str(port), "-t", "1"]
        command += ["-d", ",".join([CPU] * devices_each)] if devices_each > 1 else []
        process = start_logged(command, log)
        stack.callback(kill_group, process)
        if _is_listening(process, port, time.monotonic() + timeout_s):
            return RpcWorker(f"{_LOCAL}:{port}", process, log)
        said = last_line(log.read_text(errors="replace"))
    raise EngineFailed(f"{program} did not start: {said or 'it printed nothing'}")


def _is_listening(process: Process, port: int, deadline_s: float) -> bool:
    """Wait until the port listens, by the kernel's table: connecting would take the worker's one place."""
    pattern = re.compile(rf"^\s*\d+: [0-9A-F]+:{port:04X} 0{{8}}(?:0{{24}})?:0000 0A ", re.MULTILINE)
    while time.monotonic() < deadline_s:
        if process.poll() is not None:
            return False
        if pattern.search(Path("/proc/net/tcp").read_text()):
            return True
        time.sleep(_POLL_S)
    raise EngineTimeout(f"an RPC worker did not listen on port {port} in time")
