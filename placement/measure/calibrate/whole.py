"""One whole calibration: records → fits of decode, then of prompts, then memory → the machine and its report."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from placement.inputs.machine import Machine
from placement.inputs.problem import Workload
from placement.measure.calibrate.applied import apply_fit
from placement.measure.calibrate.data import FitData
from placement.measure.calibrate.fit import Calibration, calibrate
from placement.measure.calibrate.information import Information, trials, what_would_tell
from placement.measure.calibrate.memory import CHANCE, fit_memory
from placement.measure.calibrate.report import CalibrationReport
from placement.measure.calibrate.runs import find_runs
from placement.predict.terms import DECODE, PROMPT

MOST_PROBLEMS = 3  # of those run, whose simple placements are weighed


def fit_both(
    machine: Machine, result: FitData, with_errors: bool = True, is_trusted: bool = False
) -> tuple[Calibration, Calibration]:
    """The decode fit, and the prompt fit with what the decode fit taught."""
    decode = calibrate(machine, result.rows, DECODE, None, with_errors, is_trusted)
    prompt = calibrate(machine, result.rows, PROMPT, decode.values, with_errors, is_trusted)
    return decode, prompt


def calibrate_machine(
    machine: Machine,
    root: Path,
    date: str,
    is_mixed: bool = False,
    chance: float = CHANCE,
    with_advice: bool = True,
) -> tuple[Machine, CalibrationReport]:
    """The machine refitted from all matching records below a solutions folder; `date` is ISO 8601.

    Raises:
        InputError: a file of records is broken.
    """
    result = find_runs(root, machine, is_mixed)
    fits = fit_both(machine, result)
    memory = fit_memory(machine, result.memory, chance)
    changed, changes = (machine, ()) if not result.rows else apply_fit(machine, fits, memory, date)
    told: dict[str, Information | None] = {}
    if with_advice and result.runs:
        problems = list({run.problem.model.digest: run.problem for run in result.runs}.values())
        candidates = [
            trial
            for problem in problems[-MOST_PROBLEMS:]
            for trial in trials(replace(problem, machine=machine, workload=Workload(2000, 1, 0)))
        ]
        for fit in fits:
            told |= what_would_tell(fit, candidates)
    return changed, CalibrationReport(machine.name, result, fits, memory, changes, told, date)
