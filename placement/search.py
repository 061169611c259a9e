"""The search over ways to run a model: which of them deserve CP-SAT, and what CP-SAT then proves.

A way fixes device order, ubatch, load mode and whether the host is used. Each way's frame gets a bound by
relaxation; ways that cannot beat the best answer are dropped by it; a greedy answer and CP-SAT below a cutoff
settle the others. Compute buffers are estimates until an answer is known; then that placement is planned
exactly, and where it does not fit its frame is built again with what was found.
"""

from __future__ import annotations

import functools
import itertools
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

from placement.buffers import Buffers, Planner, compute_table, graph_counts
from placement.compute import ComputePlan, plan_compute
from placement.cost import Speed, evaluate
from placement.problem import Assignment, Problem
from placement.solver.frame import Answer, is_taken, used_kib
from placement.solver.placing import Placing
from placement.solver.relaxation import Relaxation, Relaxed
from placement.tables import N_EARLY_LAYERS, NO_PINS, ComputeTable, Pieces, Pins, Table, TableBuilder, Way, host_pattern
from placement.units import KIB

UBATCHES = (256, 512, 1024, 2048, 4096)
DEFAULT_UBATCH = 512
MAX_ORDERED_DEVICES = 3  # up to here every subset in every order is tried
GAP = 0.002
MAX_CORRECTIONS = 5
QUICK_ROUNDS, FIRST_ROUNDS, FINE_ROUNDS = 4, 150, 60
NEAR_LAYERS = 4
NEAR_S = 1.0


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
    max_host_layers: int | None = None
    max_decode_s: float | None = None  # per generated token


@dataclass(frozen=True)
class Found:
    """A placement of one way: objective and bound in microseconds as the frame counts them."""

    assignment: Assignment
    plan: ComputePlan
    speed: Speed
    objective: int
    bound: float
    is_proven: bool


@dataclass
class Lead:
    """A way with its frame and what its relaxation gave."""

    way: Way
    table: Table
    compute: ComputeTable
    relaxation: Relaxation
    relaxed: Relaxed

    @property
    def bound(self) -> float:
        """Least objective in microseconds; infinite when nothing can fit."""
        return float("inf") if self.relaxed.bound is None else self.relaxed.bound

    @functools.cached_property
    def greedy(self) -> Answer | None:
        """A quick answer near the first relaxation's homes."""
        return self.relaxation.answer(self.relaxed)

    @functools.cached_property
    def promise(self) -> float:
        """What the way will probably reach: its greedy objective, or somewhat more than its bound."""
        return self.relaxation.objective(self.greedy) if self.greedy is not None else self.bound * 1.02


def device_orders(problem: Problem) -> list[tuple[str, ...]]:
    """Device subsets and orders worth trying; equal devices are interchangeable and kept in engine order."""
    devices = problem.machine.devices
    names = [device.name for device in devices]
    same_as = {device.name: replace(device, name="", uuid=None, address=None) for device in devices}
    orders: Iterable[tuple[str, ...]]
    if len(names) <= MAX_ORDERED_DEVICES:
        lengths = range(1, len(names) + 1)
        orders = itertools.chain.from_iterable(itertools.permutations(names, n) for n in lengths)
    else:
        fastest = sorted(names, key=lambda name: -same_as[name].bandwidth_gb_per_s)
        orders = [tuple(row[:n]) for row in (names, fastest) for n in range(1, len(names) + 1)]
    kept: dict[tuple[object, ...], tuple[str, ...]] = {}
    for order in orders:
        kept.setdefault(tuple(same_as[name] for name in order), order)
    return list(kept.values())


def ways(problem: Problem, freedom: Freedom) -> Iterator[Way]:
    """Every way the freedom allows; an ubatch of more than twice the prompt adds nothing."""
    smallest = min(freedom.ubatches)
    longest = max(2 * problem.workload.prompt_tokens, smallest + 1)
    orders = freedom.orders if freedom.orders is not None else tuple(device_orders(problem))
    for order, ubatch in itertools.product(orders or ((),), freedom.ubatches):
        if ubatch >= longest:
            continue
        batch = max(problem.settings.batch_tokens, ubatch)
        settings = replace(problem.settings, ubatch_tokens=ubatch, batch_tokens=batch)
        if order:
            yield Way(order, settings, uses_host=False)
        if len(order) > 1 and settings.is_kv_offloaded:
            yield Way(order, settings, uses_host=False, is_pipelined=True)
        for load_mode in freedom.load_modes:
            yield Way(order, replace(settings, load_mode=load_mode), uses_host=True)


class Search:
    """One problem's search; pieces, buffers and plans are kept between questions."""

    def __init__(
        self, problem: Problem, time_limit_s: float = 10.0, seed: int = 1, planner: Planner | None = None
    ) -> None:
        """`planner` replaces the simulated plans (an architecture without a rule asks the engine)."""
        self.problem = problem
        self.planner = planner or self._simulate
        self.buffers = Buffers(problem, self.planner)
        self.seed = seed
        self.deadline_s = time.monotonic() + time_limit_s
        self._pieces: dict[Pins, Pieces] = {}
        self._plans: dict[Assignment, ComputePlan] = {}
        self._corrected: dict[Way, ComputeTable] = {}
        self._prices: dict[tuple[object, ...], tuple[float, ...]] = {}

    def leads(self, freedom: Freedom) -> list[Lead]:
        """Every way with a quick bound, lowest first; ways that cannot fit are left out."""
        found = [lead for way in ways(self.problem, freedom) if (lead := self._lead(way, freedom)) is not None]
        return sorted(self._without_needless_cards(found), key=lambda lead: lead.bound)

    def _lead(self, way: Way, freedom: Freedom) -> Lead | None:
        compute = self._corrected.get(way) or self.buffers.table(way)
        if freedom.pins not in self._pieces:
            self._pieces[freedom.pins] = Pieces(self.problem, freedom.pins)
        table = TableBuilder(self._pieces[freedom.pins], way, compute, freedom.reserve_fraction).build()
        table = replace(table, frame=replace(table.frame, **self._limits(freedom)))
        relaxation = Relaxation(table.frame, freedom.decode_weight, freedom.prompt_weight)
        lead = Lead(way, table, compute, relaxation, Relaxed(0.0, None, ()))
        is_known = self._kin(lead) in self._prices
        return self._refine(lead, QUICK_ROUNDS if is_known else FIRST_ROUNDS, float("inf"))

    def _limits(self, freedom: Freedom) -> dict[str, int | None]:
        slowest = None
        if freedom.max_decode_s is not None:
            slowest = int(freedom.max_decode_s * 1e6 * max(self.problem.workload.generate_tokens, 1))
        return {"max_host_layers": freedom.max_host_layers, "max_decode_us": slowest}

    def _kin(self, lead: Lead) -> tuple[object, ...]:
        return lead.way.devices, lead.way.uses_host, lead.way.is_pipelined, lead.relaxation.weights

    def _refine(self, lead: Lead, rounds: int, limit: float) -> Lead | None:
        """The way with a better bound, from the prices of its kin; None when it cannot fit."""
        prices = lead.relaxed.prices or self._prices.get(self._kin(lead), ())
        lead.relaxed = lead.relaxation.bound(list(prices), rounds, limit)
        if lead.relaxed.bound is None:
            return None
        self._prices[self._kin(lead)] = lead.relaxed.prices
        return lead

    def _without_needless_cards(self, leads: list[Lead]) -> list[Lead]:
        """Where the fast cards hold the whole model at the engine's own ubatch, slower cards are left out."""
        speed = {device.name: device.bandwidth_gb_per_s for device in self.problem.machine.devices}
        enough: float | None = None
        for lead in leads:
            slowest = min((speed[name] for name in lead.way.devices), default=0.0)
            is_roomy = lead.way.settings.ubatch_tokens >= DEFAULT_UBATCH
            if lead.way.uses_host or not is_roomy or (enough is not None and slowest <= enough):
                continue
            if lead.relaxation.answer(lead.relaxed) is not None:
                enough = slowest
        if enough is None:
            return leads
        return [lead for lead in leads if all(speed[name] >= enough for name in lead.way.devices)]

    def best(self, freedom: Freedom, leads: list[Lead], gap: float = GAP) -> Found | None:
        """The best placement over the leads, its bound that of all of them together."""
        best: Found | None = None
        open_bound, is_proven = float("inf"), True
        for lead in _most_promising(leads):
            limit = best.objective * (1 - gap) if best else float("inf")
            if lead.bound < limit:
                self._refine(lead, FINE_ROUNDS, limit)
            if lead.bound >= limit:
                open_bound = min(open_bound, lead.bound)
                continue
            found, bound, is_done = self.settle(lead, freedom, limit, gap)
            open_bound, is_proven = min(open_bound, bound), is_proven and is_done
            if found is not None:
                best = found
        if best is None:
            return None
        return replace(best, bound=min(open_bound, best.objective), is_proven=is_proven)

    def settle(self, lead: Lead, freedom: Freedom, limit: float, gap: float) -> tuple[Found | None, float, bool]:
        """Solve one way below a limit: a placement that fits or None, the way's bound, whether it is proven."""
        if lead.way not in self._corrected:
            self._corrected[lead.way] = self.buffers.exact(lead.way)
            sharper = self._lead(lead.way, freedom)
            if sharper is None:
                return None, float("inf"), True
            lead = sharper
        for _ in range(MAX_CORRECTIONS):
            answer, bound, is_proven = self._prove(lead, limit, gap)
            if answer is None:
                return None, bound, is_proven
            assignment = lead.table.assignment(answer)
            plan = self.plan(assignment)
            if self._fits(lead, answer, compute_table(lead.way, plan)):
                speed = evaluate(self.problem, assignment, graph_counts(plan))
                objective = lead.relaxation.objective(answer)
                return Found(assignment, plan, speed, objective, bound, is_proven), bound, is_proven
            again = self._correct(lead, answer, compute_table(lead.way, plan), freedom)
            if again is None:
                return None, float("inf"), True
            lead = again
        return None, lead.bound, False

    def _fits(self, lead: Lead, answer: Answer, real: ComputeTable) -> bool:
        """Whether the placement keeps within the caps with its own compute buffers."""
        frame = lead.table.frame
        spare = [(cap - used) * KIB for cap, used in zip(frame.cap_kib, used_kib(frame, answer), strict=True)]
        assumed = self._assumed(lead, answer)
        return all(left + a >= r for left, a, r in zip(spare, assumed, real.n_bytes, strict=True))

    def _assumed(self, lead: Lead, answer: Answer) -> list[int]:
        """The compute buffers that the frame counted for this answer."""
        assumed = list(lead.compute.n_bytes)
        for extra in lead.table.frame.extras:
            if is_taken(lead.table.frame, answer, extra):
                assumed = [a + kib * KIB for a, kib in zip(assumed, extra.kib, strict=True)]
        return assumed

    def _correct(self, lead: Lead, answer: Answer, real: ComputeTable, freedom: Freedom) -> Lead | None:
        """The way again, with what its buffers lacked: charged to early or partly moved layers where any are new."""
        lacking = tuple(max(0, r - a) for r, a in zip(real.n_bytes, self._assumed(lead, answer), strict=True))
        frame = lead.table.frame
        patterns = {
            pattern
            for i, (home, pick) in enumerate(zip(answer.homes, answer.picks, strict=True))
            if (groups := frame.layers[i].choices[home][pick].groups)
            and (pattern := host_pattern(home, i < N_EARLY_LAYERS, groups)) is not None
        }
        known = dict(lead.compute.extras)
        new = patterns - known.keys()
        if new:
            early = {pattern for pattern in new if pattern[1]}
            compute = replace(lead.compute, extras=(*lead.compute.extras, *((each, lacking) for each in sorted(early or new))))
        else:
            merged = tuple(a + b for a, b in zip(lead.compute.n_bytes, lacking, strict=True))
            compute = replace(lead.compute, n_bytes=merged)
        self._corrected[lead.way] = compute
        return self._lead(lead.way, freedom)

    def _prove(self, lead: Lead, limit: float, gap: float) -> tuple[Answer | None, float, bool]:
        """An answer below the limit within the gap, or none; the bound; whether that is proven.

        CP-SAT proves quickly that nothing is below a cutoff, and finds slowly: so the cuts near the relaxed ones
        are searched first, and the whole frame is then asked for anything better.
        """
        relaxation, bound = lead.relaxation, lead.bound
        answer = lead.greedy
        value = float("inf") if answer is None else relaxation.objective(answer)
        near = answer.homes if answer is not None else lead.relaxed.homes
        if limit < value < float("inf"):
            near = None  # the question is only whether anything here is below the limit
        while bound < (target := self._target(limit, value, gap)):
            left_s = self.deadline_s - time.monotonic()
            if left_s <= 0:
                return (answer if value < limit else None), bound, False
            placing = Placing(lead.table.frame, *relaxation.weights)
            if near is not None:
                placing.stay_near(near, NEAR_LAYERS)
                target = min(limit, value * (1 - gap / 4))
            if target < float("inf"):
                placing.cut_off(int(target))
            result = placing.program.solve(min(left_s, NEAR_S) if near is not None else left_s, gap / 4, self.seed)
            if result.values:
                answer = placing.answer(result.values)
                value = relaxation.objective(answer)
            if near is not None:
                near = None
            elif result.status == "INFEASIBLE":
                bound = max(bound, target)
            elif result.status == "OPTIMAL":
                bound = max(bound, result.bound or bound)
                break
            else:
                return (answer if value < limit else None), max(bound, result.bound or bound), False
        return (answer if value < limit else None), bound, True

    def _target(self, limit: float, value: float, gap: float) -> float:
        """The bound that ends a search: nothing within the gap of the best answer is left."""
        return limit if limit < value else value * (1 - gap)

    def plan(self, assignment: Assignment) -> ComputePlan:
        """The plan of a placement: simulated, or the engine's once it is known."""
        if assignment not in self._plans:
            self._plans[assignment] = self.planner(assignment)
        return self._plans[assignment]

    def _simulate(self, assignment: Assignment) -> ComputePlan:
        problem = self.problem
        return plan_compute(problem.model, problem.machine, assignment, problem.program)

    def learn(self, assignment: Assignment, plan: ComputePlan) -> None:
        """Believe this plan of an assignment (the engine's own) from now on."""
        self._plans[assignment] = plan

    def front(self, freedom: Freedom, leads: list[Lead], n_per_ubatch: int = 1) -> list[Found]:
        """Greedy placements for each ubatch that the leads allow, the best ways of each by their bound."""
        found = []
        for ubatch in freedom.ubatches:
            mine = [lead for lead in leads if lead.way.settings.ubatch_tokens == ubatch][:n_per_ubatch]
            for lead in mine:
                each, _, _ = self.settle(lead, freedom, float("inf"), gap=0.02)
                if each is not None:
                    found.append(each)
        return found


def _most_promising(leads: list[Lead]) -> list[Lead]:
    """The leads (lowest bound first) by what they promise; those whose bound is above a promise come last."""
    best = float("inf")
    promising: list[Lead] = []
    others: list[Lead] = []
    for lead in leads:
        if lead.bound < best:
            best = min(best, lead.promise)
            promising.append(lead)
        else:
            others.append(lead)
    return sorted(promising, key=lambda lead: lead.promise) + others


def shortfall(search: Search, freedom: Freedom) -> str:
    """Which caps fail by how much, on the way that needs least; a multiple of 1 MiB, rounded up."""
    best: tuple[int, str] | None = None
    smallest = replace(freedom, ubatches=(min(freedom.ubatches),), load_modes=freedom.load_modes[:1])
    for way in ways(search.problem, smallest):
        if way.is_pipelined:
            continue
        pieces = Pieces(search.problem, freedom.pins)
        frame = TableBuilder(pieces, way, search.buffers.table(way), freedom.reserve_fraction).build().frame
        placing = Placing(frame, has_caps=False)
        extra = placing.minimise_overflow()
        result = placing.program.solve(5.0, 0.01, search.seed)
        if not result.values:
            continue
        over = {name: result.values[v] for name, v in zip(frame.positions, extra, strict=True) if result.values[v]}
        total_kib = sum(over.values())
        if over and (best is None or total_kib < best[0]):
            parts = (f"{name} lacks {-(-kib // KIB):,} MiB" for name, kib in over.items())
            best = total_kib, " and ".join(parts)
    return best[1] if best else "the wishes contradict each other"
