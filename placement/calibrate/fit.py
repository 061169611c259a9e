"""Rows → coefficients: robust, non-negative least squares pulled towards the priors, and what is known after it.

Residuals are logarithms of predicted over measured time. What holds afterwards: coefficients that the runs say
nothing about have their priors; runs that the others contradict are flagged and do not count.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from placement.calibrate.design import Array, Design, make_design, prior_precision, prior_start
from placement.calibrate.features import Row, coefficient_value
from placement.calibrate.parameters import DECODE, Parameter, parameters
from placement.machine import Coefficient, Machine

MODEL_NOISE = {"decode": 0.02, "prompt": 0.05}  # what the model itself is off by, as a share
UNIDENTIFIED = 0.9  # of the prior's spread is left: the runs say nothing
ROBUST_SCALES = (30.0, 8.0, 2.5)  # residuals beyond so many standard deviations lose their pull
OUTLIER_Z, OUTLIER_SHARE = 4.0, 0.10
MOST_OUTLIERS = 1 / 3  # of the runs
LEAST_RUNS_TO_DOUBT = 4
FEW_RUNS_Z = 4.5  # with fewer, only what cannot be believed beside the priors is doubted
MEDIAN_Z = 0.6745  # of a normal distribution


@dataclass(frozen=True, slots=True)
class RunError:
    """How far a run's prediction was off, as a share of the measured time: before any run, and by the others."""

    run: str
    kind: str
    label: str
    measured_s: float
    before: float
    after: float | None  # None: it is the only run
    is_counted: bool = True


@dataclass(frozen=True, slots=True)
class Outlier:
    """A run that does not count, and why; `ratio` is measured over what the others predict."""

    run: str
    kind: str
    label: str
    ratio: float
    reason: str


@dataclass(frozen=True)
class Calibration:
    """Coefficients of one kind: values by name, standard deviations, and the share of each prior's spread left.

    `x` and `covariance` are in the fit's own terms (logarithms where a parameter is_log).
    """

    kind: str
    parameters: tuple[Parameter, ...]
    known: dict[str, float]
    x: Array
    covariance: Array
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

    def predict(self, rows: Sequence[Row]) -> tuple[Array, Array]:
        """(seconds, standard deviation as a share) of placements, run or not."""
        design = make_design(rows, self.parameters, self.known)
        seconds, slope = design.seconds(self.x)
        share = slope / seconds[:, None]
        return seconds, np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", share, self.covariance, share), 0.0))

    def gradients(self, rows: Sequence[Row]) -> Array:
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
    rows: Sequence[Row],
    kind: str = DECODE,
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
    values = _known_values(machine, mine, unknowns, known or {})
    problem = _Problem(unknowns, values, kind)
    kept, outliers = (mine, []) if is_trusted else problem.without_doubtful(mine)
    x, covariance, left = problem.solve_identified(kept)
    return Calibration(
        kind=kind,
        parameters=unknowns,
        known=values,
        x=x,
        covariance=covariance,
        left=dict(zip((each.name for each in unknowns), map(float, left), strict=True)),
        n_samples=_samples(kept, unknowns),
        errors=tuple(problem.errors(mine, kept, x)) if with_errors else (),
        outliers=tuple(outliers),
        n_rows=len(kept),
        n_runs=len({row.run for row in kept}),
        n_directions=problem.n_directions(kept, x),
    )


def _known_values(
    machine: Machine, rows: Sequence[Row], unknowns: Sequence[Parameter], known: Mapping[str, float]
) -> dict[str, float]:
    """The machine's values of what is not fitted: those that a row may have, all coefficients of both kinds."""
    names = {name for row in rows for term in row.terms for name, _ in term.powers}
    for kind in ("decode", "prompt"):
        names |= {each.name for each in parameters(machine, kind)}
    names -= {each.name for each in unknowns}
    names.add("rpc_split_us")
    return {
        name: known[name] if name in known else coefficient_value(machine, name) for name in sorted(names)
    }


def _samples(rows: Sequence[Row], unknowns: Sequence[Parameter]) -> dict[str, int]:
    """How many runs each coefficient has a part in."""
    runs: dict[str, set[str]] = {each.name: set() for each in unknowns}
    for row in rows:
        for term in row.terms:
            for name, _ in term.powers:
                if name in runs:
                    runs[name].add(row.run)
        if row.n_copies > 1 and "pipeline_overlap" in runs:
            runs["pipeline_overlap"].add(row.run)
    return {name: len(found) for name, found in runs.items()}


@dataclass
class _Problem:
    """Parameters with their priors, and how to solve for them."""

    parameters: tuple[Parameter, ...]
    known: dict[str, float]
    kind: str

    def __post_init__(self) -> None:
        self.start = prior_start(self.parameters)
        self.precision = prior_precision(self.parameters)
        self.lower = np.array([-np.inf if each.is_log else 0.0 for each in self.parameters])

    def design(self, rows: Sequence[Row]) -> Design:
        return make_design(rows, self.parameters, self.known)

    def sigma(self, rows: Sequence[Row]) -> Array:
        return np.array([math.hypot(MODEL_NOISE[self.kind], row.noise) for row in rows])

    def solve(self, rows: Sequence[Row], free: Array, start: Array | None = None) -> Array:
        """The best parameters, those not `free` at their priors."""
        x = np.where(free, self.start if start is None else start, self.start)
        if not rows or not free.any():
            return x
        design, sigma = self.design(rows), self.sigma(rows)
        measured = np.array([math.log(row.measured_s or 1.0) for row in rows])
        scales = ROBUST_SCALES if start is None else ROBUST_SCALES[-1:]
        for scale in scales:
            x = self._minimised(design, measured, sigma, free, x, scale)
        return x

    def _minimised(
        self, design: Design, measured: Array, sigma: Array, free: Array, x: Array, scale: float
    ) -> Array:
        from scipy.optimize import least_squares

        root = np.linalg.cholesky(self.precision).T
        at = np.flatnonzero(free)

        def full(part: Array) -> Array:
            whole = self.start.copy()
            whole[at] = part
            return whole

        def residuals(part: Array) -> Array:
            whole = full(part)
            seconds, _ = design.seconds(whole)
            off = (np.log(seconds) - measured) / sigma
            return np.concatenate([_tamed(off, scale)[0], root @ (whole - self.start)])

        def jacobian(part: Array) -> Array:
            seconds, slope = design.seconds(full(part))
            off = (np.log(seconds) - measured) / sigma
            rows = slope / seconds[:, None] / sigma[:, None] * _tamed(off, scale)[1][:, None]
            return np.concatenate([rows[:, at], root[:, at]])

        begin = np.maximum(x[at], self.lower[at] + 1e-9)
        bounds = (self.lower[at], np.full(len(at), np.inf))
        found: Any = least_squares(
            residuals, begin, jacobian, bounds=bounds, xtol=1e-7, ftol=1e-7, max_nfev=60
        )
        return full(found.x)

    def information(self, rows: Sequence[Row], x: Array) -> Array:
        """What the rows add to the precision, doubtful ones less."""
        if not rows:
            return np.zeros_like(self.precision)
        seconds, slope = self.design(rows).seconds(x)
        sigma = self.sigma(rows)
        measured = np.array([row.measured_s or 1.0 for row in rows])
        off = (np.log(seconds) - np.log(measured)) / sigma
        weight = 1.0 / (1.0 + (off / ROBUST_SCALES[-1]) ** 2) / sigma**2
        share = slope / seconds[:, None]
        return np.asarray(share.T @ (weight[:, None] * share))

    def solve_identified(self, rows: Sequence[Row]) -> tuple[Array, Array, Array]:
        """(parameters, covariance, share of each prior's spread left), what stays unknown at its prior."""
        free = np.ones(len(self.parameters), dtype=bool)
        x = self.solve(rows, free)
        covariance = np.linalg.inv(self.precision + self.information(rows, x))
        spread = np.sqrt(np.diag(np.linalg.inv(self.precision)))
        left = np.sqrt(np.diag(covariance)) / spread
        known = left <= UNIDENTIFIED
        if rows and not known.all():
            x = self.solve(rows, known, x)
        return x, covariance, left

    def n_directions(self, rows: Sequence[Row], x: Array) -> int:
        """Combinations of the parameters that the rows tell better than the priors do."""
        root = np.linalg.cholesky(np.linalg.inv(self.precision))
        values = np.linalg.svd(root.T @ self.information(rows, x) @ root, compute_uv=False)
        return int((values > 1.0).sum())

    def without_doubtful(self, rows: Sequence[Row]) -> tuple[list[Row], list[Outlier]]:
        """The rows that count, and the runs that do not: they say so themselves, or the others contradict."""
        kept = [row for row in rows if not row.doubt]
        outliers = [self._told(row) for row in rows if row.doubt]
        most = max(1, round(len({row.run for row in kept}) * MOST_OUTLIERS))
        for _ in range(most):
            worst = self._worst(kept)
            if worst is None:
                break
            outliers.append(worst)
            kept = [row for row in kept if row.run != worst.run]
        return kept, outliers

    def _told(self, row: Row) -> Outlier:
        seconds, _ = self.design([row]).seconds(self.start)
        return Outlier(row.run, row.kind, row.label, (row.measured_s or 0.0) / float(seconds[0]), row.doubt)

    def _worst(self, rows: Sequence[Row]) -> Outlier | None:
        """The run that the others, and what is believed without any, contradict most, if they clearly do.

        Where all runs lie farther from what the others say than their noise, that is how far a run may lie.
        """
        gaps = self._gaps(rows)
        if not gaps:
            return None
        usual = max(1.0, statistics.median(each.z for each in gaps) / MEDIAN_Z) if len(gaps) > 2 else 1.0
        least_z = (OUTLIER_Z if len(gaps) >= LEAST_RUNS_TO_DOUBT else FEW_RUNS_Z) * usual
        if len(gaps) < LEAST_RUNS_TO_DOUBT:
            gaps = [each for each in gaps if each.log_ratio > 0]  # nothing disturbs a run into being fast
        doubted = [each for each in gaps if each.z > least_z and abs(each.log_ratio) > OUTLIER_SHARE]
        worst = max(doubted, key=lambda each: each.z, default=None)
        return None if worst is None else _contradicted(worst.row, math.exp(worst.log_ratio))

    def _gaps(self, rows: Sequence[Row]) -> list[_Gap]:
        """For each run its row farthest from what the others predict, by one Gauss-Newton step without it."""
        if not rows:
            return []
        x = self.solve(rows, np.ones(len(self.parameters), dtype=bool))
        whole, found = self.precision + self.information(rows, x), []
        for run in dict.fromkeys(row.run for row in rows):
            mine = [row for row in rows if row.run == run]
            measured = np.log([row.measured_s or 1.0 for row in mine])
            covariance = np.linalg.inv(whole - self.information(mine, x))
            seconds, slope = self.design(mine).seconds(x)
            share, sigma = slope / seconds[:, None], self.sigma(mine)
            off = np.log(seconds) - measured
            weight = 1.0 / (1.0 + (off / sigma / ROBUST_SCALES[-1]) ** 2) / sigma**2
            others = np.maximum(x + covariance @ (share.T @ (weight * off)), self.lower)
            spread = np.sqrt(np.einsum("ij,jk,ik->i", share, covariance, share) + sigma**2)
            gap = measured - np.log(self.design(mine).seconds(others)[0])
            i = int(np.argmax(np.abs(gap) / spread))
            found.append(_Gap(mine[i], float(gap[i]), abs(float(gap[i])) / float(spread[i])))
        return found

    def errors(self, rows: Sequence[Row], kept: Sequence[Row], x: Array) -> list[RunError]:
        """Each row's error with the priors, and with what all other runs teach."""
        if not rows:
            return []
        before, _ = self.design(rows).seconds(self.start)
        counted = {row.run for row in kept}
        after: dict[str, Array] = {}
        for run in dict.fromkeys(row.run for row in rows):
            others = [row for row in kept if row.run != run]
            if others:
                y, _, _ = self.solve_identified(others)
                after[run] = y
        return [
            self._error(row, float(before[i]), after.get(row.run), row.run in counted)
            for i, row in enumerate(rows)
        ]

    def _error(self, row: Row, before_s: float, others: Array | None, is_counted: bool) -> RunError:
        measured = row.measured_s or 1.0
        after = None if others is None else float(self.design([row]).seconds(others)[0][0]) / measured - 1.0
        return RunError(row.run, row.kind, row.label, measured, before_s / measured - 1.0, after, is_counted)


@dataclass(frozen=True, slots=True)
class _Gap:
    """How far a row's measured time lies from what other runs say, as a logarithm and in standard deviations."""

    row: Row
    log_ratio: float
    z: float


def _contradicted(row: Row, ratio: float) -> Outlier:
    if ratio > 1:
        reason = f"{ratio - 1:.0%} slower than the other runs say: a hot or busy machine?"
    else:
        reason = f"{1 - ratio:.0%} faster than the other runs say: was something else measured?"
    return Outlier(row.run, row.kind, row.label, ratio, reason)


def _tamed(off: Array, scale: float) -> tuple[Array, Array]:
    """Residuals whose squares grow like logarithms beyond `scale` (Cauchy), and their slopes."""
    ratio = (off / scale) ** 2
    size = scale * np.sqrt(np.log1p(ratio))
    tamed = np.where(ratio > 1e-12, np.sign(off) * size, off)
    slope = np.where(ratio > 1e-12, off / (1.0 + ratio) / np.where(ratio > 1e-12, tamed, 1.0), 1.0)
    return tamed, slope


def with_values(machine: Machine, *fits: Calibration) -> Machine:
    """The machine with the fits' values, to predict with; nothing is kept of what was there."""
    values = {name: Coefficient(value, "") for fit in fits for name, value in fit.values.items()}
    return replace(machine, coefficients={**machine.coefficients, **values})
