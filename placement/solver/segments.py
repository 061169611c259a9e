"""The best cuts of a frame: a shortest path over segments, in milliseconds and without CP-SAT.

A GPU's segment of layers costs what they cost at home plus the cheapest moves that free what its cap lacks. Relaxed,
that is a fractional knapsack, and the path bounds every answer; a price per KiB stands for what moves to other GPUs
take there. Exact, it is a small knapsack over host moves; solved for the segments of the best path until these are
the path's own, it gives the best answer in which nothing moves to another GPU.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from placement.solver.frame import Answer, Choice, Frame

INFINITE = float("inf")

Taken = dict[tuple[int, int], int]  # (moves, choice index): how many layers
# cost and KiB of a layer's cheapest choice, what it may free, whether that choice or any hides a boundary
_Facts = tuple[float, int, "tuple[Step, ...]", bool, bool]
Step = tuple[float, float, int, int]  # cost per KiB, cost and KiB of a layer's next move, and its choice


@dataclass(frozen=True, slots=True)
class Terms:
    """What a bound is taken under: weights of decode and prompt, and microseconds per KiB at each position."""

    decode_weight: float
    prompt_weight: float
    prices: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Settled:
    """A segment with whole moves: least cost, a bound on it (the same where it is exact), and the moves."""

    cost: float
    bound: float
    taken: Taken | None


@dataclass
class _Card:
    """A position as far as its segments go; equal positions share one."""

    cost: list[float] = field(default_factory=lambda: [0.0])  # prefix sums of the layers at home
    kib: list[int] = field(default_factory=lambda: [0])
    is_forbidden: list[bool] = field(default_factory=list)
    steps: list[tuple[Step, ...]] = field(default_factory=list)  # per layer
    cap_kib: int = 0
    price: float = 0.0
    hidden: float = 0.0  # what a segment that moves anything may save at its end
    is_always_hidden: bool = False  # a segment that moves nothing too
    rows: dict[int, list[float]] = field(default_factory=dict)
    settled: dict[tuple[int, int], Settled] = field(default_factory=dict)


class Segments:
    """The segments of a frame under some terms. `left_out` choices, given as (moves, home, index), are not taken;
    `caps` replace the frame's. Values are in weighted microseconds, without the frame's fixed time."""

    def __init__(
        self,
        frame: Frame,
        terms: Terms,
        caps: tuple[int, ...],
        left_out: frozenset[tuple[int, int, int]] = frozenset(),
    ) -> None:
        self.frame, self.terms, self.caps, self.left_out = frame, terms, caps, left_out
        self.n_layers, self.n_positions = len(frame.layers), len(frame.positions)
        saved = terms.decode_weight * frame.hidden_us[0] + terms.prompt_weight * frame.hidden_us[1]
        self.hidden = max(0.0, saved)
        cards: dict[object, _Card] = {}
        self.cards = []
        for p in range(self.n_positions):
            facts = {table.kind: self._facts(table.moves, table.choices[p], p) for table in frame.layers}
            key = p == 0, p == self.n_positions - 1, caps[p], terms.prices[p], tuple(facts.values())
            if key not in cards:
                cards[key] = self._card(p, facts)
            self.cards.append(cards[key])

    def _facts(self, moves: int, row: tuple[Choice, ...], p: int) -> _Facts | None:
        """What a layer is like with its home in p."""
        points = [
            (self._cost(choice, p), _kib_at(choice, p), index)
            for index, choice in enumerate(row)
            if not index or (moves, p, index) not in self.left_out
        ]
        if not points:
            return None
        cost, kib, _ = min(points)
        hiding = [self._cost(choice, p) for choice in row if choice.hides_boundary]
        # a move that costs less than the split that it hides is worth it where no memory is needed
        pays = any(each - cost < self.hidden for each in hiding)
        return cost, kib, _hull(cost, kib, points), pays, bool(hiding)

    def _cost(self, choice: Choice, p: int) -> float:
        """Weighted time, and what the choice takes elsewhere at the prices there."""
        elsewhere = sum(self.terms.prices[at] * kib for at, kib in choice.kib if at != p or p == 0)
        return (
            self.terms.decode_weight * choice.decode_us
            + self.terms.prompt_weight * choice.prompt_us
            + elsewhere
        )

    def _card(self, p: int, facts: dict[int, _Facts | None]) -> _Card:
        card = _Card(cap_kib=self.caps[p], price=self.terms.prices[p] if p else 0.0)
        for table in self.frame.layers:
            fact = facts[table.kind]
            card.cost.append(card.cost[-1] + (fact[0] if fact else 0.0))
            card.kib.append(card.kib[-1] + (fact[1] if fact else 0))
            card.is_forbidden.append(fact is None)
            card.steps.append(fact[2] if fact else ())
        if 0 < p < self.n_positions - 1 and any(fact and fact[4] for fact in facts.values()):
            card.is_always_hidden = any(fact and fact[3] for fact in facts.values())
            card.hidden = self.hidden
        return card

    # --- relaxed

    def row(self, p: int, a: int) -> list[float]:
        """Bounds of the segments from layer a on at position p: after one layer, two, … while possible."""
        card = self.cards[p]
        if a not in card.rows:
            card.rows[a] = list(_relax(card, a, self.n_layers))
        return card.rows[a]

    def _forward(self) -> list[list[float]]:
        """Per position, the least cost of ending it before each layer."""
        first = [0.0, *self.row(0, 0)] if self.n_layers else [0.0]
        costs = [first + [INFINITE] * (self.n_layers + 1 - len(first))]
        for p in range(1, self.n_positions):
            found = [INFINITE] * (self.n_layers + 1)
            for a, done in enumerate(costs[-1][: self.n_layers]):
                if done < INFINITE:
                    for b, more in enumerate(self.row(p, a), a + 1):
                        if done + more < found[b]:
                            found[b] = done + more
            costs.append(found)
        return costs

    def _backward(self) -> list[list[float]]:
        """Per position, the least cost of everything after it from each layer on."""
        costs = [[INFINITE] * self.n_layers + [0.0]]
        for p in range(self.n_positions - 1, 0, -1):
            after, found = costs[-1], [INFINITE] * (self.n_layers + 1)
            rows = self.cards[p].rows
            for a, row in rows.items():
                found[a] = min(
                    (more + left for more, left in zip(row, after[a + 1 :], strict=False)), default=INFINITE
                )
            costs.append(found)
        return costs[::-1]

    def bound(self) -> float:
        """The least relaxed cost; infinite when nothing fits."""
        self.forward = self._forward()
        return self.forward[-1][self.n_layers]

    def survivors(self, most: float) -> list[dict[int, dict[int, float]]]:
        """Per position, first layer and end: the segments through which a path of at most `most` leads."""
        backward = self._backward()
        most += 1e-9 * abs(most)  # sums in another order
        kept: list[dict[int, dict[int, float]]] = [{}]
        for p in range(1, self.n_positions):
            rows: dict[int, dict[int, float]] = {}
            for a, row in self.cards[p].rows.items():
                room = most - self.forward[p - 1][a]
                ends = {b: more for b, more in enumerate(row, a + 1) if more + backward[p][b] <= room}
                if ends:
                    rows[a] = ends
            kept.append(rows)
        starts = kept[1] if len(kept) > 1 else {self.n_layers: {}}
        kept[0] = {0: {b: cost for b, cost in enumerate(self.forward[0]) if b in starts and cost <= most}}
        return kept

    def cuts(self) -> tuple[int, ...] | None:
        """The first layer of each GPU on the path of the bound."""
        end, found = self.n_layers, []
        for p in range(self.n_positions - 1, 0, -1):
            before, goal = self.forward[p - 1], self.forward[p][end]
            for a in range(end):
                row = self.cards[p].rows.get(a, [])
                if before[a] < INFINITE and end - a <= len(row) and before[a] + row[end - a - 1] == goal:
                    break
            else:
                return None
            found.append(a)
            end = a
        return tuple(reversed(found))

    # --- exact

    def settle(self, p: int, a: int, b: int, slack: float) -> Settled:
        """The segment with whole host moves, within `slack` of their least cost."""
        card = self.cards[p]
        if (a, b) not in card.settled:
            cost = card.cost[b] - card.cost[a]
            need = card.kib[b] - card.kib[a] - card.cap_kib
            knapsack = Knapsack(self._moves(p, a, b), slack)
            more, bound, taken = knapsack.solve(need) if need > 0 else (0.0, 0.0, {})
            hidden = card.hidden if taken else 0.0
            card.settled[a, b] = Settled(
                cost + more - hidden, max(cost + bound - hidden, self.row(p, a)[b - a - 1]), taken
            )
        return card.settled[a, b]

    def _moves(self, p: int, a: int, b: int) -> list[Move]:
        """The host moves of a segment's layers, best first."""
        counts: dict[int, int] = {}
        example: dict[int, tuple[Choice, ...]] = {}
        for table in self.frame.layers[a:b]:
            counts[table.moves] = counts.get(table.moves, 0) + 1
            example.setdefault(table.moves, table.choices[p])
        moves = []
        for number, row in example.items():
            cost, kib = self._cost(row[0], p), _kib_at(row[0], p)
            for pick, choice in enumerate(row):
                freed = kib - _kib_at(choice, p)
                if pick and choice.is_host and freed > 0 and (number, p, pick) not in self.left_out:
                    moves.append(
                        Move(number, pick, max(self._cost(choice, p) - cost, 0.0), freed, counts[number])
                    )
        return sorted(moves, key=lambda move: (move.cost / move.freed_kib, -move.freed_kib))

    def answer(self, cuts: tuple[int, ...], slack: float) -> Answer | None:
        """The answer of those cuts (the first layer of each GPU) with whole host moves; None where none fits."""
        edges = (0, *cuts, self.n_layers)
        homes = tuple(p for p in range(self.n_positions) for _ in range(edges[p + 1] - edges[p]))
        picks = [0] * self.n_layers
        for p in range(1, self.n_positions):
            a, b = edges[p], edges[p + 1]
            if b - a > len(self.row(p, a)) or (taken := self.settle(p, a, b, slack).taken) is None:
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


def _kib_at(choice: Choice, p: int) -> int:
    return sum(kib for at, kib in choice.kib if at == p)


def _hull(cost: float, kib: int, points: list[tuple[float, int, int]]) -> tuple[Step, ...]:
    """The steps of the lower convex hull from a point of (cost, KiB, choice) to ever fewer KiB."""
    steps: list[Step] = []
    while less := [point for point in points if point[1] < kib]:
        ratio, next_kib, next_cost, pick = min(((c - cost) / (kib - k), k, c, i) for c, k, i in less)
        steps.append((ratio, next_cost - cost, kib - next_kib, pick))
        cost, kib = next_cost, next_kib
    return tuple(steps)


def _relax(card: _Card, a: int, n_layers: int) -> Iterator[float]:
    """The relaxed costs of ever longer segments: the best steps are taken while memory lacks or sells.

    What is taken is always better than what is left; the worst of it is needed only in part.
    """
    taken: list[Step] = []  # heaps by ratio: falling (negated) and rising
    left: list[Step] = []
    paid, freed, price = 0.0, 0, card.price
    for b in range(a + 1, n_layers + 1):
        if card.is_forbidden[b - 1]:
            return
        need = card.kib[b] - card.kib[a] - card.cap_kib
        for ratio, cost, kib, pick in card.steps[b - 1]:
            if taken and ratio < -taken[0][0]:
                heapq.heappush(taken, (-ratio, cost, kib, pick))
                paid, freed = paid + cost, freed + kib
            else:
                heapq.heappush(left, (ratio, cost, kib, pick))
        while left and (freed < need or left[0][0] < price):
            ratio, cost, kib, pick = heapq.heappop(left)
            heapq.heappush(taken, (-ratio, cost, kib, pick))
            paid, freed = paid + cost, freed + kib
        if freed < need:
            return
        while taken and -taken[0][0] >= price and freed - taken[0][2] >= max(need, 0):
            ratio, cost, kib, pick = heapq.heappop(taken)
            heapq.heappush(left, (-ratio, cost, kib, pick))
            paid, freed = paid - cost, freed - kib
        worth = max(price, -taken[0][0]) if taken else price
        yield (
            card.cost[b]
            - card.cost[a]
            + paid
            - (freed - need) * worth
            - (card.hidden if taken or card.is_always_hidden else 0.0)
        )


def marginal(segments: Segments, p: int, a: int, b: int) -> float:
    """What the last KiB freed costs in a segment; 0 where it needs none."""
    card = segments.cards[p]
    need = card.kib[b] - card.kib[a] - card.cap_kib
    ratio = 0.0
    for step in sorted(step for steps in card.steps[a:b] for step in steps):
        if need <= 0:
            break
        ratio, need = step[0], need - step[2]
    return ratio if card.kib[b] - card.kib[a] > card.cap_kib else 0.0


@dataclass(frozen=True, slots=True)
class Move:
    """One layer's host move: its cost, what it frees, and how many layers of its kind there are."""

    moves: int
    pick: int
    cost: float
    freed_kib: int
    n_layers: int


class Knapsack:
    """The cheapest whole moves that free a need, each layer moved once at most: depth first below the bound."""

    MOST_NODES = 2000

    def __init__(self, moves: list[Move], slack: float) -> None:
        self.moves, self.slack = moves, slack
        self.left = {move.moves: move.n_layers for move in moves}
        self.best: float = INFINITE
        self.best_taken: Taken | None = None
        self.n_nodes = 0

    def solve(self, need: int) -> tuple[float, float, Taken | None]:
        """Cost, a bound on the least cost, and the moves."""
        self._descend(0, need, 0.0, {})
        is_exact = self.n_nodes <= self.MOST_NODES
        return self.best, self.best - self.slack if is_exact else 0.0, self.best_taken

    def _fractional(self, at: int, need: int) -> float:
        cost = 0.0
        for move in self.moves[at:]:
            freed = self.left[move.moves] * move.freed_kib
            if freed >= need:
                return cost + need * move.cost / move.freed_kib
            cost, need = cost + self.left[move.moves] * move.cost, need - freed
        return INFINITE

    def _descend(self, at: int, need: int, cost: float, taken: Taken) -> None:
        if need <= 0:
            if cost < self.best:
                self.best, self.best_taken = cost, dict(taken)
            return
        if at == len(self.moves) or self.n_nodes > self.MOST_NODES:
            return
        self.n_nodes += 1
        if cost + self._fractional(at, need) >= self.best - self.slack:
            return
        move = self.moves[at]
        most = min(self.left[move.moves], math.ceil(need / move.freed_kib))
        for count in range(most, -1, -1):
            self.left[move.moves] -= count
            if count:
                taken[move.moves, move.pick] = count
            self._descend(at + 1, need - count * move.freed_kib, cost + count * move.cost, taken)
            taken.pop((move.moves, move.pick), None)
            self.left[move.moves] += count
