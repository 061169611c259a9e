"""Questions that several solves answer: the largest context, the most headroom, the best KV type, the best file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

from placement.errors import InputError
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.llamacpp.architecture.describe import describe
from placement.predict.solution import Solution
from placement.solve.request import AUTO_KV_TYPE, Request
from placement.solve.solve import best_choice, make_problem

KV_QUALITY_ORDER = ("f16", "q8_0", "q4_0")
KV_SLACK = 0.05  # a better KV type may cost that much of the fastest turn
CTX_STEP_TOKENS = 1024
HEADROOM_STEP_MIB = 64
COARSE_GAP = 0.02

Maximize = Literal["prompt", "headroom", "context"]
Tell = Callable[[str], None]


def _silent(_text: str) -> None:
    return None


def answered(
    model: Model,
    machine: Machine,
    request: Request,
    maximize: Maximize | None = None,
    is_max_ctx: bool = False,
    tell: Tell | None = None,
) -> tuple[Request, str]:
    """The request with its questions answered (KV type, context, headroom), and the answers in words.

    Raises:
        InputError: an unknown word for `maximize`, or no decode speed that would limit it.
    """
    if maximize is not None and maximize not in get_args(Maximize):
        raise InputError("--maximize", f"must be one of {', '.join(get_args(Maximize))}", value=maximize)
    if maximize is not None and request.min_decode_tps is None:
        raise InputError("--maximize", "needs --min-decode T", value=maximize)
    say, told = tell or _silent, []
    if request.kv_type == AUTO_KV_TYPE:
        kv_type, words = choose_kv_type(model, machine, request, say)
        request = replace(request, kv_type=kv_type or KV_QUALITY_ORDER[-1])
        told.append(words)
    if is_max_ctx or maximize == "context":
        result, words = max_context(model, machine, request, say)
        told.append(words if result is None else _context_words(result, words))
        request = result or request
    if maximize == "headroom" and (roomy := max_headroom(model, machine, request, say)) is not None:
        request = roomy
        told.append(f"the largest reserve on every GPU: {roomy.reserve_mib:,.0f} MiB")
    if maximize == "prompt":
        request = replace(request, objective="prompt")
    return request, "; ".join(told)


def _context_words(request: Request, kept: str) -> str:
    return f"the largest context that keeps {kept}: {request.ctx_tokens:,} tokens"


def largest(low: int, high: int, is_possible: Callable[[int], bool]) -> int | None:
    """The largest number in [low, high] that is possible, where smaller ones are when larger ones are."""
    if not is_possible(low):
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if is_possible(middle):
            low = middle
        else:
            high = middle - 1
    return low


def max_context(
    model: Model, machine: Machine, request: Request, tell: Tell = _silent
) -> tuple[Request | None, str]:
    """The request with the largest context that still decodes `min_decode_tps`; without one, the largest that
    keeps everything on the GPUs, or else the largest that fits; and what it keeps, in words."""
    n_slots = request.n_slots or request.kept.n_slots or model.profile.n_slots
    trained = describe(model).n_ctx_train * n_slots
    on_gpus = replace(request, max_cpu_layers=0)
    if request.min_decode_tps is not None:
        tries = [(request, f"at least {request.min_decode_tps:g} t/s decode")]
    else:
        tries = [(on_gpus, "everything on the GPUs"), (request, "all that fits")]
    for asked, words in tries:

        def is_possible(steps: int, asked: Request = asked) -> bool:
            tell(f"context {steps * CTX_STEP_TOKENS:,}")
            problem, _ = make_problem(model, machine, replace(asked, ctx_tokens=steps * CTX_STEP_TOKENS))
            return best_choice(problem, asked, gap=0.5) is not None

        steps = largest(1, max(trained // CTX_STEP_TOKENS, 1), is_possible)
        if steps is not None:
            return replace(request, ctx_tokens=steps * CTX_STEP_TOKENS), words
    return None, "no context fits"


def max_headroom(model: Model, machine: Machine, request: Request, tell: Tell = _silent) -> Request | None:
    """The request with the largest reserve on every GPU that still decodes `min_decode_tps`."""

    def is_possible(steps: int) -> bool:
        tell(f"reserve {steps * HEADROOM_STEP_MIB:,} MiB")
        problem, _ = make_problem(
            model, machine, replace(request, reserve_mib=float(steps * HEADROOM_STEP_MIB))
        )
        return best_choice(problem, request, gap=0.5) is not None

    most = int(min((device.usable_mib for device in machine.devices), default=0.0))
    steps = largest(0, most // HEADROOM_STEP_MIB, is_possible)
    return None if steps is None else replace(request, reserve_mib=float(steps * HEADROOM_STEP_MIB))


def choose_kv_type(
    model: Model, machine: Machine, request: Request, tell: Tell = _silent
) -> tuple[str | None, str]:
    """The best KV type (f16, then q8_0, then q4_0) whose turn takes at most 5 % longer than the fastest's."""
    turns: dict[str, float] = {}
    names: dict[str, str] = {}  # what a type comes to beside a K or V type that the request fixes
    for kv_type in KV_QUALITY_ORDER:
        tell(f"KV {kv_type}")
        problem, _ = make_problem(model, machine, replace(request, kv_type=kv_type))
        best = best_choice(problem, request, COARSE_GAP)
        if best is not None:
            turns[kv_type] = best.speed.turn_s
            names[kv_type] = "/".join(problem.settings.kv_types)
    if not turns:
        return None, "no KV type fits"
    fastest = min(turns.values())
    picked = next(kv for kv in KV_QUALITY_ORDER if turns.get(kv, float("inf")) <= fastest * (1 + KV_SLACK))
    told = ", ".join(f"{name} {turns[kv]:.1f} s" for kv, name in names.items())
    return picked, f"KV {names[picked]}: the best quality within {KV_SLACK:.0%} of the fastest turn ({told})"


@dataclass(frozen=True, slots=True)
class Rated:
    """A model of a comparison with its fastest placement, or None where nothing fits."""

    model: Model
    best: Solution | None


def compare(models: Sequence[Model], machine: Machine, request: Request, tell: Tell = _silent) -> list[Rated]:
    """Every model's fastest placement under the same request, those that fit first, fastest turn first."""
    rated = []
    for model in models:
        tell(model.name)
        problem, _ = make_problem(model, machine, request)
        rated.append(Rated(model, best_choice(problem, request, COARSE_GAP)))
    return sorted(rated, key=lambda each: each.best.speed.turn_s if each.best else float("inf"))
