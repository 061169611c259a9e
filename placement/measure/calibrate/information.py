"""Which placement would tell most about a coefficient: placements that fit, weighed by the variance they take."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from placement.inputs.groups import EXPERTS_DOWN, movable_groups
from placement.inputs.problem import CPU, Assignment, Problem, Settings, Workload
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.emit.arguments import emit_arguments
from placement.llamacpp.memory import context_size
from placement.measure.calibrate.features import TimingRow, decode_row, prompt_row
from placement.measure.calibrate.fit import Calibration
from placement.measure.calibrate.fit_problem import MODEL_NOISE, UNIDENTIFIED
from placement.predict.check import device_use
from placement.predict.cost import GraphCounts, graph_counts
from placement.predict.solution import DeviceUse
from placement.solve.search.configurations import MAX_ORDERED_DEVICES

LEAST_SHARE = 0.03  # of a coefficient's variance: below, no placement tells anything


@dataclass(frozen=True)
class Trial:
    """A placement that could be run, what it would be for, and its rows."""

    name: str
    arguments: tuple[str, ...]
    problem: Problem
    assignment: Assignment
    rows: tuple[TimingRow, ...]
    counts: GraphCounts
    devices: dict[str, DeviceUse]


@dataclass(frozen=True, slots=True)
class Information:
    """The placement that would identify a coefficient, and the share of the prior's spread left after it."""

    coefficient: str
    trial: str
    arguments: tuple[str, ...]
    phase: str
    left: float


def trials(problem: Problem) -> list[Trial]:
    """Simple placements of a problem's model that fit this machine: one card or more, experts here or there."""
    results = []
    for name, assignment in _assignments(problem):
        plan = plan_compute(problem.model, problem.machine, assignment, problem.program)
        uses = device_use(problem, assignment, plan)
        if all(use.headroom_mib >= 0 for use in uses.values()):
            results.append(_trial(name, problem, assignment, graph_counts(plan), uses))
    return results


def _trial(
    name: str, problem: Problem, assignment: Assignment, counts: GraphCounts, devices: dict[str, DeviceUse]
) -> Trial:
    """A trial of an assignment: its token at little and at much depth, and its prompt."""
    slot = context_size(problem.model, assignment.settings).cells

    def at(depth: int, n_prompt: int = 1) -> Problem:
        return replace(problem, workload=Workload(n_prompt, 1, depth))

    prompt = max(1, min(problem.workload.prompt_tokens, slot - 1))
    rows = (
        decode_row(at(min(128, slot // 2)), assignment, counts, run=name, label="short prompt"),
        decode_row(at(slot // 4), assignment, counts, run=name, label="canary"),
        prompt_row(at(0, prompt), assignment, counts, run=name, label="long prompt"),
    )
    arguments = emit_arguments(problem.model, problem.machine, assignment, problem.program)
    return Trial(name, tuple(arguments), problem, assignment, rows, counts, devices)


def _assignments(problem: Problem) -> Iterator[tuple[str, Assignment]]:
    n_layers = describe(problem.model).n_layer_all
    groups = movable_groups(problem.model, n_layers)
    names = [device.name for device in problem.machine.devices]
    orders = [
        order
        for n in range(1, min(len(names), MAX_ORDERED_DEVICES) + 1)
        for order in itertools.permutations(names, n)
    ] or [()]
    if len(names) > MAX_ORDERED_DEVICES:
        orders = [*((name,) for name in names), tuple(names)]
    for order, load_mode in itertools.product(orders, ("auto", "none")):
        settings = replace(problem.settings, load_mode=load_mode, flash_attention="on")
        homes = _homes(problem, order, n_layers)
        for share, target, kinds in _moves(order):
            wanted = {round(i / share) for i in range(round(n_layers * share))} if share else set()
            moved = tuple(
                (tensor.name, target)
                for layer in sorted(wanted & set(range(n_layers)))
                for group in groups[layer]
                if not kinds or group.kind in kinds
                for tensor in group.tensors
                if homes[layer] != target
            )
            if (moved or not share) and (load_mode == "auto" or target == CPU):
                yield (
                    _named(order, share, target, kinds, load_mode),
                    _assignment(order, homes, moved, settings),
                )


def _homes(problem: Problem, order: Sequence[str], n_layers: int) -> tuple[str, ...]:
    if not order:
        return (CPU,) * (n_layers + 1)
    sizes = list(itertools.accumulate(problem.machine.device(name).usable_mib for name in order))
    cuts = [round(size / sizes[-1] * (n_layers + 1)) for size in sizes]
    return tuple(order[next(k for k, cut in enumerate(cuts) if i < cut)] for i in range(n_layers + 1))


def _moves(order: Sequence[str]) -> list[tuple[float, str, tuple[str, ...]]]:
    """(share of the layers whose groups move, where to, which groups; none named: all).

    Half of the experts cost as many splits as all of them, so a few such runs tell splits from bytes.
    """
    if not order:
        return [(0.0, CPU, ())]
    others = [(0.5, order[-1], ())] if len(order) > 1 else []
    some = (EXPERTS_DOWN,)
    return [(0.0, "", ()), (0.25, CPU, ()), (0.5, CPU, ()), (1.0, CPU, ()), (1.0, CPU, some), *others]


def _assignment(
    order: tuple[str, ...], homes: tuple[str, ...], moved: tuple[tuple[str, str], ...], settings: Settings
) -> Assignment:
    return Assignment(order, homes, moved, replace(settings, has_overrides=bool(moved)))


def _named(order: Sequence[str], share: float, target: str, kinds: tuple[str, ...], load_mode: str) -> str:
    words = ["+".join(order) or "all on the CPU"]
    if share and target:
        what = "the down experts" if kinds else "the experts or FFN"
        words.append(f"{what} of {'every layer' if share == 1 else f'{share:.0%} of the layers'} on {target}")
    if load_mode != "auto":
        words.append(f"-lm {load_mode}")
    return ", ".join(words)


def what_would_tell(fit: Calibration, candidates: Sequence[Trial]) -> dict[str, Information | None]:
    """For every coefficient that keeps its prior, the one placement that would tell most; None: none would."""
    pairs = [(trial, row) for trial in candidates for row in trial.rows if row.kind == fit.kind]
    index = {each.name: i for i, each in enumerate(fit.parameters)}
    if not pairs:
        return dict.fromkeys(fit.unidentified)
    slopes = fit.gradients([row for _, row in pairs])
    after = slopes @ fit.covariance
    noise = np.einsum("ij,ij->i", after, slopes) + MODEL_NOISE[fit.kind] ** 2
    results: dict[str, Information | None] = {}
    for name in fit.unidentified:
        i = index[name]
        taken = after[:, i] ** 2 / noise / fit.covariance[i, i]
        best = int(np.argmax(taken))
        trial, row = pairs[best]
        left = fit.left[name] * float(np.sqrt(max(0.0, 1.0 - taken[best])))
        is_informative = taken[best] > LEAST_SHARE
        results[name] = (
            Information(name, trial.name, trial.arguments, row.label, left) if is_informative else None
        )
    return results


def is_enough(information: Information) -> bool:
    """Whether that one run would identify the coefficient."""
    return information.left <= UNIDENTIFIED
