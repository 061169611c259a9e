"""The search over ways to run a model: which of them deserve CP-SAT, and what CP-SAT then proves.

A way fixes device order, ubatch, load mode and whether the host is used. Each way's frame gets a bound by
relaxation; ways that cannot beat the best answer are dropped by it; a greedy answer and CP-SAT below a cutoff
settle the others. Compute buffers are estimates until an answer is known; then that placement is planned
exactly, and where it does not fit its frame is built again with what was found.
"""

from __future__ import annotations

import heapq
import itertools
import math
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from placement.buffers import Buffers, Planner, compute_table, graph_counts
from placement.compute import ComputePlan, plan_compute
from placement.cost import Speed, coefficient, evaluate, rates
from placement.outlook import outlook
from placement.pieces import N_EARLY_LAYERS, NO_PINS, Pieces, Pins
from placement.problem import Assignment, Problem, Settings
from placement.solver.frame import Answer, is_alike, taken_extras, used_kib
from placement.solver.placing import Placing
from placement.solver.program import ProgramResult
from placement.solver.relaxation import Relaxation, Relaxed
from placement.tables import ComputeTable, Table, TableBuilder, Way, host_pattern
from placement.units import KIB, MIB

UBATCHES = (256, 512, 1024, 2048, 4096)
DEFAULT_UBATCH = 512
MAX_ORDERED_DEVICES = 3  # up to here every subset in every order is tried
GAP = 0.002
MAX_CORRECTIONS = 9
FEW_CORRECTIONS = 4  # after that many, or
FEW_PATTERNS = 4  # where more than that many are new at once, what lacks is charged to every placement
WORK_LIMIT = 10.0  # CP-SAT's deterministic time for one proof
FEWER_THREADS = (0.25, 0.5, 0.75)  # of the cores
OTHER_WEIGHTS = ((1, 1), (1, 30), (30, 1))
WASTE_BYTES = 24 * MIB  # buffers assumed too large by more than this are corrected


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
    max_prompt_s: float | None = None  # of the whole prompt

    @property
    def weights(self) -> tuple[int, int]:
        """Of decode and prompt."""
        return self.decode_weight, self.prompt_weight


@dataclass(frozen=True)
class Found:
    """A placement of one way: objective and bound in microseconds as the frame counts them."""

    assignment: Assignment
    answer: Answer
    plan: ComputePlan
    speed: Speed
    objective: int
    bound: float
    is_proven: bool


@dataclass(frozen=True, slots=True)
class Hope:
    """A way and what its outlook promises at best: least objective in microseconds.

    Until its buffers are planned they are taken as nothing.
    """

    way: Way
    order: int  # of its devices, among the orders
    bound: float
    is_planned: bool = False

    @property
    def rank(self) -> tuple[float, int, float]:
        """Best first; of those within a percent, the engine's own order of devices first."""
        return round(math.log(max(self.bound, 1.0)), 2), self.order, self.bound


@dataclass(frozen=True)
class Lead:
    """A way with its frame, its buffers as far as they are known, and what its relaxation gave."""

    way: Way
    table: Table
    compute: ComputeTable
    relaxation: Relaxation
    relaxed: Relaxed
    promised: float = 0.0  # the outlook's bound

    @property
    def bound(self) -> float:
        """Least objective in microseconds; infinite when nothing can fit."""
        return float("inf") if self.relaxed.bound is None else max(self.relaxed.bound, self.promised)


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
    # what a pipeline gains by finer ubatches is believed only once it was measured: each reads all weights again
    is_known = "pipeline_overlap" in problem.machine.coefficients
    least_pipelined = smallest if is_known else min(DEFAULT_UBATCH, max(freedom.ubatches))
    for order, ubatch in itertools.product(orders or ((),), freedom.ubatches):
        if ubatch >= longest:
            continue
        batch = max(problem.settings.batch_tokens, ubatch)
        settings = replace(problem.settings, ubatch_tokens=ubatch, batch_tokens=batch)
        if order:
            yield Way(order, settings, uses_host=False)
        if len(order) > 1 and settings.is_kv_offloaded and ubatch >= least_pipelined:
            yield Way(order, settings, uses_host=False, is_pipelined=True)
        loaded = _fastest_loading(problem, order, settings, freedom.load_modes)
        for n_threads in thread_counts(problem):
            yield Way(order, replace(loaded, n_threads=n_threads), uses_host=True)


def thread_counts(problem: Problem) -> tuple[int | None, ...]:
    """CPU threads worth trying where the host is used; None leaves them to the engine, which takes one a core.

    Fewer are worth it only where the machine knows that each costs something.
    """
    fixed, n_cores = problem.settings.n_threads, problem.machine.cpu.threads
    if fixed is not None or coefficient(problem.machine, "thread_us") <= 0:
        return (fixed,)
    return (None, *sorted({max(1, round(n_cores * share)) for share in FEWER_THREADS} - {n_cores}))


def _fastest_loading(
    problem: Problem, order: tuple[str, ...], settings: Settings, modes: tuple[str, ...]
) -> Settings:
    """The settings with the load mode that streams fastest; memory and decode time are the same in all of them."""
    every = [replace(settings, load_mode=mode) for mode in modes]
    return min(every, key=lambda each: rates(problem.machine, order, each).stream_s_per_byte or 0.0)


class Search:
    """One problem's search; pieces, buffers and plans are kept between questions."""

    def __init__(
        self, problem: Problem, time_limit_s: float = 10.0, seed: int = 1, planner: Planner | None = None
    ) -> None:
        """`planner` replaces the simulated plans (an architecture without a rule asks the engine)."""
        self.problem = problem
        self.planner = planner or self._simulate
        self.buffers = Buffers(problem, self.plan)
        self.seed = seed
        self.deadline_s = time.monotonic() + time_limit_s
        self._pieces: dict[Pins, Pieces] = {}
        self._builders: dict[tuple[Pins, Way], TableBuilder] = {}
        self._outlooks: dict[tuple[object, ...], float] = {}
        self._plans: dict[Assignment, ComputePlan] = {}
        self._learned: set[Assignment] = set()
        self._lacking: dict[str, int] = {}  # bytes by device that the engine plans beyond our estimates
        self._corrected: dict[Way, ComputeTable] = {}

    def hopes(self, freedom: Freedom) -> list[Hope]:
        """Every way that may be worth a look, the most promising first."""
        order: dict[tuple[str, ...], int] = {}
        found = (
            self._hope(
                Hope(way, order.setdefault(way.devices, len(order)), 0.0), freedom, self.buffers.nothing(way)
            )
            for way in ways(self.problem, freedom)
        )
        possible = [hope for hope in found if hope.bound < float("inf")]
        return sorted(self._without_needless_cards(possible, freedom), key=lambda hope: hope.bound)

    def _hope(self, hope: Hope, freedom: Freedom, compute: ComputeTable, *, is_planned: bool = False) -> Hope:
        builder = self._builder(hope.way, freedom)
        fixed_us = builder.fixed_us(compute.counts)
        caps = builder.caps_kib(compute, freedom.reserve_fraction)

        def promised(weights: tuple[int, int]) -> float:
            key = freedom.pins, hope.way, fixed_us, caps, weights
            if key not in self._outlooks:
                self._outlooks[key] = outlook(builder, fixed_us, caps, weights)
            return self._outlooks[key]

        for limit_us, alone in zip(self._limits_us(freedom), ((1, 0), (0, 1)), strict=True):
            if limit_us is not None and promised(alone) > limit_us:
                return replace(hope, bound=float("inf"), is_planned=is_planned)
        return replace(hope, bound=max(hope.bound, promised(freedom.weights)), is_planned=is_planned)

    def _known(self, way: Way) -> ComputeTable:
        """The way's buffers: a typical placement's until one is found, then corrected by that one's."""
        if way not in self._corrected:
            self._corrected[way] = self.buffers.exact(way)
        return self._corrected[way]

    def _builder(self, way: Way, freedom: Freedom) -> TableBuilder:
        key = freedom.pins, way
        if key not in self._builders:
            if freedom.pins not in self._pieces:
                self._pieces[freedom.pins] = Pieces(self.problem, freedom.pins)
            self._builders[key] = TableBuilder(self._pieces[freedom.pins], way)
        return self._builders[key]

    def lead(self, way: Way, freedom: Freedom) -> Lead | None:
        """The way with the buffers that are known of it; None when it cannot fit."""
        compute = self._known(way)
        table = self._builder(way, freedom).build(compute, freedom.reserve_fraction)
        limits_us = self._limits_us(freedom)
        frame = replace(
            table.frame,
            max_host_layers=freedom.max_host_layers,
            max_decode_us=limits_us[0],
            max_prompt_us=limits_us[1],
        )
        for limit_us, alone in zip(limits_us, ((1, 0), (0, 1)), strict=True):
            if limit_us is not None:
                least = Relaxation(frame, *alone).bound().bound
                if least is None or least > limit_us:
                    return None
        relaxation = Relaxation(frame, *freedom.weights)
        relaxed = relaxation.bound()
        if relaxed.bound is None:
            return None
        return Lead(way, replace(table, frame=frame), compute, relaxation, relaxed)

    def _limits_us(self, freedom: Freedom) -> tuple[int | None, int | None]:
        """The freedom's limits on decode and prompt time, of a turn."""
        decode_s, prompt_s = freedom.max_decode_s, freedom.max_prompt_s
        n_generated = max(self.problem.workload.generate_tokens, 1)
        return (
            None if decode_s is None else int(decode_s * 1e6 * n_generated),
            None if prompt_s is None else int(prompt_s * 1e6),
        )

    def _without_needless_cards(self, hopes: list[Hope], freedom: Freedom) -> list[Hope]:
        """Where the fast cards hold the whole model at the engine's own ubatch, slower cards are left out."""
        speed = {device.name: device.bandwidth_gb_per_s for device in self.problem.machine.devices}
        roomy = [tokens for tokens in freedom.ubatches if tokens >= DEFAULT_UBATCH]
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
        self, freedom: Freedom, hopes: list[Hope], gap: float = GAP, taken: Sequence[Found] = ()
    ) -> Found | None:
        """The best placement over the ways that is like none of the `taken`, its bound that of all ways together.

        A way is looked at more closely (its buffers, its frame, CP-SAT) only while nothing found is within the gap
        of what it still promises.
        """
        best: Found | None = None
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
            found, bound, is_done = self.settle(lead, freedom, limit, gap, taken)
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
        planned = self._hope(hope, freedom, self._known(hope.way), is_planned=True)
        return (planned, None) if planned.bound < float("inf") else None

    def settle(
        self, lead: Lead, freedom: Freedom, limit: float, gap: float, taken: Sequence[Found] = ()
    ) -> tuple[Found | None, float, bool]:
        """Solve one way below a limit: a placement that fits or None, the way's bound, whether it is proven.

        What is shown of buffers that one placement lacked holds for no other: the bound then stays as it was.
        """
        floor = float("inf")
        best: tuple[Found | None, float, bool] = None, float("inf"), True
        is_tightened = False
        again: Lead | None = lead
        for n_before in range(MAX_CORRECTIONS):
            if again is None:
                return best
            lead = again
            answer, bound, is_proven = self._prove(lead, limit, gap, _excluded(lead, taken))
            floor = bound = min(bound, floor) if lead.compute.is_padded else bound
            if answer is None:
                return best if best[0] is not None else (None, bound, is_proven)
            assignment = lead.table.assignment(answer)
            plan = self.plan(assignment)
            real = compute_table(lead.way, plan)
            if not self._fits(lead, answer, real):
                again = self._correct(lead, answer, real, freedom, n_before)
                again = replace(again, promised=lead.promised) if again is not None else None
                continue
            speed = evaluate(self.problem, assignment, graph_counts(plan))
            objective = lead.relaxation.objective(answer)
            if best[0] is None or objective < best[0].objective:
                best = Found(assignment, answer, plan, speed, objective, bound, is_proven), bound, is_proven
            if is_tightened or not self._wastes(lead, answer, real):
                return best
            is_tightened = True
            n_bytes = tuple(map(min, lead.compute.n_bytes, real.n_bytes))
            self._corrected[lead.way] = replace(lead.compute, n_bytes=n_bytes)
            again = self.lead(lead.way, freedom)
        return best if best[0] is not None else (None, lead.bound, False)

    def _wastes(self, lead: Lead, answer: Answer, real: ComputeTable) -> bool:
        """Whether a card that something was moved off has much more room than its buffers were thought to leave."""
        layers = lead.table.frame.layers
        lacking = {
            home
            for table, home, pick in zip(layers, answer.homes, answer.picks, strict=True)
            if home == 0 or pick
        }
        if not lacking:
            return False
        over = [a - r for a, r in zip(lead.compute.n_bytes, real.n_bytes, strict=True)]
        return any(over[p] > WASTE_BYTES for p in range(1, len(over)) if p in lacking or 0 in answer.homes)

    def _fits(self, lead: Lead, answer: Answer, real: ComputeTable) -> bool:
        """Whether the placement keeps within the caps with its own compute buffers."""
        frame = lead.table.frame
        spare = [(cap - used) * KIB for cap, used in zip(frame.cap_kib, used_kib(frame, answer), strict=True)]
        assumed = self._assumed(lead, answer)
        return all(left + a >= r for left, a, r in zip(spare, assumed, real.n_bytes, strict=True))

    def _assumed(self, lead: Lead, answer: Answer) -> list[int]:
        """The compute buffers that the frame counted for this answer."""
        assumed = list(lead.compute.n_bytes)
        for extra in taken_extras(lead.table.frame, answer):
            assumed = [a + kib * KIB for a, kib in zip(assumed, extra.kib, strict=True)]
        return assumed

    def _correct(
        self, lead: Lead, answer: Answer, real: ComputeTable, freedom: Freedom, n_before: int
    ) -> Lead | None:
        """The way again, with what its buffers lacked: charged to early or partly moved layers where any are new.

        Buffers also depend a little on how many layers a card has, so that placements may take turns at lacking
        some: what is charged to every placement grows by ever more to spare.
        """
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
        if new and len(new) <= FEW_PATTERNS and n_before < FEW_CORRECTIONS:
            early = {pattern for pattern in new if pattern[1]}
            compute = replace(
                lead.compute,
                extras=(*lead.compute.extras, *((each, lacking) for each in sorted(early or new))),
            )
        else:
            spare = WASTE_BYTES << n_before >> 1 if lead.compute.is_padded else 0
            merged = tuple(
                a + b + spare * (b > 0) for a, b in zip(lead.compute.n_bytes, lacking, strict=True)
            )
            compute = replace(lead.compute, n_bytes=merged, is_padded=True)
        self._corrected[lead.way] = compute
        return self.lead(lead.way, freedom)

    def _prove(
        self, lead: Lead, limit: float, gap: float, excluded: Sequence[Answer]
    ) -> tuple[Answer | None, float, bool]:
        """An answer below the limit within the gap, or none; the bound; whether that is proven.

        The segments give an answer and a bound. Where these are further apart than the gap, CP-SAT is asked for
        anything better than the answer, in the homes that the bound leaves open: it proves quickly that nothing
        is below a cutoff.
        """
        relaxation, bound = lead.relaxation, lead.bound
        if bound >= limit:
            return None, bound, True
        answer, low = _first_answer(lead, gap / 4 if gap <= GAP else gap / 2, limit, excluded)
        bound = max(bound, low)
        value = float("inf") if answer is None else relaxation.objective(answer)
        while bound < (target := limit if limit < value else value * (1 - gap)):
            left_s = self.deadline_s - time.monotonic()
            homes = relaxation.homes(lead.relaxed, target)
            if not all(homes):
                bound = target
                break
            if left_s <= 0:
                return (answer if value < limit else None), bound, False
            result, found = self._ask(lead, homes, target, answer, excluded, left_s, gap)
            if found is not None:
                answer, value = found, relaxation.objective(found)
            if result.status == "INFEASIBLE":
                bound = max(bound, target)
            elif result.status == "OPTIMAL":
                bound = max(bound, min(result.bound or bound, target))
                break
            else:
                return (
                    (answer if value < limit else None),
                    max(bound, min(result.bound or bound, target)),
                    False,
                )
        return (answer if value < limit else None), bound, True

    def _ask(
        self,
        lead: Lead,
        homes: list[set[int]],
        target: float,
        answer: Answer | None,
        excluded: Sequence[Answer],
        left_s: float,
        gap: float,
    ) -> tuple[ProgramResult, Answer | None]:
        """CP-SAT's result below a target, and its answer."""
        placing = Placing(lead.table.frame, *lead.relaxation.weights, homes=homes, has_symmetry=not excluded)
        for each in excluded:
            placing.exclude(each)
        if target < float("inf"):
            placing.cut_off(int(target))
        if answer is not None:
            placing.hint(answer)
        result = placing.program.solve(left_s, gap / 2, self.seed, work_limit=WORK_LIMIT)
        return result, placing.answer(result.values) if result.values else None

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


def _first_answer(
    lead: Lead, gap: float, limit: float, excluded: Sequence[Answer]
) -> tuple[Answer | None, float]:
    """What the segments find, and their bound.

    Where decode or prompt time is limited, answers are also looked for under weights that favour either.
    """
    frame, relaxation = lead.table.frame, lead.relaxation
    answer, low = relaxation.settled(gap, limit)
    found = [answer]
    if answer is None and (frame.max_decode_us is not None or frame.max_prompt_us is not None):
        found += [Relaxation(frame, *weights).settled(gap)[0] for weights in OTHER_WEIGHTS]
    left = [
        each
        for each in found
        if each is not None
        and relaxation.objective(each) < limit
        and not any(is_alike(frame, each, other) for other in excluded)
    ]
    return min(left, key=relaxation.objective, default=None), low


def _excluded(lead: Lead, taken: Sequence[Found]) -> list[Answer]:
    """The taken placements as answers of this way's frame, where they are on its devices."""
    return [
        Answer(each.answer.homes, tuple(_picks(lead.table, each)))
        for each in taken
        if each.assignment.devices == lead.way.devices
    ]


def _picks(table: Table, found: Found) -> Iterator[int]:
    """The choices that place a found placement's groups where they are; the first where the frame has none."""
    moved = dict(found.assignment.moved)
    number = {name: p for p, name in enumerate(table.frame.positions)}
    for layer, names, home in zip(table.frame.layers, table.group_names, found.answer.homes, strict=True):
        groups = tuple(number[moved[group[0]]] if group[0] in moved else home for group in names)
        row = [choice.groups for choice in layer.choices[home]]
        yield row.index(groups) if groups in row else 0


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
