"""Closes the loop: solve, run the few placements that tell most, refit, solve again, until nothing better is likely.

All that is learned lies in `runs.jsonl`, so the same call goes on where an earlier one ended. What holds
afterwards: the choice was run beside llama.cpp's own `--fit`, and is never slower than it as measured.
"""

from __future__ import annotations

import datetime
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.buffers import graph_counts
from placement.calibrate.applied import Change, apply_fit
from placement.calibrate.choosing import Proposal, choose_runs, is_settled, outlook, worth_again
from placement.calibrate.features import decode_row, prompt_row
from placement.calibrate.fit import Calibration
from placement.calibrate.memory import fit_memory
from placement.calibrate.runs import Found, find_runs
from placement.calibrate.telling import trials
from placement.calibrate.whole import fit_both
from placement.compute import plan_compute
from placement.cost import GraphCounts
from placement.errors import InputError
from placement.machine import Machine
from placement.model import Model
from placement.problem import Problem
from placement.solution import Solution, SolutionSet
from placement.verify.candidates import FIT
from placement.verify.decide import LEAST_NOISE, Result

if TYPE_CHECKING:
    from placement.engine import Engine
    from placement.solving import Outcome
    from placement.verify.run import Listener, Options, Report

PER_STEP = 2
MAX_STEPS = 12
FINAL_ROUNDS = 2
STEPS_SHARE = 0.7  # of the budget; the rest is for running the best again beside --fit
LEARNED = 0.03  # a smaller change of a coefficient is not told


@dataclass(frozen=True, slots=True)
class Line:
    """One run of one step: predicted before it, measured, and what its step taught."""

    step: int
    candidate: str
    predicted_tps: float
    predicted_turn_s: float
    measured_tps: float | None
    measured_turn_s: float | None
    status: str
    learned: tuple[str, ...]

    @property
    def error(self) -> float | None:
        """Predicted over measured decode speed, less one."""
        return None if self.measured_tps is None else self.predicted_tps / self.measured_tps - 1.0

    def words(self) -> str:
        """The line of the log."""
        said = f"step {self.step}: {self.candidate}: predicted {self.predicted_tps:.1f} t/s"
        if self.measured_tps is None or self.error is None:
            return f"{said}, {self.status}"
        taught = f"; learned {', '.join(self.learned)}" if self.learned else ""
        return f"{said}, measured {self.measured_tps:.1f} t/s, error {self.error:+.1%}{taught}"


@dataclass(frozen=True)
class Tuned:
    """What came out: the verdict on all that was run, the machine with what was learned, and why it ended."""

    report: Report | None
    machine: Machine
    changes: tuple[Change, ...]
    lines: tuple[Line, ...]
    is_settled: bool
    why: str


@dataclass
class Tuning:
    """One call: what it was given, and what it has learned so far."""

    model: Model
    base: Machine
    model_file: Path
    engine: Engine
    asked: dict[str, Any]
    root: Path
    options: Options
    listener: Listener
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        self.lines: list[Line] = []
        self.n_steps = 0
        self.report: Report | None = None
        self.machine = self.base
        self.changes: tuple[Change, ...] = ()
        budget_s = self.options.budget_s
        self.deadline_s = None if budget_s is None else time.monotonic() + budget_s
        self.steps_until_s = None if budget_s is None else time.monotonic() + budget_s * STEPS_SHARE

    def run(self) -> Tuned:
        """Step until settled, out of time or out of placements; then run the best again beside `--fit`.

        Where `--fit` is the faster one, its run teaches too: the search goes on once more.
        """
        fits, why, settled = self._refit(), "", False
        for _ in range(2):
            fits, why, settled = self._steps(fits)
            if not self._finals(fits) or self._is_late() or not self._is_fit_faster():
                break
            fits = self._refit()
        return self._ended(why, settled)

    def _steps(
        self, fits: tuple[Calibration, Calibration]
    ) -> tuple[tuple[Calibration, Calibration], str, bool]:
        """Run what tells most until nothing better is likely: the last fits, why it ended, whether settled."""
        while self.n_steps < MAX_STEPS:
            outcome = self._solve()
            if not outcome.found.solutions:
                return fits, f"nothing fits: {outcome.found.message}", False
            proposals = self._proposals(outcome)
            known = [each.proposal for each in proposals.values()]
            measured = self._measured(outcome)
            if is_settled(fits, known, measured | self._measured_fits(), self._noise()):
                return fits, "the best measured is within its noise of the best predicted", True
            chosen = choose_runs(fits, known, measured, PER_STEP)
            if not chosen:
                return fits, "every proposed placement has been run", False
            self.n_steps += 1
            is_whole = self._verify(outcome, [proposals[each.key].solution for each in chosen])
            before, fits = fits, self._refit()
            self._log(self.n_steps, outcome, before, fits, chosen)
            if not is_whole or self._is_late():
                return fits, "the budget ended", False
        return fits, "all steps are made", False

    def _is_fit_faster(self) -> bool:
        chosen = None if self.report is None else self.report.verdict.recommended
        return chosen is not None and chosen.role == FIT

    def _measured_fits(self) -> dict[str, float]:
        """Turns of llama.cpp's own `--fit` where it ran beside ours."""
        results = () if self.report is None else self.report.verdict.results
        return {each.run_id: each.turn_s for each in results if each.role == FIT and each.turn_s is not None}

    def _ended(self, why: str, settled: bool) -> Tuned:
        return Tuned(self.report, self.machine, self.changes, tuple(self.lines), settled, why)

    def _is_late(self) -> bool:
        return self.steps_until_s is not None and time.monotonic() > self.steps_until_s

    def _solve(self) -> Outcome:
        from placement.solving import run_solve

        return run_solve(self.model, self.machine, self.asked, str(self.root), self.tell)

    def _folder(self, outcome: Outcome) -> Path:
        """Where the solve was kept: its runs lie beside it."""
        assert outcome.path is not None, "a solve with solutions is kept"
        return outcome.path.parent

    def _refit(self) -> tuple[Calibration, Calibration]:
        """Learn from all records of this machine, those of other models too."""
        found = find_runs(self.root, self.base)
        fits = fit_both(self.base, found, with_errors=False)
        self._apply(found, fits)
        return fits

    def _apply(self, found: Found, fits: tuple[Calibration, Calibration]) -> None:
        if found.rows:
            date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
            self.machine, self.changes = apply_fit(self.base, fits, fit_memory(self.base, found.memory), date)

    def _proposals(self, outcome: Outcome) -> dict[str, Proposed]:
        """What could be run: the solver's solutions, and simple placements that may tell more."""
        problem = replace(outcome.problem, machine=self.base)
        found: dict[str, Proposed] = {}
        for solution in outcome.found.solutions:
            each = _proposed(problem, solution, _counts(problem, solution))
            found.setdefault(each.proposal.key, each)
        first = outcome.found.solutions[0]
        settings = replace(first.assignment.settings, has_overrides=False)
        for trial in trials(replace(problem, settings=settings)):
            like = replace(first, name=trial.name, args=trial.arguments, assignment=trial.assignment)
            each = _proposed(problem, replace(like, devices=trial.devices, gap=None), trial.counts)
            found.setdefault(each.proposal.key, each)
        return found

    def _measured(self, outcome: Outcome) -> dict[str, float]:
        """Measured turns by proposal key; what failed counts as endless."""
        return {
            " ".join(_placing(result, outcome.found)): result.turn_s or float("inf")
            for result in self._results(outcome)
        }

    def _results(self, outcome: Outcome) -> tuple[Result, ...]:
        """What the newest campaign measured of solutions; all that ran or failed for good."""
        from placement.verify.run import show

        try:
            self.report = show(self._folder(outcome), outcome.problem.workload)
        except InputError:
            return ()  # nothing was run yet
        over = ("not run", "not finished")
        return tuple(r for r in self.report.verdict.results if r.role == "solution" and r.status not in over)

    def _noise(self) -> float:
        noise = None if self.report is None else self.report.verdict.noise
        return LEAST_NOISE if noise is None else noise

    def _verify(
        self, outcome: Outcome, solutions: list[Solution], rounds: int = 1, has_fit: bool = False
    ) -> bool:
        """Run these solutions; whether the budget was enough."""
        from placement.verify.run import verify

        left_s = None if self.deadline_s is None else max(1.0, self.deadline_s - time.monotonic())
        options = replace(
            self.options, top=len(solutions), rounds=rounds, budget_s=left_s, has_fit=has_fit, is_fresh=False
        )
        found = replace(outcome.found, solutions=tuple(map(self._with_own_name, solutions)))
        problem = replace(outcome.problem, machine=self.base)
        folder = self._folder(outcome)
        self.report = verify(problem, found, self.model_file, self.engine, folder, options, self.listener)
        return self.report.is_complete

    def _with_own_name(self, solution: Solution) -> Solution:
        """The solution under a name that no other placement was run by."""
        results = () if self.report is None else self.report.verdict.results
        head = " ".join(solution.args)
        taken = {each.name for each in results if not " ".join(each.arguments).startswith(head)}
        name, number = solution.name, 2
        while name in taken:
            name, number = f"{solution.name}-{number}", number + 1
        return replace(solution, name=name)

    def _log(
        self,
        step: int,
        outcome: Outcome,
        before: tuple[Calibration, Calibration],
        after: tuple[Calibration, Calibration],
        chosen: list[Proposal],
    ) -> None:
        results = {" ".join(_placing(r, outcome.found)): r for r in self._results(outcome)}
        found, learned = outlook(before, chosen), what_was_learned(before, after)
        for i, each in enumerate(chosen):
            result = results.get(each.key)
            line = Line(
                step=step,
                candidate=result.name if result is not None else each.decode.run,
                predicted_tps=1.0 / float(found.decode_s[i]),
                predicted_turn_s=float(found.turns_s[i]),
                measured_tps=self._tps(result, outcome.problem),
                measured_turn_s=None if result is None else result.turn_s,
                status="not run" if result is None else result.status,
                learned=learned,
            )
            self.lines.append(line)
            self.tell(f"place: {line.words()}")

    def _tps(self, result: Result | None, problem: Problem) -> float | None:
        """Measured decode speed at the turn's depth."""
        if result is None or result.turn_s is None or result.prompt_tps is None:
            return None
        turn = problem.workload
        generating_s = result.turn_s - turn.prompt_tokens / result.prompt_tps
        return turn.generate_tokens / generating_s if generating_s > 0 else None

    def _finals(self, fits: tuple[Calibration, Calibration]) -> bool:
        """Run what is nearly the best again, `--fit` beside it, so that the choice stands on more than one round;
        whether there was anything to run.

        A run that the others contradict gets a third round: of two, one disturbed would count half.
        """
        outcome = self._solve()
        results = {each.run_id: each for each in self._results(outcome) if each.turn_s is not None}
        again = worth_again(fits, {run: each.turn_s or 0.0 for run, each in results.items()})[:PER_STEP]
        if not again or not outcome.found.solutions:
            return False
        is_doubted = any(each.run in again for fit in fits for each in fit.outliers)
        proposals = self._proposals(outcome)
        keys = [" ".join(_placing(results[run], outcome.found)) for run in again]
        kept = [proposals[k].solution if k in proposals else self._again(outcome, k) for k in keys]
        self._verify(outcome, kept, rounds=FINAL_ROUNDS + is_doubted, has_fit=True)
        self._refit()
        self._results(outcome)
        return True

    def _again(self, outcome: Outcome, key: str) -> Solution:
        """A measured placement that is not proposed any more, to run it once more."""
        from placement.arguments import parse
        from placement.emit import resolve

        result = next(r for r in self._results(outcome) if " ".join(_placing(r, outcome.found)) == key)
        arguments = _placing(result, outcome.found)
        assignment = resolve(
            self.model, outcome.problem.machine, parse(list(arguments)), outcome.problem.program
        )
        first = outcome.found.solutions[0]
        return replace(first, name=result.name, args=arguments, assignment=assignment, devices={}, gap=None)


@dataclass(frozen=True)
class Proposed:
    """A proposal with the solution that verify runs."""

    proposal: Proposal
    solution: Solution


def _proposed(problem: Problem, solution: Solution, counts: GraphCounts) -> Proposed:
    turn = problem.workload
    depth = turn.depth_tokens + turn.prompt_tokens + turn.generate_tokens // 2
    deep = replace(problem, workload=replace(turn, depth_tokens=depth))
    decode = decode_row(deep, solution.assignment, counts, run=solution.name)
    prompt = prompt_row(problem, solution.assignment, counts, run=solution.name)
    return Proposed(Proposal(" ".join(solution.args), decode, prompt, turn.generate_tokens), solution)


def _counts(problem: Problem, solution: Solution) -> GraphCounts:
    """Simulated nodes, and the splits that the solution has, planned where an engine planned it."""
    plan = plan_compute(problem.model, problem.machine, solution.assignment, problem.program)
    return replace(
        graph_counts(plan), splits_decode=solution.splits_decode, splits_prompt=solution.splits_prompt
    )


def _placing(result: Result, found: SolutionSet) -> tuple[str, ...]:
    """The arguments of a result without those of the profile."""
    n_extra = len(found.extra_args)
    return result.arguments[:-n_extra] if n_extra else result.arguments


def what_was_learned(
    before: tuple[Calibration, Calibration], after: tuple[Calibration, Calibration], most: int = 3
) -> tuple[str, ...]:
    """The coefficients that a step taught most about: "split_us 45 → 61 ± 4 us"."""
    found = []
    for old, new in zip(before, after, strict=True):
        spreads = new.uncertainties
        for each in new.parameters:
            a, b = old.values[each.name], new.values[each.name]
            is_moved = abs(b - a) > LEARNED * max(abs(a), 1e-9)
            fall = old.left[each.name] - new.left[each.name]
            if is_moved and each.name not in new.unidentified:
                found.append((fall, f"{each.name} {a:.3g} → {b:.3g} ± {spreads[each.name]:.2g} {each.unit}"))
    return tuple(words for _, words in sorted(found, reverse=True)[:most])


def tune(
    model: Model,
    machine: Machine,
    model_file: Path,
    engine: Engine,
    asked: dict[str, Any],
    root: Path,
    options: Options,
    listener: Listener,
    tell: Callable[[str], None],
) -> Tuned:
    """Find this model's best placement on this machine by measuring few; `asked` are the options of a solve.

    Raises:
        MachineBusy: another verify runs here.
        InputError: the model file or the records cannot be read.
        EngineError: the engine has no llama-server or does not answer.
    """
    return Tuning(model, machine, model_file, engine, asked, root, options, listener, tell).run()
