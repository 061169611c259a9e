"""Turns a problem and one configuration (device order, batch sizes, load mode) into the solver's `Frame`, and an
answer back into an `Assignment`. All memory is rounded up to whole KiB, all times to whole microseconds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from placement.inputs.machine import Device, margin_mib
from placement.inputs.problem import CPU, Assignment, Settings
from placement.llamacpp.memory import weight_bytes
from placement.predict.cost import CostModel, GraphCounts
from placement.predict.terms import DECODE, PROMPT, Phase
from placement.solve.cpsat.frame import Answer, Extra, Frame, GroupChoice, LayerTable
from placement.solve.frames.pieces import Pieces
from placement.units import KIB, MIB


@dataclass(frozen=True, slots=True)
class Configuration:
    """How a model may be run: GPUs in the engine's order, and the settings.

    `uses_host`: layers or experts may stay in host memory, and every buffer has room for what that needs.
    `is_pipelined`: all on the GPUs without overrides, several ubatches in flight.
    """

    devices: tuple[str, ...]
    settings: Settings
    uses_host: bool
    is_pipelined: bool = False


# Home position, whether it is one of the model's first layers, and which of its groups are in host memory.
HostPattern = tuple[int, bool, tuple[bool, ...]]

MAX_CROSSING_DEVICES = 2  # up to here a layer's groups may go to any other GPU

# Splits of a prompt's graph in a layer that lives on the CPU, beside one for each weight that is streamed.
_CPU_LAYER_SPLITS = 2


def host_pattern(home: int, is_early: bool, groups: tuple[int, ...]) -> HostPattern | None:
    """The pattern of a layer that may need buffers of its own: partly in host memory, or early; else None."""
    on_host = tuple(position == 0 for position in groups)
    if home == 0 or not any(on_host) or (all(on_host) and not is_early):
        return None
    return home, is_early, on_host


@dataclass(frozen=True, slots=True)
class ComputeTable:
    """Compute buffers of a configuration in bytes, per position (0 is the host), and its graphs' nodes.

    `extras` adds bytes once any layer at that home keeps just those of its groups in host memory. `is_padded`: some
    placement lacked some of it, and all are charged.
    """

    n_bytes: tuple[int, ...]
    counts: GraphCounts
    extras: tuple[tuple[HostPattern, tuple[int, ...]], ...] = ()
    is_padded: bool = False


@dataclass(frozen=True)
class Table:
    """A frame with what is needed to read an answer of it."""

    configuration: Configuration
    frame: Frame
    group_names: tuple[tuple[tuple[str, ...], ...], ...]  # per layer, per group: tensor names

    def assignment(self, answer: Answer) -> Assignment:
        """The assignment that an answer stands for."""
        positions = self.frame.positions
        homes = tuple(positions[home] for home in answer.homes)
        moved: list[tuple[str, str]] = []
        for i, names in enumerate(self.group_names):
            home, pick = answer.homes[i], answer.picks[i]
            choice = self.frame.layers[i].choices[home][pick]
            for tensors, position in zip(names, choice.groups, strict=False):
                if position != home:
                    moved += [(name, positions[position]) for name in tensors]
        is_plain = self.configuration.is_pipelined or len(self.configuration.devices) < 2 or CPU in homes
        has_overrides = bool(moved) or not is_plain
        settings = replace(self.configuration.settings, has_overrides=has_overrides)
        return Assignment(self.configuration.devices, homes, tuple(moved), settings)


class TableBuilder:
    """Builds frames of one configuration from a problem's pieces; what neither buffers nor reserve change is made once.

    `decode_s` and `prompt_s` are arrays of kind × part × position, the last part being the layer's context.
    """

    def __init__(self, pieces: Pieces, configuration: Configuration) -> None:
        self.pieces, self.configuration = pieces, configuration
        self.problem = pieces.problem
        self.loads = pieces.loads(configuration.settings)
        self.cost = CostModel(self.loads.work, pieces.rates(configuration.devices, configuration.settings))
        self.positions = (CPU, *configuration.devices)
        self.devices: tuple[Device | None, ...] = (
            None,
            *map(self.problem.machine.device, configuration.devices),
        )
        self.decode_s, self.prompt_s = self._seconds(DECODE), self._seconds(PROMPT)
        self._moved: dict[tuple[int, tuple[int, ...]], list[tuple[int, int, int]]] = {}

    def _seconds(self, phase: Phase) -> NDArray[np.float64]:
        unit_s = np.array([self.cost.rates.at(phase, at) for at in self.positions])
        found: NDArray[np.float64] = self.loads.amounts @ unit_s.T
        return found

    @functools.cached_property
    def n_bytes(self) -> NDArray[np.int64]:
        """Weight bytes of kind × part × position."""
        alike = {device is not None and device.is_cuda: device for device in self.devices}
        found = {is_cuda: self.pieces.kind_bytes(device) for is_cuda, device in alike.items()}
        return np.stack([found[each is not None and each.is_cuda] for each in self.devices], axis=2)

    @functools.cached_property
    def tables(self) -> dict[int, LayerTable]:
        """Every kind's choices."""
        moves = self.pieces.moves
        return {kind: LayerTable(kind, moves[kind], self._choices(kind)) for kind in self.pieces.example}

    def build(self, compute: ComputeTable, reserve_fraction: float = 0.0) -> Table:
        """The frame, with caps after compute buffers, runtime and reserve."""
        frame = Frame(
            positions=self.positions,
            layers=tuple(self.tables[kind] for kind in self.pieces.kinds),
            cap_kib=self.caps_kib(compute, reserve_fraction),
            hidden_us=self.hidden_us(),
            fixed_us=self.fixed_us(compute.counts),
            longest_permille=self.longest_permille(),
            extras=tuple(self._extra(*each) for each in compute.extras),
        )
        return Table(self.configuration, frame, self.pieces.group_names)

    def _extra(self, pattern: HostPattern, n_bytes: tuple[int, ...]) -> Extra:
        home, is_early, _ = pattern
        taken = frozenset(
            (table.moves, home, index)
            for kind, table in self.tables.items()
            if self.pieces.is_early(kind) == is_early
            for index, choice in enumerate(table.choices[home])
            if host_pattern(home, is_early, choice.groups) == pattern
        )
        return Extra(taken, tuple(-(-each // KIB) for each in n_bytes))

    def _kept_free_mib(self, device: Device, reserve_fraction: float) -> float:
        """A share of the card, or what runs have taught to keep free instead."""
        learned = margin_mib(self.problem.machine, device.name) if reserve_fraction else None
        return reserve_fraction * device.total_mib if learned is None else learned

    def caps_kib(self, compute: ComputeTable, reserve_fraction: float) -> tuple[int, ...]:
        """What layers may take at each position."""
        caps = []
        for p, device in enumerate(self.devices):
            if device is None:
                cap = self.problem.machine.cpu.usable_mib * MIB - sum(
                    weight_bytes(each.tensor, None) for each in self.pieces.inputs
                )
            else:
                reserve = self.problem.reserve_mib + self._kept_free_mib(device, reserve_fraction)
                cap = (device.usable_mib - device.runtime_mib - reserve) * MIB
                cap -= sum(weight_bytes(each.tensor, device) for each in self.pieces.shared)
            caps.append(int(cap - compute.n_bytes[p]) // KIB)
        return tuple(caps)

    def is_rpc(self, position: int) -> bool:
        """Whether the position is a worker's."""
        device = self.devices[position]
        return device is not None and device.is_rpc

    def _turn_us(self, decode_s: float, prompt_s: float) -> tuple[int, int]:
        generated = max(self.problem.workload.generate_tokens, 1)
        return round(decode_s * generated * 1e6), round(prompt_s * self.serial_share() * 1e6)

    def serial_share(self) -> float:
        """What of a stage's prompt time cannot overlap: serial·(1 − overlap·(1 − 1/n)) (cost.pipelined_s)."""
        n = max(self.cost.n_ubatches, 1)
        return 1.0 - self.cost.overlap * (1.0 - 1.0 / n) if self.configuration.is_pipelined else 1.0

    def longest_permille(self) -> int:
        """What of the longest stage's time is added where stages overlap."""
        n = max(self.cost.n_ubatches, 1)
        if not self.configuration.is_pipelined or n == 1:
            return 0
        return round(1000 * self.cost.overlap * (1.0 - 1.0 / n) / self.serial_share())

    def hidden_us(self) -> tuple[int, int]:
        """What a boundary costs that a layer's return from the host hides."""
        if self.configuration.is_pipelined or len(self.configuration.devices) < 2:
            return 0, 0
        # a streamed weight is computed on a GPU, where the boundary is still to be crossed
        n_prompt = 0 if self.cost.rates.is_streamed else 1
        return self._turn_us(*self.cost.splits_s(1, n_prompt, n_between=1))

    def fixed_us(self, counts: GraphCounts) -> tuple[int, int]:
        """What every answer takes."""
        n_devices = len(self.configuration.devices)
        decode_s, prompt_s = self.cost.fixed_s(counts.n_nodes_decode, counts.n_nodes_prompt)
        base, n_rpc = 1 + n_devices, sum(map(self.is_rpc, range(len(self.devices))))
        for seconds in (self.cost.splits_s(base, base, max(n_devices - 1, 0)), self.cost.rpc_s(n_rpc)):
            decode_s += seconds[0]
            prompt_s += seconds[1]
        return self._turn_us(decode_s, 0.0)[0], round(prompt_s * 1e6)

    def _choices(self, kind: int) -> tuple[tuple[GroupChoice, ...], ...]:
        n_groups = len(self.pieces.parts[kind]) - 1
        return tuple(
            tuple(self._choice(kind, home, targets) for targets in self._targets(kind, home, n_groups))
            for home in range(len(self.positions))
        )

    def is_allowed(self, kind: int, home: int) -> bool:
        """Whether layers of a kind may live at a home."""
        allowed = self.pieces.pinned_homes.get(self.pieces.example[kind])
        if allowed is not None and self.positions[home] not in allowed:
            return False
        return home > 0 or self.configuration.uses_host

    def _targets(self, kind: int, home: int, n_groups: int) -> list[tuple[int, ...]]:
        """Where the groups may go: all at home first, then all or some of them on one other position."""
        if not self.is_allowed(kind, home):
            return []
        i = self.pieces.example[kind]
        groups = self.pieces.groups[i] if n_groups else ()
        pinned = [self.pieces.pinned_groups.get((i, group.kind)) for group in groups]
        found = [(home,) * n_groups]
        if n_groups and home > 0 and not self.configuration.is_pipelined:
            others = range(len(self.positions)) if any(pinned) else self._others(home)
            for other in others:
                if other == home or (other == 0 and not self.configuration.uses_host):
                    continue
                found.append((other,) * n_groups)
                if n_groups == 2:
                    found += [(other, home), (home, other)]
        return [
            targets
            for targets in found
            if all(pin is None or self.positions[at] == pin for pin, at in zip(pinned, targets, strict=True))
        ]

    def _others(self, home: int) -> tuple[int, ...]:
        """Where a layer's groups may go from a home.

        A group never pays on a GPU that keeps a like group of its own in host memory: exchanging the two saves
        the splits. With more than two GPUs and the host in use nearly all of them do that, or the cuts move; so
        the host is then the only other place, and without the host the neighbours are. (Three GPUs with every
        other place: 3 % unproven after 10 s; without: 0.04 % in 0.4 s, and the same choices to 0.4 %.)
        """
        n_gpus = len(self.positions) - 1
        if n_gpus <= MAX_CROSSING_DEVICES:
            return tuple(range(n_gpus + 1))
        return (
            (0,)
            if self.configuration.uses_host
            else tuple(p for p in (home - 1, home + 1) if 1 <= p <= n_gpus)
        )

    def _choice(self, kind: int, home: int, targets: tuple[int, ...]) -> GroupChoice:
        """A choice as the layer all at home plus the difference, each rounded by itself: layers whose groups are
        alike then have equal differences, whatever else they are made of."""
        decode_us, prompt_us, kib = self._at_home[home][kind]
        taken = {home: kib}
        kv_at = self.kv_position(home)
        taken[kv_at] = taken.get(kv_at, 0) + self._context_kib[kind]
        away = [(part, at) for part, at in enumerate(targets, 1) if at != home]
        if not away:
            return GroupChoice(targets, decode_us, prompt_us, tuple(sorted(taken.items())))
        if (home, targets) not in self._moved:
            self._moved[home, targets] = self._moving(home, targets)
        more_decode_us, more_prompt_us, freed_kib = self._moved[home, targets][kind]
        taken[home] -= freed_kib
        for part, at in away:
            taken[at] = taken.get(at, 0) + -(-int(self.n_bytes[kind, part, at]) // KIB)
        is_host = home > 0 and any(at == 0 for _, at in away)
        hides = is_host and targets[-1] == 0 and not self.pieces.ends_at_home(self.pieces.example[kind])
        return GroupChoice(
            targets,
            decode_us + more_decode_us,
            prompt_us + more_prompt_us,
            tuple(sorted(taken.items())),
            is_host,
            hides,
        )

    def _turns_us(
        self, decode_s: NDArray[np.float64], prompt_s: NDArray[np.float64]
    ) -> tuple[list[int], ...]:
        """Whole microseconds of a turn, for every kind."""
        generated = max(self.problem.workload.generate_tokens, 1)
        rounded = np.rint(decode_s * (generated * 1e6)), np.rint(prompt_s * (self.serial_share() * 1e6))
        return tuple(each.astype(np.int64).tolist() for each in rounded)

    @functools.cached_property
    def _context_kib(self) -> list[int]:
        return [-(-n_bytes // KIB) for n_bytes in self.loads.context_bytes.tolist()]

    @functools.cached_property
    def _at_home(self) -> list[list[tuple[int, int, int]]]:
        """Per home and kind: the turn's (decode, prompt) microseconds and the weights' KiB, everything at home."""
        rows = []
        for home in range(len(self.positions)):
            decode_s = self.decode_s[:, :-1, home].sum(axis=1) + self.decode_s[:, -1, self.kv_position(home)]
            prompt_s = self.prompt_s[:, :, home].sum(axis=1)
            if home == 0:
                prompt_s += self.cpu_layer_splits_s
            kib = -(-self.n_bytes[:, :, home].sum(axis=1) // KIB)
            rows.append(list(zip(*self._turns_us(decode_s, prompt_s), kib.tolist(), strict=True)))
        return rows

    def _moving(self, home: int, targets: tuple[int, ...]) -> list[tuple[int, int, int]]:
        """Per kind: what moving groups off their home adds to the turn, and the KiB that it frees there."""
        decode_s, prompt_s, freed = self._move_s(home, targets)
        return list(zip(*self._turns_us(decode_s, prompt_s), freed.tolist(), strict=True))

    def kv_position(self, home: int) -> int:
        """Where a layer's context is kept and read."""
        return home if self.configuration.settings.is_kv_offloaded else 0

    @functools.cached_property
    def cpu_layer_splits_s(self) -> NDArray[np.float64]:
        """Prompt seconds of a CPU layer's splits where its weights are streamed, per kind; the output has none."""
        found = np.zeros(len(self.decode_s))
        for kind, i in self.pieces.example.items():
            if i < self.pieces.n_layers and self.cost.rates.is_streamed:
                n_splits = sum(map(len, self.pieces.parts[kind])) + _CPU_LAYER_SPLITS
                found[kind] = self.cost.splits_s(0, n_splits)[1]
        return found

    def _move_s(
        self, home: int, targets: tuple[int, ...]
    ) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.int64]]:
        """(decode, prompt) seconds that moving groups off their home adds, and the KiB freed; per kind."""
        away = {position for position in targets if position != home}
        n_between = 2 if home > 0 and 0 not in away else 0
        n_prompt = self.n_prompt_splits(home, targets)
        decode, prompt = self.cost.splits_s(2, 0, n_between)[0], self.cost.splits_s(0, 1)[1] * n_prompt
        if any(self.is_rpc(position) for position in (home, *away)):
            more_s = self.cost.rpc_s(1)
            decode, prompt = decode + more_s[0], prompt + more_s[1]
        decode_s, freed = np.full(len(self.decode_s), decode), np.zeros(len(self.decode_s), dtype=np.int64)
        prompt_s = prompt.astype(np.float64)
        for part, at in enumerate(targets, 1):
            if at != home:
                decode_s += self.decode_s[:, part, at] - self.decode_s[:, part, home]
                prompt_s = prompt_s + self.prompt_s[:, part, at] - self.prompt_s[:, part, home]
                freed += self.n_bytes[:, part, home] // KIB
        return decode_s, prompt_s, freed

    def n_prompt_splits(self, home: int, targets: tuple[int, ...]) -> NDArray[np.int64]:
        """Per kind, one split per streamed weight, and one more to come back to a home that is not the first."""
        if 0 not in targets or not self.cost.rates.is_streamed:
            return np.full(len(self.decode_s), 2)
        streamed = [part for part, at in enumerate(targets, 1) if at == 0]
        found: NDArray[np.int64] = self.pieces.n_tensors[:, streamed].sum(axis=1) + (home > 1)
        return found
