"""The placement program of one frame: homes as monotone prefix booleans, one boolean per moved choice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

from placement.solver.frame import Answer, Choice, Frame
from placement.solver.program import Program, Terms


class Placing:
    """Variables and rules of a frame. `before[i][p]` is 1 when layer i's home is at position p or earlier."""

    def __init__(self, frame: Frame, decode_weight: int = 1, prompt_weight: int = 1) -> None:
        self.frame = frame
        self.program = Program()
        self.n_positions = len(frame.positions)
        self.n_layers = len(frame.layers)
        self.one = self.program.integer(1, 1)
        self._add_homes()
        self._add_choices()
        self.uses_host = self.program.boolean()
        self._order_homes()
        self._use_every_device()
        self._choose_once_per_layer()
        self._keep_within_caps()
        self._exchange_equal_layers_one_way()
        self._hide_boundaries()
        self._add_prompt_time()
        self._set_objective(decode_weight, prompt_weight)

    def _add_homes(self) -> None:
        last = self.n_positions - 1
        self.before = [
            [self.program.boolean() if p < last else self.one for p in range(self.n_positions)]
            for _ in range(self.n_layers)
        ]

    def _add_choices(self) -> None:
        self.moved: list[list[list[tuple[int, Choice]]]] = [
            [
                [(self.program.boolean(), choice) for choice in table.choices[p][1:]]
                for p in range(self.n_positions)
            ]
            for table in self.frame.layers
        ]

    def at_home(self, layer: int, position: int, factor: int = 1) -> Terms:
        """Terms that sum to `factor` when the layer's home is that position, else to 0."""
        terms = [(self.before[layer][position], factor)]
        if position > 0:
            terms.append((self.before[layer][position - 1], -factor))
        return terms

    def _order_homes(self) -> None:
        for i in range(self.n_layers):
            for p in range(self.n_positions - 1):
                if p + 1 < self.n_positions - 1:
                    self.program.at_most([(self.before[i][p], 1), (self.before[i][p + 1], -1)], 0)
                if i + 1 < self.n_layers:
                    self.program.at_most([(self.before[i + 1][p], 1), (self.before[i][p], -1)], 0)

    def _use_every_device(self) -> None:
        for p in range(1, self.n_positions):
            self.program.at_least([term for i in range(self.n_layers) for term in self.at_home(i, p)], 1)

    def _choose_once_per_layer(self) -> None:
        for i, table in enumerate(self.frame.layers):
            for p in range(self.n_positions):
                if not table.choices[p]:
                    self.program.at_most(self.at_home(i, p), 0)
                elif self.moved[i][p]:
                    literals = [(literal, 1) for literal, _ in self.moved[i][p]]
                    self.program.at_most([*literals, *self.at_home(i, p, -1)], 0)

    def _sum(self, value: _Value, only_position: int | None = None) -> Terms:
        """Terms of Σ value(choice) over the layers' actual choices (homes at `only_position`, or all)."""
        terms: Terms = []
        for i, table in enumerate(self.frame.layers):
            for p in range(self.n_positions) if only_position is None else (only_position,):
                if not table.choices[p]:
                    continue
                base = value(table.choices[p][0])
                terms += self.at_home(i, p, base)
                terms += [(literal, value(choice) - base) for literal, choice in self.moved[i][p]]
        return terms

    def _keep_within_caps(self) -> None:
        host: list[int] = [literal for i in range(self.n_layers) for literal in self._host_literals(i)]
        for literal in [*host, self.before[0][0]]:
            if literal != self.one:
                self.program.at_most([(literal, 1), (self.uses_host, -1)], 0)
        for position in range(self.n_positions):
            terms = self._sum(lambda choice, at=position: sum(kib for p, kib in choice.kib if p == at))
            terms.append((self.uses_host, self.frame.host_kib[position]))
            self.program.at_most(terms, self.frame.cap_kib[position])

    def _host_literals(self, layer: int, position: int | None = None) -> list[int]:
        positions: Iterable[int] = range(1, self.n_positions) if position is None else (position,)
        return [literal for p in positions for literal, choice in self.moved[layer][p] if choice.is_host]

    def _exchange_equal_layers_one_way(self) -> None:
        """Of two equal layers on one device, the later one's weights go to host memory first."""
        following: dict[int, int] = {}
        for i in reversed(range(self.n_layers)):
            kind = self.frame.layers[i].kind
            j = following.get(kind)
            following[kind] = i
            if j is None:
                continue
            for p in range(1, self.n_positions):
                mine, later = self._host_literals(i, p), self._host_literals(j, p)
                if not mine:
                    continue
                absent = self.at_home(j, p)
                self.program.at_most([*((x, 1) for x in mine), *((x, -1) for x in later), *absent], 1)
                full = [k for k, (_, choice) in enumerate(self.moved[i][p]) if not any(choice.groups)]
                for k in full:
                    pair = [(self.moved[i][p][k][0], 1), (self.moved[j][p][k][0], -1)]
                    self.program.at_most([*pair, *absent], 1)

    def _hide_boundaries(self) -> None:
        self.hidden: list[int] = []
        if not any(self.frame.hidden_us):
            return
        for i in range(self.n_layers - 1):
            host = self._host_literals(i)
            if not host or self.n_positions < 3:
                continue
            literal = self.program.boolean()
            self.hidden.append(literal)
            self.program.at_most([(literal, 1), *((x, -1) for x in host)], 0)
            cut = [(self.before[i][p], -1) for p in range(1, self.n_positions - 1)]
            cut += [(self.before[i + 1][p], 1) for p in range(1, self.n_positions - 1)]
            self.program.at_most([(literal, 1), *cut], 0)

    def _add_prompt_time(self) -> None:
        if not self.frame.is_pipelined:
            self.prompt: Terms = self._sum(lambda choice: choice.prompt_us)
            self.prompt += [(literal, -self.frame.hidden_us[1]) for literal in self.hidden]
            return
        most = sum(
            max((c.prompt_us for choices in table.choices for c in choices), default=0) for table in self.frame.layers
        )
        longest = self.program.integer(0, most)
        for p in range(self.n_positions):
            stage = self._sum(lambda choice: choice.prompt_us, only_position=p)
            self.program.at_most([*stage, (longest, -1)], 0)
        self.prompt = [(longest, 1)]

    def _set_objective(self, decode_weight: int, prompt_weight: int) -> None:
        self.decode: Terms = self._sum(lambda choice: choice.decode_us)
        self.decode += [(literal, -self.frame.hidden_us[0]) for literal in self.hidden]
        fixed_decode, fixed_prompt = self.frame.fixed_us
        terms = [(variable, decode_weight * c) for variable, c in self.decode]
        terms += [(variable, prompt_weight * c) for variable, c in self.prompt]
        self.program.minimise(terms, decode_weight * fixed_decode + prompt_weight * fixed_prompt)

    def hint(self, answer: Answer) -> None:
        """Start the search from this answer."""
        values: dict[int, int] = {}
        for i, home in enumerate(answer.homes):
            for p in range(self.n_positions - 1):
                values[self.before[i][p]] = int(home <= p)
            for p in range(self.n_positions):
                for k, (literal, _) in enumerate(self.moved[i][p]):
                    values[literal] = int(p == home and k + 1 == answer.picks[i])
        self.program.hint(values)

    def answer(self, values: tuple[int, ...]) -> Answer:
        """The answer that the variables' values stand for."""
        homes = tuple(self.n_positions - sum(values[b] for b in row) for row in self.before)
        picks = tuple(
            next((k + 1 for k, (literal, _) in enumerate(self.moved[i][home]) if values[literal]), 0)
            for i, home in enumerate(homes)
        )
        return Answer(homes, picks)


class _Value(Protocol):
    """A number of a choice: called with the choice (a structural type for `_sum`)."""

    def __call__(self, choice: Choice) -> int: ...
