"""Turns what ended a phase into one of the outcomes that a record can have."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path

from placement.engine.failures import classify_failure
from placement.engine.serve import ServerFailed, ServerHung
from placement.errors import EngineMissing, EngineTimeout, InputError
from placement.measure.records import log as records

_TAIL_LINES = 25
_BY_SERVER = {
    "oom-at-start": records.OOM_START,
    "oom-in-inference": records.OOM_INFERENCE,
    "out-of-memory": records.OOM_INFERENCE,
    "hang": records.HANG,
    "port-taken": records.PORT_TAKEN,
    "bad-argument": records.WRONG_BUILD,
    "rpc": records.WORKER_LOST,
    "bad-model": records.REFUSED,
    "bad-setting": records.REFUSED,
}


def oom_kills() -> int | None:
    """Return how many processes the kernel has ended for want of memory; None where it does not say."""
    with contextlib.suppress(OSError):
        match = re.search(r"^oom_kill (\d+)$", Path("/proc/vmstat").read_text(), re.MULTILINE)
        return int(match[1]) if match else None
    return None


def tail(log: Path | None) -> tuple[str, ...]:
    """Return the last lines of a log; none if there is no log."""
    if log is None:
        return ()
    with contextlib.suppress(OSError):
        return tuple(log.read_text(errors="replace")[-16384:].splitlines()[-_TAIL_LINES:])
    return ()


def outcome_of(error: Exception, phase: str, n_killed_before: int | None) -> str:
    """Name what went wrong in a phase.

    A server that the kernel killed for want of memory ran out of memory, whatever its log says.
    """
    if isinstance(error, ServerHung | EngineTimeout):
        return records.HANG
    if isinstance(error, ServerFailed):
        outcome = _BY_SERVER.get(error.outcome, error.outcome)
        is_killed = outcome == records.CRASH and "SIGKILL" in str(error)
        if is_killed and n_killed_before is not None and oom_kills() != n_killed_before:
            outcome = records.OOM_START if phase == "start" else records.OOM_INFERENCE
        return records.CRASH if outcome in ("abort", "error", "gpu-error") else outcome
    if isinstance(error, EngineMissing):
        return records.WRONG_BUILD
    if isinstance(error, InputError):
        return records.REFUSED
    failure = classify_failure(str(error))
    kind = failure.kind if failure is not None else ""
    return _BY_SERVER.get(kind, records.REFUSED)
