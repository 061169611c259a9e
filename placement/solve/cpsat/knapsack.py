"""Which whole layers to move so that enough memory is freed at the least cost: a small bounded knapsack."""

from __future__ import annotations

import math
from dataclasses import dataclass

Taken = dict[tuple[int, int], int]  # (moves, choice index): how many layers


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
        self.best: float = math.inf
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
        return math.inf

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
