"""Rows → coefficients: robust, non-negative least squares pulled towards the priors, and what is known after it.

Residuals are logarithms of predicted over measured time. What holds afterwards: coefficients that the runs say
nothing about have their priors; runs that the others contradict are flagged and do not count.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from placement.inputs.coefficients import DEFAULTS
from placement.inputs.machine import Coefficient, Machine
from placement.measure.calibrate.design import FloatArray, make_design
from placement.measure.calibrate.features import TimingRow
from placement.measure.calibrate.fit_problem import UNIDENTIFIED, FitProblem
from placement.measure.calibrate.outliers import Outlier, scale_of, without_doubtful
from placement.measure.calibrate.parameters import Parameter, full_names, parameters
from placement.predict.terms import DECODE, OVERLAP, Phase, coefficient


@dataclass(frozen=True, slots=True)
class RunError:
    """How far a run's prediction was off, as a share of the measured time: before any run, and by the others."""

    run: str
    kind: str
    label: str
    measured_s: float
    before: float
    after: float | None  # None: it is the only run
    is_counted: bool = True  # a disturbed round of a run does not count, its others do


@dataclass(frozen=True)
class Calibration:
    """Coefficients of one kind: values by name, standard deviations, and the share of each prior's spread left.

    `x` and `covariance` are in the fit's own terms (logarithms where a parameter is_log).
    """

    kind: Phase
    parameters: tuple[Parameter, ...]
    known: dict[str, float]
    x: FloatArray
    covariance: FloatArray
    left: dict[str, float]
    n_samples: dict[str, int]
    errors: tuple[RunError, ...]
    outliers: tuple[Outlier, ...]
    n_rows: int
    n_runs: int
    n_directions: int

    @property
    def values(self) -> dict[str, float]:
        """The coefficients by name."""
        return {
            each.name: float(math.exp(value) if each.is_log else max(value, 0.0))
            for each, value in zip(self.parameters, self.x, strict=True)
        }

    @property
    def uncertainties(self) -> dict[str, float]:
        """Standard deviations by name, in the coefficient's unit."""
        spread = np.sqrt(np.diag(self.covariance))
        values = self.values
        return {
            each.name: float(sd * values[each.name] if each.is_log else sd)
            for each, sd in zip(self.parameters, spread, strict=True)
        }

    @property
    def unidentified(self) -> tuple[str, ...]:
        """Names of the coefficients that keep their priors."""
        return tuple(name for name, left in self.left.items() if left > UNIDENTIFIED)

    def predict(self, rows: Sequence[TimingRow]) -> tuple[FloatArray, FloatArray]:
        """(seconds, standard deviation as a share) of placements, run or not."""
        design = make_design(rows, self.parameters, self.known)
        seconds, slope = design.seconds(self.x)
        share = slope / seconds[:, None]
        return seconds, np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", share, self.covariance, share), 0.0))

    def gradients(self, rows: Sequence[TimingRow]) -> FloatArray:
        """How the logarithm of each row's time changes with each parameter."""
        seconds, slope = make_design(rows, self.parameters, self.known).seconds(self.x)
        return slope / seconds[:, None]

    def coefficient(self, name: str, date: str) -> Coefficient:
        """A coefficient as the machine file keeps it."""
        unit = next(each.unit for each in self.parameters if each.name == name)
        return Coefficient(
            value=float(f"{self.values[name]:.6g}"),
            unit=unit,
            source="calibrated",
            date=date,
            n_samples=self.n_samples[name],
            uncertainty=float(f"{self.uncertainties[name]:.3g}"),
        )


def calibrate(
    machine: Machine,
    rows: Sequence[TimingRow],
    kind: Phase = DECODE,
    known: Mapping[str, float] | None = None,
    with_errors: bool = True,
    is_trusted: bool = False,
) -> Calibration:
    """Fit the coefficients of one kind to its rows; `known` are values fitted before, of other kinds.

    Without rows every coefficient keeps its prior. `with_errors` adds each run's error, fitted without it.
    `is_trusted`: no run is left out because the others contradict it.
    """
    mine = [row for row in rows if row.kind == kind and row.measured_s]
    unknowns = parameters(machine, kind)
    values = _known_values(machine, unknowns, known or {})
    problem = FitProblem(unknowns, values, kind)
    kept, outliers = (mine, []) if is_trusted else without_doubtful(problem, mine)
    problem.scale = scale_of(problem, kept)
    x, covariance, left = problem.solve_identified(kept)
    return Calibration(
        kind=kind,
        parameters=unknowns,
        known=values,
        x=x,
        covariance=covariance,
        left=dict(zip((each.name for each in unknowns), map(float, left), strict=True)),
        n_samples=_samples(kept, unknowns),
        errors=tuple(_errors(problem, mine, kept, x)) if with_errors else (),
        outliers=tuple(outliers),
        n_rows=len(kept),
        n_runs=len({row.run for row in kept}),
        n_directions=problem.n_directions(kept, x),
    )


def _known_values(
    machine: Machine, unknowns: Sequence[Parameter], known: Mapping[str, float]
) -> dict[str, float]:
    """The machine's values of all coefficients that are not fitted: a row may have any."""
    names = set(full_names(machine, tuple(DEFAULTS))) - {each.name for each in unknowns}
    return {name: known[name] if name in known else coefficient(machine, name) for name in sorted(names)}


def _samples(rows: Sequence[TimingRow], unknowns: Sequence[Parameter]) -> dict[str, int]:
    """How many runs each coefficient has a part in."""
    runs: dict[str, set[str]] = {each.name: set() for each in unknowns}
    for row in rows:
        for term in row.terms:
            for name, _ in term.powers:
                if name in runs:
                    runs[name].add(row.run)
        if row.n_copies > 1 and OVERLAP in runs:
            runs[OVERLAP].add(row.run)
    return {name: len(result) for name, result in runs.items()}


def _errors(
    problem: FitProblem, rows: Sequence[TimingRow], kept: Sequence[TimingRow], x: FloatArray
) -> list[RunError]:
    """Each row's error with the priors, and with what all other runs teach."""
    if not rows:
        return []
    before, _ = problem.design(rows).seconds(problem.start)
    counted = set(map(id, kept))
    after: dict[str, FloatArray] = {}
    for run in dict.fromkeys(row.run for row in rows):
        others = [row for row in kept if row.run != run]
        if others:
            y, _, _ = problem.solve_identified(others)
            after[run] = y
    return [
        _error(problem, row, float(before[i]), after.get(row.run), id(row) in counted)
        for i, row in enumerate(rows)
    ]


def _error(
    problem: FitProblem, row: TimingRow, before_s: float, others: FloatArray | None, is_counted: bool
) -> RunError:
    measured = row.measured_s or 1.0
    after = None if others is None else float(problem.design([row]).seconds(others)[0][0]) / measured - 1.0
    return RunError(row.run, row.kind, row.label, measured, before_s / measured - 1.0, after, is_counted)


def with_values(machine: Machine, *fits: Calibration) -> Machine:
    """The machine with the fits' values, to predict with; nothing is kept of what was there."""
    values = {name: Coefficient(value, "") for fit in fits for name, value in fit.values.items()}
    return replace(machine, coefficients={**machine.coefficients, **values})
