"""What could be run next: the solver's solutions, and simple placements that may tell more."""

from __future__ import annotations

from dataclasses import dataclass, replace

from placement.buffers import graph_counts
from placement.calibrate.choosing import Proposal
from placement.calibrate.features import decode_row, prompt_row
from placement.calibrate.telling import trials
from placement.compute import plan_compute
from placement.cost import GraphCounts, evaluate
from placement.problem import Assignment, Problem
from placement.solution import Solution


@dataclass(frozen=True)
class Proposed:
    """A proposal with the solution that verify runs."""

    proposal: Proposal
    solution: Solution


def proposals(problem: Problem, solutions: tuple[Solution, ...]) -> dict[str, Proposed]:
    """The solutions and the simple placements by their arguments, those of the solutions first.

    `problem` has the machine as it is believed now: the speeds are its.
    """
    found: dict[str, Proposed] = {}
    for solution in solutions:
        each = proposed(problem, solution, _planned_counts(problem, solution))
        found.setdefault(each.proposal.key, each)
    first = solutions[0]
    settings = replace(first.assignment.settings, has_overrides=False)
    for trial in trials(replace(problem, settings=settings)):
        like = solution_like(first, trial.name, trial.arguments, trial.assignment, problem, trial.counts)
        each = proposed(problem, replace(like, devices=trial.devices), trial.counts)
        found.setdefault(each.proposal.key, each)
    return found


def solution_like(
    like: Solution,
    name: str,
    arguments: tuple[str, ...],
    assignment: Assignment,
    problem: Problem,
    counts: GraphCounts | None = None,
) -> Solution:
    """Another placement of what a solution places: its speed and splits are its own, its memory is not known."""
    counts = counts or graph_counts(plan_compute(problem.model, problem.machine, assignment, problem.program))
    return replace(
        like,
        name=name,
        label="estimated",
        args=arguments,
        assignment=assignment,
        devices={},
        gap=None,
        speed=evaluate(problem, assignment, counts),
        splits_decode=counts.splits_decode,
        splits_prompt=counts.splits_prompt,
        notes=(),
        differences=(),
    )


def proposed(problem: Problem, solution: Solution, counts: GraphCounts | None = None) -> Proposed:
    """A solution with its token at the turn's depth and its prompt; its graph is simulated if not given."""
    counts = counts or _counts(problem, solution)
    turn = problem.workload
    depth = turn.depth_tokens + turn.prompt_tokens + turn.generate_tokens // 2
    deep = replace(problem, workload=replace(turn, depth_tokens=depth))
    decode = decode_row(deep, solution.assignment, counts, run=solution.name)
    prompt = prompt_row(problem, solution.assignment, counts, run=solution.name)
    return Proposed(Proposal(" ".join(solution.args), decode, prompt, turn.generate_tokens), solution)


def _planned_counts(problem: Problem, solution: Solution) -> GraphCounts:
    """Simulated nodes, and the splits that the solution has, planned where an engine planned it."""
    return replace(
        _counts(problem, solution),
        splits_decode=solution.splits_decode,
        splits_prompt=solution.splits_prompt,
    )


def _counts(problem: Problem, solution: Solution) -> GraphCounts:
    return graph_counts(plan_compute(problem.model, problem.machine, solution.assignment, problem.program))
