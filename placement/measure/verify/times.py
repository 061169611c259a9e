"""Several measured times of the same work → the one that is believed; what disturbs a machine makes it slower."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence

MEDIAN_OFF = 0.6745  # of a normal distribution with a standard deviation of 1
DISTURBED = 0.1  # a round so much slower than the middle one says nothing of a placement


def undisturbed(seconds: Sequence[float]) -> float:
    """The tenth percentile of the repeats of one request: of three nearly the least, of many no lucky one.

    On a quiet machine it is their median within a per cent; where other work comes and goes, medians of the same
    placement differ by tens of per cent from start to start, and these by a few.

    Raises:
        ValueError: there are none.
    """
    if not seconds:
        raise ValueError("no repeats have no time")
    if len(seconds) == 1:
        return seconds[0]
    return statistics.quantiles(seconds, n=10, method="inclusive")[0]


def middle(seconds: Sequence[float]) -> float:
    """The mean of the rounds near the middle one; of two that differ much it is the faster.

    Raises:
        ValueError: there are none.
    """
    if not seconds:
        raise ValueError("no rounds have no middle")
    usual = sorted(seconds)[(len(seconds) - 1) // 2]
    return statistics.fmean(each for each in seconds if abs(each / usual - 1.0) <= DISTURBED)


def usual_spread(off: Iterable[float]) -> float:
    """The standard deviation of which these distances from the middle, in its unit, are the usual ones.

    Raises:
        ValueError: there are none.
    """
    return statistics.median(off) / MEDIAN_OFF
