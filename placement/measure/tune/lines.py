"""What a tuning says: a line for each run of each step, and what came out of it all."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from placement.inputs.machine import Machine
from placement.measure.calibrate.applied import Change
from placement.measure.calibrate.fit import Calibration

if TYPE_CHECKING:
    from placement.measure.verify.run import VerifyReport

LEAST_LEARNED = 0.03  # a smaller change of a coefficient is not told


@dataclass(frozen=True, slots=True)
class TuneLine:
    """One run of one step: predicted before it, measured, and what its step taught."""

    step: int
    candidate: str
    predicted_tps: float
    predicted_turn_s: float
    measured_tps: float | None
    measured_turn_s: float | None
    status: str
    learned: tuple[str, ...]

    @property
    def error(self) -> float | None:
        """Predicted over measured decode speed, less one."""
        return None if self.measured_tps is None else self.predicted_tps / self.measured_tps - 1.0

    def words(self) -> str:
        """The line of the log."""
        said = f"step {self.step}: {self.candidate}: predicted {self.predicted_tps:.1f} t/s"
        if self.measured_tps is None or self.error is None:
            return f"{said}, {self.status}"
        taught = f"; learned {', '.join(self.learned)}" if self.learned else ""
        return f"{said}, measured {self.measured_tps:.1f} t/s, error {self.error:+.1%}{taught}"


@dataclass(frozen=True)
class Tuned:
    """What came out: the verdict on all that was run, the machine with what was learned, and why it ended.

    `error`: the median error of decode speeds, each run predicted from all others; None where too few were run.
    """

    report: VerifyReport | None
    machine: Machine
    changes: tuple[Change, ...]
    lines: tuple[TuneLine, ...]
    is_converged: bool
    why: str
    error: float | None = None


def what_was_learned(
    before: tuple[Calibration, Calibration], after: tuple[Calibration, Calibration], most: int = 3
) -> tuple[str, ...]:
    """The coefficients that a step taught most about: "split_us 45 → 61 ± 4 us"."""
    results = []
    for old, new in zip(before, after, strict=True):
        spreads = new.uncertainties
        for each in new.parameters:
            a, b = old.values[each.name], new.values[each.name]
            is_moved = abs(b - a) > LEAST_LEARNED * max(abs(a), 1e-9)
            fall = old.left[each.name] - new.left[each.name]
            if is_moved and each.name not in new.unidentified:
                results.append(
                    (fall, f"{each.name} {a:.3g} → {b:.3g} ± {spreads[each.name]:.2g} {each.unit}")
                )
    return tuple(words for _, words in sorted(results, reverse=True)[:most])
