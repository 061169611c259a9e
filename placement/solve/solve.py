"""A model, a machine and what the user fixes → the named solutions: aggressive, moderate, and the Pareto front."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from placement.errors import InputError
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import Assignment, Problem, Settings, Workload
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.emit.arguments import emit_arguments
from placement.llamacpp.graph.rows import ROWS
from placement.llamacpp.plan import ComputePlan
from placement.predict.check import default_workload, device_use, differences
from placement.predict.cost import evaluate, graph_counts
from placement.predict.solution import (
    AGGRESSIVE,
    ESTIMATED,
    MODERATE,
    MODERATE_RESERVE,
    PLANNED,
    EnginePlanner,
    PlannedPlacement,
    Solution,
    SolutionSet,
    backend_notes,
)
from placement.solve.constraints import Constraint, apply_constraints, constraints_of, smallest_conflict
from placement.solve.pareto import DECODE_FIRST, best_different, is_dominated, spread, walk
from placement.solve.request import AUTO_KV_TYPE, Objective, Request
from placement.solve.search.configurations import UBATCHES, SearchSpace
from placement.solve.search.search import Search, shortfall
from placement.solve.search.solve_subproblem import GAP
from placement.solve.search.subproblems import Candidate

MAX_SHOWN = 12
EQUAL_TURNS = 0.0005  # turns that differ by less are equal
MAX_ROUNDS = 6  # of planning on the engine and searching anew
WEIGHTS: dict[Objective, tuple[int, int]] = {"turn": (1, 1), "decode": DECODE_FIRST, "prompt": (1, 1000)}


def make_problem(model: Model, machine: Machine, request: Request) -> tuple[Problem, list[str]]:
    """The problem of a request, profile and defaults filled in, and warnings about it.

    Raises:
        InputError: the description or the kept arguments give no positive context or slots, the turn does not
            fit one slot, or the KV type is still a question.
    """
    trained, kept = describe(model).n_ctx_train, request.kept
    ctx = request.ctx_tokens or kept.ctx_tokens or model.profile.ctx_tokens or trained
    n_slots = request.n_slots or kept.n_slots or model.profile.n_slots
    kv_type = (request.kv_type or model.profile.kv_type or "f16").lower()
    if kv_type == AUTO_KV_TYPE:
        raise InputError("--kv", "must be chosen before a problem is made", value=kv_type)
    for option, value in (("--ctx", ctx), ("--parallel", n_slots)):
        if value < 1:  # of the description or of --keep
            raise InputError(option, "must be at least 1", value=value)
    warnings = []
    if trained and ctx > trained * n_slots:
        warnings.append(f"--ctx {ctx} is over the {trained} tokens that {model.name} was trained on")
    settings = Settings(
        ctx_tokens=ctx, n_slots=n_slots, kv_type_k=kv_type, kv_type_v=kv_type, flash_attention="on"
    )
    settings = replace(settings, **dict(request.fixed_settings()))  # type: ignore[arg-type]
    workload = default_workload(model, ctx // n_slots, request.prompt_tokens, request.generate_tokens)
    if request.depth_tokens is not None:
        workload = _at_depth(request, ctx // n_slots, request.depth_tokens)
    elif workload.prompt_tokens < request.prompt_tokens or workload.generate_tokens < request.generate_tokens:
        warnings.append(
            f"a slot of {ctx // n_slots} tokens at depth {workload.depth_tokens} holds a turn of"
            f" {workload.prompt_tokens} + {workload.generate_tokens} tokens: taken instead of"
            f" {request.prompt_tokens} + {request.generate_tokens}"
        )
    return Problem(model, machine, settings, workload, request.program, request.reserve_mib), warnings


def _at_depth(request: Request, slot_tokens: int, depth_tokens: int) -> Workload:
    """The turn at the depth that was asked for.

    Raises:
        InputError: depth, prompt and answer do not fit one slot.
    """
    if depth_tokens + request.prompt_tokens + request.generate_tokens > slot_tokens:
        rule = f"depth + --prompt + --generate must be at most {slot_tokens}, the tokens of a slot"
        raise InputError("--depth", rule, value=depth_tokens)
    return Workload(request.prompt_tokens, request.generate_tokens, depth_tokens)


def solve_request(
    model: Model,
    machine: Machine,
    request: Request,
    engine_planner: EnginePlanner | None = None,
    progress: Callable[[str], None] | None = None,
) -> SolutionSet:
    """Find the recommended placement, the moderate one, and the other points of the Pareto front.

    With a `engine_planner` every solution shown is planned by the engine, and what does not fit there is searched anew.
    An impossible request gives a set without solutions, status INFEASIBLE, and a message that says which cap
    fails by how much.

    Raises:
        InputError: the request breaks a rule.
        EngineError: the planner's engine failed.
    """
    problem, warnings = make_problem(model, machine, request)
    tell = progress or (lambda _text: None)
    has_rules = describe(model).is_known and model.architecture in ROWS
    probes = None if has_rules else Probes(problem, engine_planner)
    search = Search(
        problem, request.time_limit_s, request.seed, probes if engine_planner is not None else None
    )
    constraints = constraints_of(model, machine, request)
    space = apply_constraints(_search_space(request), constraints)
    extra_args = (*model.profile.extra_args, *(word for words in request.kept.other for word in words))
    result = SolutionSet(
        model.name, model.digest, machine.name, problem.workload, "INFEASIBLE", (),
        extra_args=extra_args, warnings=tuple(warnings),
    )  # fmt: skip
    for _ in range(MAX_ROUNDS):
        points = _points(search, space, request.n_best, tell)
        if not points:
            return replace(result, message=_why_not(search, request, constraints))
        shown = _shown(problem, points)
        if engine_planner is None:
            break
        tell("planning on the engine")
        planned = engine_planner(problem, [each.assignment for each in shown])
        for each, verdict in zip(shown, planned, strict=True):
            search.learn(each.assignment, verdict.plan)
        shown = [_with_verdict(problem, *pair) for pair in zip(shown, planned, strict=True)]
        fitting = [each for each in shown if all(use.headroom_mib >= 0 for use in each.devices.values())]
        if len(fitting) == len(shown):
            break
    else:
        shown = fitting  # nothing over a cap is ever shown
    if not shown:
        return replace(
            result, message="the engine plans every placement found over a cap: keep more free (--reserve)"
        )
    if probes is not None:
        result = replace(result, warnings=(*warnings, probes.words()))
    status = "OPTIMAL" if all(each.status == "OPTIMAL" for each in shown[:1]) else "FEASIBLE"
    return replace(result, status=status, solutions=tuple(_named(shown)))


def _why_not(search: Search, request: Request, constraints: Sequence[Constraint]) -> str:
    """Why nothing fits: the constraints that conflict, or the caps that fail and what would fit."""
    base = _search_space(request)

    def is_possible(some: Sequence[Constraint]) -> bool:
        space = apply_constraints(base, some)
        return search.best(space, search.lower_bounds(space), gap=0.5) is not None

    conflict = smallest_conflict(constraints, is_possible) if constraints else []
    if conflict:
        return "these constraints cannot hold together: " + ", ".join(
            constraint.text for constraint in conflict
        )
    if (
        request.min_decode_tps is not None
        and (fastest := _fastest_decode(search, request, constraints)) is not None
    ):
        return (
            f"no placement decodes {request.min_decode_tps:g} tokens per second:"
            f" the fastest that fits decodes {fastest.speed.decode_tps:.2f}"
        )
    return f"{shortfall(search, base)}; {_what_fits(search.problem, request)}"


def _fastest_decode(search: Search, request: Request, constraints: Sequence[Constraint]) -> Candidate | None:
    """The fastest decode that fits once the one asked for is dropped; None where nothing does."""
    space = apply_constraints(
        _search_space(replace(request, min_decode_tps=None, objective="decode")), constraints
    )
    return search.best(space, search.lower_bounds(space))


def _what_fits(problem: Problem, request: Request) -> str:
    """The largest halving of the context that fits, or that none does."""
    ctx_tokens = problem.settings.ctx_tokens // 2
    while ctx_tokens >= 1024:
        smaller = replace(problem, settings=replace(problem.settings, ctx_tokens=ctx_tokens))
        search, space = Search(smaller, request.time_limit_s, request.seed), _search_space(request)
        if search.best(space, search.lower_bounds(space), gap=0.5) is not None:
            return f"it fits with --ctx {ctx_tokens}"
        ctx_tokens //= 2
    return "no smaller context fits either: the weights alone are too large"


class Probes:
    """Plans for an architecture that has no rule here: the engine's, counted and timed."""

    def __init__(self, problem: Problem, engine_planner: EnginePlanner | None) -> None:
        self.problem, self.engine_planner = problem, engine_planner
        self.n_plans, self.wall_s = 0, 0.0

    def __call__(self, assignment: Assignment) -> ComputePlan:
        assert self.engine_planner is not None
        start_s = time.monotonic()
        verdict = self.engine_planner(self.problem, [assignment])[0]
        self.n_plans += 1
        self.wall_s += time.monotonic() - start_s
        return verdict.plan

    def words(self) -> str:
        """What the user should know of how the numbers came about."""
        what = f"architecture {self.problem.model.architecture!r} has no rule here"
        if self.engine_planner is None:
            return f"{what}: compute buffers and splits are coarse estimates; give an --engine to plan with"
        return f"{what}: the engine planned it, {self.n_plans} probe plans in {self.wall_s:.1f} s"


def _search_space(request: Request) -> SearchSpace:
    decode_weight, prompt_weight = WEIGHTS[request.objective]
    return SearchSpace(
        ubatches=(request.ubatch_tokens,) if request.ubatch_tokens else UBATCHES,
        load_modes=request.load_modes,
        max_decode_s=1.0 / request.min_decode_tps if request.min_decode_tps else None,
        decode_weight=decode_weight,
        prompt_weight=prompt_weight,
    )


def _points(
    search: Search, space: SearchSpace, n_best: int, tell: Callable[[str], None]
) -> list[tuple[str, Candidate]]:
    """The named placements and the others that may stand on the Pareto front; empty when nothing fits."""
    tell("aggressive")
    aggressive = search.best(space, search.lower_bounds(space))
    if aggressive is None and space.orders is None and search.problem.machine.devices:
        # no card can hold even a layer: the CPU alone
        return _points(search, replace(space, orders=((),)), n_best, tell)
    if aggressive is None:
        return []
    tell("moderate")
    gentle = replace(space, reserve_fraction=MODERATE_RESERVE)
    moderate = search.best(gentle, search.lower_bounds(gentle))
    others = list(walk(search, space, tell))
    points = [(AGGRESSIVE, _shortest(aggressive, others))]
    if moderate is not None:
        points.append((MODERATE, moderate))
    points += [("", result) for result in others]
    best = best_different(search, space, points[0][1], n_best, tell)[1:] if n_best else []
    return points + [(f"best-{number}", result) for number, result in enumerate(best, 2)]


def _shortest(aggressive: Candidate, others: Iterable[Candidate]) -> Candidate:
    """The shortest turn of all: another point may beat the fastest found by what its proof leaves open."""
    best = min((aggressive, *others), key=lambda each: each.speed.turn_s)
    if best is aggressive or best.speed.turn_s >= aggressive.speed.turn_s * (1 - EQUAL_TURNS):
        return aggressive
    objective = round(aggressive.objective * best.speed.turn_s / aggressive.speed.turn_s)
    return replace(
        best, objective=objective, bound=min(aggressive.bound, objective), is_proven=aggressive.is_proven
    )


def _shown(problem: Problem, points: list[tuple[str, Candidate]]) -> list[Solution]:
    """The points as solutions: the named ones, then at most so many of the Pareto front, spread out."""
    every = [as_solution(problem, result, name) for name, result in points]
    named = [each for each in every if each.name in (AGGRESSIVE, MODERATE)]
    pareto_front = [*named, *_non_dominated(named, [each for each in every if not each.name])]
    kept = [pareto_front[i] for i in spread([_merit(each) for each in pareto_front], len(named), MAX_SHOWN)]
    placed = {each.args for each in kept}
    return kept + [each for each in every if each.name.startswith("best-") and each.args not in placed]


def _with_verdict(problem: Problem, solution: Solution, verdict: PlannedPlacement) -> Solution:
    """The solution with the engine's own memory, splits and nodes, and what was estimated differently."""
    plan = verdict.plan
    speed = evaluate(problem, solution.assignment, graph_counts(plan))
    return replace(
        solution,
        label=PLANNED,
        devices=verdict.devices,
        splits_prompt=plan.splits_prompt,
        splits_decode=plan.splits_decode,
        speed=speed,
        is_exact=True,
        notes=plan.notes,
        differences=differences(solution.devices, (solution.splits_prompt, solution.splits_decode), verdict),
    )


def as_solution(problem: Problem, result: Candidate, name: str) -> Solution:
    """A candidate with its arguments, memory and proof."""
    args = emit_arguments(problem.model, problem.machine, result.assignment, problem.program)
    coarse = backend_notes(problem.machine, result.assignment)
    return Solution(
        name=name,
        label=ESTIMATED,
        assignment=result.assignment,
        args=tuple(args),
        devices=device_use(problem, result.assignment, result.plan),
        splits_prompt=result.plan.splits_prompt,
        splits_decode=result.plan.splits_decode,
        speed=result.speed,
        status="OPTIMAL" if result.is_proven else "FEASIBLE",
        gap=max(0.0, 1.0 - result.bound / result.objective) if math.isfinite(result.bound) else None,
        is_exact=result.plan.is_exact and not coarse,
        notes=(*result.plan.notes, *coarse),
    )


def _merit(solution: Solution) -> tuple[float, float, float]:
    return solution.speed.decode_tps, solution.speed.prompt_tps or 0.0, solution.headroom_mib


def _non_dominated(named: list[Solution], others: Iterable[Solution]) -> list[Solution]:
    """Those of the others that no named and no other solution beats in decode, prompt and headroom at once."""
    left = [each for each in others if each.headroom_mib >= 0]
    results: list[Solution] = []
    for solution in sorted(left, key=lambda each: each.speed.turn_s):
        merit = _merit(solution)
        strictly = [_merit(each) for each in left if each is not solution and _merit(each) != merit]
        if not is_dominated(merit, [*map(_merit, (*named, *results))]) and not any(
            all(a >= b for a, b in zip(other, merit, strict=True)) for other in strictly
        ):
            results.append(solution)
    return results


def _named(solutions: list[Solution]) -> list[Solution]:
    """Names for the points of the Pareto front: their ubatch and cards, numbered where those repeat."""
    named: list[Solution] = []
    seen: Counter[str] = Counter()
    for solution in solutions:
        if not solution.name:
            cards = "+".join(solution.assignment.devices) or "CPU"
            name = f"ub{solution.assignment.settings.ubatch_tokens}-{cards}".lower()
            seen[name] += 1
            solution = replace(solution, name=f"{name}-{seen[name]}" if seen[name] > 1 else name)
        named.append(solution)
    return named


def best_choice(problem: Problem, request: Request, gap: float = GAP) -> Solution | None:
    """The solver's fastest placement of a problem whose settings are given; None where nothing fits."""
    search = Search(problem, request.time_limit_s, request.seed)
    space = apply_constraints(_search_space(request), constraints_of(problem.model, problem.machine, request))
    result = search.best(space, search.lower_bounds(space), gap)
    return as_solution(problem, result, AGGRESSIVE) if result is not None else None
