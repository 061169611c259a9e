"""Compute buffers of a configuration before its placement is known: planned on a typical placement."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace

from placement.inputs.groups import movable_groups
from placement.inputs.problem import CPU, HOST, Assignment, Problem
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.plan import ComputePlan
from placement.predict.cost import GraphCounts, graph_counts
from placement.solve.frames.tables import ComputeTable, Configuration
from placement.units import MIB

Planner = Callable[[Assignment], ComputePlan]


def compute_table(configuration: Configuration, plan: ComputePlan) -> ComputeTable:
    """A plan's buffers by position of the configuration."""
    names = (HOST, *configuration.devices)
    return ComputeTable(tuple(plan.compute_bytes.get(name, 0) for name in names), graph_counts(plan))


class Buffers:
    """Estimates compute buffers for configurations of one problem.

    The buffers of a placement depend on it little: on a device's place in the order, and on whether weights in
    host memory are streamed; not on which card it is. What is found for a typical placement is corrected once the
    solver's is known.
    """

    def __init__(self, problem: Problem, planner: Planner) -> None:
        self.problem, self.planner = problem, planner
        self._tables: dict[tuple[object, ...], ComputeTable] = {}
        self._counts: GraphCounts | None = None

    def exact(self, configuration: Configuration) -> ComputeTable:
        """The buffers of the typical placement."""
        return self._planned(configuration)

    def nothing(self, configuration: Configuration) -> ComputeTable:
        """No buffers at all, less than any configuration can do with, and the nodes of some placement."""
        if self._counts is None:
            names = tuple(device.name for device in self.problem.machine.devices)
            room_mib = sum(device.usable_mib for device in self.problem.machine.devices)
            some = Configuration(
                names,
                configuration.settings,
                uses_host=not names or self.problem.model.n_bytes > room_mib * MIB,
            )
            self._counts = self._planned(some).counts
        return ComputeTable((0,) * (1 + len(configuration.devices)), self._counts)

    def _planned(self, configuration: Configuration) -> ComputeTable:
        backends = [self.problem.machine.device(name).backend for name in configuration.devices]
        stands_for = stand_ins(backends)
        chosen = sorted(set(stands_for))
        key = (
            tuple(backends[at] for at in chosen),
            configuration.settings.ubatch_tokens,
            configuration.uses_host,
            configuration.is_pipelined,
        )
        if key not in self._tables:
            fewer = replace(configuration, devices=tuple(configuration.devices[at] for at in chosen))
            self._tables[key] = compute_table(fewer, self.planner(typical_assignment(self.problem, fewer)))
        found = self._tables[key]
        at_host, *at_devices = found.n_bytes
        return replace(found, n_bytes=(at_host, *(at_devices[chosen.index(at)] for at in stands_for)))


def stand_ins(backends: list[str]) -> list[int]:
    """Which device stands for each: of four and more of a kind in a row, the second for all but first and last."""
    found: list[int] = []
    for _, row in itertools.groupby(range(len(backends)), key=lambda at: backends[at]):
        first, *middle = row
        last = middle.pop() if middle else None
        found += [first, *[first + 1] * len(middle)]
        if last is not None:
            found.append(last)
    return found


def typical_assignment(problem: Problem, configuration: Configuration) -> Assignment:
    """Layers over the GPUs in proportion to their memory; with host use, each GPU's last half-layers' groups on
    the CPU, or the first layers themselves where nothing smaller moves."""
    n_layers = describe(problem.model).n_layer_all
    if not configuration.devices:
        return Assignment((), (CPU,) * (n_layers + 1), (), configuration.settings)
    groups = movable_groups(problem.model, n_layers)
    has_experts = any(group.kind != "ffn" for row in groups for group in row)
    n_first = max(1, n_layers // 8) if configuration.uses_host and not has_experts else 0
    sizes = [problem.machine.device(name).usable_mib for name in configuration.devices]
    homes, total, n_gpu = [CPU] * n_first, sum(sizes), n_layers + 1 - n_first
    done = 0.0
    for name, size in zip(configuration.devices, sizes, strict=True):
        upto = n_first + max(round((done + size) / total * n_gpu), 1)
        done += size
        homes += [name] * (upto - len(homes))
    homes = (homes + [configuration.devices[-1]] * n_layers)[: n_layers + 1]
    moved: list[tuple[str, str]] = []
    if configuration.uses_host and has_experts:
        for name in configuration.devices:
            mine = [i for i in range(n_layers) if homes[i] == name and groups[i]]
            for i in mine[len(mine) // 2 :]:
                moved += [(tensor.name, CPU) for group in groups[i] for tensor in group.tensors]
    has_overrides = bool(moved) or (
        len(configuration.devices) > 1 and not configuration.is_pipelined and CPU not in homes
    )
    settings = replace(configuration.settings, has_overrides=has_overrides)
    return Assignment(configuration.devices, tuple(homes), tuple(moved), settings)
