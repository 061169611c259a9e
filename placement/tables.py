"""Turns a problem and one way to run it (device order, batch sizes, load mode) into the solver's `Frame`, and an
answer back into an `Assignment`. All memory is rounded up to whole KiB, all times to whole microseconds.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from placement.architecture import Architecture, PlacedTensor, describe
from placement.cost import CostModel, GraphCounts, Load, total
from placement.crossings import AFTER_FFN
from placement.groups import movable_groups
from placement.machine import Device, margin_mib
from placement.memory import layer_context_bytes, weight_bytes
from placement.problem import CPU, Assignment, Problem, Settings
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

# The allocator packs a graph's start less densely: streaming experts of the first three layers may take hundreds
# of MiB more on the first card than streaming any others.
N_EARLY_LAYERS = 3

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


@dataclass(frozen=True, slots=True)
class Pins:
    """What the user fixes: (layer, allowed home names) and (layer, group kind, device name)."""

    homes: tuple[tuple[int, frozenset[str]], ...] = ()
    groups: tuple[tuple[int, str, str], ...] = ()


NO_PINS = Pins()


@dataclass(frozen=True, slots=True)
class _Part:
    """A layer's fixed part or one of its groups: bytes and seconds at every position."""

    n_tensors: int
    n_bytes: tuple[int, ...]
    decode_s: tuple[float, ...]
    prompt_s: tuple[float, ...]


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


class Pieces:
    """A model cut into what a frame is made of; the same for every way of one problem.

    `kinds[i]` numbers layers that are alike; `example[kind]` is one of them. `parts[kind]` lists the fixed
    tensors first, then each movable group.
    """

    def __init__(self, problem: Problem, pins: Pins = NO_PINS) -> None:
        self.problem = problem
        self.pinned_homes = dict(pins.homes)
        self.pinned_groups = {(layer, kind): device for layer, kind, device in pins.groups}
        self.architecture: Architecture = describe(problem.model)
        self.n_layers = self.architecture.n_layer_all
        self.groups = movable_groups(problem.model, self.n_layers)
        self.members: list[list[PlacedTensor]] = [[] for _ in range(self.n_layers + 1)]
        self.shared: list[PlacedTensor] = []
        self.inputs: list[PlacedTensor] = []
        for placed in self.architecture.tensors:
            if placed.is_shared:
                self.shared.append(placed)
            elif placed.layer is None:
                self.inputs.append(placed)
            else:
                self.members[placed.layer].append(placed)
        numbers: dict[Hashable, int] = {}
        self.kinds = [numbers.setdefault(self._signature(i), len(numbers)) for i in range(self.n_layers + 1)]
        self.example = {kind: i for i, kind in reversed(list(enumerate(self.kinds)))}
        self.parts = {kind: self._parts(i) for kind, i in self.example.items()}
        alike: dict[Hashable, int] = {}
        self.moves = {
            kind: alike.setdefault(self._move_signature(i), len(alike)) for kind, i in self.example.items()
        }
        self.group_names = (
            *(tuple(tuple(t.name for t in group.tensors) for group in groups) for groups in self.groups),
            (),
        )
        self._bytes: dict[tuple[int, int, bool], int] = {}
        self.costs: dict[Way, CostModel] = {}
        self.tables: dict[Way, dict[int, LayerTable]] = {}

    def _signature(self, i: int) -> Hashable:
        shapes = tuple(
            (p.name.split(".", 2)[-1] if i < self.n_layers else p.name, p.tensor.shape, p.tensor.type)
            for p in self.members[i]
        )
        if i == self.n_layers:
            return ("output", shapes, self.pinned_homes.get(i))
        facts = self.architecture.layers[i]
        pins = tuple(self.pinned_groups.get((i, group.kind)) for group in self.groups[i])
        memory = (facts.caches, facts.n_head, facts.window_tokens, facts.state_r, facts.state_s)
        use = (facts.is_loaded, facts.n_expert_used, facts.cache_layer == i)
        return (shapes, memory, use, self.pinned_homes.get(i), pins, i < N_EARLY_LAYERS)

    def _move_signature(self, i: int) -> Hashable:
        """What the differences between a layer's choices depend on: its groups, whatever its attention."""
        if i == self.n_layers:
            return "output"
        groups = self.groups[i]
        shapes = tuple((g.kind, tuple((t.shape, t.type) for t in g.tensors)) for g in groups)
        pins = tuple(self.pinned_groups.get((i, group.kind)) for group in groups)
        n_used = self.architecture.layers[i].n_expert_used
        return (shapes, n_used, self.ends_at_home(i), self.pinned_homes.get(i), pins, i < N_EARLY_LAYERS)

    def ends_at_home(self, i: int) -> bool:
        """Whether a layer's last work needs weights that never move: a shared expert, a norm after the network."""
        return any(mark in placed.name for placed in self.members[i] for mark in AFTER_FFN)

    def is_early(self, kind: int) -> bool:
        """Whether a kind's layers are among the model's first."""
        return self.example[kind] < N_EARLY_LAYERS

    def _parts(self, i: int) -> list[list[PlacedTensor]]:
        groups = self.groups[i] if i < self.n_layers else ()
        by_name = {placed.name: placed for placed in self.members[i]}
        movable = [[by_name[t.name] for t in group.tensors if t.name in by_name] for group in groups]
        moving = {placed.name for group in movable for placed in group}
        return [[placed for placed in self.members[i] if placed.name not in moving], *movable]

    def part_bytes(self, kind: int, part: int, device: Device | None) -> int:
        """Weight bytes of one part on a device (None: host memory)."""
        key = kind, part, device is not None and device.is_cuda
        if key not in self._bytes:
            self._bytes[key] = sum(weight_bytes(placed.tensor, device) for placed in self.parts[kind][part])
        return self._bytes[key]


class TableBuilder:
    """Builds frames of one way from a problem's pieces, which keep what neither buffers nor reserve change."""

    def __init__(self, pieces: Pieces, way: Way) -> None:
        self.pieces, self.way = pieces, way
        self.problem = pieces.problem
        self.cost = pieces.costs.get(way) or CostModel(self.problem, way.settings, way.devices)
        pieces.costs[way] = self.cost
        self.positions = (CPU, *way.devices)
        self.devices: tuple[Device | None, ...] = (None, *map(self.problem.machine.device, way.devices))
        self.context_bytes = layer_context_bytes(self.problem.model, way.settings)

    def build(self, compute: ComputeTable, reserve_fraction: float = 0.0) -> Table:
        """The frame, with caps after compute buffers, runtime and reserve."""
        if self.way not in self.pieces.tables:
            moves, kinds = self.pieces.moves, self.pieces.example
            self.pieces.tables[self.way] = {
                kind: LayerTable(kind, moves[kind], self._choices(kind)) for kind in kinds
            }
        tables = self.pieces.tables[self.way]
        frame = Frame(
            positions=self.positions,
            layers=tuple(tables[kind] for kind in self.pieces.kinds),
            cap_kib=self._caps(compute, reserve_fraction),
            hidden_us=self._hidden_us(),
            fixed_us=self._fixed_us(compute.counts),
            longest_permille=self._longest_permille(),
            extras=tuple(self._extra(tables, *each) for each in compute.extras),
        )
        return Table(self.way, frame, self.pieces.group_names)

    def _extra(self, tables: dict[int, LayerTable], pattern: HostPattern, n_bytes: tuple[int, ...]) -> Extra:
        home, is_early, _ = pattern
        taken = frozenset(
            (table.moves, home, index)
            for kind, table in tables.items()
            if self.pieces.is_early(kind) == is_early
            for index, choice in enumerate(table.choices[home])
            if host_pattern(home, is_early, choice.groups) == pattern
        )
        return Extra(taken, tuple(-(-each // KIB) for each in n_bytes))

    def _kept_free_mib(self, device: Device, reserve_fraction: float) -> float:
        """A share of the card, or what runs have taught to keep free instead."""
        learned = margin_mib(self.problem.machine, device.name) if reserve_fraction else None
        return reserve_fraction * device.total_mib if learned is None else learned

    def _caps(self, compute: ComputeTable, reserve_fraction: float) -> tuple[int, ...]:
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

    def _is_rpc(self, position: int) -> bool:
        device = self.devices[position]
        return device is not None and device.is_rpc

    def _us(self, seconds: float) -> int:
        return round(seconds * 1e6)

    def _turn_us(self, decode_s: float, prompt_s: float) -> tuple[int, int]:
        generated = max(self.problem.workload.generate_tokens, 1)
        return self._us(decode_s * generated), self._us(prompt_s * self._serial_share())

    def _serial_share(self) -> float:
        """What of a stage's prompt time cannot overlap: serial·(1 − overlap·(1 − 1/n)) (cost.pipelined_s)."""
        n = max(len(self.cost.ubatches), 1)
        return 1.0 - self.cost.overlap * (1.0 - 1.0 / n) if self.way.is_pipelined else 1.0

    def _longest_permille(self) -> int:
        n = max(len(self.cost.ubatches), 1)
        if not self.way.is_pipelined or n == 1:
            return 0
        return round(1000 * self.cost.overlap * (1.0 - 1.0 / n) / self._serial_share())

    def _hidden_us(self) -> tuple[int, int]:
        if self.way.is_pipelined or len(self.way.devices) < 2:
            return 0, 0
        # a streamed weight is computed on a GPU, where the boundary is still to be crossed
        n_prompt = 1 if self.cost.rates.stream_s_per_byte is None else 0
        return self._turn_us(*self.cost.splits_s(1, n_prompt, n_between=1))

    def _fixed_us(self, counts: GraphCounts) -> tuple[int, int]:
        n_devices = len(self.way.devices)
        decode_s, prompt_s = self.cost.fixed_s(counts.n_nodes_decode, counts.n_nodes_prompt)
        base, n_rpc = 1 + n_devices, sum(map(self._is_rpc, range(len(self.devices))))
        for seconds in (self.cost.splits_s(base, base, max(n_devices - 1, 0)), self.cost.rpc_s(n_rpc)):
            decode_s += seconds[0]
            prompt_s += seconds[1]
        return self._turn_us(decode_s, 0.0)[0], self._us(prompt_s)

    def _choices(self, kind: int) -> tuple[tuple[Choice, ...], ...]:
        i = self.pieces.example[kind]
        parts = [self._part(kind, part) for part in range(len(self.pieces.parts[kind]))]
        context = Load()
        context_bytes = 0
        if i < self.pieces.n_layers:
            context = self.cost.context_load(self.pieces.architecture.layers[i])
            context_bytes = self.context_bytes[i]
        return tuple(
            tuple(
                self._choice(i, home, targets, parts, context, context_bytes)
                for targets in self._targets(i, home, len(parts) - 1)
            )
            for home in range(len(self.positions))
        )

    def _part(self, kind: int, part: int) -> _Part:
        members = self.pieces.parts[kind][part]
        load = total(map(self.cost.tensor_load, members))
        return _Part(
            n_tensors=len(members),
            n_bytes=tuple(self.pieces.part_bytes(kind, part, device) for device in self.devices),
            decode_s=tuple(self.cost.decode_s(load, name) for name in self.positions),
            prompt_s=tuple(self.cost.prompt_s(load, name) for name in self.positions),
        )

    def _targets(self, i: int, home: int, n_groups: int) -> list[tuple[int, ...]]:
        """Where the groups may go: all at home first, then all or some of them on one other position."""
        allowed = self.pieces.pinned_homes.get(i)
        if allowed is not None and self.positions[home] not in allowed:
            return []
        if home == 0 and not self.way.uses_host:
            return []
        pinned = (
            [self.pieces.pinned_groups.get((i, group.kind)) for group in self.pieces.groups[i]]
            if n_groups
            else []
        )
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

    def _choice(
        self,
        i: int,
        home: int,
        targets: tuple[int, ...],
        parts: list[_Part],
        context: Load,
        context_bytes: int,
    ) -> Choice:
        """A choice as the layer all at home plus the difference, each rounded by itself: layers whose groups are
        alike then have equal differences, whatever else they are made of."""
        kv_at = home if self.way.settings.is_kv_offloaded else 0
        decode_s = self.cost.decode_s(context, self.positions[kv_at]) + sum(
            part.decode_s[home] for part in parts
        )
        prompt_s = self.cost.prompt_s(context, self.positions[home]) + sum(
            part.prompt_s[home] for part in parts
        )
        if home == 0 and i < self.pieces.n_layers:
            prompt_s += self._cpu_layer_splits_s(parts)
        decode_us, prompt_us = self._turn_us(decode_s, prompt_s)
        kib = {home: -(-sum(part.n_bytes[home] for part in parts) // KIB)}
        kib[kv_at] = kib.get(kv_at, 0) + -(-context_bytes // KIB)
        moved = [(at, part) for at, part in zip(targets, parts[1:], strict=True) if at != home]
        if moved:
            more_us = self._turn_us(*self._move_s(home, targets, parts))
            decode_us, prompt_us = decode_us + more_us[0], prompt_us + more_us[1]
            for at, part in moved:
                kib[home] -= part.n_bytes[home] // KIB
                kib[at] = kib.get(at, 0) + -(-part.n_bytes[at] // KIB)
        is_host = home > 0 and any(at == 0 for at, _ in moved)
        hides = is_host and targets[-1] == 0 and not self.pieces.ends_at_home(i)
        return Choice(targets, decode_us, prompt_us, tuple(sorted(kib.items())), is_host, hides)

    def _cpu_layer_splits_s(self, parts: list[_Part]) -> float:
        """Prompt seconds of a CPU layer's splits where its weights are streamed."""
        if self.cost.rates.stream_s_per_byte is None:
            return 0.0
        n_splits = sum(part.n_tensors for part in parts) + _CPU_LAYER_SPLITS
        return self.cost.splits_s(0, n_splits)[1]

    def _move_s(self, home: int, targets: tuple[int, ...], parts: list[_Part]) -> tuple[float, float]:
        """(decode, prompt) seconds that moving groups off their home adds."""
        away = {position for position in targets if position != home}
        n_between = 2 if home > 0 and 0 not in away else 0
        costs = [self.cost.splits_s(2, self._n_prompt_splits(home, targets, parts), n_between)]
        if any(self._is_rpc(position) for position in (home, *away)):
            costs.append(self.cost.rpc_s(1))
        for at, part in zip(targets, parts[1:], strict=True):
            costs.append((part.decode_s[at] - part.decode_s[home], part.prompt_s[at] - part.prompt_s[home]))
        return sum(decode for decode, _ in costs), sum(prompt for _, prompt in costs)

    def _n_prompt_splits(self, home: int, targets: tuple[int, ...], parts: list[_Part]) -> int:
        """One split per streamed weight, and one more to come back to a home that is not the first device."""
        if 0 not in targets or self.cost.rates.stream_s_per_byte is None:
            return 2
        n_streamed = sum(part.n_tensors for at, part in zip(targets, parts[1:], strict=True) if at == 0)
        return n_streamed + (home > 1)
