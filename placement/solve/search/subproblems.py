"""Configurations refined step by step: their lower bounds, buffers and frames; kept between questions."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from placement.inputs.problem import Assignment, Problem
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.plan import ComputePlan
from placement.predict.cost import Speed
from placement.solve.cpsat.frame import Answer
from placement.solve.cpsat.relaxation import Relaxation, Relaxed
from placement.solve.frames.bound import kinds_lower_bound
from placement.solve.frames.buffers import Buffers, Planner
from placement.solve.frames.pieces import Pieces, Pins
from placement.solve.frames.tables import ComputeTable, Configuration, Table, TableBuilder
from placement.solve.search.configurations import SearchSpace


@dataclass(frozen=True)
class Candidate:
    """A placement of one configuration: objective and bound in microseconds as the frame counts them."""

    assignment: Assignment
    answer: Answer
    plan: ComputePlan
    speed: Speed
    objective: int
    bound: float
    is_proven: bool


@dataclass(frozen=True, slots=True)
class LowerBound:
    """A configuration and its least objective in microseconds.

    Until its buffers are planned they are taken as nothing.
    """

    configuration: Configuration
    order: int  # of its devices, among the orders
    bound: float
    is_planned: bool = False

    @property
    def rank(self) -> tuple[float, int, float]:
        """Best first; of those within a percent, the engine's own order of devices first."""
        return round(math.log(max(self.bound, 1.0)), 2), self.order, self.bound


@dataclass(frozen=True)
class Subproblem:
    """A configuration with its frame, its buffers as far as they are known, and what its relaxation gave."""

    configuration: Configuration
    table: Table
    compute: ComputeTable
    relaxation: Relaxation
    relaxed: Relaxed
    kinds_bound: float = 0.0  # from the kinds of layers

    @property
    def bound(self) -> float:
        """Least objective in microseconds; infinite when nothing can fit."""
        return float("inf") if self.relaxed.bound is None else max(self.relaxed.bound, self.kinds_bound)


class Subproblems:
    """One problem's configurations with all that is known of them: pieces, frames, buffers and plans."""

    def __init__(self, problem: Problem, planner: Planner | None = None) -> None:
        """`planner` replaces the simulated plans (an architecture without a rule asks the engine)."""
        self.problem = problem
        self.planner = planner or self._simulate
        self.buffers = Buffers(problem, self.plan)
        self.corrected: dict[Configuration, ComputeTable] = {}
        self._pieces: dict[Pins, Pieces] = {}
        self._builders: dict[tuple[Pins, Configuration], TableBuilder] = {}
        self._kinds_lower_bounds: dict[tuple[object, ...], float] = {}
        self._plans: dict[Assignment, ComputePlan] = {}
        self._learned: set[Assignment] = set()
        self._lacking: dict[str, int] = {}  # bytes by device that the engine plans beyond our estimates

    def lower_bound(
        self, lower_bound: LowerBound, space: SearchSpace, compute: ComputeTable, *, is_planned: bool = False
    ) -> LowerBound:
        """A configuration's lower bound with those buffers, or the one that was known already."""
        builder = self._builder(lower_bound.configuration, space)
        fixed_us = builder.fixed_us(compute.counts)
        caps = builder.caps_kib(compute, space.reserve_fraction)

        def kinds_bound(weights: tuple[int, int]) -> float:
            key = space.pins, lower_bound.configuration, fixed_us, caps, weights
            if key not in self._kinds_lower_bounds:
                self._kinds_lower_bounds[key] = kinds_lower_bound(builder, fixed_us, caps, weights)
            return self._kinds_lower_bounds[key]

        for limit_us, alone in zip(self._limits_us(space), ((1, 0), (0, 1)), strict=True):
            if limit_us is not None and kinds_bound(alone) > limit_us:
                return replace(lower_bound, bound=float("inf"), is_planned=is_planned)
        return replace(
            lower_bound, bound=max(lower_bound.bound, kinds_bound(space.weights)), is_planned=is_planned
        )

    def known(self, configuration: Configuration) -> ComputeTable:
        """The configuration's buffers: a typical placement's until one is found, then corrected by that one's."""
        if configuration not in self.corrected:
            self.corrected[configuration] = self.buffers.exact(configuration)
        return self.corrected[configuration]

    def _builder(self, configuration: Configuration, space: SearchSpace) -> TableBuilder:
        key = space.pins, configuration
        if key not in self._builders:
            if space.pins not in self._pieces:
                self._pieces[space.pins] = Pieces(self.problem, space.pins)
            self._builders[key] = TableBuilder(self._pieces[space.pins], configuration)
        return self._builders[key]

    def subproblem(self, configuration: Configuration, space: SearchSpace) -> Subproblem | None:
        """The configuration with the buffers that are known of it; None when it cannot fit."""
        compute = self.known(configuration)
        table = self._builder(configuration, space).build(compute, space.reserve_fraction)
        limits_us = self._limits_us(space)
        frame = replace(
            table.frame,
            max_host_layers=space.max_host_layers,
            max_decode_us=limits_us[0],
            max_prompt_us=limits_us[1],
        )
        for limit_us, alone in zip(limits_us, ((1, 0), (0, 1)), strict=True):
            if limit_us is not None:
                least = Relaxation(frame, *alone).bound().bound
                if least is None or least > limit_us:
                    return None
        relaxation = Relaxation(frame, *space.weights)
        relaxed = relaxation.bound()
        if relaxed.bound is None:
            return None
        return Subproblem(configuration, replace(table, frame=frame), compute, relaxation, relaxed)

    def _limits_us(self, space: SearchSpace) -> tuple[int | None, int | None]:
        """The search space's limits on decode and prompt time, of a turn."""
        decode_s, prompt_s = space.max_decode_s, space.max_prompt_s
        n_generated = max(self.problem.workload.generate_tokens, 1)
        return (
            None if decode_s is None else int(decode_s * 1e6 * n_generated),
            None if prompt_s is None else int(prompt_s * 1e6),
        )

    def plan(self, assignment: Assignment) -> ComputePlan:
        """The plan of a placement: simulated, or the engine's once it is known."""
        if assignment not in self._plans:
            self._plans[assignment] = self._with_lacking(self.planner(assignment))
        return self._plans[assignment]

    def _with_lacking(self, plan: ComputePlan) -> ComputePlan:
        """A plan with what the engine's plans have shown estimates to lack on each device."""
        if not self._lacking:
            return plan
        sizes = {name: size + self._lacking.get(name, 0) for name, size in plan.compute_bytes.items()}
        return replace(plan, compute_bytes=sizes)

    def _simulate(self, assignment: Assignment) -> ComputePlan:
        problem = self.problem
        return plan_compute(problem.model, problem.machine, assignment, problem.program)

    def learn(self, assignment: Assignment, plan: ComputePlan) -> None:
        """Believe this plan of an assignment (the engine's own), and that others lack as much as its estimate did."""
        estimate = self._plans.get(assignment)
        if estimate is not None and assignment not in self._learned:
            for name, n_bytes in plan.compute_bytes.items():
                lacking = n_bytes - estimate.compute_bytes.get(name, 0) + self._lacking.get(name, 0)
                self._lacking[name] = max(self._lacking.get(name, 0), lacking)
        self._learned.add(assignment)
        self._plans = {each: kept for each, kept in self._plans.items() if each in self._learned}
        self._plans[assignment] = plan
