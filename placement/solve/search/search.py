"""The search: the configuration of the least lower bound first, until nothing that is left can beat what was found."""

from __future__ import annotations

import heapq
import time
from collections.abc import Sequence
from dataclasses import replace

from placement.inputs.problem import DEFAULT_UBATCH_TOKENS, Assignment, Problem
from placement.llamacpp.plan import ComputePlan
from placement.solve.cpsat.placing import Placing
from placement.solve.frames.buffers import Planner
from placement.solve.frames.pieces import Pieces
from placement.solve.frames.tables import Configuration, TableBuilder
from placement.solve.search.configurations import SearchSpace, configurations
from placement.solve.search.solve_subproblem import GAP, WORK_LIMIT, SubproblemSolver
from placement.solve.search.subproblems import Candidate, LowerBound, Subproblem, Subproblems
from placement.units import KIB


class Search:
    """One problem's search; what is learned of its configurations is kept between questions."""

    def __init__(
        self, problem: Problem, time_limit_s: float = 10.0, seed: int = 1, planner: Planner | None = None
    ) -> None:
        """`planner` replaces the simulated plans (an architecture without a rule asks the engine)."""
        self.problem = problem
        self.subproblems = Subproblems(problem, planner)
        self.buffers = self.subproblems.buffers
        self.seed = seed
        self.time_limit_s = time_limit_s  # of each question

    def plan(self, assignment: Assignment) -> ComputePlan:
        """The plan of a placement: simulated, or the engine's once it is known."""
        return self.subproblems.plan(assignment)

    def learn(self, assignment: Assignment, plan: ComputePlan) -> None:
        """Believe this plan of an assignment (the engine's own), and that others lack as much as its estimate did."""
        self.subproblems.learn(assignment, plan)

    def subproblem(self, configuration: Configuration, space: SearchSpace) -> Subproblem | None:
        """The configuration with the buffers that are known of it; None when it cannot fit."""
        return self.subproblems.subproblem(configuration, space)

    def lower_bounds(self, space: SearchSpace) -> list[LowerBound]:
        """Every configuration that may be worth a look, the least lower bound first."""
        order: dict[tuple[str, ...], int] = {}
        found = (
            self.subproblems.lower_bound(
                LowerBound(configuration, order.setdefault(configuration.devices, len(order)), 0.0),
                space,
                self.buffers.nothing(configuration),
            )
            for configuration in configurations(self.problem, space)
        )
        possible = [lower_bound for lower_bound in found if lower_bound.bound < float("inf")]
        return sorted(
            self._without_needless_cards(possible, space), key=lambda lower_bound: lower_bound.bound
        )

    def _without_needless_cards(self, lower_bounds: list[LowerBound], space: SearchSpace) -> list[LowerBound]:
        """Where the fast cards hold the whole model at the engine's own ubatch, slower cards are left out."""
        speed = {device.name: device.bandwidth_gb_per_s for device in self.problem.machine.devices}
        roomy = [tokens for tokens in space.ubatches if tokens >= DEFAULT_UBATCH_TOKENS]
        slowest = {
            lower_bound.configuration: min(
                (speed[name] for name in lower_bound.configuration.devices), default=0.0
            )
            for lower_bound in lower_bounds
        }
        if not roomy:
            return lower_bounds
        plain = [
            lower_bound
            for lower_bound in lower_bounds
            if not (lower_bound.configuration.uses_host or lower_bound.configuration.is_pipelined)
            and lower_bound.configuration.settings.ubatch_tokens == min(roomy)
            and slowest[lower_bound.configuration] > min(speed.values())
        ]
        for lower_bound in sorted(
            plain,
            key=lambda lower_bound: (
                -slowest[lower_bound.configuration],
                len(lower_bound.configuration.devices),
            ),
        ):
            subproblem = self.subproblem(lower_bound.configuration, space)
            if subproblem is not None and subproblem.relaxation.answer() is not None:
                enough = slowest[lower_bound.configuration]
                return [
                    each
                    for each in lower_bounds
                    if all(speed[name] >= enough for name in each.configuration.devices)
                ]
        return lower_bounds

    def best(
        self,
        space: SearchSpace,
        lower_bounds: list[LowerBound],
        gap: float = GAP,
        taken: Sequence[Candidate] = (),
        work_limit: float = WORK_LIMIT,
    ) -> Candidate | None:
        """The best placement over the configurations that is like none of the `taken`, its bound that of all together.

        A configuration is refined (its buffers, its frame, CP-SAT) only while nothing found is within the gap
        of its lower bound.
        """
        deadline_s = time.monotonic() + self.time_limit_s
        subproblem_solver = SubproblemSolver(
            self.subproblems, space, gap, taken, self.seed, deadline_s, work_limit
        )
        best: Candidate | None = None
        open_bound, is_proven = float("inf"), True
        queue: list[tuple[tuple[float, int, float], int, LowerBound, Subproblem | None]] = [
            (lower_bound.rank, number, lower_bound, None) for number, lower_bound in enumerate(lower_bounds)
        ]
        heapq.heapify(queue)
        while queue:
            _, number, lower_bound, subproblem = heapq.heappop(queue)
            limit = best.objective * (1 - gap) if best else float("inf")
            if lower_bound.bound >= limit:
                open_bound = min(open_bound, lower_bound.bound)
                continue
            if subproblem is None:
                if (refined := self._refine(lower_bound, space)) is not None:
                    heapq.heappush(queue, (refined[0].rank, number, *refined))
                continue
            found, bound, is_done = subproblem_solver.solve_subproblem(subproblem, limit)
            open_bound, is_proven = min(open_bound, bound), is_proven and is_done
            if found is not None:
                best = found
        if best is None:
            return None
        return replace(best, bound=min(open_bound, best.objective), is_proven=is_proven)

    def _refine(
        self, lower_bound: LowerBound, space: SearchSpace
    ) -> tuple[LowerBound, Subproblem | None] | None:
        """The configuration with its buffers, or then with its frame; None when it cannot fit."""
        if lower_bound.is_planned:
            subproblem = self.subproblem(lower_bound.configuration, space)
            if subproblem is None:
                return None
            subproblem = replace(subproblem, kinds_bound=lower_bound.bound)
            return replace(lower_bound, bound=subproblem.bound), subproblem
        planned = self.subproblems.lower_bound(
            lower_bound, space, self.subproblems.known(lower_bound.configuration), is_planned=True
        )
        return (planned, None) if planned.bound < float("inf") else None


def shortfall(search: Search, space: SearchSpace) -> str:
    """Which caps fail by how much, on the configuration that needs least; a multiple of 1 MiB, rounded up."""
    best: tuple[int, str] | None = None
    smallest = replace(space, ubatches=(min(space.ubatches),), load_modes=space.load_modes[:1])
    for configuration in configurations(search.problem, smallest):
        if configuration.is_pipelined:
            continue
        pieces = Pieces(search.problem, space.pins)
        frame = (
            TableBuilder(pieces, configuration)
            .build(search.buffers.exact(configuration), space.reserve_fraction)
            .frame
        )
        placing = Placing(frame, has_caps=False)
        extra = placing.minimise_overflow()
        result = placing.program.solve(5.0, 0.01, search.seed)
        if not result.values:
            continue
        over = {
            name: result.values[v] for name, v in zip(frame.positions, extra, strict=True) if result.values[v]
        }
        total_kib = sum(over.values())
        if over and (best is None or total_kib < best[0]):
            parts = (f"{name} lacks {-(-kib // KIB):,} MiB" for name, kib in over.items())
            best = total_kib, " and ".join(parts)
    return best[1] if best else "the constraints contradict each other"
