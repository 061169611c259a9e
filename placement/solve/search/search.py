"""The search: the most promising way first, until nothing that is left can beat what was found."""

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
from placement.solve.frames.tables import TableBuilder, Way
from placement.solve.search.configurations import Freedom, ways
from placement.solve.search.solve_subproblem import GAP, WORK_LIMIT, Settling
from placement.solve.search.subproblems import Candidate, Hope, Lead, Leads
from placement.units import KIB


class Search:
    """One problem's search; what is learned of its ways is kept between questions."""

    def __init__(
        self, problem: Problem, time_limit_s: float = 10.0, seed: int = 1, planner: Planner | None = None
    ) -> None:
        """`planner` replaces the simulated plans (an architecture without a rule asks the engine)."""
        self.problem = problem
        self.leads = Leads(problem, planner)
        self.buffers = self.leads.buffers
        self.seed = seed
        self.time_limit_s = time_limit_s  # of each question

    def plan(self, assignment: Assignment) -> ComputePlan:
        """The plan of a placement: simulated, or the engine's once it is known."""
        return self.leads.plan(assignment)

    def learn(self, assignment: Assignment, plan: ComputePlan) -> None:
        """Believe this plan of an assignment (the engine's own), and that others lack as much as its estimate did."""
        self.leads.learn(assignment, plan)

    def lead(self, way: Way, freedom: Freedom) -> Lead | None:
        """The way with the buffers that are known of it; None when it cannot fit."""
        return self.leads.lead(way, freedom)

    def hopes(self, freedom: Freedom) -> list[Hope]:
        """Every way that may be worth a look, the most promising first."""
        order: dict[tuple[str, ...], int] = {}
        found = (
            self.leads.hope(
                Hope(way, order.setdefault(way.devices, len(order)), 0.0), freedom, self.buffers.nothing(way)
            )
            for way in ways(self.problem, freedom)
        )
        possible = [hope for hope in found if hope.bound < float("inf")]
        return sorted(self._without_needless_cards(possible, freedom), key=lambda hope: hope.bound)

    def _without_needless_cards(self, hopes: list[Hope], freedom: Freedom) -> list[Hope]:
        """Where the fast cards hold the whole model at the engine's own ubatch, slower cards are left out."""
        speed = {device.name: device.bandwidth_gb_per_s for device in self.problem.machine.devices}
        roomy = [tokens for tokens in freedom.ubatches if tokens >= DEFAULT_UBATCH_TOKENS]
        slowest = {hope.way: min((speed[name] for name in hope.way.devices), default=0.0) for hope in hopes}
        if not roomy:
            return hopes
        plain = [
            hope
            for hope in hopes
            if not (hope.way.uses_host or hope.way.is_pipelined)
            and hope.way.settings.ubatch_tokens == min(roomy)
            and slowest[hope.way] > min(speed.values())
        ]
        for hope in sorted(plain, key=lambda hope: (-slowest[hope.way], len(hope.way.devices))):
            lead = self.lead(hope.way, freedom)
            if lead is not None and lead.relaxation.answer() is not None:
                enough = slowest[hope.way]
                return [each for each in hopes if all(speed[name] >= enough for name in each.way.devices)]
        return hopes

    def best(
        self,
        freedom: Freedom,
        hopes: list[Hope],
        gap: float = GAP,
        taken: Sequence[Candidate] = (),
        work_limit: float = WORK_LIMIT,
    ) -> Candidate | None:
        """The best placement over the ways that is like none of the `taken`, its bound that of all ways together.

        A way is looked at more closely (its buffers, its frame, CP-SAT) only while nothing found is within the gap
        of what it still promises.
        """
        deadline_s = time.monotonic() + self.time_limit_s
        settling = Settling(self.leads, freedom, gap, taken, self.seed, deadline_s, work_limit)
        best: Candidate | None = None
        open_bound, is_proven = float("inf"), True
        queue: list[tuple[tuple[float, int, float], int, Hope, Lead | None]] = [
            (hope.rank, number, hope, None) for number, hope in enumerate(hopes)
        ]
        heapq.heapify(queue)
        while queue:
            _, number, hope, lead = heapq.heappop(queue)
            limit = best.objective * (1 - gap) if best else float("inf")
            if hope.bound >= limit:
                open_bound = min(open_bound, hope.bound)
                continue
            if lead is None:
                if (closer := self._closer(hope, freedom)) is not None:
                    heapq.heappush(queue, (closer[0].rank, number, *closer))
                continue
            found, bound, is_done = settling.settle(lead, limit)
            open_bound, is_proven = min(open_bound, bound), is_proven and is_done
            if found is not None:
                best = found
        if best is None:
            return None
        return replace(best, bound=min(open_bound, best.objective), is_proven=is_proven)

    def _closer(self, hope: Hope, freedom: Freedom) -> tuple[Hope, Lead | None] | None:
        """The way with its buffers, or then with its frame; None when it cannot fit."""
        if hope.is_planned:
            lead = self.lead(hope.way, freedom)
            if lead is None:
                return None
            lead = replace(lead, promised=hope.bound)
            return replace(hope, bound=lead.bound), lead
        planned = self.leads.hope(hope, freedom, self.leads.known(hope.way), is_planned=True)
        return (planned, None) if planned.bound < float("inf") else None


def shortfall(search: Search, freedom: Freedom) -> str:
    """Which caps fail by how much, on the way that needs least; a multiple of 1 MiB, rounded up."""
    best: tuple[int, str] | None = None
    smallest = replace(freedom, ubatches=(min(freedom.ubatches),), load_modes=freedom.load_modes[:1])
    for way in ways(search.problem, smallest):
        if way.is_pipelined:
            continue
        pieces = Pieces(search.problem, freedom.pins)
        frame = TableBuilder(pieces, way).build(search.buffers.exact(way), freedom.reserve_fraction).frame
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
    return best[1] if best else "the wishes contradict each other"
