"""`runs.jsonl`: one record per finished phase, appended and forced to disk, read back after any crash.

A line is written with one call and then synced, so a kill loses at most the phase in flight. A torn last line
is moved to `runs.jsonl.torn`; any other line that is not a record is an error that names it.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.errors import InputError
from placement.inputs.identity import is_same_machine

if TYPE_CHECKING:
    from placement.measure.records.schema import Key, Record

FORMAT = 1
RUNS = "runs.jsonl"

OK = "ok"
OOM_START, OOM_INFERENCE, OOM_INTERMITTENT = "oom-at-start", "oom-in-inference", "oom-intermittent"
CRASH, HANG, WRONG_BUILD, PORT_TAKEN = "crash", "hang", "wrong-build", "port-taken"
MODEL_MISMATCH, WORKER_LOST, REFUSED = "model-mismatch", "worker-lost", "refused"

# What says nothing about the placement itself: measured again by a rerun.
TRANSIENT = frozenset({WRONG_BUILD, PORT_TAKEN, MODEL_MISMATCH, WORKER_LOST})


@functools.cache
def _schema() -> Any:
    """The pydantic classes, imported when a record is first made or read."""
    from placement.measure.records import schema

    return schema


class RunLog:
    """The records of one folder."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / RUNS

    def append(self, record: Record) -> None:
        """Add one record; it is on the disk when this returns.

        Raises:
            InputError: the file cannot be written.
        """
        line = record.model_dump_json(exclude_none=True).encode() + b"\n"
        is_new = not self.path.exists()
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o644)
            try:
                _write_all(handle, line)
                os.fsync(handle)
            finally:
                os.close(handle)
            if is_new:
                _sync_folder(self.path.parent)
        except OSError as error:
            raise InputError(self.path, f"cannot be written: {error.strerror}") from error

    def read(self) -> list[Record]:
        """Return the records in their order, without the torn last line if there is one.

        Raises:
            InputError: the file cannot be read, or another line is not a record.
        """
        lines, torn = self._lines()
        return [self._record(number, line) for number, line in lines if number not in torn]

    def read_whole_lines(self) -> tuple[list[Record], list[str]]:
        """Return the records in their order, and what is wrong with each line that is none, a torn last one apart.

        Raises:
            InputError: the file cannot be read.
        """
        lines, torn = self._lines()
        results, broken = [], []
        for number, line in lines:
            try:
                results.append(self._record(number, line))
            except InputError as error:
                broken += [] if number in torn else [str(error)]
        return results, broken

    def mend(self) -> str | None:
        """Move a torn last line to `runs.jsonl.torn`, so that appending is safe again; say so, or None.

        Raises:
            InputError: the file cannot be read or written.
        """
        lines, torn = self._lines()
        if not torn:
            self._end_last_line(lines)
            return None
        _, line = lines[-1]
        aside = self.path.with_name(self.path.name + ".torn")
        try:
            with aside.open("ab") as file:
                file.write(line + b"\n")
                file.flush()
                os.fsync(file.fileno())
            with self.path.open("r+b") as file:
                file.truncate(sum(len(each) + 1 for _, each in lines[:-1]))
                os.fsync(file.fileno())
        except OSError as error:
            raise InputError(self.path, f"cannot be mended: {error.strerror}") from error
        return f"the last line of {self.path} was torn ({len(line)} bytes): it is kept in {aside}"

    def _end_last_line(self, lines: list[tuple[int, bytes]]) -> None:
        """A whole record whose newline was lost gets it back."""
        if not lines or self._is_ended():
            return
        with self.path.open("ab") as file:
            file.write(b"\n")
            os.fsync(file.fileno())

    def _is_ended(self) -> bool:
        return self.path.read_bytes()[-1:] == b"\n"

    def _lines(self) -> tuple[list[tuple[int, bytes]], set[int]]:
        """Numbered lines, and the number of the last one if it is torn."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return [], set()
        except OSError as error:
            raise InputError(self.path, f"cannot be read: {error.strerror}") from error
        if not data:
            return [], set()
        pieces = data.removesuffix(b"\n").split(b"\n")
        lines = list(enumerate(pieces, start=1))
        try:
            self._record(*lines[-1])
        except InputError:
            return lines, {lines[-1][0]}
        return lines, set()

    def _record(self, number: int, line: bytes) -> Record:
        try:
            record: Record = _schema().Record.model_validate_json(line)
        except ValueError as error:
            first = str(error).splitlines()[0]
            raise InputError(self.path, f"line {number} is not a run record ({first})") from error
        if record.format > FORMAT:
            raise InputError(
                self.path, f"line {number} was written by a newer place", field="format", value=record.format
            )
        return record


def _write_all(handle: int, data: bytes) -> None:
    while data:
        data = data[os.write(handle, data) :]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def is_same_key(a: Key, b: Key) -> bool:
    """Whether what was measured under both may be mixed: all alike, on the same machine whatever its name."""
    others = (name for name in type(a).model_fields if name != "machine")
    is_alike = all(getattr(a, name) == getattr(b, name) for name in others)
    return is_alike and is_same_machine(a.machine, b.machine)


def each_once(records: Iterable[Record]) -> list[Record]:
    """Return the records without those that say what an earlier one said: copied folders, doubled lines."""
    kept: dict[tuple[object, ...], Record] = {}
    for each in records:
        kept.setdefault(
            (each.campaign, each.at, each.run_id, each.round, each.phase, each.repeat, each.timing), each
        )
    return list(kept.values())


def latest_campaign(records: Iterable[Record], key: Key | None = None) -> str | None:
    """Return the campaign of the newest record (made under `key`, if one is given); None if there is none."""
    campaign = None
    for record in records:
        if key is None or is_same_key(record.key, key):
            campaign = record.campaign
    return campaign


def of_campaign(records: Iterable[Record], campaign: str | None) -> list[Record]:
    """Return the records of one campaign in their order."""
    return [record for record in records if record.campaign == campaign]
