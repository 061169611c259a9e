"""Memory samples → what a card takes beside the engine's plan, and what to keep free for a stated chance.

The runtime is the median of what is taken at start beyond the plan, the growth the median of what is taken later.
The margin covers a further run: Student's t over the runs' spread, which a few runs tell together with what is
believed without any.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from placement.inputs.machine import Machine
from placement.measure.calibrate.data import MemorySample

CHANCE = 0.01  # of a run needing more than is kept free
PRIOR_SPREAD_MIB = 48.0
PRIOR_RUNS = 2.0  # how many runs the prior spread is worth


@dataclass(frozen=True, slots=True)
class MemoryFit:
    """MiB on one device: `runtime` and `growth` beside the plan, `margin` beside both; from `n_samples` rounds."""

    device: str
    runtime_mib: float
    growth_mib: float
    margin_mib: float
    spread_mib: float
    n_samples: int
    chance: float
    most_mib: float  # the most that was ever seen beside the plan


def fit_memory(
    machine: Machine, samples: Sequence[MemorySample], chance: float = CHANCE
) -> tuple[MemoryFit, ...]:
    """What the devices with samples take beside their plans."""
    found = []
    for device in machine.devices:
        mine = [sample for sample in samples if sample.device == device.name]
        if mine:
            found.append(_fit(device.name, mine, chance))
    return tuple(found)


def _fit(device: str, samples: Sequence[MemorySample], chance: float) -> MemoryFit:
    over = [sample.peak_mib - sample.planned_mib for sample in samples]
    starts = [s.start_mib - s.planned_mib for s in samples if s.start_mib is not None]
    whole = max(0.0, statistics.median(over))
    runtime = min(whole, max(0.0, statistics.median(starts))) if starts else whole
    n = len(over)
    degrees = PRIOR_RUNS + n - 1
    squares = PRIOR_RUNS * PRIOR_SPREAD_MIB**2 + sum((each - whole) ** 2 for each in over)
    spread = math.sqrt(squares / degrees)
    margin = max(quantile(1.0 - chance, degrees) * spread * math.sqrt(1.0 + 1.0 / n), max(over) - whole)
    return MemoryFit(device, runtime, whole - runtime, margin, spread, n, chance, max(over))


def quantile(share: float, degrees: float) -> float:
    """Student's t: what a value stays below with that probability."""
    from scipy.stats import t

    return float(t.ppf(share, degrees))
