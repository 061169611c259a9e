"""What there is to fit: timings as rows, memory samples, and the conditions that they share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from placement.inputs.problem import Assignment, Problem
from placement.measure.calibrate.features import TimingRow
from placement.predict.cost import GraphCounts

if TYPE_CHECKING:
    pass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    pass


@dataclass(frozen=True, slots=True)
class Conditions:
    """What runs must share to be fitted together."""

    engine_build: str
    engine_fingerprint: str
    driver: str | None
    memory_clock: str | None

    def words(self) -> str:
        """As a line names it."""
        parts = [self.engine_build, self.engine_fingerprint[:8]]
        parts += [f"driver {self.driver}"] if self.driver else []
        return ", ".join([*parts, *([f"memory clock {self.memory_clock}"] if self.memory_clock else [])])


@dataclass(frozen=True, slots=True)
class MemorySample:
    """MiB on one device in one round of a run: the engine's own plan, and what was taken at start and at most."""

    run: str
    device: str
    planned_mib: float
    start_mib: float | None
    peak_mib: float


@dataclass(frozen=True)
class FitData:
    """What there is to fit. `left_out` counts records of other conditions, `skipped` says what could not be used."""

    rows: tuple[TimingRow, ...] = ()
    memory: tuple[MemorySample, ...] = ()
    runs: tuple[Run, ...] = ()
    conditions: Conditions | None = None
    left_out: tuple[tuple[str, int], ...] = ()
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True)
class Run:
    """A placement that was run. `id` tells it from all others, `name` is for reading."""

    id: str
    name: str
    problem: Problem
    assignment: Assignment
    counts: GraphCounts
