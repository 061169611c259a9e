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
from typing import TYPE_CHECKING

from placement.errors import InputError
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import Problem
from placement.measure.calibrate.applied import Change, apply_fit
from placement.measure.calibrate.choosing import (
    LEAST_ROUNDS,
    MORE_ROUNDS,
    Proposal,
    choose_runs,
    forecast_turns,
    is_converged,
    rounds_to_tell,
    surprising,
    worth_again,
)
from placement.measure.calibrate.data import FitData
from placement.measure.calibrate.fit import Calibration
from placement.measure.calibrate.memory import fit_memory
from placement.measure.calibrate.report import median_error
from placement.measure.calibrate.runs import conditions_of, find_runs
from placement.measure.calibrate.whole import fit_both
from placement.measure.tune.lines import Tuned, TuneLine, what_was_learned
from placement.measure.tune.proposals import Proposals, Proposed
from placement.measure.tune.start import current_key, probed
from placement.measure.verify.candidates import FIT
from placement.measure.verify.decide import LEAST_NOISE, CandidateResult
from placement.predict.solution import Solution, SolutionSet
from placement.solve.request import Request

if TYPE_CHECKING:
    from placement.engine.find import Engine
    from placement.measure.verify.run import Listener, Options, VerifyReport
    from placement.solve.run import EngineChoice, Outcome

PER_STEP = 2
MAX_STEPS, MOST_SEARCHES = 12, 3
CREDIBLE = 0.1  # runs that are predicted from each other this well: what is predicted best is believed
STEPS_SHARE = 0.7  # of the budget; the rest is for running the best again beside --fit


@dataclass
class Tuning:
    """One call: what it was given, and what it has learned so far."""

    model: Model
    base: Machine
    model_file: Path
    engine: Engine
    request: Request
    planner: EngineChoice
    root: Path
    options: Options
    listener: Listener
    tell: Callable[[str], None]

    def __post_init__(self) -> None:
        self.key = current_key(self.engine, self.base, self.model_file)
        self._known = Proposals(self.base)
        self._solved: tuple[Machine, Outcome] | None = None
        self.is_told_old = False
        self.lines: list[TuneLine] = []
        self.n_steps = 0
        self.report: VerifyReport | None = None
        self.machine = self.base
        self.changes: tuple[Change, ...] = ()
        self.error: float | None = None  # the median of decode speeds, each run predicted from all others
        budget_s = self.options.budget_s
        self.deadline_s = None if budget_s is None else time.monotonic() + budget_s
        self.steps_until_s = None if budget_s is None else time.monotonic() + budget_s * STEPS_SHARE

    def run(self) -> Tuned:
        """Step until converged, out of time or out of placements, run the best beside `--fit`, then tell them apart.

        Where `--fit` is the faster one its run teaches too, and where what was run is badly predicted more is to
        be learned: the search goes on.
        """
        if not (self.base.coefficients or find_runs(self.root, self.base).rows):
            self.base = self.machine = probed(self.base, self.engine, self.options.budget_s, self.tell)
        fits, why, converged = self._refit(), "", False
        for _ in range(MOST_SEARCHES):
            fits, why, converged = self._steps(fits)
            if not self._run_beside_fit(fits):
                break
            fits = self._refit()
            if self._is_late() or (self._is_credible() and not self._is_fit_faster()):
                break
        self._finals(fits)
        return Tuned(self.report, self.machine, self.changes, tuple(self.lines), converged, why, self.error)

    def _steps(
        self, fits: tuple[Calibration, Calibration]
    ) -> tuple[tuple[Calibration, Calibration], str, bool]:
        """Run what tells most until nothing better is likely: the last fits, why it ended, whether converged."""
        while self.n_steps < MAX_STEPS:
            outcome = self._solve()
            if not outcome.solution_set.solutions:
                return fits, f"nothing fits: {outcome.solution_set.message}", False
            proposals = self._proposals(outcome)
            known = [each.proposal for each in proposals.values()]
            measured = self._measured(outcome)
            all_s = measured | self._measured_fits()
            if self._is_credible() and is_converged(fits, known, all_s, self._noise()):
                return fits, "the best measured is within its noise of the best predicted", True
            picked = choose_runs(fits, known, measured, PER_STEP)
            if not picked:
                return fits, "every proposed placement has been run", False
            self.n_steps += 1
            is_whole = self._verify(outcome, [proposals[each.key].solution for each in picked])
            if again := surprising(fits, picked, self._measured(outcome)):
                is_whole = self._verify(outcome, [proposals[each.key].solution for each in again], rounds=2)
            before, fits = fits, self._refit()
            self._log(self.n_steps, outcome, before, fits, picked)
            if not is_whole or self._is_late():
                return fits, "the budget ended", False
        return fits, "all steps are made", False

    def _is_fit_faster(self) -> bool:
        picked = None if self.report is None else self.report.verdict.recommended
        return picked is not None and picked.role == FIT

    def _all_results(self) -> tuple[CandidateResult, ...]:
        """What is known of everything that ran, llama.cpp's own `--fit` included."""
        return () if self.report is None else self.report.verdict.results

    def _measured_fits(self) -> dict[str, float]:
        """Turns of llama.cpp's own `--fit` where it ran beside ours."""
        fits = (each for each in self._all_results() if each.role == FIT)
        return {each.run_id: each.turn_s for each in fits if each.turn_s is not None}

    def _is_credible(self) -> bool:
        """Whether runs are predicted from each other well enough to believe what is predicted best."""
        return self.error is None or self.error <= CREDIBLE

    def _is_late(self) -> bool:
        return self.steps_until_s is not None and time.monotonic() > self.steps_until_s

    def _solve(self) -> Outcome:
        """The solve for the machine as it is believed now, made once until something is learned."""
        from placement.solve.run import run_solve

        if self._solved is None or self._solved[0] is not self.machine:
            result = run_solve(
                self.model, self.machine, self.request,
                engine=self.planner, out_folder=str(self.root), warn=self.tell,
            )  # fmt: skip
            self._solved = self.machine, result
        return self._solved[1]

    def _folder(self, outcome: Outcome) -> Path:
        """Where the solve was kept: its runs lie beside it."""
        assert outcome.path is not None, "a solve with solutions is kept"
        return outcome.path.parent

    def _refit(self) -> tuple[Calibration, Calibration]:
        """Learn from all records of this machine and build, those of other models too.

        Before the first of them the fits are those of the newest other build or driver; the machine stays.
        """
        result = find_runs(self.root, self.base, conditions=conditions_of(self.key))
        if not result.rows:
            result = find_runs(self.root, self.base)
            if result.conditions is not None and not self.is_told_old:
                self.is_told_old = True
                self.tell(f"place: nothing was run as now yet: starting from {result.conditions.words()}")
            return fit_both(self.base, result, with_errors=False)
        fits = fit_both(self.base, result)
        self.error = median_error(fits[0].errors, is_after=True)
        self._apply(result, fits)
        return fits

    def _apply(self, result: FitData, fits: tuple[Calibration, Calibration]) -> None:
        date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        self.machine, self.changes = apply_fit(self.base, fits, fit_memory(self.base, result.memory), date)

    def _proposals(self, outcome: Outcome) -> dict[str, Proposed]:
        return self._known.of(replace(outcome.problem, machine=self.machine), outcome.solution_set.solutions)

    def _measured(self, outcome: Outcome) -> dict[str, float]:
        """Measured turns by proposal key; what failed counts as endless."""
        return {
            " ".join(_placing(result, outcome.solution_set)): result.turn_s or float("inf")
            for result in self._results(outcome)
        }

    def _results(self, outcome: Outcome) -> tuple[CandidateResult, ...]:
        """What the newest campaign measured of solutions; all that ran or failed for good."""
        from placement.measure.verify.run import asked_of, decide_again

        asked = self.options.asked or asked_of(outcome.problem, self.options.is_full_depth)
        key = self.key.model_copy(update={"plan": asked.text()})
        try:
            self.report = decide_again(self._folder(outcome), outcome.problem, key)
        except InputError:
            return ()  # nothing was run yet
        over = ("not run", "not finished")
        return tuple(r for r in self.report.verdict.results if r.role == "solution" and r.status not in over)

    def _noise(self) -> float:
        noise = None if self.report is None else self.report.verdict.noise
        return LEAST_NOISE if noise is None else noise

    def _round_noise(self) -> float:
        """What one round is off by, as a share: a noise floor is twice that."""
        return self._noise() / 2

    def _verify(
        self, outcome: Outcome, solutions: list[Solution], rounds: int = 1, has_fit: bool = False
    ) -> bool:
        """Run these solutions; whether the budget was enough."""
        from placement.measure.verify.run import verify

        left_s = None if self.deadline_s is None else max(1.0, self.deadline_s - time.monotonic())
        options = replace(
            self.options, top=len(solutions), rounds=rounds, budget_s=left_s, has_fit=has_fit, is_fresh=False
        )
        result = replace(outcome.solution_set, solutions=tuple(map(self._with_own_name, solutions)))
        problem = replace(outcome.problem, machine=self.base)
        folder = self._folder(outcome)
        self.report = verify(problem, result, self.model_file, self.engine, folder, options, self.listener)
        return self.report.is_complete

    def _with_own_name(self, solution: Solution) -> Solution:
        """The solution under a name that no other placement was run by."""
        head = " ".join(solution.args)
        taken = {each.name for each in self._all_results() if not " ".join(each.arguments).startswith(head)}
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
        picked: list[Proposal],
    ) -> None:
        results = {" ".join(_placing(r, outcome.solution_set)): r for r in self._results(outcome)}
        match, learned = forecast_turns(before, picked), what_was_learned(before, after)
        for i, each in enumerate(picked):
            result = results.get(each.key)
            line = TuneLine(
                step=step,
                candidate=result.name if result is not None else each.decode.run,
                predicted_tps=1.0 / float(match.decode_s[i]),
                predicted_turn_s=float(match.turns_s[i]),
                measured_tps=self._tps(result, outcome.problem),
                measured_turn_s=None if result is None else result.turn_s,
                status="not run" if result is None else result.status,
                learned=learned,
            )
            self.lines.append(line)
            self.tell(f"place: {line.words()}")

    def _tps(self, result: CandidateResult | None, problem: Problem) -> float | None:
        """Measured decode speed at the turn's depth."""
        if result is None or result.turn_s is None or result.prompt_tps is None:
            return None
        turn = problem.workload
        generating_s = result.turn_s - turn.prompt_tokens / result.prompt_tps
        return turn.generate_tokens / generating_s if generating_s > 0 else None

    def _run_beside_fit(self, fits: tuple[Calibration, Calibration]) -> bool:
        """Run what is nearly the best again, `--fit` beside it, so that the choice stands on more than one round;
        whether there was anything to run."""
        outcome = self._solve()
        if not outcome.solution_set.solutions or not self._results(outcome):
            return False
        self._verify(outcome, self._nearly_best(outcome, fits), LEAST_ROUNDS, has_fit=True)
        self._results(outcome)
        return True

    def _finals(self, fits: tuple[Calibration, Calibration]) -> None:
        """As many more rounds as the noise asks for, and the budget allows, of what they do not tell from the best;
        at last of the choice itself, if it had fewer."""
        outcome = self._solve()
        if not outcome.solution_set.solutions or not self._results(outcome):
            return
        rounds, again = LEAST_ROUNDS, self._nearly_best(outcome, fits)
        while (wanted := rounds_to_tell(self._round_noise())) > rounds:
            is_fit_near = self._is_fit_near()
            rounds = min(wanted, rounds + MORE_ROUNDS)
            if (len(again) == 1 and not is_fit_near) or not self._verify(outcome, again, rounds, is_fit_near):
                break
            fits = self._refit()
            again = self._nearly_best(outcome, fits)
        picked = None if self.report is None else self.report.verdict.recommended
        if picked is not None and picked.role != FIT and picked.n_good < LEAST_ROUNDS:
            self._verify(outcome, [self._again(outcome, picked).solution], LEAST_ROUNDS, has_fit=True)
        self._refit()
        self._results(outcome)

    def _is_fit_near(self) -> bool:
        """Whether rounds do not tell llama.cpp's own `--fit` from the best of ours."""
        results = self._all_results()
        rounds_s = {each.run_id: each.turns_s for each in results if each.turns_s}
        fits = {each.run_id for each in results if each.role == FIT}
        return not fits.isdisjoint(worth_again(rounds_s, {}, self._round_noise()))

    def _nearly_best(self, outcome: Outcome, fits: tuple[Calibration, Calibration]) -> list[Solution]:
        """What may be the fastest of all that was measured, by its own runs and by those of the others."""
        known = {
            " ".join(_placing(each, outcome.solution_set)): each
            for each in self._results(outcome)
            if each.turns_s
        }
        if not known:
            return []
        offered = self._proposals(outcome)
        mine = {key: offered.get(key) or self._again(outcome, each) for key, each in known.items()}
        turns_s = forecast_turns(fits, [each.proposal for each in mine.values()]).turns_s
        predicted = dict(zip(mine, map(float, turns_s), strict=True))
        rounds_s = {key: each.turns_s for key, each in known.items()}
        return [mine[key].solution for key in worth_again(rounds_s, predicted, self._round_noise())]

    def _again(self, outcome: Outcome, result: CandidateResult) -> Proposed:
        """A measured placement that may not be proposed any more, to run it once more."""
        from placement.llamacpp.arguments import parse
        from placement.llamacpp.emit.resolve import resolve

        arguments, problem = (
            _placing(result, outcome.solution_set),
            replace(outcome.problem, machine=self.machine),
        )
        assignment = resolve(self.model, problem.machine, parse(list(arguments)), problem.program)
        first = outcome.solution_set.solutions[0]
        return self._known.again(problem, first, result.name, arguments, assignment)


def _placing(result: CandidateResult, match: SolutionSet) -> tuple[str, ...]:
    """The arguments of a result without those of the profile."""
    n_extra = len(match.extra_args)
    return result.arguments[:-n_extra] if n_extra else result.arguments


def tune(
    model: Model,
    machine: Machine,
    model_file: Path,
    engine: Engine,
    request: Request,
    planner: EngineChoice,
    root: Path,
    options: Options,
    listener: Listener,
    tell: Callable[[str], None],
) -> Tuned:
    """Find this model's best placement on this machine by measuring few: those that solving `request` gives.

    `engine` runs them, `planner` is the solve's, which may do without one.

    Raises:
        MachineBusy: another verify runs here.
        InputError: the model file or the records cannot be read.
        EngineError: the engine has no llama-server or does not answer.
    """
    return Tuning(model, machine, model_file, engine, request, planner, root, options, listener, tell).run()
