"""Turns a problem and one way to run it (device order, batch sizes, load mode) into the solver's `Frame`, and an
answer back into an `Assignment`. All memory is rounded up to whole KiB, all times to whole microseconds.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from placement.cost import CostModel, GraphCounts, decode_rates, prompt_rates
from placement.machine import Device, margin_mib
from placement.memory import weight_bytes
from placement.pieces import Pieces
from placement.problem import CPU, Assignment, Settings
from placement.solver.frame import Answer, Choice, Extra, Frame, LayerTable
from placement.units import KIB, MIB

# A real override that changes nothing: the engine looks the embedding up on the CPU anyway, and with any
# override it gives up pipeline parallelism and the fourfold buffers that come with it.
NO_PIPELINE_TENSOR = "token_embd.weight"


@dataclass(frozen=True, slots=True)
class Way:
    """One way to run the model: GPUs in the engine's order, and the settings.

    `uses_host`: layers or experts may stay in host memory, and every buffer has room for what that needs.
    `is_pipelined`: all on the GPUs without overrides, several ubatches in flight.
    """

    devices: tuple[str, ...]
    settings: Settings
    uses_host: bool
    is_pipelined: bool = False


# Home position, whether it is one of the model's first layers, and which of its groups are in host memory.
HostPattern = tuple[int, bool, tuple[bool, ...]]

MAX_CROSSING_DEVICES = 3  # up to here a layer's groups may go to any other GPU

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
    """Compute buffers of a way in bytes, per position (0 is the host), and its graphs' nodes.

    `extras` adds bytes once any layer at that home keeps just those of its groups in host memory.
    """

    n_bytes: tuple[int, ...]
    counts: GraphCounts
    extras: tuple[tuple[HostPattern, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Table:
    """A frame with what is needed to read an answer of it."""

    way: Way
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
        is_plain = self.way.is_pipelined or len(self.way.devices) < 2 or CPU in homes
        has_overrides = bool(moved) or not is_plain
        settings = replace(self.way.settings, has_overrides=has_overrides)
        return Assignment(self.way.devices, homes, tuple(moved), settings)


class TableBuilder:
    """Builds frames of one way from a problem's pieces; what neither buffers nor reserve change is made once.

    `decode_s` and `prompt_s` are arrays of kind × part × position, the last part being the layer's context.
    """

    def __init__(self, pieces: Pieces, way: Way) -> None:
        self.pieces, self.way = pieces, way
        self.problem = pieces.problem
        self.loads = pieces.loads(way.settings)
        self.cost = CostModel(self.problem, way.settings, way.devices)
        self.positions = (CPU, *way.devices)
        self.devices: tuple[Device | None, ...] = (None, *map(self.problem.machine.device, way.devices))
        rates = self.cost.rates
        self.decode_s = self.loads.decode @ np.array([decode_rates(rates, at) for at in self.positions]).T
        self.prompt_s = self.loads.prompt @ np.array([prompt_rates(rates, at) for at in self.positions]).T

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
        return Table(self.way, frame, self.pieces.group_names)

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

    def _us(self, seconds: float) -> int:
        return round(seconds * 1e6)

    def _turn_us(self, decode_s: float, prompt_s: float) -> tuple[int, int]:
        generated = max(self.problem.workload.generate_tokens, 1)
        return self._us(decode_s * generated), self._us(prompt_s * self.serial_share())

    def serial_share(self) -> float:
        """What of a stage's prompt time cannot overlap: serial·(1 − overlap·(1 − 1/n)) (cost.pipelined_s)."""
        n = max(len(self.cost.ubatches), 1)
        return 1.0 - self.cost.overlap * (1.0 - 1.0 / n) if self.way.is_pipelined else 1.0

    def longest_permille(self) -> int:
        """What of the longest stage's time is added where stages overlap."""
        n = max(len(self.cost.ubatches), 1)
        if not self.way.is_pipelined or n == 1:
            return 0
        return round(1000 * self.cost.overlap * (1.0 - 1.0 / n) / self.serial_share())

    def hidden_us(self) -> tuple[int, int]:
        """What a boundary costs that a layer's way back from the host hides."""
        if self.way.is_pipelined or len(self.way.devices) < 2:
            return 0, 0
        # a streamed weight is computed on a GPU, where the boundary is still to be crossed
        n_prompt = 1 if self.cost.rates.stream_s_per_byte is None else 0
        return self._turn_us(*self.cost.splits_s(1, n_prompt, n_between=1))

    def fixed_us(self, counts: GraphCounts) -> tuple[int, int]:
        """What every answer takes."""
        n_devices = len(self.way.devices)
        decode_s, prompt_s = self.cost.fixed_s(counts.n_nodes_decode, counts.n_nodes_prompt)
        base, n_rpc = 1 + n_devices, sum(map(self.is_rpc, range(len(self.devices))))
        for seconds in (self.cost.splits_s(base, base, max(n_devices - 1, 0)), self.cost.rpc_s(n_rpc)):
            decode_s += seconds[0]
            prompt_s += seconds[1]
        return self._turn_us(decode_s, 0.0)[0], self._us(prompt_s)

    def _choices(self, kind: int) -> tuple[tuple[Choice, ...], ...]:
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
        return home > 0 or self.way.uses_host

    def _targets(self, kind: int, home: int, n_groups: int) -> list[tuple[int, ...]]:
        """Where the groups may go: all at home first, then all or some of them on one other position."""
        if not self.is_allowed(kind, home):
            return []
        i = self.pieces.example[kind]
        groups = self.pieces.groups[i] if n_groups else ()
        pinned = [self.pieces.pinned_groups.get((i, group.kind)) for group in groups]
        found = [(home,) * n_groups]
        if n_groups and home > 0 and not self.way.is_pipelined:
            others = range(len(self.positions)) if any(pinned) else self._others(home)
            for other in others:
                if other == home or (other == 0 and not self.way.uses_host):
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
        the splits. With many GPUs and the host in use all of them do that, or the cuts move; so the host is then
        the only other place, and without the host the neighbours are.
        """
        n_gpus = len(self.positions) - 1
        if n_gpus <= MAX_CROSSING_DEVICES:
            return tuple(range(n_gpus + 1))
        return (0,) if self.way.uses_host else tuple(p for p in (home - 1, home + 1) if 1 <= p <= n_gpus)

    def _choice(self, kind: int, home: int, targets: tuple[int, ...]) -> Choice:
        """A choice as the layer all at home plus the difference, each rounded by itself: layers whose groups are
        alike then have equal differences, whatever else they are made of."""
        kv_at = self.kv_position(home)
        decode_s = float(self.decode_s[kind, :-1, home].sum() + self.decode_s[kind, -1, kv_at])
        prompt_s = float(self.prompt_s[kind, :, home].sum())
        if home == 0 and self.pieces.example[kind] < self.pieces.n_layers:
            prompt_s += self.cpu_layer_splits_s(kind)
        decode_us, prompt_us = self._turn_us(decode_s, prompt_s)
        kib = {home: -(-int(self.n_bytes[kind, :, home].sum()) // KIB)}
        kib[kv_at] = kib.get(kv_at, 0) + -(-int(self.loads.context_bytes[kind]) // KIB)
        moved = [(part, at) for part, at in enumerate(targets, 1) if at != home]
        if moved:
            more_us = self._turn_us(*self._move_s(kind, home, targets))
            decode_us, prompt_us = decode_us + more_us[0], prompt_us + more_us[1]
            for part, at in moved:
                kib[home] -= int(self.n_bytes[kind, part, home]) // KIB
                kib[at] = kib.get(at, 0) + -(-int(self.n_bytes[kind, part, at]) // KIB)
        is_host = home > 0 and any(at == 0 for _, at in moved)
        hides = is_host and targets[-1] == 0 and not self.pieces.ends_at_home(self.pieces.example[kind])
        return Choice(targets, decode_us, prompt_us, tuple(sorted(kib.items())), is_host, hides)

    def kv_position(self, home: int) -> int:
        """Where a layer's context is kept and read."""
        return home if self.way.settings.is_kv_offloaded else 0

    def cpu_layer_splits_s(self, kind: int) -> float:
        """Prompt seconds of a CPU layer's splits where its weights are streamed."""
        if self.cost.rates.stream_s_per_byte is None:
            return 0.0
        return self.cost.splits_s(0, sum(map(len, self.pieces.parts[kind])) + _CPU_LAYER_SPLITS)[1]

    def _move_s(self, kind: int, home: int, targets: tuple[int, ...]) -> tuple[float, float]:
        """(decode, prompt) seconds that moving groups off their home adds."""
        away = {position for position in targets if position != home}
        n_between = 2 if home > 0 and 0 not in away else 0
        decode_s, prompt_s = self.cost.splits_s(2, self.n_prompt_splits(kind, home, targets), n_between)
        if any(self.is_rpc(position) for position in (home, *away)):
            more_s = self.cost.rpc_s(1)
            decode_s, prompt_s = decode_s + more_s[0], prompt_s + more_s[1]
        for part, at in enumerate(targets, 1):
            decode_s += float(self.decode_s[kind, part, at] - self.decode_s[kind, part, home])
            prompt_s += float(self.prompt_s[kind, part, at] - self.prompt_s[kind, part, home])
        return decode_s, prompt_s

    def n_prompt_splits(self, kind: int, home: int, targets: tuple[int, ...]) -> int:
        """One split per streamed weight, and one more to come back to a home that is not the first device."""
        if 0 not in targets or self.cost.rates.stream_s_per_byte is None:
            return 2
        parts = self.pieces.parts[kind]
        return sum(len(parts[part]) for part, at in enumerate(targets, 1) if at == 0) + (home > 1)
