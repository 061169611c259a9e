"""Compute buffers of a way to run a model, before its placement is known: planned on a typical placement."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from placement.architecture import describe
from placement.compute import ComputePlan
from placement.cost import GraphCounts
from placement.groups import movable_groups
from placement.memory import context_size
from placement.problem import CPU, Assignment, Problem
from placement.tables import N_EARLY_LAYERS, ComputeTable, Way, host_pattern

Planner = Callable[[Assignment], ComputePlan]


def graph_counts(plan: ComputePlan) -> GraphCounts:
    """What the speed model needs of a plan."""
    return GraphCounts(
        plan.splits_prompt, plan.splits_decode, plan.n_nodes_prompt, plan.n_nodes_decode, plan.n_copies
    )


def compute_table(way: Way, plan: ComputePlan) -> ComputeTable:
    """A plan's buffers by position of the way."""
    names = ("Host", *way.devices)
    return ComputeTable(tuple(plan.compute_bytes.get(name, 0) for name in names), graph_counts(plan))


class Buffers:
    """Estimates compute buffers for ways of one problem; between two planned ubatches it interpolates.

    The buffers of a placement depend on it little: on a device's place in the order, and on whether weights in
    host memory are streamed; not on which card it is. What is found for a typical placement is corrected once the solver's is known.
    """

    _PLANNED_UBATCHES = (512, 2048)

    def __init__(self, problem: Problem, planner: Planner) -> None:
        self.problem, self.planner = problem, planner
        self._tables: dict[tuple[object, ...], ComputeTable] = {}

    def table(self, way: Way) -> ComputeTable:
        """The estimate for a way."""
        low, high = (self._planned(_with_ubatch(way, tokens)) for tokens in self._PLANNED_UBATCHES)
        tokens = context_size(self.problem.model, way.settings).ubatch_tokens
        a, b = self._PLANNED_UBATCHES
        sizes = tuple(
            max(0, round(x + (y - x) * (tokens - a) / (b - a)))
            for x, y in zip(low.n_bytes, high.n_bytes, strict=True)
        )
        return ComputeTable(sizes, low.counts)

    def exact(self, way: Way) -> ComputeTable:
        """The buffers of the typical placement at the way's own ubatch, with what early layers in host memory add."""
        plain = self._planned(way)
        early = typical_assignment(self.problem, way, has_early=True) if way.uses_host else None
        if early is None or early == typical_assignment(self.problem, way):
            return plain
        more = compute_table(way, self.planner(early)).n_bytes
        lacking = tuple(max(0, a - b) for a, b in zip(more, plain.n_bytes, strict=True))
        if not any(lacking):
            return plain
        n_groups = len(movable_groups(self.problem.model, describe(self.problem.model).n_layer_all)[-1])
        pattern = host_pattern(1, True, (0,) * n_groups)
        return replace(plain, extras=((pattern, lacking),)) if pattern is not None else plain

    def _planned(self, way: Way) -> ComputeTable:
        key = (
            tuple(self.problem.machine.device(name).is_cuda for name in way.devices),
            way.settings.ubatch_tokens,
            way.uses_host,
            way.is_pipelined,
        )
        if key not in self._tables:
            assignment = typical_assignment(self.problem, way)
            self._tables[key] = compute_table(way, self.planner(assignment))
        return self._tables[key]


def _with_ubatch(way: Way, ubatch_tokens: int) -> Way:
    batch_tokens = max(way.settings.batch_tokens, ubatch_tokens)
    return replace(way, settings=replace(way.settings, ubatch_tokens=ubatch_tokens, batch_tokens=batch_tokens))


def typical_assignment(problem: Problem, way: Way, *, has_early: bool = False) -> Assignment:
    """Layers over the GPUs in proportion to their memory; with host use, each GPU's last half-layers' groups on
    the CPU (with `has_early` also the model's first layers'), or the first layers themselves where nothing
    smaller moves."""
    n_layers = describe(problem.model).n_layer_all
    if not way.devices:
        return Assignment((), (CPU,) * (n_layers + 1), (), way.settings)
    groups = movable_groups(problem.model, n_layers)
    has_experts = any(group.kind != "ffn" for row in groups for group in row)
    n_first = max(1, n_layers // 8) if way.uses_host and not has_experts else 0
    sizes = [problem.machine.device(name).usable_mib for name in way.devices]
    homes, total, n_gpu = [CPU] * n_first, sum(sizes), n_layers + 1 - n_first
    done = 0.0
    for name, size in zip(way.devices, sizes, strict=True):
        upto = n_first + max(round((done + size) / total * n_gpu), 1)
        done += size
        homes += [name] * (upto - len(homes))
    homes = (homes + [way.devices[-1]] * n_layers)[: n_layers + 1]
    moved: list[tuple[str, str]] = []
    if way.uses_host and has_experts:
        for name in way.devices:
            mine = [i for i in range(n_layers) if homes[i] == name and groups[i]]
            first = mine[:N_EARLY_LAYERS] if has_early and name == way.devices[0] else []
            for i in dict.fromkeys([*first, *mine[len(mine) // 2 :]]):
                moved += [(tensor.name, CPU) for group in groups[i] for tensor in group.tensors]
    has_overrides = bool(moved) or (len(way.devices) > 1 and not way.is_pipelined and CPU not in homes)
    settings = replace(way.settings, has_overrides=has_overrides)
    return Assignment(way.devices, tuple(homes), tuple(moved), settings)
