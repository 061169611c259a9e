"""Rows → those that count, and the runs that do not: hot, busy or swapping machines are flagged, not fitted.

A run is doubted where it says so itself, or where the others, and what is believed without any, clearly contradict
it. Where all runs lie farther from each other than their noise, that is how far a run may lie.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from placement.measure.calibrate.design import FloatArray
from placement.measure.calibrate.features import TimingRow
from placement.measure.calibrate.fit_problem import ROBUST_SCALES, FitProblem
from placement.measure.verify.times import usual_spread

OUTLIER_Z, OUTLIER_SHARE = 4.0, 0.10
MOST_OUTLIERS = 1 / 3  # of the runs
LEAST_RUNS_TO_DOUBT = 4
FEW_RUNS_Z = 3.5  # with fewer, only what cannot be believed beside the priors is doubted
LEAST_RUNS_TO_SCALE = 6
MOST_SOLVED = 8  # runs whose others are fitted anew each


@dataclass(frozen=True, slots=True)
class Outlier:
    """A run that does not count, and why; `ratio` is measured over what the others predict."""

    run: str
    kind: str
    label: str
    ratio: float
    reason: str


@dataclass(frozen=True, slots=True)
class _Gap:
    """How far a row's measured time lies from what other runs say, as a logarithm and in standard deviations;
    `cost`: how badly the others are explained without it."""

    row: TimingRow
    log_ratio: float
    z: float
    cost: float


def without_doubtful(problem: FitProblem, rows: Sequence[TimingRow]) -> tuple[list[TimingRow], list[Outlier]]:
    """The rows that count, and the runs that do not."""
    kept = [row for row in rows if not row.doubt]
    outliers = [_told(problem, row) for row in rows if row.doubt]
    most = max(1, round(len({row.run for row in kept}) * MOST_OUTLIERS))
    for _ in range(most):
        worst = _worst(problem, kept)
        if worst is None:
            break
        outliers.append(worst)
        kept = [row for row in kept if row.run != worst.run]
    return kept, outliers


def scale_of(problem: FitProblem, rows: Sequence[TimingRow]) -> float:
    """How many times as far as their noise rows lie from what the others say: one, or more with enough runs."""
    if len({row.run for row in rows}) < LEAST_RUNS_TO_SCALE:
        return 1.0
    return max(1.0, usual_spread(each.z for each in _gaps(problem, rows)))


def _told(problem: FitProblem, row: TimingRow) -> Outlier:
    seconds, _ = problem.design([row]).seconds(problem.start)
    return Outlier(row.run, row.kind, row.label, (row.measured_s or 0.0) / float(seconds[0]), row.doubt)


def _worst(problem: FitProblem, rows: Sequence[TimingRow]) -> Outlier | None:
    """The run that is contradicted most, if any is: of few runs the one without which the others, and what is
    believed, agree best."""
    gaps = _gaps(problem, rows)
    is_few = len(gaps) < LEAST_RUNS_TO_DOUBT
    doubted = [
        each
        for each in gaps
        if abs(each.log_ratio) > OUTLIER_SHARE and each.z > (FEW_RUNS_Z if is_few else OUTLIER_Z)
        if each.log_ratio > 0 or not is_few  # nothing disturbs a run into being fast
    ]
    if not doubted:
        return None
    is_solved = len(gaps) <= MOST_SOLVED
    worst = min(doubted, key=lambda each: each.cost) if is_solved else max(doubted, key=lambda each: each.z)
    if worst.z <= OUTLIER_Z * _usual_z(problem, [row for row in rows if row.run != worst.row.run]):
        return None
    return _contradicted(worst.row, math.exp(worst.log_ratio))


def _usual_z(problem: FitProblem, others: Sequence[TimingRow]) -> float:
    """How far, beside their noise, the other runs lie from each other; nothing where they are too few to tell."""
    gaps = _gaps(problem, others)
    if len(gaps) < LEAST_RUNS_TO_DOUBT - 1:
        return 0.0
    return max(1.0, usual_spread(each.z for each in gaps))


def _gaps(problem: FitProblem, rows: Sequence[TimingRow]) -> list[_Gap]:
    """For each run its row farthest from what the others predict."""
    if not rows:
        return []
    free, results = np.ones(len(problem.parameters), dtype=bool), []
    runs = list(dict.fromkeys(row.run for row in rows))
    x = problem.solve(rows, free) if len(runs) > MOST_SOLVED else None
    for run in runs:
        mine = [row for row in rows if row.run == run]
        rest = [row for row in rows if row.run != run]
        others = problem.solve(rest, free) if x is None else _stepped(problem, x, mine, rest)
        covariance = np.linalg.inv(problem.precision + problem.information(rest, others))
        seconds, slope = problem.design(mine).seconds(others)
        share = slope / seconds[:, None]
        spread = np.sqrt(np.einsum("ij,jk,ik->i", share, covariance, share) + problem.sigma(mine) ** 2)
        gap = np.log([row.measured_s or 1.0 for row in mine]) - np.log(seconds)
        i = int(np.argmax(np.abs(gap) / spread))
        z = abs(float(gap[i])) / float(spread[i])
        results.append(_Gap(mine[i], float(gap[i]), z, problem.cost(rest, others)))
    return results


def _stepped(
    problem: FitProblem, x: FloatArray, mine: Sequence[TimingRow], rest: Sequence[TimingRow]
) -> FloatArray:
    """What the rest says, by one Gauss-Newton step from what all say: many runs move little by one."""
    seconds, slope = problem.design(mine).seconds(x)
    share, sigma = slope / seconds[:, None], problem.sigma(mine)
    off = np.log(seconds) - np.log([row.measured_s or 1.0 for row in mine])
    weight = 1.0 / (1.0 + (off / sigma / ROBUST_SCALES[-1]) ** 2) / sigma**2
    covariance = np.linalg.inv(problem.precision + problem.information(rest, x))
    return np.asarray(np.clip(x + covariance @ (share.T @ (weight * off)), problem.lower, problem.upper))


def _contradicted(row: TimingRow, ratio: float) -> Outlier:
    if ratio > 1:
        reason = f"{ratio - 1:.0%} slower than the other runs say: a hot or busy machine?"
    else:
        reason = f"{1 - ratio:.0%} faster than the other runs say: was something else measured?"
    return Outlier(row.run, row.kind, row.label, ratio, reason)
