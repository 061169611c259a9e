"""Writes the solutions of the shipped models: each at its profile's context on the reference machine, no engine.

    python -m benchmarks.solutions [--out DIR] [MODEL …]

Prints a line for each model: its seconds, whether the file is new, and the recommended placement's figures.
`tests/test_shipped_solutions.py` solves them again and compares.
"""

from __future__ import annotations

import argparse
import time

from placement.inputs.machine_files import REFERENCE_MACHINE, resolve_machine
from placement.inputs.model_files.files import resolve_model
from placement.solve.request import Request
from placement.solve.run import NO_ENGINE, Outcome, run_solve

SHIPPED = (
    "gemma-3-27b-q4",
    "glm-flash",
    "glm-flash-exp",
    "glm-flash-q4",
    "gpt-oss-120b",
    "llama-3.3-70b-q4",
    "qwen3-30b-a3b-q4",
    "qwen3-coder-q5",
)


def write(name: str, out: str) -> Outcome:
    """Solve one shipped model as `place solve NAME --machine … --engine off` does."""
    model, machine = resolve_model(name), resolve_machine(REFERENCE_MACHINE)
    return run_solve(model, machine, Request(), engine=NO_ENGINE, out_folder=out)


def main() -> None:
    """Write them all, or those named."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help="names [all shipped models]")
    parser.add_argument("--out", default="solutions", help="the folder [./solutions]")
    asked = parser.parse_args()
    for name in asked.models or SHIPPED:
        start = time.perf_counter()
        outcome = write(name, asked.out)
        seconds = time.perf_counter() - start
        best, state = outcome.solution_set.solutions[0], "written" if outcome.is_new else "unchanged"
        gap = "-" if best.gap is None else f"{best.gap:.2%}"
        print(
            f"{name:<18} {seconds:5.2f} s  {state:<9}  {best.speed.turn_s:6.2f} s/turn  gap {gap:>6}"
            f"  {best.splits_decode:3} decode splits  {best.headroom_mib:5.0f} MiB headroom"
        )


if __name__ == "__main__":
    main()
