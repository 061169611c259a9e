"""Calibration as a user has it, against simulated machines: runs.jsonl in, machine out, placements not run predicted.

    python benchmarks/acceptance.py [--machines 200] [--seed 0] [--noise 0.01-0.08] [--kind "two cards"] …

Every run has a noise of its own that the fit is not told; some runs are hot, one in twenty swaps (a fifth of the
speed). Prints the median error of decode and prompt speeds before, after 4, 8 and 16 runs, the coefficients' errors,
and in how many machines the choice after it is the true optimum within 2 %.
"""

from __future__ import annotations

import argparse
import math
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from machine_simulator import MACHINES, Placed, Simulated, placements, rows_of, solution_file, tuned_choice

from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.model_files.files import save_model
from placement.measure.calibrate.features import predict_s
from placement.measure.calibrate.whole import calibrate_machine

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))


RUNS = (4, 8, 16)
ASKED = {0: 0.25, 4: 0.08, 8: 0.05, 16: 0.05}
SWAPPED = 5.0
# How far an identified coefficient may lie from the truth: the median over machines, as a share.
TOLERANCE = {4: 0.20, 8: 0.18, 16: 0.15}
MAIN = ("read_efficiency", "cpu_read_efficiency", "split_us", "node_us", "expert_read_share")


@dataclass(frozen=True)
class Asked:
    """The command line."""

    machines: int
    seed: int
    noise: tuple[float, float]
    misfit: float
    spread: float
    throttled: float
    swapped: float
    kind: str
    model: str


def asked() -> Asked:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--machines", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--noise", default="0.01-0.08", help="of one timing, as a share: a range over runs")
    parser.add_argument("--misfit", type=float, default=0.015, help="what no coefficient explains")
    parser.add_argument("--spread", type=float, default=0.22, help="of true coefficients about the defaults")
    parser.add_argument("--throttled", type=float, default=0.1, help="chance of a run 15 to 60 %% slow")
    parser.add_argument("--swapped", type=float, default=0.05, help="chance of a run at a fifth of its speed")
    parser.add_argument("--kind", choices=list(MACHINES), default="two cards")
    parser.add_argument(
        "--model", default="qwen3-30b-a3b-q4+", help="a shipped model; +: of two quantisation families"
    )
    row = vars(parser.parse_args())
    low, _, high = row.pop("noise").partition("-")
    return Asked(noise=(float(low), float(high or low)), **row)


@dataclass(frozen=True)
class Learned:
    """What one machine's calibrations came to, by number of runs: errors of what was not run, and of the truth."""

    decode: dict[int, list[float]]
    prompt: dict[int, list[float]]
    coefficients: dict[int, list[float]]
    gaps: dict[int, float]


def learn(want: Asked, seed: int, pool: tuple[Placed, ...]) -> Learned:
    """Calibrate one machine from more and more runs."""
    base = MACHINES[want.kind]()
    simulated, rng = Simulated(seed, want.spread, misfit=want.misfit, base=base), random.Random(seed)
    order = rng.sample(pool, len(pool))
    result = Learned({}, {}, {}, {})
    with tempfile.TemporaryDirectory() as folder:
        runs = Path(folder) / "m--simulated--w"
        _name_model(runs, pool[0].problem.model)
        for n in range(len(order)):
            if n in (0, *RUNS):
                machine = (
                    base
                    if n == 0
                    else calibrate_machine(base, runs.parent, "2026-01-02", with_advice=False)[0]
                )
                _note_errors(result, n, machine, simulated, order)
            if n == max(RUNS):
                break
            simulated.noise = rng.uniform(*want.noise)
            simulated.keep(runs, order[n], throttle=_slowness(want, rng), repeats=3)
    return result


def _name_model(folder: Path, model: Model) -> None:
    """A solution.toml whose model is found, shipped or not."""
    path = folder.parent / "model.toml"
    save_model(model, path)
    solution_file(folder, replace(model, name=str(path)))


def _slowness(want: Asked, rng: random.Random) -> float:
    if rng.random() < want.swapped:
        return SWAPPED
    return rng.uniform(1.15, 1.6) if rng.random() < want.throttled else 1.0


def _note_errors(
    result: Learned, n: int, machine: Machine, simulated: Simulated, order: list[Placed]
) -> None:
    """Note the errors of all placements that no calibration of this machine has seen."""
    rows = [rows_of(each) for each in order]
    for kept, i in ((result.decode, 0), (result.prompt, 1)):
        kept[n] = [abs(simulated.true_s(r[i]) / predict_s(r[i], machine) - 1.0) for r in rows[max(RUNS) :]]
    identified = {name: each for name, each in machine.coefficients.items() if each.source == "calibrated"}
    result.coefficients[n] = [
        abs(math.log(each.value / simulated.machine.coefficients[name].value))
        for name, each in identified.items()
        if name.partition(".")[0] in MAIN
    ]
    true = [simulated.true_s(b) + 500 * simulated.true_s(a) for a, b in rows]
    said = [predict_s(b, machine) + 500 * predict_s(a, machine) for a, b in rows]
    result.gaps[n] = true[said.index(min(said))] / min(true) - 1.0


def _lines(all_learned: list[Learned], want: Asked) -> Iterator[str]:
    for n in (0, *RUNS):
        decode = [each for result in all_learned for each in result.decode[n]]
        prompt = [each for result in all_learned for each in result.prompt[n]]
        off = [each for result in all_learned for each in result.coefficients[n]]
        good = sum(result.gaps[n] <= 0.02 for result in all_learned) / len(all_learned)
        truth = f"; coefficients off by {statistics.median(off):.1%}, asked {TOLERANCE[n]:.0%}" if off else ""
        yield (
            f"{n:2} runs: decode off by {statistics.median(decode):.1%} (90th percentile "
            f"{statistics.quantiles(decode, n=10)[-1]:.0%}), asked {ASKED[n]:.0%}; prompts by "
            f"{statistics.median(prompt):.1%}{truth}; predicted best within 2 % of the best: {good:.1%}"
        )
    if want.kind == "two cards":
        choices = [
            tuned_choice(
                10_000 + want.seed + i, statistics.mean(want.noise), want.spread, throttled=want.throttled
            )
            for i in range(want.machines)
        ]
        good = sum(gap <= 0.02 for gap, _ in choices) / len(choices)
        yield (
            f"tuned choice within 2 % of the true optimum: {good:.1%}, asked 95 %; worst "
            f"{max(gap for gap, _ in choices):.1%}; {statistics.mean(n for _, n in choices):.1f} placements run"
        )


def main() -> None:
    """Run it all."""
    want, began_s = asked(), time.monotonic()
    pool = placements(want.model, 48, want.seed + 1, want.kind)
    print(f"{want.machines} machines: {want}")
    results = [learn(want, 20_000 + want.seed + i, pool) for i in range(want.machines)]
    for line in _lines(results, want):
        print(line)
    print(f"{time.monotonic() - began_s:.0f} s")


if __name__ == "__main__":
    main()
