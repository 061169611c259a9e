"""Turns a problem and one way to run it (device order, batch sizes, load mode) into the solver's `Frame`, and an
answer back into an `Assignment`. All memory is rounded up to whole KiB, all times to whole microseconds.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

from placement.architecture import Architecture, PlacedTensor, describe
from placement.cost import CostModel, GraphCounts, Load, total
from placement.groups import movable_groups
from placement.machine import Device
from placement.memory import layer_context_bytes, weight_bytes
from placement.problem import CPU, Assignment, Problem, Settings
from placement.solver.frame import Answer, Choice, Frame, LayerTable
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


@dataclass(frozen=True, slots=True)
class ComputeTable:
    """Compute buffers of a way in bytes, per position (0 is the host), and its graphs' nodes."""

    n_bytes: tuple[int, ...]
    counts: GraphCounts


@dataclass(frozen=True, slots=True)
class Pins:
    """What the user fixes: layer → allowed home names, (layer, group kind) → device name."""

    homes: dict[int, frozenset[str]]
    groups: dict[tuple[int, str], str]


NO_PINS = Pins({}, {})


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


class TableBuilder:
    """Builds the frame of one way; what does not depend on caps is computed once per kind of layer."""

    def __init__(
        self,
        problem: Problem,
        way: Way,
        compute: ComputeTable,
        pins: Pins = NO_PINS,
        reserve_fraction: float = 0.0,
    ) -> None:
        self.problem, self.way, self.compute, self.pins = problem, way, compute, pins
        self.reserve_fraction = reserve_fraction
        self.architecture: Architecture = describe(problem.model)
        self.cost = CostModel(problem, way.settings, way.devices)
        self.positions = (CPU, *way.devices)
        self.devices: tuple[Device | None, ...] = (None, *map(problem.machine.device, way.devices))
        self.context_bytes = layer_context_bytes(problem.model, way.settings)
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

    def build(self) -> Table:
        """The frame, with caps after compute buffers, runtime and reserve."""
        kinds: dict[Hashable, int] = {}
        tables: dict[int, LayerTable] = {}
        layers = []
        for i in range(self.n_layers + 1):
            kind = kinds.setdefault(self._kind(i), len(kinds))
            if kind not in tables:
                tables[kind] = LayerTable(kind, self._choices(i))
            layers.append(tables[kind])
        frame = Frame(
            positions=self.positions,
            layers=tuple(layers),
            cap_kib=self._caps(),
            hidden_us=self._hidden_us(),
            fixed_us=self._fixed_us(),
            n_in_flight=len(self.cost.ubatches) if self.way.is_pipelined else 1,
        )
        names = tuple(tuple(tuple(t.name for t in g.tensors) for g in groups) for groups in self.groups)
        return Table(self.way, frame, (*names, ()))

    def _kind(self, i: int) -> Hashable:
        shapes = tuple(
            (p.name.split(".", 2)[-1] if i < self.n_layers else p.name, p.tensor.shape, p.tensor.type)
            for p in self.members[i]
        )
        if i == self.n_layers:
            return ("output", shapes, self.pins.homes.get(i))
        facts = self.architecture.layers[i]
        pins = tuple(self.pins.groups.get((i, group.kind)) for group in self.groups[i])
        return (
            shapes, facts.caches, facts.n_head, facts.window_tokens, facts.state_r, facts.state_s, facts.is_loaded,
            facts.n_expert_used, facts.cache_layer == i, self.pins.homes.get(i), pins,
        )  # fmt: skip

    def _caps(self) -> tuple[int, ...]:
        caps = []
        for p, device in enumerate(self.devices):
            if device is None:
                cap = self.problem.machine.cpu.usable_mib * MIB - sum(self._weights(t, p) for t in self.inputs)
            else:
                reserve = self.problem.reserve_mib + self.reserve_fraction * device.total_mib
                cap = (device.usable_mib - device.runtime_mib - reserve) * MIB
                cap -= sum(self._weights(t, p) for t in self.shared)
            caps.append(int(cap - self.compute.n_bytes[p]) // KIB)
        return tuple(caps)

    def _weights(self, placed: PlacedTensor, position: int) -> int:
        return weight_bytes(placed.tensor, self.devices[position])

    def _is_rpc(self, position: int) -> bool:
        device = self.devices[position]
        return device is not None and device.is_rpc

    def _us(self, seconds: float) -> int:
        return round(seconds * 1e6)

    def _turn_us(self, decode_s: float, prompt_s: float) -> tuple[int, int]:
        workload = self.problem.workload
        n_ubatches = max(len(self.cost.ubatches), 1)
        prompt_us = self._us(prompt_s / n_ubatches if self.way.is_pipelined else prompt_s)
        return self._us(decode_s * max(workload.generate_tokens, 1)), prompt_us

    def _hidden_us(self) -> tuple[int, int]:
        if self.way.is_pipelined or len(self.way.devices) < 2:
            return 0, 0
        return self._turn_us(*self.cost.splits_s(1, 1))

    def _fixed_us(self) -> tuple[int, int]:
        counts, n_devices = self.compute.counts, len(self.way.devices)
        decode_s, prompt_s = self.cost.fixed_s(counts.n_nodes_decode, counts.n_nodes_prompt)
        base = 1 + n_devices
        for seconds in (self.cost.splits_s(base, base), self._rpc_s(sum(map(self._is_rpc, range(len(self.devices)))))):
            decode_s += seconds[0]
            prompt_s += seconds[1]
        decode_us, _ = self._turn_us(decode_s, 0.0)
        return decode_us, self._us(prompt_s)

    def _rpc_s(self, n_crossings: int) -> tuple[float, float]:
        seconds = 2 * n_crossings * self.cost.rates.rpc_split_s
        return seconds, seconds * len(self.cost.ubatches)

    def _choices(self, i: int) -> tuple[tuple[Choice, ...], ...]:
        groups = self.groups[i] if i < self.n_layers else ()
        by_name = {placed.name: placed for placed in self.members[i]}
        movable = [[by_name[t.name] for t in group.tensors if t.name in by_name] for group in groups]
        moving = {placed.name for group in movable for placed in group}
        parts = [self._part([placed for placed in self.members[i] if placed.name not in moving])]
        parts += [self._part(group) for group in movable]
        context = Load()
        context_bytes = 0
        if i < self.n_layers:
            context = self.cost.context_load(self.architecture.layers[i])
            context_bytes = self.context_bytes[i]
        return tuple(
            tuple(
                self._choice(home, targets, parts, context, context_bytes)
                for targets in self._targets(i, home, len(groups))
            )
            for home in range(len(self.positions))
        )

    def _part(self, members: list[PlacedTensor]) -> _Part:
        load = total(map(self.cost.tensor_load, members))
        positions = range(len(self.positions))
        names = self.positions
        return _Part(
            n_tensors=len(members),
            n_bytes=tuple(sum(self._weights(placed, p) for placed in members) for p in positions),
            decode_s=tuple(self.cost.decode_s(load, names[p]) for p in positions),
            prompt_s=tuple(self.cost.prompt_s(load, names[p]) for p in positions),
        )

    def _targets(self, i: int, home: int, n_groups: int) -> list[tuple[int, ...]]:
        """Where the groups may go: all at home first, then all or some of them on one other position."""
        allowed = self.pins.homes.get(i)
        if allowed is not None and self.positions[home] not in allowed:
            return []
        if home == 0 and not self.way.uses_host:
            return []
        found = [(home,) * n_groups]
        if n_groups and home > 0 and not self.way.is_pipelined:
            for other in range(len(self.positions)):
                if other == home or (other == 0 and not self.way.uses_host):
                    continue
                found.append((other,) * n_groups)
                if n_groups == 2:
                    found += [(other, home), (home, other)]
        pinned = [self.pins.groups.get((i, group.kind)) for group in self.groups[i]] if n_groups else []
        return [
            targets
            for targets in found
            if all(pin is None or self.positions[at] == pin for pin, at in zip(pinned, targets, strict=True))
        ]

    def _choice(
        self, home: int, targets: tuple[int, ...], parts: list[_Part], context: Load, context_bytes: int
    ) -> Choice:
        kv_at = home if self.way.settings.is_kv_offloaded else 0
        used: dict[int, int] = {kv_at: context_bytes}
        decode_s = self.cost.decode_s(context, self.positions[kv_at])
        prompt_s = self.cost.prompt_s(context, self.positions[home])
        for position, part in zip((home, *targets), parts, strict=True):
            decode_s += part.decode_s[position]
            prompt_s += part.prompt_s[position]
            used[position] = used.get(position, 0) + part.n_bytes[position]
        away = {position for position in targets if position != home}
        if away:
            moves = [self.cost.splits_s(2, self._n_prompt_splits(home, targets, parts))]
            if any(self._is_rpc(position) for position in (home, *away)):
                moves.append(self._rpc_s(1))
            decode_s += sum(seconds for seconds, _ in moves)
            prompt_s += sum(seconds for _, seconds in moves)
        decode_us, prompt_us = self._turn_us(decode_s, prompt_s)
        kib = tuple((position, -(-n_bytes // KIB)) for position, n_bytes in sorted(used.items()) if n_bytes)
        return Choice(targets, decode_us, prompt_us, kib, is_host=home > 0 and 0 in away)

    def _n_prompt_splits(self, home: int, targets: tuple[int, ...], parts: list[_Part]) -> int:
        """One split per streamed weight, and one more to come back to a home that is not the first device."""
        if 0 not in targets or self.cost.rates.stream_s_per_byte is None:
            return 2
        n_streamed = sum(part.n_tensors for at, part in zip(targets, parts[1:], strict=True) if at == 0)
        return n_streamed + (home > 1)
