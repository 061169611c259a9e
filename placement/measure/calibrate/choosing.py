"""Fits and proposed placements → which few to run next, and whether running more is worth it.

A proposal is worth running when it is predicted best, or when its times would tell most about the proposals that
may still be best: the expected fall of their turns' variance, those near the best counting more.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from placement.measure.calibrate.design import FloatArray
from placement.measure.calibrate.features import TimingRow
from placement.measure.calibrate.fit import Calibration
from placement.measure.calibrate.fit_problem import MODEL_NOISE
from placement.measure.verify.times import middle
from placement.predict.terms import DECODE

NEAR = 0.1  # a turn so much slower than the best predicted counts less by a factor e
NEAR_BEST = 0.03  # what takes at most so much more than the best turn is run again beside it
SURPRISE, SURPRISE_Z = 0.1, 1.0  # slower than predicted by so much, and by so many spreads
MEANT = 0.01  # how well the turns to choose from shall be known
CLEAR = 2.5  # middles that lie so many times their spread apart are told apart
MOST_AGAIN = 4  # runs repeated
LEAST_ROUNDS, MOST_ROUNDS, MORE_ROUNDS = 2, 12, 2
LEAST_RUNS = 4  # before anything is decided
MOST_NOISE = 0.05  # a machine too busy to tell turns apart has decided nothing
SLOWEST = 3.0  # a run that takes so many times the best turn is not worth its time


@dataclass(frozen=True)
class Proposal:
    """A placement that could be run: its token and its prompt, and how many tokens a turn generates."""

    key: str
    decode: TimingRow
    prompt: TimingRow
    generate_tokens: int


@dataclass(frozen=True)
class TurnForecast:
    """The predicted turn of each proposal, in seconds, its standard deviation as a share, and its gradients."""

    turns_s: FloatArray
    spreads: FloatArray
    decode_s: FloatArray
    prompt_s: FloatArray
    slopes: FloatArray  # of the turn's logarithm, by all parameters of both fits
    covariance: FloatArray


def forecast_turns(fits: tuple[Calibration, Calibration], proposals: Sequence[Proposal]) -> TurnForecast:
    """What the fits say of the proposals' turns."""
    decode_fit, prompt_fit = fits
    decode_s, _ = decode_fit.predict([each.decode for each in proposals])
    prompt_s, _ = prompt_fit.predict([each.prompt for each in proposals])
    generating_s = decode_s * np.array([each.generate_tokens for each in proposals])
    turns_s = generating_s + prompt_s
    slopes = np.hstack(
        [
            decode_fit.gradients([each.decode for each in proposals]) * (generating_s / turns_s)[:, None],
            prompt_fit.gradients([each.prompt for each in proposals]) * (prompt_s / turns_s)[:, None],
        ]
    )
    n = len(decode_fit.parameters)
    covariance = np.zeros((slopes.shape[1], slopes.shape[1]))
    covariance[:n, :n], covariance[n:, n:] = decode_fit.covariance, prompt_fit.covariance
    spreads = np.sqrt(np.maximum(np.einsum("ij,jk,ik->i", slopes, covariance, slopes), 0.0))
    return TurnForecast(turns_s, spreads, decode_s, prompt_s, slopes, covariance)


def choose_runs(
    fits: tuple[Calibration, Calibration],
    proposals: Sequence[Proposal],
    measured: Mapping[str, float],
    n: int = 2,
) -> list[Proposal]:
    """At most `n` proposals not measured yet: the one predicted best first, then those that tell most."""
    result = forecast_turns(fits, proposals)
    open_ = [i for i, each in enumerate(proposals) if each.key not in measured]
    if not open_:
        return []
    best_s = float(result.turns_s.min())
    first = min(open_, key=lambda i: float(result.turns_s[i]))
    picked, covariance = [first], _after(fits, result, first, result.covariance, proposals)
    while len(picked) < n:
        rest = [i for i in open_ if i not in picked and result.turns_s[i] <= SLOWEST * best_s]
        if not rest:
            break
        gains = {i: _gain(fits, result, i, covariance, proposals) for i in rest}
        top = max(rest, key=lambda i: gains[i])
        picked.append(top)
        covariance = _after(fits, result, top, covariance, proposals)
    return [proposals[i] for i in picked]


def _gain(
    fits: tuple[Calibration, Calibration],
    result: TurnForecast,
    i: int,
    covariance: FloatArray,
    proposals: Sequence[Proposal],
) -> float:
    """How much a run of proposal i lowers the variance of the turns that matter."""
    after = _after(fits, result, i, covariance, proposals)
    fall = np.einsum("ij,jk,ik->i", result.slopes, covariance - after, result.slopes)
    weights = np.exp(-(result.turns_s / result.turns_s.min() - 1.0) / NEAR)
    return float((weights * fall).sum())


def _after(
    fits: tuple[Calibration, Calibration],
    result: TurnForecast,
    i: int,
    covariance: FloatArray,
    proposals: Sequence[Proposal],
) -> FloatArray:
    """The covariance once proposal i is run: its token's and its prompt's time are both measured."""
    n = len(fits[0].parameters)
    rows = np.zeros((2, covariance.shape[0]))
    rows[0, :n] = fits[0].gradients([proposals[i].decode])[0]
    rows[1, n:] = fits[1].gradients([proposals[i].prompt])[0]
    noise = np.diag([MODEL_NOISE[fit.kind] ** 2 for fit in fits])
    gain = covariance @ rows.T @ np.linalg.inv(rows @ covariance @ rows.T + noise)
    return covariance - gain @ rows @ covariance


def is_converged(
    fits: tuple[Calibration, Calibration],
    proposals: Sequence[Proposal],
    measured: Mapping[str, float],
    noise: float,
) -> bool:
    """Whether the best measured turn is within the noise of the best predicted of those not measured.

    What is predicted with a spread, the model's own error included, counts as one spread better: a chance worth
    taking is taken. What was measured once counts halfway to what the fits make of all runs: the best of several
    was lucky, too. Before LEAST_RUNS the spreads themselves are guesses.
    """
    open_ = [i for i, each in enumerate(proposals) if each.key not in measured]
    if len(measured) < LEAST_RUNS or not open_:
        return bool(measured) and not open_
    result = forecast_turns(fits, proposals)
    hoped_s = min(
        float(result.turns_s[i]) * (1.0 - math.hypot(float(result.spreads[i]), MODEL_NOISE[DECODE]))
        for i in open_
    )
    predicted = {each.key: float(result.turns_s[i]) for i, each in enumerate(proposals)}
    best_s = min(math.sqrt(seconds * predicted.get(key, seconds)) for key, seconds in measured.items())
    return best_s <= hoped_s * (1.0 + min(noise, MOST_NOISE))


def worth_again(
    rounds_s: Mapping[str, Sequence[float]], predicted_s: Mapping[str, float], noise: float
) -> list[str]:
    """Runs to repeat before choosing, the likeliest to be the fastest first; `noise` is what one round is off by.

    Of those that had one round, what measured nearly the best, and what would have by the fits of all runs, had it
    not been disturbed. Of those that had more, what their middles do not tell from the best.
    """
    middle_s, hoped_s, near = dict[str, float](), dict[str, float](), dict[str, float]()
    for run, rounds in rounds_s.items():
        turn_s, n = middle(rounds), len(rounds)
        said_s = predicted_s.get(run, turn_s) if n == 1 else turn_s
        middle_s[run], hoped_s[run] = math.sqrt(turn_s * said_s), min(turn_s, said_s)
        near[run] = NEAR_BEST + noise if n == 1 else CLEAR * noise * math.sqrt(2.0 / n)
    best_s = min(middle_s.values(), default=0.0)
    results = [run for run in rounds_s if hoped_s[run] <= best_s * (1.0 + near[run])]
    return sorted(results, key=lambda run: middle_s[run])[:MOST_AGAIN]


def surprising(
    fits: tuple[Calibration, Calibration], proposals: Sequence[Proposal], turns_s: Mapping[str, float]
) -> list[Proposal]:
    """Those that ran clearly slower than was predicted: run once more before anything is learned from them."""
    known = [each for each in proposals if math.isfinite(turns_s.get(each.key, math.inf))]
    if not known:
        return []
    result = forecast_turns(fits, known)
    slower = [math.log(turns_s[each.key] / float(result.turns_s[i])) for i, each in enumerate(known)]
    spreads = [math.hypot(float(spread), MODEL_NOISE[DECODE]) for spread in result.spreads]
    return [each for i, each in enumerate(known) if slower[i] > max(SURPRISE, SURPRISE_Z * spreads[i])]


def rounds_to_tell(noise: float) -> int:
    """Rounds after which a turn is known within MEANT, `noise` being what one round is off by: two to twelve."""
    return min(MOST_ROUNDS, max(LEAST_ROUNDS, math.ceil((noise / MEANT) ** 2)))
