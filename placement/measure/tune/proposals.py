"""What could be run next: the solver's solutions, and simple placements that may tell more."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from placement.inputs.machine import Machine
from placement.inputs.problem import Assignment, Problem, Settings
from placement.llamacpp.compute import plan_compute
from placement.measure.calibrate.choosing import Proposal
from placement.measure.calibrate.features import TimingRow, decode_row, predict_s, prompt_row
from placement.measure.calibrate.information import Trial, trials
from placement.predict.cost import GraphCounts, Speed, graph_counts
from placement.predict.solution import Solution


@dataclass(frozen=True)
class Proposed:
    """A proposal with the solution that verify runs."""

    proposal: Proposal
    solution: Solution


@dataclass(frozen=True, slots=True)
class _Worked:
    """What of a placement does not change with the machine's speeds; `at_depth` is its token where a turn begins."""

    counts: GraphCounts
    proposal: Proposal
    at_depth: TimingRow


class Proposals:
    """What could be run of one model on one machine: graphs and rows are worked out once a placement."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._trials: dict[Settings, list[Trial]] = {}
        self._worked: dict[str, _Worked] = {}

    def of(self, problem: Problem, solutions: Sequence[Solution]) -> dict[str, Proposed]:
        """The solutions and the simple placements by their arguments, those of the solutions first.

        `problem` has the machine as it is believed now: the speeds of the simple ones are its.
        """
        found: dict[str, Proposed] = {}
        for each in solutions:
            splits = each.splits_decode, each.splits_prompt
            worked = self._work(problem, each.name, each.args, each.assignment, splits=splits)
            found.setdefault(worked.proposal.key, Proposed(worked.proposal, each))
        for trial in self._simple(problem, solutions[0].assignment.settings):
            known = self._work(problem, trial.name, trial.arguments, trial.assignment, trial.counts)
            like = _like(solutions[0], trial.name, trial.arguments, trial.assignment, known, problem)
            proposed = Proposed(known.proposal, replace(like, devices=trial.devices))
            found.setdefault(known.proposal.key, proposed)
        return found

    def again(
        self, problem: Problem, like: Solution, name: str, arguments: tuple[str, ...], assignment: Assignment
    ) -> Proposed:
        """A placement that was run and may not be proposed any more, to run it once more."""
        worked = self._work(problem, name, arguments, assignment)
        return Proposed(worked.proposal, _like(like, name, arguments, assignment, worked, problem))

    def _simple(self, problem: Problem, settings: Settings) -> list[Trial]:
        plain = replace(settings, has_overrides=False)
        if plain not in self._trials:
            self._trials[plain] = trials(replace(problem, machine=self._machine, settings=plain))
        return self._trials[plain]

    def _work(
        self,
        problem: Problem,
        name: str,
        arguments: tuple[str, ...],
        assignment: Assignment,
        counts: GraphCounts | None = None,
        splits: tuple[int, int] | None = None,
    ) -> _Worked:
        """Its graph is simulated if its counts are not given; `splits` are an engine's own, where it planned them."""
        key = " ".join(arguments)
        if key not in self._worked:
            counts = counts or _simulated(replace(problem, machine=self._machine), assignment)
            if splits is not None:
                counts = replace(counts, splits_decode=splits[0], splits_prompt=splits[1])
            self._worked[key] = _worked(problem, key, name, assignment, counts)
        return self._worked[key]


def _simulated(problem: Problem, assignment: Assignment) -> GraphCounts:
    return graph_counts(plan_compute(problem.model, problem.machine, assignment, problem.program))


def _worked(problem: Problem, key: str, name: str, assignment: Assignment, counts: GraphCounts) -> _Worked:
    """The rows of a placement: its token in the middle of the turn's answer and where it begins, its prompt."""
    turn = problem.workload
    depth = turn.depth_tokens + turn.prompt_tokens + turn.generate_tokens // 2
    deep = replace(problem, workload=replace(turn, depth_tokens=depth))
    decode = decode_row(deep, assignment, counts, run=name)
    prompt = prompt_row(problem, assignment, counts, run=name)
    proposal = Proposal(key, decode, prompt, turn.generate_tokens)
    return _Worked(counts, proposal, decode_row(problem, assignment, counts, run=name))


def _like(
    like: Solution,
    name: str,
    arguments: tuple[str, ...],
    assignment: Assignment,
    worked: _Worked,
    problem: Problem,
) -> Solution:
    """Another placement of what a solution places: its speed and splits are its own, its memory is not known."""
    turn, machine = problem.workload, problem.machine
    decode_s, prompt_s = predict_s(worked.at_depth, machine), predict_s(worked.proposal.prompt, machine)
    return replace(
        like,
        name=name,
        label="estimated",
        args=arguments,
        assignment=assignment,
        devices={},
        gap=None,
        speed=Speed(decode_s, prompt_s, turn.generate_tokens, turn.prompt_tokens),
        splits_decode=worked.counts.splits_decode,
        splits_prompt=worked.counts.splits_prompt,
        notes=(),
        differences=(),
    )
