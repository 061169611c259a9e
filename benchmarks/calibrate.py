"""Calibration against 200 simulated machines: errors of placements not run, outliers found, and the tuned choice.

    python benchmarks/calibrate.py [MACHINES]

Prints a table; the numbers asked for are beside what was reached.
"""

from __future__ import annotations

import random
import statistics
import sys
import time
from pathlib import Path

from machine_simulator import DECODE, PROMPT, Simulated, bare_machine, pool, tuned_choice

from placement.measure.calibrate.fit import calibrate

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


MODELS = ("qwen3-30b-a3b-q4", "gemma-3-27b-q4")
ASKED = {0: 0.25, 4: 0.08, 8: 0.05}
# (noise of one timing, spread of the truth, share of runs that are 30 % slow)
CHOICES = ((0.01, 0.22, 0.0), (0.02, 0.35, 0.0), (0.01, 0.22, 0.12), (0.045, 0.22, 0.0), (0.045, 0.22, 0.1))


def errors(name: str, kind: str, n_runs: int, n_machines: int, noise: float) -> list[float]:
    """Errors of the placements not run, over machines."""
    rows, result = pool(name)[kind == PROMPT], []
    for seed in range(5000, 5000 + n_machines):
        simulated = Simulated(seed, noise=noise)
        true = {key: each.value for key, each in simulated.machine.coefficients.items()}
        order = random.Random(seed).sample(range(len(rows)), len(rows))
        runs = simulated.runs([rows[i] for i in order[:n_runs]])
        fit = calibrate(bare_machine(), runs, kind, true if kind == PROMPT else None, with_errors=False)
        rest = [rows[i] for i in order[n_runs:]]
        result += [abs(simulated.true_s(r) / p - 1) for r, p in zip(rest, fit.predict(rest)[0], strict=True)]
    return result


def flags(n_machines: int, n_runs: int, slower: float) -> tuple[float, float]:
    """(share of throttled runs found, false flags per machine), one run of each machine being throttled."""
    rows, n_caught, n_false = pool()[0], 0, 0
    for seed in range(7000, 7000 + n_machines):
        simulated = Simulated(seed)
        picked = random.Random(seed).sample(range(len(rows)), n_runs)
        runs = [simulated.run(rows[i], slower if i == picked[0] else 1.0) for i in picked]
        names = {each.run for each in calibrate(bare_machine(), runs, with_errors=False).outliers}
        n_caught += rows[picked[0]].run in names
        n_false += len(names - {rows[picked[0]].run})
    return n_caught / n_machines, n_false / n_machines


def main() -> None:
    """Run it all."""
    n_machines = int(sys.argv[1]) if len(sys.argv) > 1 else 200
    began_s = time.monotonic()
    print(f"median (90th percentile) error of placements not run, {n_machines} machines")
    for name in MODELS:
        for kind in (DECODE, PROMPT):
            for noise in (0.01, 0.03):
                cells = []
                for n_runs in (0, 4, 8, 16):
                    result = errors(name, kind, n_runs, n_machines, noise)
                    asked = f", asked {ASKED[n_runs]:.0%}" if kind == DECODE and n_runs in ASKED else ""
                    most = statistics.quantiles(result, n=10)[-1]
                    cells.append(f"{n_runs} runs {statistics.median(result):.1%} ({most:.0%}{asked})")
                print(f"  {name} {kind}, noise {noise:.0%}: " + "; ".join(cells))
    for n_runs in (8, 16):
        for slower in (1.25, 1.4):
            caught_share, n_false = flags(n_machines, n_runs, slower)
            words = f"found {caught_share:.0%}, {n_false:.2f} false flags a machine"
            print(f"one of {n_runs} runs {slower - 1:.0%} slow: {words}")
    for noise, spread, throttled in CHOICES:
        choices = [
            tuned_choice(seed, noise, spread, throttled=throttled) for seed in range(9000, 9000 + n_machines)
        ]
        gaps = sorted(gap for gap, _ in choices)
        good = sum(gap <= 0.02 for gap in gaps) / n_machines
        runs = statistics.mean(n for _, n in choices)
        words = f"noise {noise:.0%}, spread {spread:.0%}, throttled {throttled:.0%}"
        print(
            f"tuned choice within 2 % of the true optimum, {words}: {good:.1%} (asked 95 %), "
            f"worst {gaps[-1]:.1%}, {runs:.1f} runs"
        )
    print(f"{time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
