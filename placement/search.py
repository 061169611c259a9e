"""The search over ways to run a model: which of them deserve CP-SAT, and what CP-SAT then proves.

A way fixes device order, ubatch, load mode and whether the host is used. Each way's frame gets a bound and a
greedy answer by relaxation; ways that cannot beat the best answer are dropped by their bound; CP-SAT settles the
others below a cutoff. Compute buffers are estimates until an answer is known; then that placement is planned
exactly, and where it does not fit the frame is built again with what was found.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from placement.buffers import Buffers, compute_table, graph_counts
from placement.compute import ComputePlan, plan_compute
from placement.cost import Speed, evaluate
from placement.problem import Assignment, Problem
from placement.solver.frame import Answer
from placement.solver.placing import Placing
from placement.solver.relaxation import Relaxation, Relaxed
from placement.tables import NO_PINS, ComputeTable, Pins, Table, TableBuilder, Way

UBATCHES = (256, 512, 1024, 2048, 4096)
MAX_ORDERED_DEVICES = 3  # up to here every subset in every order is tried
GAP = 0.002


@dataclass(frozen=True, slots=True)
class Freedom:
    """What the search may choose; a single value fixes it."""

    ubatches: tuple[int, ...] = UBATCHES
    load_modes: tuple[str, ...] = ("auto", "none")
    orders: tuple[tuple[str, ...], ...] | None = None
    pins: Pins = NO_PINS
    reserve_fraction: float = 0.0  # of each card's total, on top of the problem's reserve
    decode_weight: int = 1
    prompt_weight: int = 1


@dataclass(frozen=True)
class Found:
    """A placement of one way: objective and bound in microseconds as the frame counts them."""

    assignment: Assignment
    plan: ComputePlan
    speed: Speed
    objective: int
    bound: float
    status: str


@dataclass
class _Lead:
    """A way with what its relaxation gave."""

    way: Way
    table: Table
    relaxed: Relaxed

    @property
    def bound(self) -> float:
        return self.relaxed.bound if self.relaxed.bound is not None else float("inf")


def device_orders(problem: Problem) -> list[tuple[str, ...]]:
    """Device subsets and orders worth trying; equal devices are interchangeable and kept in engine order."""
    names = [device.name for device in problem.machine.devices]
    signature = {
        d.name: (d.usable_mib, d.runtime_mib, d.bandwidth_gb_per_s, d.link_gb_per_s, d.tflops, d.is_rpc)
        for d in problem.machine.devices
    }
    orders: list[tuple[str, ...]] = []
    if len(names) <= MAX_ORDERED_DEVICES:
        candidates = itertools.chain.from_iterable(itertools.permutations(names, n) for n in range(1, len(names) + 1))
        orders = list(candidates)
    else:
        fastest = sorted(names, key=lambda name: -signature[name][2])
        for ordered in (names, fastest):
            orders += [tuple(ordered[:n]) for n in range(1, len(names) + 1)]
    kept: dict[tuple[object, ...], tuple[str, ...]] = {}
    for order in orders:
        kept.setdefault(tuple(signature[name] for name in order), order)
    return list(kept.values())


def ways(problem: Problem, freedom: Freedom) -> Iterator[Way]:
    """Every way the freedom allows; ubatches beyond the prompt and the context add nothing."""
    longest = max(problem.workload.prompt_tokens, min(freedom.ubatches))
    ubatches = [u for u in freedom.ubatches if u // 2 < longest] or [min(freedom.ubatches)]
    orders = freedom.orders if freedom.orders is not None else tuple(device_orders(problem))
    for order in orders or ((),):
        for ubatch in ubatches:
            settings = replace(
                problem.settings, ubatch_tokens=ubatch, batch_tokens=max(problem.settings.batch_tokens, ubatch)
            )
            if order:
                yield Way(order, replace(settings, load_mode="auto"), uses_host=False)
            if len(order) > 1 and settings.is_kv_offloaded:
                yield Way(order, replace(settings, load_mode="auto"), uses_host=False, is_pipelined=True)
            for load_mode in freedom.load_modes:
                yield Way(order, replace(settings, load_mode=load_mode), uses_host=True)


class Search:
    """One problem's search; tables and plans are kept between questions."""

    def __init__(self, problem: Problem, time_limit_s: float = 10.0, seed: int = 1) -> None:
        self.problem = problem
        self.buffers = Buffers(problem)
        self.seed = seed
        self.deadline = time.monotonic() + time_limit_s
        self._plans: dict[Assignment, ComputePlan] = {}
        self._corrected: dict[Way, ComputeTable] = {}

    def leads(self, freedom: Freedom, only: list[Way] | None = None) -> list[_Lead]:
        """Every way with its relaxation, lowest bound first; ways that cannot fit are left out."""
        found = []
        for way in only if only is not None else ways(self.problem, freedom):
            lead = self._lead(way, freedom)
            if lead.relaxed.bound is not None:
                found.append(lead)
        return sorted(found, key=lambda lead: lead.bound)

    def _lead(self, way: Way, freedom: Freedom) -> _Lead:
        compute = self._corrected.get(way) or self.buffers.table(way)
        problem = self.problem
        table = TableBuilder(problem, way, compute, freedom.pins, freedom.reserve_fraction).build()
        return _Lead(way, table, Relaxation(table.frame, freedom.decode_weight, freedom.prompt_weight).solve())

    def best(self, freedom: Freedom, leads: list[_Lead], gap: float = GAP) -> Found | None:
        """The best placement over the leads, its bound that of all of them together."""
        best: Found | None = None
        open_bound = float("inf")
        for lead in leads:
            limit = best.objective * (1 - gap) if best else float("inf")
            if lead.bound >= limit:
                open_bound = min(open_bound, lead.bound)
                continue
            found = self.settle(lead, freedom, limit, gap)
            if found is None:
                open_bound = min(open_bound, limit)
            elif isinstance(found, float):
                open_bound = min(open_bound, found)
            else:
                open_bound = min(open_bound, found.bound)
                if best is None or found.objective < best.objective:
                    best = found
        if best is None:
            return None
        bound = min(best.bound, open_bound, best.objective)
        return replace(best, bound=bound)

    def settle(self, lead: _Lead, freedom: Freedom, limit: float, gap: float) -> Found | float | None:
        """Solve one way to the gap: a placement that fits, a bound, or None when none is below the limit."""
        for _ in range(4):
            answer, bound, status = self._prove(lead, freedom, limit, gap)
            if answer is None:
                return bound if bound < limit else None
            assignment = lead.table.assignment(answer)
            plan = self.plan(assignment)
            real = compute_table(lead.way, plan)
            assumed = self._corrected.get(lead.way) or self.buffers.table(lead.way)
            excess = self._excess_bytes(lead, answer, real, assumed)
            if excess <= 0:
                return self.found(assignment, plan, lead, answer, freedom, bound, status)
            merged = tuple(max(a, b) for a, b in zip(real.n_bytes, assumed.n_bytes, strict=True))
            self._corrected[lead.way] = ComputeTable(merged, real.counts)
            again = self._lead(lead.way, freedom)
            lead.table, lead.relaxed = again.table, again.relaxed
            if lead.relaxed.bound is None:
                return None
        return None

    def _excess_bytes(self, lead: _Lead, answer: Answer, real: ComputeTable, assumed: ComputeTable) -> int:
        from placement.solver.frame import used_kib

        frame = lead.table.frame
        left = [cap - used for cap, used in zip(frame.cap_kib, used_kib(frame, answer), strict=True)]
        return max(
            r - a - 1024 * free for r, a, free in zip(real.n_bytes, assumed.n_bytes, left, strict=True)
        )

    def _prove(
        self, lead: _Lead, freedom: Freedom, limit: float, gap: float
    ) -> tuple[Answer | None, float, str]:
        """An answer below the limit with its bound, or no answer and the bound."""
        relaxed, frame = lead.relaxed, lead.table.frame
        answer, value = relaxed.answer, relaxed.objective
        bound = lead.bound
        relaxation = Relaxation(frame, freedom.decode_weight, freedom.prompt_weight)
        while True:
            best = min(limit, float(value)) if value is not None else limit
            if best < float("inf") and bound >= best * (1 - gap):
                break
            left = self.deadline - time.monotonic()
            if left <= 0:
                return self._kept(answer, value, limit), bound, "FEASIBLE"
            placing = Placing(frame, freedom.decode_weight, freedom.prompt_weight)
            if best < float("inf"):
                placing.cut_off(int(best * (1 - gap)))
            result = placing.program.solve(left, gap, self.seed)
            if result.status == "INFEASIBLE":
                bound = max(bound, best * (1 - gap)) if best < float("inf") else float("inf")
                break
            if result.status == "UNKNOWN":
                return self._kept(answer, value, limit), max(bound, result.bound or bound), "FEASIBLE"
            answer = placing.answer(result.values)
            value = relaxation.objective(answer)
            bound = max(bound, result.bound or bound)
            if result.status == "OPTIMAL":
                break
        return self._kept(answer, value, limit), bound, "OPTIMAL"

    def _kept(self, answer: Answer | None, value: int | None, limit: float) -> Answer | None:
        return answer if value is not None and value < limit else None

    def plan(self, assignment: Assignment) -> ComputePlan:
        """The exact simulated plan of a placement."""
        if assignment not in self._plans:
            problem = self.problem
            self._plans[assignment] = plan_compute(problem.model, problem.machine, assignment, problem.program)
        return self._plans[assignment]

    def found(
        self,
        assignment: Assignment,
        plan: ComputePlan,
        lead: _Lead,
        answer: Answer,
        freedom: Freedom,
        bound: float,
        status: str,
    ) -> Found:
        """The placement with its predicted speed, from the exact plan's own splits and nodes."""
        speed = evaluate(self.problem, assignment, graph_counts(plan))
        relaxation = Relaxation(lead.table.frame, freedom.decode_weight, freedom.prompt_weight)
        return Found(assignment, plan, speed, relaxation.objective(answer), bound, status)
