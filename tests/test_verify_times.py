"""Several measured times of the same work, and the one that is believed."""

from __future__ import annotations

import random

import pytest

from placement.verify.times import middle, undisturbed


@pytest.mark.parametrize(
    ("seconds", "expected"), [([2.0], 2.0), ([3.0, 1.0, 2.0], 1.2), ([float(i) for i in range(1, 12)], 2.0)]
)
def test_it_is_the_tenth_percentile(seconds: list[float], expected: float) -> None:
    """Of one the one, of three nearly the least, of eleven the second."""
    assert undisturbed(seconds) == pytest.approx(expected)


def test_what_comes_and_goes_does_not_move_it() -> None:
    """Forty starts in which a third to two thirds of the repeats are held up differ by a few per cent."""
    found = []
    for seed in range(40):
        rng = random.Random(seed)
        held_up = rng.uniform(0.3, 0.7)
        found.append(
            undisturbed(
                [
                    rng.gauss(1.0, 0.01) + (rng.expovariate(2) if rng.random() < held_up else 0)
                    for _ in range(12)
                ]
            )
        )
    assert max(found) / min(found) <= 1.06


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
