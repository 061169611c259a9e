"""Why a placement is what it is: what fills each device, what one more layer would need, what memory would give."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from placement.inputs.groups import movable_groups
from placement.inputs.problem import CPU, Problem
from placement.llamacpp.memory import weight_bytes
from placement.predict.solution import Solution, SolutionSet
from placement.solve.request import Request
from placement.solve.solve import best_choice
from placement.units import mib

MORE_MIB = 500.0
NOTABLE_GAIN = 0.001  # turn times that differ by less are equal


def next_layer_lines(problem: Problem, solution: Solution) -> Iterator[str]:
    """For every GPU that keeps experts in host memory: what the smallest of them would need to come home."""
    n_layers = len(solution.assignment.homes) - 1
    away = {name for name, device in solution.assignment.moved if device == CPU}
    needs: dict[str, float] = {}
    for layer, groups in enumerate(movable_groups(problem.model, n_layers)):
        home = solution.assignment.homes[layer]
        for group in groups:
            if home == CPU or not any(tensor.name in away for tensor in group.tensors):
                continue
            device = problem.machine.device(home)
            size = mib(sum(weight_bytes(tensor, device) for tensor in group.tensors))
            needs[home] = min(needs.get(home, size), size)
    for name, size in needs.items():
        left = solution.devices[name].headroom_mib
        yield f"{name}: the next expert tensors need {size:,.0f} MiB, {left:,.0f} are left"


def next_best_line(result: SolutionSet) -> str | None:
    """What the next best of the shown placements costs, in percent of a turn."""
    if len(result.solutions) < 2:
        return None
    best, *others = result.solutions
    second = min((each for each in others if each.assignment != best.assignment), key=_turn_s, default=None)
    if second is None:
        return None
    more = second.speed.turn_s / best.speed.turn_s - 1.0
    return f"next best: {second.name} takes {more:+.1%} of a turn"


def _turn_s(solution: Solution) -> float:
    return solution.speed.turn_s


def sensitivity(problem: Problem, result: SolutionSet, request: Request) -> Iterator[str]:
    """What 500 MiB more on each device would give: the problem solved again."""
    if not result.solutions:
        return
    turn_s = result.solutions[0].speed.turn_s
    for device in problem.machine.devices:
        roomier = replace(
            device, usable_mib=device.usable_mib + MORE_MIB, total_mib=device.total_mib + MORE_MIB
        )
        devices = tuple(roomier if each is device else each for each in problem.machine.devices)
        machine = replace(problem.machine, devices=devices)
        best = best_choice(replace(problem, machine=machine), request)
        if best is None:
            continue
        gain = 1.0 - best.speed.turn_s / turn_s
        decode = best.speed.decode_tps / result.solutions[0].speed.decode_tps - 1.0
        words = f"{gain:.1%} off a turn ({decode:+.1%} decode)" if gain > NOTABLE_GAIN else "nothing"
        yield f"+{MORE_MIB:.0f} MiB on {device.name} would give {words}"
