"""A lower bound and a good answer of a frame in milliseconds, without CP-SAT, both from its segments.

The bound allows fractions of moves and pays for space on other GPUs by a price; any price gives a bound, those
that the best cuts would pay give a good one. The answer moves nothing to another GPU and is the best of its kind
but for rare ties. What a bound rules out, CP-SAT need not search: `homes` says where each layer may still live.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf

import numpy as np

from placement.solve.cpsat.frame import CPU_POSITION, Answer, Frame, is_valid, times_us, used_kib
from placement.solve.cpsat.segments import BoundTerms, Segments, forward, marginal, path

MOST_PATHS = 150
HOST_PRICES = 12


@dataclass(frozen=True, slots=True)
class Relaxed:
    """`bound` is None when no answer can keep within the caps; `prices` are the bound's, per position."""

    bound: float | None
    prices: tuple[float, ...]


class Relaxation:
    """A frame under weights, with prices (microseconds per KiB) and fractions in place of caps."""

    def __init__(self, frame: Frame, decode_weight: int = 1, prompt_weight: int = 1) -> None:
        self.frame = frame
        self.weights = decode_weight, prompt_weight
        self.n_positions = len(frame.positions)
        # max(stages) is at least their mean, so pipelined prompt time is bounded by a sum
        n_stages = sum(any(table.choices[p] for table in frame.layers) for p in range(self.n_positions))
        self.overlap = 1.0 + frame.longest_permille / 1000 / max(n_stages, 1)
        fixed = decode_weight * frame.fixed_us[0] + prompt_weight * frame.fixed_us[1]
        self.constant = fixed - (prompt_weight if frame.longest_permille else 0)  # rounding down
        self.charged = frame.cap_kib
        for extra in frame.extras:
            self.charged = tuple(cap - kib for cap, kib in zip(self.charged, extra.kib, strict=True))

    @functools.cached_property
    def has_crossing(self) -> bool:
        """Whether any choice moves something to another GPU."""
        return any(
            at not in (CPU_POSITION, p)
            for table in {each.kind: each for each in self.frame.layers}.values()
            for p, row in enumerate(table.choices)
            for choice in row
            for at, _ in choice.kib
        )

    @functools.cached_property
    def is_hopeless(self) -> bool:
        """Whether the layers' least memory is more than all caps together; the host's counts where it may be used."""
        tables: dict[int, int | None] = {}
        used: set[int] = set()
        for table in self.frame.layers:
            if table.kind not in tables:
                choices = [choice for row in table.choices for choice in row]
                tables[table.kind] = min(
                    (sum(kib for _, kib in choice.kib) for choice in choices), default=None
                )
                used |= {at for choice in choices for at, kib in choice.kib if kib}
        least = [tables[table.kind] for table in self.frame.layers]
        room = sum(max(self.frame.cap_kib[at], 0) for at in used)
        return None in least or sum(filter(None, least)) > room

    def segments(self, prices: tuple[float, ...]) -> Segments:
        """The frame's segments at those prices, extras not charged."""
        terms = BoundTerms(self.weights[0], self.weights[1] * self.overlap, prices)
        return Segments(self.frame, terms, self.frame.cap_kib)

    def bound(self, prices: Sequence[float] | None = None) -> Relaxed:
        """The bound at those prices, or at what the best cuts without moves between GPUs would pay."""
        if self.is_hopeless or self.n_positions - 1 > len(self.frame.layers):
            return Relaxed(None, ())
        if prices is None:
            prices = self._marginals() if self.has_crossing else (0.0,) * self.n_positions
        prices = tuple(prices)
        self.priced = self.segments(prices)
        value = self.priced.bound()
        if value == inf:
            return Relaxed(None, ())
        paid = prices[CPU_POSITION] * self.frame.cap_kib[CPU_POSITION]
        return Relaxed(value + self.constant - paid, prices)

    def _marginals(self) -> tuple[float, ...]:
        """What each position's last KiB is worth on the best relaxed cuts without moves between GPUs."""
        plain = self._plain(self.frame.cap_kib, frozenset(), 0.0)
        if plain.bound() == inf or (cuts := plain.cuts()) is None:
            return (0.0,) * self.n_positions
        edges = (0, *cuts, len(self.frame.layers))
        found = [0.0] + [marginal(plain, p, edges[p], edges[p + 1]) for p in range(1, self.n_positions)]
        # equal cards take one price: they then share their segments
        for card in plain.cards[1:]:
            alike = [p for p in range(1, self.n_positions) if plain.cards[p] is card]
            mean = sum(found[p] for p in alike) / max(len(alike), 1)
            found = [mean if p in alike else each for p, each in enumerate(found)]
        return tuple(found)

    def _plain(
        self, caps: tuple[int, ...], left_out: frozenset[tuple[int, int, int]], host_price: float
    ) -> Segments:
        """Segments in which nothing moves to another GPU."""
        terms = BoundTerms(
            self.weights[0], self.weights[1] * self.overlap, (host_price, *[0.0] * (self.n_positions - 1))
        )
        crossing = {
            (table.moves, p, index)
            for table in {each.moves: each for each in self.frame.layers}.values()
            for p, row in enumerate(self._longest_rows(table.moves))
            for index, choice in enumerate(row)
            if index and any(at not in (CPU_POSITION, p) for at, _ in choice.kib)
        }
        return Segments(self.frame, terms, caps, left_out | frozenset(crossing))

    def _longest_rows(self, moves: int) -> list[tuple]:  # type: ignore[type-arg]
        tables = [table for table in self.frame.layers if table.moves == moves]
        return [max((table.choices[p] for table in tables), key=len) for p in range(self.n_positions)]

    def answer(self, gap: float = 0.0005, limit: float = inf) -> Answer | None:
        """The best answer without moves between GPUs, within the gap; None where there is none below the limit."""
        return self.answer_and_bound(gap, limit)[0]

    def answer_and_bound(self, gap: float, limit: float = inf) -> tuple[Answer | None, float]:
        """That answer, and a bound on every answer: what the search for it has shown, or that there is none."""
        if self.is_hopeless or self.n_positions - 1 > len(self.frame.layers):
            return None, inf
        taken = frozenset().union(*(extra.choices for extra in self.frame.extras))
        cases = (
            [(self.frame.cap_kib, taken), (self.charged, frozenset())] if taken else [(self.charged, taken)]
        )
        best: Answer | None = None
        bound = inf
        for caps, left_out in cases:
            found, low, lacks_host = self._best_cuts(self._plain(caps, left_out, 0.0), gap, limit)
            bound = min(bound, low)
            if found is None and lacks_host:
                found = self._with_host_price(caps, left_out, gap)
            if found is not None and (best is None or self.objective(found) < self.objective(best)):
                best = found
                limit = min(limit, self.objective(best))
        if self.has_crossing:
            return best, -inf
        if len(self.frame.extras) > 1:  # an answer may pay some of them and not others
            bound = self._best_cuts(self._plain(self.frame.cap_kib, frozenset(), 0.0), gap, limit)[1]
        return best, bound

    def _with_host_price(
        self, caps: tuple[int, ...], left_out: frozenset[tuple[int, int, int]], gap: float
    ) -> Answer | None:
        """An answer that keeps within host memory: the lowest price of it that does."""
        low, high, best = 0.0, 16.0, None
        for _ in range(HOST_PRICES):
            middle = (low + high) / 2
            found, _, lacks_host = self._best_cuts(self._plain(caps, left_out, middle), gap, inf)
            if found is None and lacks_host:
                low = middle
            else:
                high, best = middle, found or best
        return best

    def _best_cuts(self, plain: Segments, gap: float, limit: float) -> tuple[Answer | None, float, bool]:
        """The best valid answer over the cuts, a bound, and whether one failed for lack of host memory alone."""
        value, best, best_value, lacks_host = plain.bound() + self.constant, None, limit, False
        cuts = plain.cuts()
        if value >= limit or cuts is None:
            return None, max(value, limit), False
        slack = value * gap / 4 / self.n_positions
        paths: Paths | None = None
        for _ in range(MOST_PATHS):
            answer = plain.answer(cuts, slack)
            if answer is not None and not is_valid(self.frame, answer):
                lacks_host |= used_kib(self.frame, answer)[CPU_POSITION] > self.frame.cap_kib[CPU_POSITION]
                answer = None
            if answer is not None and (objective := self.objective(answer)) < best_value:
                best, best_value = answer, objective
            if paths is None:
                paths = Paths(plain, best_value - self.constant)
            if not paths.refine(cuts, slack):
                break
            found = paths.shortest()
            value, cuts = (found[0] + self.constant, found[1]) if found else (best_value, cuts)
            if value >= (best_value if best is None else best_value * (1 - gap)):
                break
        return best, min(value, best_value), lacks_host

    def objective(self, answer: Answer) -> int:
        """The weighted time of an answer, exactly as the program counts it."""
        decode, prompt = times_us(self.frame, answer)
        return self.weights[0] * decode + self.weights[1] * prompt

    def homes(self, relaxed: Relaxed, most: float) -> list[set[int]]:
        """The positions where each layer may live in an answer of at most `most`."""
        segments = self.priced
        paid = relaxed.prices[CPU_POSITION] * self.frame.cap_kib[CPU_POSITION]
        kept = segments.survivors(most - self.constant + paid)
        homes: list[set[int]] = [set() for _ in self.frame.layers]
        for p, rows in enumerate(kept):
            for a, row in enumerate(rows):
                ends = np.flatnonzero(row < inf)
                for i in range(a, int(ends[-1]) if len(ends) else a):
                    homes[i].add(p)
        return homes


class Paths:
    """The segments that are left below a limit, with what is known of each; the shortest path through them."""

    def __init__(self, segments: Segments, most: float) -> None:
        self.segments = segments
        self.costs = segments.survivors(most)

    def refine(self, cuts: tuple[int, ...], slack: float) -> bool:
        """Replace the bounds of a path's segments by those of whole moves; False where all were known."""
        edges, is_new = (0, *cuts, self.segments.n_layers), False
        for p in range(1, self.segments.n_positions):
            a, b = edges[p], edges[p + 1]
            if self.costs[p][a, b] == inf:
                continue
            if (bound := self.segments.solve_segment(p, a, b, slack).bound) > self.costs[p][a, b] + 1e-6:
                self.costs[p][a, b], is_new = bound, True
        return is_new

    def shortest(self) -> tuple[float, tuple[int, ...]] | None:
        """The least cost and its cuts."""
        reached = forward(self.costs)
        cuts = path(self.costs, reached)
        return None if cuts is None else (float(reached[-1][-1]), cuts)
