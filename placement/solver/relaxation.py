"""A lower bound and a good answer of a frame in milliseconds, without CP-SAT.

The caps are priced (Lagrangian relaxation): what is left is, for every layer and home, its cheapest choice, and
a shortest path over the cuts between devices. The best prices give the bound. Around the cuts that they suggest,
a greedy filling of each device gives an answer, which CP-SAT then has to beat.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.solver.frame import Answer, Choice, Frame, is_valid, times_us

N_ROUNDS = 150
IMPOSSIBLE_US = 1e13  # a bound of four months: the caps cannot hold


@dataclass(frozen=True, slots=True)
class Relaxed:
    """`bound` is None when no answer can keep within the caps; `homes` and `prices` are the bound's own."""

    bound: float | None
    homes: tuple[int, ...] | None
    prices: tuple[float, ...]


class Relaxation:
    """The frame with prices (microseconds per KiB) in place of caps."""

    def __init__(self, frame: Frame, decode_weight: int = 1, prompt_weight: int = 1) -> None:
        self.frame = frame
        self.weights = decode_weight, prompt_weight
        self.n_positions = len(frame.positions)
        self.kinds = [table.kind for table in frame.layers]
        self.moves = [table.moves for table in frame.layers]
        tables = {table.kind: table for table in frame.layers}
        # max(stages) is at least their mean, so pipelined prompt time is bounded by a sum
        n_stages = sum(any(table.choices[p] for table in frame.layers) for p in range(self.n_positions))
        overlap = 1.0 + frame.longest_permille / 1000 / max(n_stages, 1)
        self.choices: dict[tuple[int, int], list[tuple[float, Choice]]] = {
            (kind, p): [
                (decode_weight * c.decode_us + prompt_weight * overlap * c.prompt_us, c) for c in table.choices[p]
            ]
            for kind, table in tables.items()
            for p in range(self.n_positions)
        }
        fixed = decode_weight * frame.fixed_us[0] + prompt_weight * frame.fixed_us[1]
        hidden = decode_weight * frame.hidden_us[0] + prompt_weight * frame.hidden_us[1]
        fixed -= prompt_weight if frame.longest_permille else 0  # rounding down
        self.constant = fixed - hidden * max(self.n_positions - 2, 0)

    def bound(
        self, prices: list[float] | None = None, rounds: int = N_ROUNDS, enough: float = float("inf")
    ) -> Relaxed:
        """The best bound found by moving the prices; None when they prove that the caps cannot hold.

        Stops once the bound reaches `enough`.
        """
        prices = list(prices) if prices else [0.0] * self.n_positions
        best, best_homes, best_prices = float("-inf"), None, prices
        target, scale, stalled = 0.0, 1.0, 0
        for _ in range(rounds):
            value, homes, used = self._price(prices)
            if homes is None:
                return Relaxed(None, None, ())
            if value > best:
                stalled = stalled if value <= best + abs(best) * 1e-4 else 0
                best, best_homes, best_prices = value, homes, prices
            stalled += 1
            if best > IMPOSSIBLE_US:
                return Relaxed(None, None, ())
            if best >= enough:
                break
            over = [u - cap for u, cap in zip(used, self.frame.cap_kib, strict=True)]
            norm = sum(o * o for o, price in zip(over, prices, strict=True) if o > 0 or price > 0)
            if norm == 0:
                break
            if stalled > 4:
                scale, stalled, prices = scale * 0.5, 0, best_prices
                if scale < 0.001:
                    break
            target = max(target, abs(best) * 1.3 + 1.0)
            step = scale * (target - value) / norm
            prices = [max(0.0, price + step * o) for price, o in zip(prices, over, strict=True)]
        return Relaxed(best, best_homes, tuple(best_prices))

    def answer(self, relaxed: Relaxed) -> Answer | None:
        """A good answer near the homes of a relaxed solution, or None when the greedy finds none."""
        return self._climb(relaxed.homes) if relaxed.homes is not None else None

    def _climb(self, start: tuple[int, ...]) -> Answer | None:
        """Shift one cut at a time while the greedy answer gets better."""
        best, best_value = self.fill(start), float("inf")
        if best is not None:
            best_value = self.objective(best)
        cuts, seen = _cuts(start, self.n_positions), {start}
        shift = max(len(start) // 4, 1)
        while shift:
            improved = False
            for at in range(len(cuts)):
                for moved in (cuts[at] - shift, cuts[at] + shift):
                    trial = (*cuts[:at], moved, *cuts[at + 1 :])
                    homes = _homes(trial, len(start))
                    if homes is None or homes in seen:
                        continue
                    seen.add(homes)
                    answer = self.fill(homes)
                    if answer is not None and (value := self.objective(answer)) < best_value:
                        best, best_value, cuts, improved = answer, value, trial, True
            if not improved:
                shift //= 2
        return best

    def objective(self, answer: Answer) -> int:
        """The weighted time of an answer, exactly as the program counts it."""
        decode, prompt = times_us(self.frame, answer)
        return self.weights[0] * decode + self.weights[1] * prompt

    def _price(self, prices: list[float]) -> tuple[float, tuple[int, ...] | None, list[int]]:
        """Bound at these prices, the homes that reach it, and the KiB they would use."""
        cheapest: dict[tuple[int, int], tuple[float, Choice | None]] = {}
        for key, rows in self.choices.items():
            best, pick = float("inf"), None
            for cost, choice in rows:
                value = cost + sum(prices[p] * kib for p, kib in choice.kib)
                if value < best:
                    best, pick = value, choice
            cheapest[key] = best, pick
        value, homes = self._shortest(cheapest)
        if homes is None:
            return 0.0, None, []
        used = [0] * self.n_positions
        for kind, home in zip(self.kinds, homes, strict=True):
            choice = cheapest[kind, home][1]
            assert choice is not None
            for p, kib in choice.kib:
                used[p] += kib
        paid = sum(price * cap for price, cap in zip(prices, self.frame.cap_kib, strict=True))
        return value - paid + self.constant, homes, used

    def _shortest(self, cheapest: dict[tuple[int, int], tuple[float, Choice | None]]) -> tuple[float, tuple[int, ...] | None]:
        """The cheapest non-decreasing homes in which every GPU has a layer."""
        infinite = float("inf")
        last = self.n_positions - 1
        costs = [infinite] * self.n_positions  # best path whose current layer lives at p
        came: list[list[int]] = []
        for i, kind in enumerate(self.kinds):
            row, origin = [infinite] * self.n_positions, [-1] * self.n_positions
            for p in range(self.n_positions):
                stay = costs[p]
                move = costs[p - 1] if p > 0 else infinite
                if i == 0:
                    stay, move = (0.0 if p <= 1 else infinite), infinite
                row[p] = min(stay, move) + cheapest[kind, p][0]
                origin[p] = p if stay <= move else p - 1
            came.append(origin)
            costs = row
        if costs[last] == infinite:
            return infinite, None
        homes, p = [last], last
        for i in range(len(self.kinds) - 1, 0, -1):
            p = came[i][p]
            homes.append(p)
        return costs[last], tuple(reversed(homes))

    def fill(self, homes: tuple[int, ...]) -> Answer | None:
        """A greedy answer for these homes: on each overfull GPU, move what costs least per KiB freed."""
        picks = [0] * len(homes)
        if any(not self.choices[kind, home] for kind, home in zip(self.kinds, homes, strict=True)):
            return None
        for p in range(1, self.n_positions):
            layers = [i for i, home in enumerate(homes) if home == p]
            used = sum(dict(self.choices[self.kinds[i], p][0][1].kib).get(p, 0) for i in layers)
            found = self._free(layers, p, used - self.frame.cap_kib[p])
            if found is None:
                return None
            for i, pick in found.items():
                picks[i] = pick
        answer = Answer(homes, tuple(picks))
        return answer if is_valid(self.frame, answer) else None

    def _free(self, layers: list[int], p: int, need_kib: int) -> dict[int, int] | None:
        """The cheapest found set of host moves at p that frees that many KiB; later layers first."""
        if need_kib <= 0:
            return {}
        moves: dict[int, list[tuple[float, int, int]]] = {}  # moves: (cost, freed, pick)
        for i in {self.moves[i]: i for i in layers}.values():
            rows = self.choices[self.kinds[i], p]
            base_cost, base = rows[0]
            kept = dict(base.kib).get(p, 0)
            moves[self.moves[i]] = [
                (cost - base_cost, kept - dict(choice.kib).get(p, 0), pick)
                for pick, (cost, choice) in enumerate(rows)
                if choice.is_host and kept > dict(choice.kib).get(p, 0)
            ]
        counts = {each: sum(self.moves[i] == each for i in layers) for each in moves}
        best: tuple[float, dict[int, list[int]]] | None = None
        partials = [(kind, move) for kind, rows in moves.items() for move in rows]
        for first in (None, *partials):
            taken: dict[int, list[int]] = {}
            cost, need = 0.0, need_kib
            left = dict(counts)
            if first is not None:
                kind, move = first
                taken[kind] = [move[2]]
                cost, need = move[0], need - move[1]
                left[kind] -= 1
            done = self._take(moves, left, need, taken)
            if done is not None and (best is None or cost + done < best[0]):
                best = cost + done, taken
        if best is None:
            return None
        found = {}
        for kind, picks in best[1].items():
            here = [i for i in layers if self.moves[i] == kind]
            for i, pick in zip(reversed(here), picks[1:] + picks[:1], strict=False):
                found[i] = pick
        return found

    def _take(
        self,
        moves: dict[int, list[tuple[float, int, int]]],
        left: dict[int, int],
        need: int,
        taken: dict[int, list[int]],
    ) -> float | None:
        """Take the cheapest moves per KiB until `need` is freed, then the cheapest last one that suffices."""
        cost = 0.0
        while need > 0:
            open_moves = [(c, freed, pick, kind) for kind, rows in moves.items() if left[kind] for c, freed, pick in rows]
            if not open_moves:
                return None
            enough = [move for move in open_moves if move[1] >= need]
            if enough:
                c, freed, pick, kind = min(enough)
            else:
                c, freed, pick, kind = min(open_moves, key=lambda move: (move[0] / move[1], -move[1]))
            taken.setdefault(kind, []).append(pick)
            left[kind] -= 1
            cost, need = cost + c, need - freed
        return cost


def _cuts(homes: tuple[int, ...], n_positions: int) -> tuple[int, ...]:
    """The first layer of each position from 1 on."""
    return tuple(sum(home < p for home in homes) for p in range(1, n_positions))


def _homes(cuts: tuple[int, ...], n_layers: int) -> tuple[int, ...] | None:
    """The homes of those cuts, or None when a GPU would have no layer."""
    edges = (0, *cuts, n_layers)
    if edges[0] > edges[1] or any(a >= b for a, b in zip(edges[1:], edges[2:], strict=False)) or edges[1] < 0:
        return None
    return tuple(p for p, (a, b) in enumerate(zip(edges, edges[1:], strict=False)) for _ in range(b - a))
