"""Verifies solutions on the hardware: interleaved rounds, each phase recorded, resumed after any end.

What holds afterwards: no server of ours runs, the machine's lock is free, and `runs.jsonl` has every phase
that finished. `decide_again` decides again from the records alone.
"""

from __future__ import annotations

import statistics
import time
import uuid
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from placement.engine.find import Engine
from placement.errors import InputError
from placement.inputs.identity import is_same_machine, machine_identity
from placement.inputs.model import Model
from placement.inputs.model_files.files import read_model
from placement.inputs.problem import Problem, Workload
from placement.measure.records import log as records
from placement.measure.records.log import RUNS, RunLog, each_once, is_same_key, latest_campaign, of_campaign
from placement.measure.records.phase_names import PLAN, SHORT
from placement.measure.verify.candidates import FIT, VerifyCandidate, choose, make_candidates
from placement.measure.verify.decide import Round, Verdict, decide, rounds_of
from placement.measure.verify.keys import make_key
from placement.measure.verify.lock import machine_lock
from placement.measure.verify.phases import Bench, BudgetSpent, Limits, Visit
from placement.measure.verify.prompts import Asked
from placement.measure.verify.watch import Sample, load_nvml
from placement.predict.solution import SolutionSet
from placement.solve.store import folders_of_other_names

if TYPE_CHECKING:
    from placement.measure.records.schema import Key, Record

_FATAL = (
    records.CRASH,
    records.HANG,
    records.REFUSED,
)  # not run again in later rounds


@dataclass(frozen=True, slots=True)
class Options:
    """How much to run. `budget_s` None: until all is measured. `asked` None: as the workload says."""

    top: int = 3
    rounds: int = 3
    budget_s: float | None = None
    is_full_depth: bool = False
    is_fresh: bool = False
    has_fit: bool = True  # run --fit beside the solutions
    asked: Asked | None = None
    limits: Limits = field(default_factory=Limits)
    lock_path: Path | None = None


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a verify stands: the phase that begins, the visits that are done, and about what is left."""

    candidate: str
    round: int
    n_rounds: int
    phase: str
    repeat: int
    n_done: int
    n_visits: int
    decode_tps: float | None
    left_s: float | None
    caps_mib: dict[str, float]


class Listener(Protocol):
    """Whoever shows the progress; called from this thread, `sample` from another."""

    def say(self, text: str) -> None:
        """Take a line for the user."""

    def phase(self, progress: Progress) -> None:
        """Take the phase that begins."""

    def sample(self, sample: Sample) -> None:
        """Take a sample of the memory."""


@dataclass(frozen=True, slots=True)
class VerifyReport:
    """The verdict on a campaign; `is_complete` is False where the budget ended before the rounds did."""

    verdict: Verdict
    campaign: str
    workload: Workload
    is_complete: bool
    n_records: int


def mismatch(expected: Model, found: Model) -> str | None:
    """Say how a model file differs from the model that was solved for; None if it is the same.

    Names and licences (`general.*`) may differ: they change neither memory nor speed.
    """
    if expected.digest == found.digest:
        return None
    if expected.architecture != found.architecture:
        return f"it is a {found.architecture}, not a {expected.architecture}"
    if len(expected.tensors) != len(found.tensors):
        return f"it has {len(found.tensors)} tensors, not {len(expected.tensors)}"
    for tensor in expected.tensors:
        other = found.by_name.get(tensor.name)
        if other is None:
            return f"it has no {tensor.name}"
        if (tensor.shape, tensor.type) != (other.shape, other.type):
            shapes = f"{other.type} {list(other.shape)}, not {tensor.type} {list(tensor.shape)}"
            return f"its {tensor.name} is {shapes}"
    keys = {key for key in {**expected.metadata, **found.metadata} if not key.startswith("general.")}
    for key in sorted(keys):
        if expected.metadata.get(key) != found.metadata.get(key):
            return f"its {key} is {found.metadata.get(key)!r}, not {expected.metadata.get(key)!r}"
    return None


def asked_of(problem: Problem, is_full_depth: bool = False) -> Asked:
    """Return what a problem's runs ask: its prompt, and a canary to a quarter (or all) of a slot."""
    settings = problem.settings
    slot = settings.ctx_tokens if settings.is_kv_unified else settings.ctx_tokens // settings.n_slots
    return Asked(long_prompt=problem.workload.prompt_tokens, canary=slot if is_full_depth else slot // 4)


def verify(
    problem: Problem,
    found: SolutionSet,
    model_file: Path,
    engine: Engine,
    folder: Path,
    options: Options,
    listener: Listener,
) -> VerifyReport:
    """Run the top solutions and `--fit` beside them, or what is left of it, and decide.

    Raises:
        MachineBusy: another verify runs here.
        InputError: the model file or the records cannot be read, or there are no solutions.
        EngineError: the engine has no llama-server or does not answer.
    """
    if not found.solutions:
        raise InputError("verify", f"there is no solution to run: {found.message}")
    engine.program("llama-server")
    with machine_lock(options.lock_path) as (lock, n_reaped):
        if n_reaped:
            listener.say(f"ended {n_reaped} server(s) that an earlier verify left behind")
        work = _prepare(problem, found, model_file, engine, folder, options, listener)
        work.bench = replace(work.bench, on_server=lock.note_server)
        is_complete = work.run()
        return VerifyReport(
            decide(work.records, problem.workload),
            work.bench.campaign,
            problem.workload,
            is_complete,
            len(work.records),
        )


def decide_again(folder: Path, problem: Problem, key: Key | None = None) -> VerifyReport:
    """Decide again from the records of the newest campaign that measured anything here, running nothing.

    `key`: only what was measured under it counts.

    Raises:
        InputError: nothing was measured there, or the records cannot be read.
    """
    mine = machine_identity(problem.machine)
    known = [
        record
        for record in read_runs(folder, problem)
        if (is_same_machine(record.key.machine, mine) if key is None else is_same_key(record.key, key))
    ]
    measured = [record for record in known if record.timing is not None]
    campaign = latest_campaign(measured or known)
    if campaign is None:
        raise InputError(folder / RUNS, "has no records of this machine: run place verify first")
    run = of_campaign(known, campaign)
    return VerifyReport(decide(run, problem.workload), campaign, problem.workload, True, len(run))


def read_runs(folder: Path, problem: Problem) -> list[Record]:
    """Return the records of a problem's folder; by time, with those of this machine from when it had another name.

    Raises:
        InputError: the folder's records cannot be read.
    """
    own, mine = RunLog(folder).read(), machine_identity(problem.machine)
    renamed = [
        record
        for other in folders_of_other_names(folder, problem)
        for record in RunLog(other).read_whole_lines()[0]
        if is_same_machine(record.key.machine, mine)
    ]
    return sorted(each_once([*renamed, *own]), key=lambda record: record.at) if renamed else own


def _prepare(
    problem: Problem,
    found: SolutionSet,
    model_file: Path,
    engine: Engine,
    folder: Path,
    options: Options,
    listener: Listener,
) -> _Work:
    log = RunLog(folder)
    if (said := log.mend()) is not None:
        listener.say(said)
    actual = read_model(model_file)
    asked = options.asked or asked_of(problem, options.is_full_depth)
    nvml = load_nvml()
    key = make_key(engine, problem.machine, actual, asked, nvml)
    known = read_runs(folder, problem)
    campaign = None if options.is_fresh else latest_campaign(known, key)
    run = of_campaign(known, campaign) if campaign is not None else []
    _say_resumed(listener, known, run, options)
    campaign = campaign or uuid.uuid4().hex[:8]
    settings = problem.settings
    bench = Bench(
        engine=engine,
        model_file=model_file,
        machine=problem.machine,
        key=key,
        campaign=campaign,
        asked=asked,
        limits=options.limits,
        ctx_tokens=max(1, settings.ctx_tokens // settings.n_slots),
        folder=folder,
        nvml=nvml,
        write=log.append,
        solved_digest=problem.model.digest,
        deadline_s=None if options.budget_s is None else time.monotonic() + options.budget_s,
    )
    solutions = choose(found.solutions, options.top)
    candidates = make_candidates(solutions, problem.machine, found.extra_args, problem.reserve_mib)
    candidates = [each for each in candidates if options.has_fit or each.role != FIT]
    return _Work(bench, candidates, options.rounds, run, listener, mismatch(problem.model, actual))


def _say_resumed(
    listener: Listener, known: Sequence[Record], run: Sequence[Record], options: Options
) -> None:
    if run:
        listener.say(f"resuming campaign {run[0].campaign}: {len(run)} phases are recorded and not run again")
    elif known and not options.is_fresh:
        listener.say(
            f"{len(known)} recorded phases are of another build, model file, machine, driver or question: "
            "measuring anew"
        )


@dataclass
class _Work:
    """The visits of one call: every candidate in every round."""

    bench: Bench
    candidates: list[VerifyCandidate]
    n_rounds: int
    records: list[Record]
    listener: Listener
    wrong_model: str | None
    _durations_s: list[float] = field(default_factory=list)
    _n_done: int = 0

    def run(self) -> bool:
        """Make every visit that is not over; whether none is left."""
        self.bench = replace(
            self.bench, write=self._keeping(self.bench.write), tell=self._tell, on_sample=self.listener.sample
        )
        if self.wrong_model is not None:
            self._refuse_model(self.wrong_model)
            return False
        numbers = range(1, self.n_rounds + 1)
        try:
            for number in numbers:
                for candidate in self.candidates:
                    self._visit(candidate, number)
        except BudgetSpent:
            self.listener.say("the time given is over: the same command again measures the rest")
        return all(self._is_over(candidate, number) for number in numbers for candidate in self.candidates)

    def _keeping(self, write: Any) -> Any:
        def keep(record: Record) -> None:
            write(record)
            self.records.append(record)

        return keep

    def _rounds(self, candidate: VerifyCandidate) -> dict[int, Round]:
        return rounds_of([record for record in self.records if record.run_id == candidate.run_id])

    def _is_over(self, candidate: VerifyCandidate, number: int) -> bool:
        """Whether a round has nothing left to run: all is measured, or the candidate has lost already."""
        rounds = self._rounds(candidate)
        known = rounds.get(number)
        if any(each.status in _FATAL for each in rounds.values()):
            return True
        if known is None or not known.is_over:
            return False
        return known.status != records.OK or Visit(self.bench, candidate, number).is_measured(known.timings)

    def _visit(self, candidate: VerifyCandidate, number: int) -> None:
        known = self._rounds(candidate).get(number)
        self._n_done += 1
        if self._is_over(candidate, number):
            return
        if self.bench.deadline_s is not None and time.monotonic() > self.bench.deadline_s:
            raise BudgetSpent
        began_s = time.monotonic()
        Visit(self.bench, candidate, number).run(known.timings if known is not None else {})
        self._durations_s.append(time.monotonic() - began_s)
        after = self._rounds(candidate)[number]
        if after.status != records.OK:
            self.listener.say(f"{candidate.name}, round {number}: {after.status}: {after.detail}")

    def _tell(self, candidate: VerifyCandidate, number: int, phase: str, repeat: int) -> None:
        shorts = [
            record.timing.n_generated / record.timing.generate_s
            for record in self.records
            if record.run_id == candidate.run_id and record.phase == SHORT and record.timing
            if record.timing.generate_s
        ]
        n_visits = self.n_rounds * len(self.candidates)
        left_s = None
        if self._durations_s:
            left_s = statistics.mean(self._durations_s) * (n_visits - self._n_done + 1)
        self.listener.phase(
            Progress(
                candidate=candidate.name,
                round=number,
                n_rounds=self.n_rounds,
                phase=phase,
                repeat=repeat,
                n_done=self._n_done - 1,
                n_visits=n_visits,
                decode_tps=statistics.median(shorts) if shorts else None,
                left_s=left_s,
                caps_mib=candidate.caps_mib,
            )
        )

    def _refuse_model(self, reason: str) -> None:
        """The file is another model: every candidate says so, and nothing is started."""
        import datetime

        from placement.measure.records.schema import Record

        for candidate in self.candidates:
            self.bench.write(
                Record(
                    campaign=self.bench.campaign,
                    at=datetime.datetime.now(datetime.UTC).isoformat(timespec="milliseconds"),
                    key=self.bench.key,
                    round=1,
                    candidate=candidate.name,
                    role=candidate.role,
                    run_id=candidate.run_id,
                    arguments=candidate.arguments,
                    phase=PLAN,
                    outcome=records.MODEL_MISMATCH,
                    detail=f"{self.bench.model_file} is not the model that was solved for: {reason}",
                    wall_s=0.0,
                    model_file=str(self.bench.model_file.absolute()),
                )
            )
            self.listener.say(f"{candidate.name}: {records.MODEL_MISMATCH}: {reason}")
