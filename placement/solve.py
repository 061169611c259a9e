"""A model, a machine and what the user fixes → the named solutions: aggressive, moderate, and the front."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

from placement.architecture import describe
from placement.check import default_workload, device_use
from placement.emit import emit_arguments
from placement.errors import InputError
from placement.machine import Machine
from placement.model import Model
from placement.problem import Problem, Settings
from placement.quants import KV_CACHE_TYPES
from placement.search import UBATCHES, Found, Freedom, Search, shortfall
from placement.solution import ESTIMATED, Solution, SolutionSet
from placement.tables import NO_PINS, Pins

AGGRESSIVE, MODERATE = "aggressive", "moderate"
MODERATE_RESERVE = 0.05  # of each card's total
MAX_SHOWN = 12


@dataclass(frozen=True, slots=True)
class Request:
    """What the user asks of a solve; None leaves it to the model's profile or to the solver."""

    ctx_tokens: int | None = None
    n_slots: int | None = None
    kv_type: str | None = None
    ubatch_tokens: int | None = None
    prompt_tokens: int = 2000
    generate_tokens: int = 500
    depth_tokens: int | None = None
    reserve_mib: float = 0.0
    objective: str = "turn"
    top: int = MAX_SHOWN
    program: str = "llama-server"
    pins: Pins = NO_PINS
    load_modes: tuple[str, ...] = ("auto", "none")
    time_limit_s: float = 10.0
    seed: int = 1


OBJECTIVES = {"turn": (1, 1), "decode": (1000, 1), "prompt": (1, 1000)}


def make_problem(model: Model, machine: Machine, request: Request) -> tuple[Problem, list[str]]:
    """The problem of a request, profile and defaults filled in, and warnings about it.

    Raises:
        InputError: a number that is not positive, or a KV type that llama.cpp does not know.
    """
    trained = describe(model).n_ctx_train
    ctx = request.ctx_tokens or model.profile.ctx_tokens or trained
    n_slots = request.n_slots or model.profile.n_slots
    kv_type = (request.kv_type or model.profile.kv_type or "f16").lower()
    if kv_type.upper() not in KV_CACHE_TYPES and kv_type not in KV_CACHE_TYPES:
        known = ", ".join(sorted(each.lower() for each in KV_CACHE_TYPES))
        raise InputError("--kv", f"unknown KV cache type; llama.cpp takes {known}", value=kv_type)
    for option, value, least in (
        ("--ctx", ctx, 1),
        ("--parallel", n_slots, 1),
        ("--prompt", request.prompt_tokens, 1),
        ("--generate", request.generate_tokens, 1),
    ):
        if value < least:
            raise InputError(option, f"must be at least {least}", value=value)
    warnings = []
    if trained and ctx > trained * n_slots:
        warnings.append(f"--ctx {ctx} is over the {trained} tokens that {model.name} was trained on")
    settings = Settings(
        ctx_tokens=ctx, n_slots=n_slots, kv_type_k=kv_type, kv_type_v=kv_type, flash_attention="on"
    )
    workload = default_workload(model, ctx // n_slots, request.prompt_tokens, request.generate_tokens)
    if request.depth_tokens is not None:
        workload = replace(workload, depth_tokens=request.depth_tokens)
    return Problem(model, machine, settings, workload, request.program, request.reserve_mib), warnings


def solve(
    model: Model, machine: Machine, request: Request, progress: Callable[[str], None] | None = None
) -> SolutionSet:
    """Find the recommended placement, the moderate one, and the other points of the front.

    An impossible request gives a set without solutions, status INFEASIBLE, and a message that says which cap
    fails by how much and what would fit.

    Raises:
        InputError: the request breaks a rule.
    """
    problem, warnings = make_problem(model, machine, request)
    if model.architecture and not describe(model).is_known:
        warnings.append(f"architecture {model.architecture!r} has no rule here: its figures are coarse estimates")
    decode_weight, prompt_weight = OBJECTIVES[request.objective]
    freedom = Freedom(
        ubatches=(request.ubatch_tokens,) if request.ubatch_tokens else UBATCHES,
        load_modes=request.load_modes,
        pins=request.pins,
        decode_weight=decode_weight,
        prompt_weight=prompt_weight,
    )
    search = Search(problem, request.time_limit_s, request.seed)
    tell = progress or (lambda _text: None)
    tell("aggressive")
    leads = search.leads(freedom)
    aggressive = search.best(freedom, leads)
    empty = SolutionSet(model.name, model.digest, machine.name, problem.workload, "INFEASIBLE", (), warnings=tuple(warnings))
    if aggressive is None:
        return replace(empty, message=shortfall(search, freedom), extra_args=model.profile.extra_args)
    tell("moderate")
    gentle = replace(freedom, reserve_fraction=MODERATE_RESERVE)
    moderate = search.best(gentle, search.leads(gentle))
    tell("the other points")
    others = search.front(freedom, leads)
    solutions = [as_solution(problem, aggressive, AGGRESSIVE)]
    if moderate is not None:
        solutions.append(as_solution(problem, moderate, MODERATE))
    solutions += _non_dominated(solutions, (as_solution(problem, found, "") for found in others))
    status = "OPTIMAL" if aggressive.is_proven else "FEASIBLE"
    return replace(
        empty,
        status=status,
        solutions=tuple(_named(solutions)[: max(request.top, 2)]),
        extra_args=model.profile.extra_args,
    )


def as_solution(problem: Problem, found: Found, name: str) -> Solution:
    """A found placement with its arguments, memory and proof."""
    args = emit_arguments(problem.model, problem.machine, found.assignment, problem.program)
    return Solution(
        name=name,
        label=ESTIMATED,
        assignment=found.assignment,
        args=tuple(args),
        devices=device_use(problem, found.assignment, found.plan),
        splits_prompt=found.plan.splits_prompt,
        splits_decode=found.plan.splits_decode,
        speed=found.speed,
        status="OPTIMAL" if found.is_proven else "FEASIBLE",
        gap=max(0.0, 1.0 - found.bound / found.objective) if math.isfinite(found.bound) else None,
        is_exact=found.plan.is_exact,
        notes=found.plan.notes,
    )


def _merit(solution: Solution) -> tuple[float, float, float]:
    return solution.speed.decode_tps, solution.speed.prompt_tps or 0.0, solution.headroom_mib


def _is_dominated(merit: tuple[float, float, float], by: Iterable[tuple[float, float, float]]) -> bool:
    """Whether another point is as good everywhere within 0.2 % and 8 MiB; ties count as dominated."""
    return any(
        d >= merit[0] * 0.998 and p >= merit[1] * 0.998 and h >= merit[2] - 8.0 for d, p, h in by
    )


def _non_dominated(kept: list[Solution], others: Iterable[Solution]) -> list[Solution]:
    """Those of the others that no named and no other solution beats in decode, prompt and headroom at once."""
    named = [_merit(solution) for solution in kept]
    found: list[Solution] = []
    for solution in sorted(others, key=lambda each: each.speed.turn_s):
        if solution.headroom_mib >= 0 and not _is_dominated(_merit(solution), [*named, *map(_merit, found)]):
            found.append(solution)
    return found


def _named(solutions: list[Solution]) -> list[Solution]:
    """Names for the points of the front, telling what each is chosen for."""
    named = []
    for index, solution in enumerate(solutions):
        if solution.name:
            named.append(solution)
            continue
        cards = "+".join(solution.assignment.devices) or "CPU"
        name = f"ub{solution.assignment.settings.ubatch_tokens}-{cards}".lower()
        taken = {each.name for each in named}
        named.append(replace(solution, name=name if name not in taken else f"{name}-{index}"))
    return named

