"""The best cuts of a frame: a shortest path over segments, in milliseconds and without CP-SAT.

A GPU's segment of layers costs what they cost at home plus the cheapest moves that free what its cap lacks. Relaxed,
that is a fractional knapsack, and the path bounds every answer; a price per KiB stands for what moves to other GPUs
take there. Exact, it is a small knapsack over host moves; solved for the segments of the best path until these are
the path's own, it gives the best answer in which nothing moves to another GPU.

All segments of a position are one matrix: row a, column b is the segment of layers a, a + 1, …, b − 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import inf

import numpy as np
from numpy.typing import NDArray

from placement.solve.cpsat.frame import CPU_POSITION, Answer, Frame, GroupChoice
from placement.solve.cpsat.knapsack import Knapsack, Move, Taken

MOST_RATIOS = 24  # of a position's knapsacks; any subset gives a bound, so many gives a close one

Vector = NDArray[np.float64]
Matrix = NDArray[np.float64]
Step = tuple[float, float, int, int]  # cost per KiB, cost and KiB of a layer's next move, and its choice
# cost, KiB and index of a layer's cheapest choice, what it may free, whether that choice or any hides a boundary
_Facts = tuple[float, int, int, "tuple[Step, ...]", bool, bool]


@dataclass(frozen=True, slots=True)
class BoundTerms:
    """What a bound is taken under: weights of decode and prompt, and microseconds per KiB at each position."""

    decode_weight: float
    prompt_weight: float
    prices: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class SolvedSegment:
    """A segment with whole moves: least cost, a bound on it (the same where it is exact), and the moves."""

    cost: float
    bound: float
    taken: Taken | None


@dataclass
class _Card:
    """A position as far as its segments go; equal positions share one."""

    cost: Vector  # prefix sums over the layers at home
    kib: NDArray[np.int64]
    forbidden: NDArray[np.int64]  # prefix counts of layers that may not live here
    cheapest: list[int]  # per kind, the index of the cheapest choice
    steps: list[tuple[Step, ...]]  # per layer
    cap_kib: int
    price: float
    hidden: float  # what a segment that moves anything may save at its end
    is_always_hidden: bool  # a segment that moves nothing too
    relaxed: Matrix | None = None
    solved: dict[tuple[int, int], SolvedSegment] = field(default_factory=dict)


class Segments:
    """The segments of a frame under some terms. `left_out` choices, given as (moves, home, index), are not taken;
    `caps` replace the frame's. Values are in weighted microseconds, without the frame's fixed time."""

    def __init__(
        self,
        frame: Frame,
        terms: BoundTerms,
        caps: tuple[int, ...],
        left_out: frozenset[tuple[int, int, int]] = frozenset(),
    ) -> None:
        self.frame, self.terms, self.caps, self.left_out = frame, terms, caps, left_out
        self.n_layers, self.n_positions = len(frame.layers), len(frame.positions)
        saved = terms.decode_weight * frame.hidden_us[0] + terms.prompt_weight * frame.hidden_us[1]
        self.hidden = max(0.0, saved)
        kinds = {table.kind: table for table in frame.layers}
        numbers = {kind: number for number, kind in enumerate(kinds)}
        self._rows = np.array([numbers[table.kind] for table in frame.layers], dtype=np.int64)
        cards: dict[object, _Card] = {}
        self.cards: list[_Card] = []
        for p in range(self.n_positions):
            facts = [self._facts(table.moves, table.choices[p], p) for table in kinds.values()]
            key = p == 0, p == self.n_positions - 1, caps[p], terms.prices[p], tuple(facts)
            if key not in cards:
                cards[key] = self._card(p, facts)
            self.cards.append(cards[key])

    def _facts(self, moves: int, row: tuple[GroupChoice, ...], p: int) -> _Facts | None:
        """What a layer is like with its home in p."""
        points = [
            (self._cost(choice, p), _kib_at(choice, p), index)
            for index, choice in enumerate(row)
            if not index or (moves, p, index) not in self.left_out
        ]
        if not points:
            return None
        cost, kib, index = min(points)
        hiding = [self._cost(choice, p) for choice in row if choice.hides_boundary]
        # a move that costs less than the split that it hides is worth it where no memory is needed
        pays = any(each - cost < self.hidden for each in hiding)
        return cost, kib, index, _hull(cost, kib, points), pays, bool(hiding)

    def _cost(self, choice: GroupChoice, p: int) -> float:
        """Weighted time, and what the choice takes elsewhere at the prices there."""
        cost = self.terms.decode_weight * choice.decode_us + self.terms.prompt_weight * choice.prompt_us
        prices = self.terms.prices
        for at, kib in choice.kib:
            if prices[at] and (at != p or p == CPU_POSITION):
                cost += prices[at] * kib
        return cost

    def _card(self, p: int, facts: list[_Facts | None]) -> _Card:
        def sums(values: list[float], dtype: type) -> NDArray:  # type: ignore[type-arg]
            return np.concatenate([[0], np.cumsum(np.array(values, dtype=dtype)[self._rows])])

        steps = [fact[3] if fact else () for fact in facts]
        card = _Card(
            cost=sums([fact[0] if fact else 0.0 for fact in facts], np.float64),
            kib=sums([fact[1] if fact else 0 for fact in facts], np.int64),
            forbidden=sums([fact is None for fact in facts], np.int64),
            cheapest=[fact[2] if fact else 0 for fact in facts],
            steps=[steps[row] for row in self._rows],
            cap_kib=self.caps[p],
            price=self.terms.prices[p] if p else 0.0,
            hidden=0.0,
            is_always_hidden=False,
        )
        if 0 < p < self.n_positions - 1 and any(fact and fact[5] for fact in facts):
            card.is_always_hidden = any(fact and fact[4] for fact in facts)
            card.hidden = self.hidden
        return card

    # --- relaxed

    def relaxed(self, p: int) -> Matrix:
        """Bounds of all segments at position p; infinite where a segment cannot be."""
        card = self.cards[p]
        if card.relaxed is None:
            card.relaxed = _relax(card, self._rows)
        return card.relaxed

    def bound(self) -> float:
        """The least relaxed cost; infinite when nothing fits."""
        self.forward = forward([self.relaxed(p) for p in range(self.n_positions)])
        return float(self.forward[-1][self.n_layers])

    def survivors(self, most: float) -> list[Matrix]:
        """Per position, the segments' bounds; infinite where no path of at most `most` passes."""
        most += 1e-9 * abs(most)  # sums in another order
        kept = []
        after = np.full(self.n_layers + 1, inf)
        after[self.n_layers] = 0.0
        for p in range(self.n_positions - 1, 0, -1):
            rows = self.relaxed(p)
            through = self.forward[p - 1][:, None] + rows + after[None, :]
            kept.append(np.where(through <= most, rows, inf))
            after = (rows + after[None, :]).min(axis=1)
        first = np.full_like(self.relaxed(0), inf)
        first[0] = np.where(self.forward[0] + after <= most, self.forward[0], inf)
        return [first, *reversed(kept)]

    def cuts(self) -> tuple[int, ...] | None:
        """The first layer of each GPU on the path of the bound."""
        return path([self.relaxed(p) for p in range(self.n_positions)], self.forward)

    # --- exact

    def solve_segment(self, p: int, a: int, b: int, slack: float) -> SolvedSegment:
        """The segment with whole host moves, within `slack` of their least cost."""
        card = self.cards[p]
        if (a, b) not in card.solved:
            cost = float(card.cost[b] - card.cost[a])
            need = int(card.kib[b] - card.kib[a]) - card.cap_kib
            knapsack = Knapsack(self._moves(p, a, b), slack)
            more, bound, taken = knapsack.solve(need) if need > 0 else (0.0, 0.0, {})
            hidden = card.hidden if taken or card.is_always_hidden else 0.0
            card.solved[a, b] = SolvedSegment(
                cost + more - hidden, max(cost + bound - hidden, float(self.relaxed(p)[a, b])), taken
            )
        return card.solved[a, b]

    def _moves(self, p: int, a: int, b: int) -> list[Move]:
        """The host moves of a segment's layers from their cheapest choices, best first."""
        card = self.cards[p]
        counts = Counter(table.moves for table in self.frame.layers[a:b])
        example = {self.frame.layers[i].moves: i for i in range(a, b)}
        moves = []
        for number, i in example.items():
            row = self.frame.layers[i].choices[p]
            first = row[card.cheapest[self._rows[i]]]
            cost, kib = self._cost(first, p), _kib_at(first, p)
            for pick, choice in enumerate(row):
                freed = kib - _kib_at(choice, p)
                if pick and choice.is_host and freed > 0 and (number, p, pick) not in self.left_out:
                    moves.append(Move(number, pick, self._cost(choice, p) - cost, freed, counts[number]))
        return sorted(moves, key=lambda move: (move.cost / move.freed_kib, -move.freed_kib))

    def answer(self, cuts: tuple[int, ...], slack: float) -> Answer | None:
        """The answer of those cuts (the first layer of each GPU) with whole host moves; None where none fits."""
        edges = (0, *cuts, self.n_layers)
        homes = tuple(p for p in range(self.n_positions) for _ in range(edges[p + 1] - edges[p]))
        picks = [self.cards[home].cheapest[row] for home, row in zip(homes, self._rows.tolist(), strict=True)]
        for p in range(1, self.n_positions):
            a, b = edges[p], edges[p + 1]
            if self.relaxed(p)[a, b] == inf or (taken := self.solve_segment(p, a, b, slack).taken) is None:
                return None
            for i, pick in self._spread(p, a, b, taken):
                picks[i] = pick
        return Answer(homes, tuple(picks))

    def _spread(self, p: int, a: int, b: int, taken: Taken) -> Iterator[tuple[int, int]]:
        """Which layers take the moves: the last ones, those that hide a boundary at the very end."""
        for moves in dict.fromkeys(number for number, _ in taken):
            here = [i for i in range(a, b) if self.frame.layers[i].moves == moves]
            row = self.frame.layers[here[0]].choices[p]
            picks = [pick for (number, pick), count in taken.items() if number == moves for _ in range(count)]
            picks.sort(key=lambda pick, row=row: (row[pick].hides_boundary, len(set(row[pick].groups)) == 1))  # type: ignore[misc]
            yield from zip(reversed(here), reversed(picks), strict=False)


def forward(costs: list[Matrix]) -> list[Vector]:
    """Per position, the least cost of ending it before each layer; only the CPU's may be empty."""
    first = costs[0][0].copy()
    first[0] = 0.0
    found = [first]
    for rows in costs[1:]:
        found.append((found[-1][:, None] + rows).min(axis=0))
    return found


def path(costs: list[Matrix], reached: list[Vector]) -> tuple[int, ...] | None:
    """The cuts of the shortest path to the last layer; None where there is none."""
    end, found = costs[0].shape[0] - 1, []
    if reached[-1][end] == inf:
        return None
    for p in range(len(costs) - 1, 0, -1):
        end = int(np.argmin(reached[p - 1] + costs[p][:, end]))
        found.append(end)
    return tuple(reversed(found))


def _kib_at(choice: GroupChoice, p: int) -> int:
    return sum(kib for at, kib in choice.kib if at == p)


def _hull(cost: float, kib: int, points: list[tuple[float, int, int]]) -> tuple[Step, ...]:
    """The steps of the lower convex hull from a point of (cost, KiB, choice) to ever fewer KiB."""
    steps: list[Step] = []
    while less := [point for point in points if point[1] < kib]:
        ratio, next_kib, next_cost, pick = min(((c - cost) / (kib - k), k, c, i) for c, k, i in less)
        steps.append((ratio, next_cost - cost, kib - next_kib, pick))
        cost, kib = next_cost, next_kib
    return tuple(steps)


def _relax(card: _Card, rows: NDArray[np.int64]) -> Matrix:
    """The fractional knapsacks of all segments by their dual.

    Freeing at least `need`, and selling what is freed beyond it at the card's price, costs the most over all ratios
    r from that price on of r · need − Σ (r − ratio) · KiB over the steps that are cheaper than r; the best r is the
    ratio of some step, or the price.
    """
    n = len(rows) + 1
    ratios, kib = _step_arrays(card, rows)
    need = (card.kib[None, :] - card.kib[:, None] - card.cap_kib).astype(np.float64)
    more = np.full((n, n), -inf)
    for ratio in _some_ratios(ratios, kib, card.price):
        gain = np.concatenate([[0.0], np.cumsum((np.maximum(ratio - ratios, 0.0) * kib).sum(axis=1))])
        np.maximum(more, ratio * need - (gain[None, :] - gain[:, None]), out=more)
    found: Matrix = card.cost[None, :] - card.cost[:, None] + more
    if card.hidden:
        sold = np.concatenate([[0], np.cumsum(((ratios < card.price) & (kib > 0)).sum(axis=1))])
        is_moved = (need > 0) | (sold[None, :] > sold[:, None])
        found -= card.hidden * (is_moved | card.is_always_hidden)
    freed = np.concatenate([[0.0], np.cumsum(kib.sum(axis=1))])
    is_out = (freed[None, :] - freed[:, None] < need) | (card.forbidden[None, :] > card.forbidden[:, None])
    found[is_out | np.tri(n, dtype=bool)] = inf
    return found


def _step_arrays(card: _Card, rows: NDArray[np.int64]) -> tuple[Matrix, Matrix]:
    """Ratio and KiB of each layer's steps, padded with steps of nothing."""
    example: dict[int, tuple[Step, ...]] = dict(zip(rows.tolist(), card.steps, strict=True))
    width = max((len(steps) for steps in example.values()), default=0)
    ratios, kib = np.full((len(example), width), inf), np.zeros((len(example), width))
    for row, steps in example.items():
        for at, step in enumerate(steps):
            ratios[row, at], kib[row, at] = step[0], step[2]
    ratios[kib == 0] = np.finfo(np.float64).max
    return ratios[rows], kib[rows]


def _some_ratios(ratios: Matrix, kib: Matrix, price: float) -> list[float]:
    """The price and the ratios above it, evenly by the memory that they free where there are many."""
    above = (kib > 0) & (ratios > price)
    found, where = np.unique(ratios[above], return_inverse=True)
    if len(found) > MOST_RATIOS:
        freed = np.cumsum(np.bincount(where.ravel(), kib[above]))
        wanted = np.linspace(freed[0], freed[-1], MOST_RATIOS)
        found = np.unique(found[np.searchsorted(freed, wanted).clip(0, len(found) - 1)])
    return [price, *map(float, found)]


def marginal(segments: Segments, p: int, a: int, b: int) -> float:
    """What the last KiB freed costs in a segment; 0 where it needs none."""
    card = segments.cards[p]
    need = int(card.kib[b] - card.kib[a]) - card.cap_kib
    ratio = 0.0
    for step in sorted(step for steps in card.steps[a:b] for step in steps):
        if need <= 0:
            break
        ratio, need = step[0], need - step[2]
    return ratio
