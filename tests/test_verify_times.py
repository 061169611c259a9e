"""Several measured times of the same work, and the one that is believed."""

from __future__ import annotations

import random
from types import SimpleNamespace

import pytest

from placement.measure.records.phase_names import CANARY, LONG, SHORT
from placement.measure.records.schema import Timing
from placement.measure.verify.phases import Visit
from placement.measure.verify.prompts import Asked
from placement.measure.verify.times import middle, undisturbed


@pytest.mark.parametrize(
    ("seconds", "expected"), [([2.0], 2.0), ([3.0, 1.0, 2.0], 1.2), ([float(i) for i in range(1, 12)], 2.0)]
)
def test_it_is_the_tenth_percentile(seconds: list[float], expected: float) -> None:
    """Of one the one, of three nearly the least, of eleven the second."""
    assert undisturbed(seconds) == pytest.approx(expected)


def test_what_comes_and_goes_does_not_move_it() -> None:
    """Forty starts in which a third to two thirds of the repeats are held up differ by a few per cent."""
    results = []
    for seed in range(40):
        rng = random.Random(seed)
        held_up = rng.uniform(0.3, 0.7)
        results.append(
            undisturbed(
                [
                    rng.gauss(1.0, 0.01) + (rng.expovariate(2) if rng.random() < held_up else 0)
                    for _ in range(12)
                ]
            )
        )
    assert max(results) / min(results) <= 1.06


@pytest.mark.parametrize(
    ("seconds", "expected"),
    [([5.0], 5.0), ([10.0, 10.4], 10.2), ([10.0, 13.0], 10.0), ([1.0, 1.02, 20.0, 0.98], 1.0)],
)
def test_a_disturbed_round_does_not_count(seconds: list[float], expected: float) -> None:
    """Rounds that are alike count alike; of two that differ the faster one does."""
    assert middle(seconds) == pytest.approx(expected)


@pytest.mark.parametrize("function", [middle, undisturbed])
def test_nothing_has_no_time(function: object) -> None:
    """An empty list is an error, not a zero."""
    with pytest.raises(ValueError, match="no "):
        function([])  # type: ignore[operator]


def visit_of(least_s: float) -> Visit:
    bench = SimpleNamespace(asked=Asked(repeats=3, least_s=least_s))
    return Visit(bench, candidate=None, round=1)  # type: ignore[arg-type]


def timings(*generate_s: float) -> dict[str, list[Timing]]:
    """The short prompt's repeats; the other phases took long enough once."""
    results = [Timing(n_prompt=1, prompt_s=0, n_generated=1, generate_s=each) for each in generate_s]
    once = [Timing(n_prompt=1, prompt_s=50, n_generated=1, generate_s=50)]
    return {SHORT: results, LONG: once, CANARY: once}


@pytest.mark.parametrize(
    ("generate_s", "is_enough"),
    [
        ((2.0, 2.0), False),  # three are asked for
        ((0.5, 0.5, 0.5), False),  # 1.5 of 3 s
        ((1.5, 1.5, 1.0), False),  # the fastest is alone
        ((1.5, 1.5, 1.0, 1.01), True),
        ((1.5, 2.5, 1.0, 1.7, 2.4), True),  # 9 s are enough
        ((0.05, 0.04, 0.03) * 8, True),  # so are 24 repeats
    ],
)
def test_repeats_end_when_the_fastest_agree(generate_s: tuple[float, ...], is_enough: bool) -> None:
    """After the seconds asked for if the two fastest repeats are alike, after three times as long anyway."""
    assert visit_of(3.0).is_measured(timings(*generate_s)) is is_enough


def test_a_long_prompt_is_not_repeated() -> None:
    """What takes a minute once is asked once."""
    assert visit_of(3.0).is_measured(timings(20.0, 20.0, 20.0))
