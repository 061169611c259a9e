"""Turns an unsuccessful run into one clear line, and keeps what was printed in a file that it names."""

from __future__ import annotations

import signal

from placement.engine.failure_logs import keep_record
from placement.engine.failures import classify_failure, last_line
from placement.engine.run import Finished
from placement.errors import EngineFailed, EngineOutputError

_LINE_LENGTH = 300


def exit_words(returncode: int) -> str:
    """ "exit status 1", or "was killed by SIGABRT" (134 as well as -6 mean that)."""
    number = -returncode if returncode < 0 else returncode - 128 if returncode > 128 else 0
    try:
        return f"was killed by {signal.Signals(number).name}"
    except ValueError:
        return f"ended with exit status {returncode}"


def require_success(finished: Finished) -> None:
    """Accept a run that ended well or was ended by its stop condition.

    Raises:
        EngineFailed: any other; with the line of the log that says why.
    """
    if finished.returncode != 0 and not finished.is_stopped:
        raise EngineFailed(failure_line(finished))


def is_unexplained(finished: Finished) -> bool:
    """Whether a run failed with an exception's text alone: the log line with the reason may be lost."""
    if finished.returncode == 0 or finished.is_stopped:
        return False
    failure = classify_failure(finished.text)
    return failure is not None and failure.line.startswith(("what():", "terminate called"))


def is_unconnected(finished: Finished) -> bool:
    """Whether a run failed because an RPC worker did not take its connection."""
    failure = (
        classify_failure(finished.text) if finished.returncode != 0 and not finished.is_stopped else None
    )
    return failure is not None and failure.kind == "rpc"


def failure_line(finished: Finished) -> str:
    """Say in one line which program failed, how and why, and where its last lines are kept."""
    name = finished.arguments[0]
    failure = classify_failure(finished.text)
    line = failure.line if failure is not None else last_line(finished.stderr) or last_line(finished.stdout)
    kept = keep_record(finished.arguments, finished.text, exit_words(finished.returncode))
    said = f": {line[:_LINE_LENGTH]}" if line else " and printed nothing"
    return f"{name} {exit_words(finished.returncode)}{said}{kept}"


def unreadable(finished: Finished, what: str) -> EngineOutputError:
    """Return the error for a run that succeeded without printing `what`."""
    kept = keep_record(finished.arguments, finished.text, f"no {what}")
    return EngineOutputError(f"{finished.arguments[0]} printed no {what} that can be read{kept}")
