"""Rows → matrices: predicted seconds of all rows, and how they change with every parameter, at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from placement.inputs.coefficients import SERVED_BY
from placement.measure.calibrate.features import TimingRow
from placement.measure.calibrate.parameters import ALIKE, Parameter
from placement.predict.terms import GRAPH, OVERLAP, Powers

FloatArray = Any  # numpy.ndarray of floats


@dataclass(frozen=True)
class Design:
    """The rows' terms, collected: row i takes Σ_k fixed[i, k]·v_k and its stages Σ_k stages[s, k]·v_k, where v_k
    is a product of parameters."""

    parameters: tuple[Parameter, ...]
    log_powers: FloatArray  # (products, parameters), of those with is_log
    linear: FloatArray  # (products,): the parameter that a product is linear in, or -1
    fixed: FloatArray
    stages: FloatArray
    row_of_stage: FloatArray
    n_ubatches: FloatArray
    is_pipelined: FloatArray

    def seconds(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        """(seconds, their derivatives by x); x holds logarithms where a parameter is_log."""
        value, slope = self._products(x)
        total, total_slope = self.fixed @ value, self.fixed @ slope
        if not len(self.row_of_stage):
            return total, total_slope
        stage, stage_slope = self.stages @ value, self.stages @ slope
        weights, more = self._weights(x, stage)
        np.add.at(total, self.row_of_stage, weights * stage)
        np.add.at(total_slope, self.row_of_stage, weights[:, None] * stage_slope)
        at = self._index(OVERLAP)
        if at is not None:
            total_slope[:, at] += more * np.exp(x[at])
        return total, total_slope

    def _products(self, x: FloatArray) -> tuple[FloatArray, FloatArray]:
        is_linear = self.linear >= 0
        at = np.where(is_linear, self.linear, 0)
        rest = np.exp(self.log_powers @ x)
        value = np.where(is_linear, rest * x[at], rest)
        slope = value[:, None] * self.log_powers
        slope[is_linear, at[is_linear]] += rest[is_linear]
        return value, slope

    def _weights(self, x: FloatArray, stage: FloatArray) -> tuple[FloatArray, FloatArray]:
        """What of each stage counts (cost.pipelined_s), and the change of each row with the overlap."""
        n_rows = len(self.n_ubatches)
        longest = np.full(n_rows, -np.inf)
        np.maximum.at(longest, self.row_of_stage, stage)
        serial = np.zeros(n_rows)
        np.add.at(serial, self.row_of_stage, stage)
        at = self._index(OVERLAP)
        overlap = np.where(self.is_pipelined, np.exp(x[at]) if at is not None else 0.0, 0.0)
        hidden = overlap * (1.0 - 1.0 / self.n_ubatches)
        is_longest = stage >= longest[self.row_of_stage]
        n_longest = np.zeros(n_rows)
        np.add.at(n_longest, self.row_of_stage, is_longest)
        share = is_longest / np.maximum(n_longest, 1.0)[self.row_of_stage]
        weights = 1.0 - hidden[self.row_of_stage] + hidden[self.row_of_stage] * share
        is_known = np.isfinite(longest)
        gain = np.where(is_known, np.where(is_known, longest, 0.0) - serial, 0.0)
        return weights, np.where(self.is_pipelined, (1.0 - 1.0 / self.n_ubatches) * gain, 0.0)

    def _index(self, name: str) -> int | None:
        return next((i for i, each in enumerate(self.parameters) if each.name == name), None)


def make_design(
    rows: Sequence[TimingRow], parameters: tuple[Parameter, ...], known: Mapping[str, float]
) -> Design:
    """Collect the rows' terms; coefficients that are no parameters have their `known` values.

    Raises:
        KeyError: a coefficient is neither.
    """
    index = {each.name: i for i, each in enumerate(parameters)}
    products: dict[Powers, int] = {}
    fixed: list[tuple[int, int, float]] = []
    staged: list[tuple[int, int, float]] = []
    stages: dict[tuple[int, str], int] = {}
    for i, row in enumerate(rows):
        for term in row.terms:
            amount, powers = _reduced(term.amount, term.powers, index, known)
            k = products.setdefault(powers, len(products))
            if term.stage == GRAPH:
                fixed.append((i, k, amount))
            else:
                staged.append((stages.setdefault((i, term.stage), len(stages)), k, amount))
    log_powers, linear = _powers(products, parameters, index)
    return Design(
        parameters,
        log_powers,
        linear,
        _filled((len(rows), len(products)), fixed),
        _filled((len(stages), len(products)), staged),
        np.array([i for i, _ in stages], dtype=int),
        np.array([max(row.n_ubatches, 1) for row in rows], dtype=float),
        np.array([row.n_copies > 1 and row.n_ubatches > 1 for row in rows], dtype=bool),
    )


def _reduced(
    amount: float, powers: Powers, index: Mapping[str, int], known: Mapping[str, float]
) -> tuple[float, Powers]:
    kept = []
    for name, power in powers:
        if name in index:
            kept.append((name, power))
        else:
            amount *= known[name] ** power
    return amount, tuple(kept)


def _powers(
    products: Mapping[Powers, int], parameters: tuple[Parameter, ...], index: Mapping[str, int]
) -> tuple[FloatArray, FloatArray]:
    log_powers = np.zeros((len(products), len(parameters)))
    linear = np.full(len(products), -1)
    for powers, k in products.items():
        for name, power in powers:
            i = index[name]
            if parameters[i].is_log:
                log_powers[k, i] += power
            else:
                linear[k] = i
    return log_powers, linear


def _filled(shape: tuple[int, int], entries: Sequence[tuple[int, int, float]]) -> FloatArray:
    matrix = np.zeros(shape)
    for i, k, amount in entries:
        matrix[i, k] += amount
    return matrix


def prior_start(parameters: Sequence[Parameter]) -> FloatArray:
    """The priors as x: logarithms where a parameter is_log."""
    return np.array([np.log(each.prior) if each.is_log else each.prior for each in parameters])


def prior_precision(parameters: Sequence[Parameter]) -> FloatArray:
    """The inverse of the priors' covariance; the same coefficient of several devices is believed alike, but not
    what another serves for: how the host reads a cache tells nothing of cards."""
    spread = np.array([each.spread for each in parameters])
    covariance = np.diag(spread**2)
    for i, a in enumerate(parameters):
        for j, b in enumerate(parameters):
            is_alike = a.base == b.base and not {a.name, b.name} & SERVED_BY.keys()
            if i != j and is_alike and a.is_log and b.is_log:
                covariance[i, j] = ALIKE * spread[i] * spread[j]
    return np.linalg.inv(covariance)
