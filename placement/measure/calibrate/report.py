"""What a calibration found, as plain data: coefficients, errors before and after, outliers, memory, what to run."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from placement.measure.calibrate.applied import Change
from placement.measure.calibrate.data import FitData
from placement.measure.calibrate.fit import Calibration, RunError
from placement.measure.calibrate.information import Information
from placement.measure.calibrate.memory import MemoryFit


@dataclass(frozen=True)
class CalibrationReport:
    """All that `place calibrate` has to say. `told` names the placement that would identify a coefficient."""

    machine: str
    data: FitData
    fits: tuple[Calibration, ...]
    memory: tuple[MemoryFit, ...]
    changes: tuple[Change, ...]
    told: dict[str, Information | None]
    date: str


def median_error(errors: Iterable[RunError], is_after: bool) -> float | None:
    """The median size of the errors of the runs that count; None without any."""
    sizes = [
        abs(error)
        for each in errors
        if each.is_counted and (error := each.after if is_after else each.before) is not None
    ]
    return statistics.median(sizes) if sizes else None


def calibration_row(report: CalibrationReport) -> dict[str, Any]:
    """The report as JSON: shares are fractions, times seconds."""
    result = report.data
    return {
        "machine": report.machine,
        "date": report.date,
        "conditions": result.conditions.words() if result.conditions is not None else None,
        "n_runs": len(result.runs),
        "left_out": [{"conditions": words, "n_records": n} for words, n in result.left_out],
        "skipped": list(result.skipped),
        "kinds": {fit.kind: _kind_row(fit, report.told) for fit in report.fits},
        "memory": [_memory_row(each) for each in report.memory],
        "changes": [_change_row(each) for each in report.changes],
    }


def _rounded(share: float | None) -> float | None:
    return None if share is None else round(share, 5)


def _kind_row(fit: Calibration, told: dict[str, Information | None]) -> dict[str, Any]:
    return {
        "n_rows": fit.n_rows,
        "n_runs": fit.n_runs,
        "n_directions": fit.n_directions,
        "median_error_before": _rounded(median_error(fit.errors, is_after=False)),
        "median_error_after": _rounded(median_error(fit.errors, is_after=True)),
        "coefficients": [coefficient_row(fit, each.name, told) for each in fit.parameters],
        "errors": [
            {
                "run": each.run,
                "label": each.label,
                "measured_s": each.measured_s,
                "before": _rounded(each.before),
                "after": _rounded(each.after),
                "is_counted": each.is_counted,
            }
            for each in fit.errors
        ],
        "outliers": [
            {"run": each.run, "label": each.label, "ratio": _rounded(each.ratio), "reason": each.reason}
            for each in fit.outliers
        ],
    }


def coefficient_row(fit: Calibration, name: str, told: dict[str, Information | None]) -> dict[str, Any]:
    """One coefficient: value, uncertainty, prior, and what would identify it if the runs do not."""
    parameter = next(each for each in fit.parameters if each.name == name)
    information = told.get(name)
    return {
        "name": name,
        "value": float(f"{fit.values[name]:.5g}"),
        "unit": parameter.unit,
        "uncertainty": float(f"{fit.uncertainties[name]:.3g}"),
        "prior": float(f"{parameter.prior:.5g}"),
        "is_identified": name not in fit.unidentified,
        "prior_spread_left": _rounded(fit.left[name]),
        "n_samples": fit.n_samples[name],
        "would_be_told_by": None
        if information is None
        else {
            "placement": information.trial,
            "phase": information.phase,
            "arguments": list(information.arguments),
            "prior_spread_left": _rounded(information.left),
        },
    }


def _memory_row(fit: MemoryFit) -> dict[str, Any]:
    return {
        "device": fit.device,
        "runtime_mib": round(fit.runtime_mib, 1),
        "growth_mib": round(fit.growth_mib, 1),
        "margin_mib": round(fit.margin_mib, 1),
        "spread_mib": round(fit.spread_mib, 1),
        "chance": fit.chance,
        "most_mib": round(fit.most_mib, 1),
        "n_samples": fit.n_samples,
    }


def _change_row(change: Change) -> dict[str, Any]:
    return {
        "name": change.name,
        "old": None if change.old is None else change.old.value,
        "new": change.new.value,
        "unit": change.new.unit,
        "uncertainty": change.new.uncertainty,
        "source": change.new.source,
        "n_samples": change.new.n_samples,
    }


def calibration_summary(report: CalibrationReport) -> list[str]:
    """What the report comes to, a sentence a line."""
    lines = [f"{n} records left out: {words}" for words, n in report.data.left_out]
    lines += [f"skipped: {words}" for words in report.data.skipped]
    for fit in report.fits:
        lines += _fit_lines(fit)
    lines += [
        f"{each.device}: runtime {each.runtime_mib:.0f} MiB, growth {each.growth_mib:.0f} MiB; keep "
        f"{each.margin_mib:.0f} MiB more for a chance of {each.chance:.1%} of running out ({each.n_samples} rounds)"
        for each in report.memory
    ]
    return lines


def _fit_lines(fit: Calibration) -> list[str]:
    before, after = (median_error(fit.errors, is_after) for is_after in (False, True))
    if before is None:
        return [f"{fit.kind}: no runs: every coefficient keeps its prior"]
    then = "" if after is None else f", {after:.1%} from all other runs"
    n_known = len(fit.parameters) - len(fit.unidentified)
    lines = [
        f"{fit.kind}: {fit.n_runs} runs, {fit.n_rows} timings; median error {before:.1%} before{then}; {n_known} of "
        f"{len(fit.parameters)} coefficients are identified"
    ]
    return lines + [f"not counted: {each.label}: {each.reason}" for each in fit.outliers]


def advice(told: dict[str, Information | None], names: Sequence[str]) -> list[tuple[str, str]]:
    """(coefficient, what would identify it) of those that keep their priors."""
    rows = []
    for name in names:
        information = told.get(name)
        words = "no placement of these models would tell it"
        if information is not None:
            trial = f"run {information.trial} ({information.phase})"
            words = f"{trial}: {information.left:.0%} of the prior's spread would be left"
        rows.append((name, words))
    return rows
