"""The placement program of one frame.

Homes are monotone prefix booleans; what moves is counted per position and kind of layer, so equal layers have
nothing to permute. Measured on Qwen3-Coder-Next and two cards: one boolean per layer and choice did not prove
0.5 % in 4 s, counts prove optimality in 3 s, and counts below a cutoff prove 0.2 % in 0.05 s.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Protocol

from placement.solve.cpsat.frame import CPU_POSITION, Answer, Frame, GroupChoice, LayerTable
from placement.solve.cpsat.program import CpsatProgram, LinearTerms


class _Number(Protocol):
    """A number of a choice."""

    def __call__(self, choice: GroupChoice) -> int: ...


class Placing:
    """Variables and rules of a frame. `before[i][p]` is 1 when layer i's home is at position p or earlier;
    `counts[p, moves, c]` is how many layers of those moves at home p take choice c (c ≥ 1)."""

    def __init__(
        self,
        frame: Frame,
        decode_weight: int = 1,
        prompt_weight: int = 1,
        *,
        has_caps: bool = True,
        has_symmetry: bool = False,
        homes: list[set[int]] | None = None,
    ) -> None:
        """`has_symmetry`: of answers that differ in which of two equal devices is which, one is enough.

        `homes` says where each layer may live, where more than the tables is known; no set may be empty."""
        self.frame, self.has_symmetry = frame, has_symmetry
        self.program = CpsatProgram()
        self.n_positions = len(frame.positions)
        self.n_layers = len(frame.layers)
        self.zero, self.one = self.program.integer(0, 0), self.program.integer(1, 1)
        everywhere = set(range(self.n_positions))
        windows = [each or everywhere for each in homes] if homes else [everywhere] * self.n_layers
        # layers take non-decreasing positions, so what rules a home out for one rules it out for others too
        self.lows = list(itertools.accumulate(map(min, windows), max))
        highs = itertools.accumulate((max(each) for each in reversed(windows)), min)
        self.highs = list(highs)[::-1]
        self.members: dict[int, list[int]] = {}
        for i, table in enumerate(frame.layers):
            self.members.setdefault(table.moves, []).append(i)
        # one layer's choices stand for all of its moves
        self.rows: dict[int, list[tuple[GroupChoice, ...]]] = {
            moves: [
                max((frame.layers[i].choices[p] for i in members), key=len) for p in range(self.n_positions)
            ]
            for moves, members in self.members.items()
        }
        self._add_homes()
        self._add_counts()
        self._order_homes()
        self._use_every_device()
        self._order_equal_devices()
        self._move_no_more_layers_than_are_home()
        self._pay_extras_once_taken()
        if has_caps:
            self._keep_within_caps()
        self._hide_boundaries()
        self._set_objective(decode_weight, prompt_weight)
        self._keep_within_limits()

    def _add_homes(self) -> None:
        self.before = [
            [
                self.zero if p < low else self.one if p >= high else self.program.boolean()
                for p in range(self.n_positions)
            ]
            for low, high in zip(self.lows, self.highs, strict=True)
        ]

    def _add_counts(self) -> None:
        self.counts: dict[tuple[int, int, int], int] = {}
        for moves, rows in self.rows.items():
            for p, row in enumerate(rows):
                most = sum(self.lows[i] <= p <= self.highs[i] for i in self.members[moves])
                for c in range(1, len(row)):
                    self.counts[p, moves, c] = self.program.integer(0, most) if most else self.zero

    def at_home(self, layer: int, position: int, factor: int = 1) -> LinearTerms:
        """Terms that sum to `factor` when the layer's home is that position, else to 0."""
        if not self.lows[layer] <= position <= self.highs[layer]:
            return []
        terms = [(self.before[layer][position], factor)]
        if position > 0:
            terms.append((self.before[layer][position - 1], -factor))
        return terms

    def _order_homes(self) -> None:
        fixed = self.zero, self.one
        for i in range(self.n_layers):
            for p in range(self.n_positions - 1):
                here, later = self.before[i][p], self.before[i][p + 1]
                if here not in fixed and later not in fixed:
                    self.program.at_most([(here, 1), (later, -1)], 0)
                if i + 1 < self.n_layers:
                    below = self.before[i + 1][p]
                    if below != self.zero and here != self.one:
                        self.program.at_most([(below, 1), (here, -1)], 0)

    def _use_every_device(self) -> None:
        for p in range(1, self.n_positions):
            self.program.at_least([term for i in range(self.n_layers) for term in self.at_home(i, p)], 1)

    def _order_equal_devices(self) -> None:
        """Of two equal devices in a row the first has no fewer layers, where these are all alike.

        Exchanging the two then gives another answer of the same time and memory. The last device is never equal to
        another: it has the output layer.
        """
        if not self.has_symmetry:
            return
        for p in range(1, self.n_positions - 1):
            able = [i for i in range(self.n_layers) if self.lows[i] <= p + 1 and self.highs[i] >= p]
            tables = {self.frame.layers[i].kind: self.frame.layers[i] for i in able}
            is_equal = self.frame.cap_kib[p] == self.frame.cap_kib[p + 1] and all(
                len({each.kib[p], each.kib[p + 1]}) == 1 for each in self.frame.extras
            )
            if len(tables) != 1 or not is_equal or p + 2 >= self.n_positions or self._has_extras_at(p):
                continue
            if _is_alike_on(next(iter(tables.values())), p, p + 1):
                here, after = (
                    [term for i in able for term in self.at_home(i, q, factor)]
                    for q, factor in ((p, -1), (p + 1, 1))
                )
                self.program.at_most([*here, *after], 0)

    def _has_extras_at(self, p: int) -> bool:
        return any(home in (p, p + 1) for extra in self.frame.extras for _, home, _ in extra.choices)

    def _move_no_more_layers_than_are_home(self) -> None:
        for moves, rows in self.rows.items():
            for p, row in enumerate(rows):
                forbidden = [i for i in self.members[moves] if not self.frame.layers[i].choices[p]]
                for i in forbidden:
                    self.program.at_most(self.at_home(i, p), 0)
                moved = [(self.counts[p, moves, c], 1) for c in range(1, len(row))]
                if moved:
                    home = [term for i in self.members[moves] for term in self.at_home(i, p, -1)]
                    self.program.at_most([*moved, *home], 0)

    def _sum(self, number: _Number, only_position: int | None = None) -> LinearTerms:
        """Terms of Σ number(choice) over the layers' actual choices (homes at `only_position`, or all)."""
        terms: LinearTerms = []
        positions = range(self.n_positions) if only_position is None else (only_position,)
        for p in positions:
            for i, table in enumerate(self.frame.layers):
                if table.choices[p]:
                    terms += self.at_home(i, p, number(table.choices[p][0]))
            for moves, rows in self.rows.items():
                for c in range(1, len(rows[p])):
                    terms.append((self.counts[p, moves, c], number(rows[p][c]) - number(rows[p][0])))
        return terms

    def _taking(self, moves: int, position: int, is_meant: Callable[[GroupChoice], bool]) -> LinearTerms:
        """Terms that count the layers of these moves at that home whose choice is meant (none: no such choice).

        Pinned groups may make even the first choice one of those.
        """
        row = self.rows[moves][position]
        is_first = bool(row) and is_meant(row[0])
        terms = [term for i in self.members[moves] for term in self.at_home(i, position)] if is_first else []
        sign = -1 if is_first else 1
        terms += [
            (self.counts[position, moves, c], sign)
            for c in range(1, len(row))
            if is_meant(row[c]) is not is_first
        ]
        return terms

    def _pay_extras_once_taken(self) -> None:
        self.paid = [self.program.boolean() for _ in self.frame.extras]
        for literal, extra in zip(self.paid, self.frame.extras, strict=True):
            for moves, home, c in sorted(extra.choices):
                if (home, moves, c) in self.counts:
                    n_members = len(self.members[moves])
                    self.program.at_most([(self.counts[home, moves, c], 1), (literal, -n_members)], 0)

    def _keep_within_caps(self, extra: list[int] | None = None) -> None:
        for position, cap in enumerate(self.frame.cap_kib):
            terms = self._sum(lambda choice, at=position: sum(kib for p, kib in choice.kib if p == at))
            terms += [
                (paid, each.kib[position]) for paid, each in zip(self.paid, self.frame.extras, strict=True)
            ]
            if extra is not None:
                terms.append((extra[position], -1))
            self.program.at_most(terms, cap)

    def _hide_boundaries(self) -> None:
        """A layer hides its device's boundary when it is the last one there and ends on the host."""
        self.hidden: list[int] = []
        if not any(self.frame.hidden_us) or self.n_positions < 3:
            return
        inner = range(1, self.n_positions - 1)
        for i, table in enumerate(self.frame.layers[:-1]):
            hiding = [self._taking(table.moves, p, lambda choice: choice.hides_boundary) for p in inner]
            if not any(hiding):
                continue
            literal = self.program.boolean()
            self.hidden.append(literal)
            cut = [(self.before[i][p], -1) for p in inner] + [(self.before[i + 1][p], 1) for p in inner]
            self.program.at_most([(literal, 1), *cut], 0)
            for p, terms in zip(inner, hiding, strict=True):
                none_here = [(variable, -factor) for variable, factor in terms]
                self.program.at_most([(literal, 1), *none_here, *self.at_home(i, p)], 1)

    def _set_objective(self, decode_weight: int, prompt_weight: int) -> None:
        self.decode = self._sum(lambda choice: choice.decode_us)
        self.decode += [(literal, -self.frame.hidden_us[0]) for literal in self.hidden]
        self.prompt = self._sum(lambda choice: choice.prompt_us)
        self.prompt += [(literal, -self.frame.hidden_us[1]) for literal in self.hidden]
        self._overlap_ubatches()
        fixed_decode, fixed_prompt = self.frame.fixed_us
        self.offset = decode_weight * fixed_decode + prompt_weight * fixed_prompt
        self.objective = [(variable, decode_weight * c) for variable, c in self.decode]
        self.objective += [(variable, prompt_weight * c) for variable, c in self.prompt]
        self.program.minimise(self.objective, self.offset)

    def _overlap_ubatches(self) -> None:
        permille = self.frame.longest_permille
        if not permille:
            return
        longest = self.program.integer(0, sum(map(_most_prompt_us, self.frame.layers)) * permille // 1000 + 1)
        for p in range(self.n_positions):
            stage = self._sum(lambda choice: choice.prompt_us, only_position=p)
            # 1000 · longest ≥ permille · stage − 999 rounds down as `times_us` does
            self.program.at_most([*((v, permille * c) for v, c in stage), (longest, -1000)], 999)
        self.prompt.append((longest, 1))

    def _keep_within_limits(self) -> None:
        if self.frame.max_host_layers is not None:
            terms = [(row[0], 1) for row in self.before]
            for moves in self.members:
                for p in range(1, self.n_positions):
                    terms += self._taking(moves, p, lambda choice: choice.is_host)
            self.program.at_most(terms, self.frame.max_host_layers)
        if self.frame.max_decode_us is not None:
            self.program.at_most(self.decode, self.frame.max_decode_us - self.frame.fixed_us[0])
        if self.frame.max_prompt_us is not None:
            self.program.at_most(self.prompt, self.frame.max_prompt_us - self.frame.fixed_us[1])

    def minimise_overflow(self) -> list[int]:
        """Let every cap be exceeded, and minimise by how much in all; returns one KiB variable per position."""
        extra = [self.program.integer(0, 2**40) for _ in range(self.n_positions)]
        self._keep_within_caps(extra)
        self.program.minimise([(variable, 1) for variable in extra])
        return extra

    def exclude(self, answer: Answer) -> None:
        """Require an answer that is not alike (`frame.is_alike`): other ranges, or two layers' groups elsewhere."""
        has_other_ranges = self.program.boolean()
        flips: LinearTerms = [(has_other_ranges, 1)]
        n_set = 0
        for row, home in zip(self.before, answer.homes, strict=True):
            for p, variable in enumerate(row):
                is_set = p >= home
                n_set += is_set
                flips.append((variable, 1 if is_set else -1))
        self.program.at_most(flips, n_set)
        unlike: LinearTerms = [(has_other_ranges, 2)]
        for moves, rows in self.rows.items():
            for p, choices in enumerate(rows):
                unlike += self._more_of_some_choice(moves, p, len(choices), answer)
        self.program.at_least(unlike, 2)

    def _more_of_some_choice(self, moves: int, p: int, n_choices: int, answer: Answer) -> LinearTerms:
        """Booleans of which so many may be 1 as layers take a choice that fewer take in the answer, two a choice."""
        members = self.members[moves]
        taken = [answer.picks[i] for i in members if answer.homes[i] == p]
        most = sum(self.lows[i] <= p <= self.highs[i] for i in members)
        found: LinearTerms = []
        counts = [self.counts[p, moves, c] for c in range(1, n_choices)]
        for more in (1, 2) if counts else ():
            for c, variable in enumerate(counts, 1):
                if (least := taken.count(c) + more) <= most:
                    literal = self.program.boolean()
                    self.program.at_least([(variable, 1), (literal, -least)], 0)
                    found.append((literal, 1))
            fewer = len(taken) - taken.count(0) - more  # then more take the first choice
            if fewer >= 0:
                literal = self.program.boolean()
                self.program.at_most([*((v, 1) for v in counts), (literal, most - fewer)], most)
                found.append((literal, 1))
        return found

    def hint(self, answer: Answer) -> None:
        """Suggest an answer to start from."""
        values = {self.zero: 0, self.one: 1}
        for row, home in zip(self.before, answer.homes, strict=True):
            values |= {variable: int(p >= home) for p, variable in enumerate(row)}
        for (p, moves, c), variable in self.counts.items():
            taken = [answer.picks[i] for i in self.members[moves] if answer.homes[i] == p]
            values[variable] = taken.count(c)
        self.program.hint({v: n for v, n in values.items() if v not in (self.zero, self.one)})

    def cut_off(self, most: int) -> None:
        """Require an objective of at most `most`."""
        self.program.at_most(self.objective, most - self.offset)

    def answer(self, values: tuple[int, ...]) -> Answer:
        """The answer that the variables' values stand for."""
        homes = tuple(self.n_positions - sum(values[b] for b in row) for row in self.before)
        picks = [0] * self.n_layers
        for moves, rows in self.rows.items():
            for p, row in enumerate(rows):
                here = [i for i in self.members[moves] if homes[i] == p]
                wanted = [c for c in range(1, len(row)) for _ in range(values[self.counts[p, moves, c]])]
                wanted += [0] * (len(here) - len(wanted))
                # host choices go to the last layers, where a device's very last one hides the boundary
                wanted.sort(key=lambda c, row=row: _lateness(row, c))  # type: ignore[misc]
                for i, c in zip(here, wanted, strict=True):
                    picks[i] = c
        return Answer(homes, tuple(picks))


def _is_alike_on(table: LayerTable, p: int, q: int) -> bool:
    """Whether a layer's choices are the same at two positions, the positions' own numbers aside."""

    def as_at_p(choice: GroupChoice) -> tuple[object, ...]:
        kib = sorted((p if at == q else at, n) for at, n in choice.kib)
        groups = tuple(p if at == q else at for at in choice.groups)
        return groups, choice.decode_us, choice.prompt_us, kib, choice.is_host, choice.hides_boundary

    def is_own(choice: GroupChoice, home: int) -> bool:
        return all(at in (CPU_POSITION, home) for at, _ in choice.kib)

    rows = table.choices[p], table.choices[q]
    if not all(is_own(choice, home) for row, home in zip(rows, (p, q), strict=True) for choice in row):
        return False
    return [as_at_p(choice) for choice in rows[0]] == [as_at_p(choice) for choice in rows[1]]


def _lateness(row: tuple[GroupChoice, ...], c: int) -> tuple[bool, bool, bool, bool]:
    choice = row[c]
    return choice.hides_boundary, choice.is_host, c > 0, len(set(choice.groups)) == 1


def _most_prompt_us(table: LayerTable) -> int:
    return max((choice.prompt_us for choices in table.choices for choice in choices), default=0)
