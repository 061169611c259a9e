"""A model cut into what frames are made of: layers that are alike, their fixed parts and their movable groups,
with what each asks of whatever device holds it.
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from placement.inputs.groups import movable_groups
from placement.inputs.machine import Device
from placement.inputs.problem import Problem, Settings
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.architecture.records import Architecture, PlacedTensor
from placement.llamacpp.memory import layer_context_bytes, weight_bytes
from placement.predict.crossings import AFTER_FFN
from placement.predict.loads import Load, Work, total
from placement.predict.rates import Rates, rates

# The allocator packs a graph's start less densely: streaming experts of the first three layers may take hundreds
# of MiB more on the first card than streaming any others.
N_EARLY_LAYERS = 3


@dataclass(frozen=True, slots=True)
class Pins:
    """What the user fixes: (layer, allowed home names) and (layer, group kind, device name)."""

    homes: tuple[tuple[int, frozenset[str]], ...] = ()
    groups: tuple[tuple[int, str, str], ...] = ()


NO_PINS = Pins()


@dataclass(frozen=True)
class Loads:
    """What every part of every kind asks for under one ubatch, by `work`; `amounts` is an array of kind × part ×
    quantity (loads.QUANTITIES), the last part being the layer's context.
    """

    work: Work
    amounts: NDArray[np.float64]
    context_bytes: NDArray[np.int64]  # per kind


class Pieces:
    """A model cut into what a frame is made of; the same for every configuration of one problem.

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
        self._ends_at_home: dict[int, bool] = {}
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
        self.n_parts = max(len(parts) for parts in self.parts.values())
        self.n_tensors = np.zeros((len(self.parts), self.n_parts), dtype=np.int64)  # kind × part
        for kind, parts in self.parts.items():
            self.n_tensors[kind, : len(parts)] = list(map(len, parts))
        self.n_of_kind = np.bincount(self.kinds)
        self._bytes: dict[tuple[int, int, bool], int] = {}
        self._loads: dict[Settings, Loads] = {}
        self._rates: dict[Hashable, Rates] = {}

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
        if i not in self._ends_at_home:
            self._ends_at_home[i] = any(mark in each.name for each in self.members[i] for mark in AFTER_FFN)
        return self._ends_at_home[i]

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

    def kind_bytes(self, device: Device | None) -> NDArray[np.int64]:
        """Weight bytes on a device of every kind × part."""
        found = np.zeros((len(self.parts), self.n_parts), dtype=np.int64)
        for kind, parts in self.parts.items():
            for part in range(len(parts)):
                found[kind, part] = self.part_bytes(kind, part, device)
        return found

    def loads(self, settings: Settings) -> Loads:
        """The loads under these settings; how weights are loaded, and by how many threads, changes none."""
        key = replace(settings, load_mode="auto", n_threads=None)
        if key not in self._loads:
            self._loads[key] = self._make_loads(key)
        return self._loads[key]

    def rates(self, devices: tuple[str, ...], settings: Settings) -> Rates:
        """The rates of the devices; of the settings the load mode, the threads and what is offloaded matter."""
        is_offloaded = self.loads(settings).work.is_offloaded
        key = (devices, settings.load_mode, settings.n_threads, settings.is_op_offloaded, is_offloaded)
        if key not in self._rates:
            self._rates[key] = rates(self.problem.machine, devices, settings, is_offloaded)
        return self._rates[key]

    def _make_loads(self, settings: Settings) -> Loads:
        work = Work(self.problem, settings)
        rows = [
            [
                *(total(map(work.tensor, part)) for part in self.parts[kind]),
                *[Load()] * (self.n_parts - len(self.parts[kind])),
                self._context_load(work, i),
            ]
            for kind, i in sorted(self.example.items())
        ]
        sizes = layer_context_bytes(self.problem.model, settings)
        return Loads(
            work,
            np.array([[load.amounts for load in row] for row in rows]),
            np.array([sizes[i] if i < self.n_layers else 0 for _, i in sorted(self.example.items())]),
        )

    def _context_load(self, work: Work, i: int) -> Load:
        return work.context(self.architecture.layers[i]) if i < self.n_layers else Load()
