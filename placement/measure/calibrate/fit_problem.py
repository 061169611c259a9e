"""Parameters and rows → the best parameters: robust, non-negative least squares pulled towards the priors.

Residuals are logarithms of predicted over measured time.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.measure.calibrate.design import Design, FloatArray, make_design, prior_precision, prior_start
from placement.measure.calibrate.features import TimingRow
from placement.measure.calibrate.parameters import Parameter
from placement.predict.terms import OVERLAP, Phase

MODEL_NOISE: dict[Phase, float] = {
    "decode": 0.02,
    "prompt": 0.05,
}  # what the model itself is off by, as a share
UNIDENTIFIED = 0.9  # of the prior's spread is left: the runs say nothing
ROBUST_SCALES = (30.0, 8.0, 2.5)  # residuals beyond so many standard deviations lose their pull


@dataclass
class FitProblem:
    """Parameters with their priors, and how to solve for them.

    `scale`: how many times as far as their noise the rows lie from what explains them best.
    """

    parameters: tuple[Parameter, ...]
    known: dict[str, float]
    kind: Phase

    def __post_init__(self) -> None:
        self.start = prior_start(self.parameters)
        self.precision = prior_precision(self.parameters)
        self.lower = np.array([-np.inf if each.is_log else 0.0 for each in self.parameters])
        self.upper = np.array([0.0 if each.name == OVERLAP else np.inf for each in self.parameters])
        self.scale = 1.0

    def design(self, rows: Sequence[TimingRow]) -> Design:
        """The rows' terms as matrices."""
        return make_design(rows, self.parameters, self.known)

    def sigma(self, rows: Sequence[TimingRow]) -> FloatArray:
        """What each row's time is off by, as a share."""
        return self.scale * np.array([math.hypot(MODEL_NOISE[self.kind], row.noise) for row in rows])

    def solve(
        self, rows: Sequence[TimingRow], free: FloatArray, start: FloatArray | None = None
    ) -> FloatArray:
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
        self,
        design: Design,
        measured: FloatArray,
        sigma: FloatArray,
        free: FloatArray,
        x: FloatArray,
        scale: float,
    ) -> FloatArray:
        from scipy.optimize import least_squares

        root = np.linalg.cholesky(self.precision).T
        at = np.flatnonzero(free)

        def full(part: FloatArray) -> FloatArray:
            whole = self.start.copy()
            whole[at] = part
            return whole

        def residuals(part: FloatArray) -> FloatArray:
            whole = full(part)
            seconds, _ = design.seconds(whole)
            off = (np.log(seconds) - measured) / sigma
            return np.concatenate([tamed(off, scale)[0], root @ (whole - self.start)])

        def jacobian(part: FloatArray) -> FloatArray:
            seconds, slope = design.seconds(full(part))
            off = (np.log(seconds) - measured) / sigma
            rows = slope / seconds[:, None] / sigma[:, None] * tamed(off, scale)[1][:, None]
            return np.concatenate([rows[:, at], root[:, at]])

        begin = np.clip(x[at], self.lower[at] + 1e-9, self.upper[at] - 1e-9)
        bounds = (self.lower[at], self.upper[at])
        result: Any = least_squares(
            residuals, begin, jacobian, bounds=bounds, xtol=1e-7, ftol=1e-7, max_nfev=60
        )
        return full(result.x)

    def information(self, rows: Sequence[TimingRow], x: FloatArray) -> FloatArray:
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

    def solve_identified(self, rows: Sequence[TimingRow]) -> tuple[FloatArray, FloatArray, FloatArray]:
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

    def n_directions(self, rows: Sequence[TimingRow], x: FloatArray) -> int:
        """Combinations of the parameters that the rows tell better than the priors do."""
        root = np.linalg.cholesky(np.linalg.inv(self.precision))
        values = np.linalg.svd(root.T @ self.information(rows, x) @ root, compute_uv=False)
        return int((values > 1.0).sum())

    def cost(self, rows: Sequence[TimingRow], x: FloatArray) -> float:
        """How badly the parameters fit rows and priors together, doubtful rows counting less."""
        off = x - self.start
        result = float(off @ self.precision @ off)
        if not rows:
            return result
        measured = np.log([row.measured_s or 1.0 for row in rows])
        gaps = (np.log(self.design(rows).seconds(x)[0]) - measured) / self.sigma(rows)
        return result + float((tamed(gaps, ROBUST_SCALES[-1])[0] ** 2).sum())


def tamed(off: FloatArray, scale: float) -> tuple[FloatArray, FloatArray]:
    """Residuals whose squares grow like logarithms beyond `scale` (Cauchy), and their slopes."""
    ratio = (off / scale) ** 2
    size = scale * np.sqrt(np.log1p(ratio))
    tamed = np.where(ratio > 1e-12, np.sign(off) * size, off)
    slope = np.where(ratio > 1e-12, off / (1.0 + ratio) / np.where(ratio > 1e-12, tamed, 1.0), 1.0)
    return tamed, slope
