"""Anyone's engine arguments → memory per device, splits, predicted speed and advice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import HOST, Assignment, Problem, Workload
from placement.llamacpp.arguments import Arguments
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.emit.resolve import resolve
from placement.llamacpp.memory import context_size, static_memory
from placement.llamacpp.plan import ComputePlan
from placement.predict.advice.advise import advise
from placement.predict.advice.case import Advice
from placement.predict.cost import Speed, evaluate, graph_counts
from placement.predict.solution import (
    ESTIMATED,
    PLANNED,
    DeviceUse,
    EnginePlanner,
    PlannedPlacement,
    Solution,
    backend_notes,
    device_row,
)
from placement.units import mib

OurChoice = Callable[[Problem], Solution | None]


@dataclass(frozen=True, slots=True)
class Check:
    """What arguments cost. `label` says how memory and splits are known; the speed is always an estimate."""

    model: str
    machine: str
    label: str
    assignment: Assignment
    devices: dict[str, DeviceUse]  # GPUs in the engine's order, then "Host"
    splits_prompt: int
    splits_decode: int
    speed: Speed
    advice: tuple[Advice, ...]
    unknown_arguments: tuple[tuple[str, ...], ...]
    is_exact: bool
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()  # planned against estimated, where they are not equal

    @property
    def fits(self) -> bool:
        """Whether every device, the host included, stays within its cap."""
        return all(use.headroom_mib >= 0 for use in self.devices.values())


def device_use(problem: Problem, assignment: Assignment, plan: ComputePlan) -> dict[str, DeviceUse]:
    """Memory of every device of an assignment, and of "Host" last."""
    uses: dict[str, DeviceUse] = {}
    for name, memory in static_memory(problem.model, problem.machine, assignment).items():
        if name == HOST:
            runtime, cap, total = 0.0, problem.machine.cpu.usable_mib, problem.machine.cpu.usable_mib
        else:
            device = problem.machine.device(name)
            runtime, total = device.runtime_mib, device.total_mib
            cap = device.usable_mib - problem.reserve_mib
        uses[name] = DeviceUse(
            weights_mib=mib(memory.weights_bytes),
            context_mib=mib(memory.context_bytes),
            compute_mib=mib(plan.compute_bytes.get(name, 0)),
            runtime_mib=runtime,
            cap_mib=cap,
            total_mib=total,
        )
    return uses


def default_workload(model: Model, ctx_tokens: int, prompt: int = 2000, generate: int = 500) -> Workload:
    """A turn at a quarter of the context; both parts cut to what the context holds."""
    depth = ctx_tokens // 4
    prompt = max(1, min(prompt, ctx_tokens - depth - 1))
    return Workload(prompt, max(1, min(generate, ctx_tokens - depth - prompt)), depth)


def check_arguments(
    model: Model,
    machine: Machine,
    arguments: Arguments,
    program: str = "llama-server",
    workload: Workload | None = None,
    reserve_mib: float = 0.0,
    engine_planner: EnginePlanner | None = None,
    our_choice: OurChoice | None = None,
) -> Check:
    """Find what the engine would do with these arguments, and what to change.

    With an `engine_planner` memory and splits are the engine's own plan. `our_choice` gives the solver's own
    choice for the same problem, against which the arguments' cost is told.

    Raises:
        InputError: an argument that the engine would refuse.
    """
    assignment = resolve(model, machine, arguments, program)
    size = context_size(model, assignment.settings)
    turn = workload or default_workload(model, size.cells)
    problem = Problem(model, machine, assignment.settings, turn, program, reserve_mib)
    plan = plan_compute(model, machine, assignment, program)
    coarse = backend_notes(machine, assignment)

    def planner(other: Assignment) -> ComputePlan:
        return plan if other == assignment else plan_compute(model, machine, other, program)

    result = Check(
        model=model.name,
        machine=machine.name,
        label=ESTIMATED,
        assignment=assignment,
        devices=device_use(problem, assignment, plan),
        splits_prompt=plan.splits_prompt,
        splits_decode=plan.splits_decode,
        speed=evaluate(problem, assignment, graph_counts(plan)),
        advice=tuple(advise(model, machine, arguments, assignment, planner, program)),
        unknown_arguments=arguments.other,
        is_exact=plan.is_exact and not coarse,
        notes=(*plan.notes, *coarse),
    )
    if engine_planner is not None:
        result = _with_engine_plan(result, problem, engine_planner(problem, [assignment])[0])
    if our_choice is not None:
        result = replace(result, advice=(*result.advice, *_against(result, problem, our_choice(problem))))
    return result


def _with_engine_plan(result: Check, problem: Problem, verdict: PlannedPlacement) -> Check:
    """The check with the engine's own memory, splits and nodes."""
    speed = evaluate(problem, result.assignment, graph_counts(verdict.plan))
    return replace(
        result,
        label=PLANNED,
        devices=verdict.devices,
        splits_prompt=verdict.plan.splits_prompt,
        splits_decode=verdict.plan.splits_decode,
        speed=speed,
        is_exact=True,
        notes=verdict.plan.notes,
        differences=differences(result.devices, (result.splits_prompt, result.splits_decode), verdict),
    )


def differences(
    estimated: dict[str, DeviceUse], splits: tuple[int, int], verdict: PlannedPlacement
) -> tuple[str, ...]:
    """Where a plan is not what was estimated, beyond its rounding: "CUDA0 compute +12 MiB"."""
    results = []
    for name, planned in verdict.devices.items():
        for what in ("weights", "context", "compute"):
            more = getattr(planned, f"{what}_mib") - getattr(estimated[name], f"{what}_mib")
            if not -2.0 < more < 1.0:  # the engine rounds its figures down
                results.append(f"{name} {what} {more:+,.0f} MiB")
    for what, guess, real in zip(
        ("prompt", "decode"), splits, (verdict.plan.splits_prompt, verdict.plan.splits_decode), strict=True
    ):
        if real != guess:
            results.append(f"{what} splits {real - guess:+d}")
    return tuple(results)


def _against(result: Check, problem: Problem, best: Solution | None) -> tuple[Advice, ...]:
    """What the arguments cost beside the solver's own choice of the same context, KV type and slots."""
    if best is None or (best.speed.turn_s >= result.speed.turn_s * 0.99 and result.fits):
        return ()
    turn, mine, theirs = problem.workload, best.speed, result.speed
    words = f"place's own choice for this context takes {mine.turn_s:.1f} s for a turn of {turn.prompt_tokens:,} tokens"
    words += f" in and {turn.generate_tokens:,} out at depth {turn.depth_tokens:,}"
    words += f" ({mine.decode_tps:.1f} t/s decode, {mine.prompt_tps or 0:,.0f} prompt, {best.splits_decode} splits)"
    if result.fits:
        more = theirs.turn_s / mine.turn_s - 1.0
        words += f"; these arguments take {theirs.turn_s:.1f} s, {more:.0%} more"
    else:
        words += "; these arguments do not fit"
    return (Advice("slower-than-solver", f"{words}: see place solve"),)


def check_row(result: Check) -> dict[str, Any]:
    """The check with the contract's keys."""
    prompt_tps = result.speed.prompt_tps
    return {
        "model": result.model,
        "machine": result.machine,
        "label": result.label,
        "devices": {name: device_row(use) for name, use in result.devices.items()},
        "splits": {"prompt": result.splits_prompt, "decode": result.splits_decode},
        "speed": {
            "prompt_tps": None if prompt_tps is None else round(prompt_tps, 2),
            "decode_tps": round(result.speed.decode_tps, 3),
        },
        "fits": result.fits,
        "is_exact": result.is_exact,
        "advice": [{"code": each.code, "message": each.message} for each in result.advice],
        "unknown_arguments": [list(each) for each in result.unknown_arguments],
        "notes": list(result.notes),
        "differences": list(result.differences),
    }
