"""Run records of a machine → the rows and memory samples to fit; what does not belong together is told, not mixed.

Records belong together when they are of the same machine, engine build, driver and memory clocks; the newest
such group is used. A folder of `solutions/` gives the model; a run's arguments give its placement again.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.arguments import parse
from placement.buffers import graph_counts
from placement.calibrate.features import Row, decode_row, prompt_row
from placement.compute import plan_compute
from placement.cost import GraphCounts
from placement.emit import resolve
from placement.errors import InputError
from placement.machine import Machine
from placement.model import Model
from placement.problem import Assignment, Problem, Workload
from placement.verify.candidates import FIT, without_placement
from placement.verify.phases import CANARY, LONG, PLAN, SHORT, START
from placement.verify.records import OK, RUNS, RunLog

if TYPE_CHECKING:
    from placement.verify.schema import Key, Record, Timing

PROGRAM = "llama-server"
LEAST_NOISE = 0.005
SHORT_PROMPT_NOISE = 0.15  # a prompt of one small ubatch measures start-up as much as work
SLOW_ROUND = 0.08  # slower than the run's own best by so much: disturbed
SWAPPED_MIB = 16.0


@dataclass(frozen=True, slots=True)
class Conditions:
    """What runs must share to be fitted together."""

    engine_build: str
    engine_fingerprint: str
    driver: str | None
    memory_clock: str | None

    def words(self) -> str:
        """As a line names it."""
        parts = [self.engine_build, self.engine_fingerprint[:8]]
        parts += [f"driver {self.driver}"] if self.driver else []
        return ", ".join([*parts, *([f"memory clock {self.memory_clock}"] if self.memory_clock else [])])


@dataclass(frozen=True, slots=True)
class MemorySample:
    """MiB on one device in one round of a run: the engine's own plan, and what was taken at start and at most."""

    run: str
    device: str
    planned_mib: float
    start_mib: float | None
    peak_mib: float


@dataclass(frozen=True)
class Run:
    """A placement that was run, and what its records say."""

    name: str
    problem: Problem
    assignment: Assignment
    counts: GraphCounts


@dataclass(frozen=True)
class Found:
    """What there is to fit. `left_out` counts records of other conditions, `skipped` says what could not be used."""

    rows: tuple[Row, ...] = ()
    memory: tuple[MemorySample, ...] = ()
    runs: tuple[Run, ...] = ()
    conditions: Conditions | None = None
    left_out: tuple[tuple[str, int], ...] = ()
    skipped: tuple[str, ...] = ()


def conditions_of(key: Key) -> Conditions:
    """The conditions that a record was made under."""
    return Conditions(key.engine_build, key.engine_fingerprint, key.driver, key.memory_clock)


def find_runs(root: Path, machine: Machine, is_mixed: bool = False) -> Found:
    """Read every `runs.jsonl` below a solutions folder; `is_mixed` takes all builds and drivers together.

    Raises:
        InputError: a file of records is broken.
    """
    from placement.verify.run import machine_key

    key = machine_key(machine)
    folders = sorted(path.parent for path in root.glob(f"*/{RUNS}"))
    kept = {folder: RunLog(folder).read() for folder in folders}
    everything = [record for records in kept.values() for record in records]
    mine = [record for record in everything if record.key.machine == key]
    chosen = max(mine, key=lambda record: record.at, default=None)
    conditions = None if chosen is None else conditions_of(chosen.key)
    left_out = Counter(f"another machine ({r.key.machine})" for r in everything if r.key.machine != key)
    if not is_mixed:
        left_out.update(
            conditions_of(record.key).words() for record in mine if conditions_of(record.key) != conditions
        )
    found = Found(conditions=conditions, left_out=tuple(left_out.items()))
    for folder, records in kept.items():
        usable = [
            record
            for record in records
            if record.key.machine == key and (is_mixed or conditions_of(record.key) == conditions)
        ]
        if usable:
            found = _joined(found, read_folder(folder, usable, machine))
    return found


def _joined(a: Found, b: Found) -> Found:
    return replace(
        a,
        rows=a.rows + b.rows,
        memory=a.memory + b.memory,
        runs=a.runs + b.runs,
        skipped=a.skipped + b.skipped,
    )


def read_folder(
    folder: Path, records: Sequence[Record], machine: Machine, model: Model | None = None
) -> Found:
    """Rows and memory samples of one folder's records; the folder's solution.toml names the model."""
    try:
        model = model or _model(folder)
    except InputError as error:
        return Found(skipped=(f"{folder.name}: {error}",))
    found = Found()
    for run_id in dict.fromkeys(record.run_id for record in records):
        mine = [record for record in records if record.run_id == run_id]
        name = f"{folder.name}/{mine[0].candidate}" if mine[0].candidate else run_id
        try:
            run = _run(name, mine, model, machine)
        except InputError as error:
            found = _joined(found, Found(skipped=(f"{name}: {error}",)))
            continue
        if run is not None:
            rows = tuple(_rows(run_id, run, mine))
            found = _joined(found, Found(rows, tuple(_memory(run_id, mine, machine)), (run,) if rows else ()))
    return found


def _model(folder: Path) -> Model:
    """The model that the folder's solutions are for.

    Raises:
        InputError: there is no solution.toml, or its model is not found any more, or has changed.
    """
    from placement.model_files import resolve_model
    from placement.store import read_solutions

    path = folder / "solution.toml"
    table = read_solutions(path)
    words = [word for row in table["solutions"] for word in str(row.get("command", "")).split()]
    files = [word for word in words if word.endswith(".gguf") and Path(word).is_file()]
    for name in (table["model"], *dict.fromkeys(files)):
        try:
            model = resolve_model(str(name))
        except InputError:
            continue
        if model.digest == table["model_digest"]:
            return model
    raise InputError(
        path, "its model is not found, or is another by now", field="model", value=table["model"]
    )


def _run(name: str, records: Sequence[Record], model: Model, machine: Machine) -> Run | None:
    """The placement of a run; None where nothing of it was timed.

    Raises:
        InputError: its arguments do not say where things are.
    """
    if not any(record.timing is not None and record.outcome == OK for record in records):
        return None
    last = next((r for r in reversed(records) if r.phase == PLAN and r.outcome == OK), records[-1])
    arguments = last.arguments
    if last.role == FIT:
        if last.fit_arguments is None:
            raise InputError("runs.jsonl", "what --fit chose was not recorded")
        arguments = (*without_placement(arguments), *last.fit_arguments)
    assignment = resolve(model, machine, parse(list(arguments)), PROGRAM)
    counts = graph_counts(plan_compute(model, machine, assignment, PROGRAM))
    started = next((r for r in reversed(records) if r.splits_decode is not None), None)
    if started is not None:
        prompt = started.splits_prompt if started.splits_prompt is not None else counts.splits_prompt
        counts = replace(counts, splits_decode=started.splits_decode or 0, splits_prompt=prompt)
    problem = Problem(model, machine, assignment.settings, Workload(), PROGRAM)
    return Run(name, problem, assignment, counts)


@dataclass(frozen=True, slots=True)
class _Value:
    """One measured time: of a token at a depth, or of a whole prompt."""

    round: int
    n_tokens: int
    seconds: float
    doubt: str
    noise: float = LEAST_NOISE


def _rows(run_id: str, run: Run, records: Sequence[Record]) -> Iterable[Row]:
    for phase in (SHORT, CANARY):
        values = [
            _Value(
                record.round,
                timing.n_prompt + timing.n_generated // 2,
                timing.generate_s / timing.n_generated,
                doubt,
            )
            for record, timing, doubt in _timings(records, phase)
            if timing.n_generated and timing.generate_s > 0
        ]
        yield from _phase_rows(run_id, run, phase, values, is_prompt=False)
    for phase in (SHORT, LONG, CANARY):
        values = [
            _Value(record.round, timing.n_prompt, timing.prompt_s, doubt)
            for record, timing, doubt in _timings(records, phase)
            if timing.n_prompt and timing.prompt_s > 0
        ]
        yield from _phase_rows(run_id, run, phase, values, is_prompt=True)


def _timings(records: Sequence[Record], phase: str) -> Iterable[tuple[Record, Timing, str]]:
    for record in records:
        if record.phase == phase and record.outcome == OK and record.timing is not None:
            swapped = (record.host.swapped_mib or 0.0) if record.host is not None else 0.0
            doubt = f"the host swapped {swapped:.0f} MiB meanwhile" if swapped >= SWAPPED_MIB else ""
            yield record, record.timing, doubt


def _phase_rows(run_id: str, run: Run, phase: str, values: list[_Value], is_prompt: bool) -> Iterable[Row]:
    """One row of what was undisturbed, its noise from the rounds' spread; one more of each disturbed round."""
    by_round: dict[int, list[_Value]] = {}
    for value in values:
        by_round.setdefault(value.round, []).append(value)
    medians = {number: _median(found) for number, found in by_round.items()}
    good = [value for value in medians.values() if not value.doubt]
    best = min((value.seconds for value in good), default=0.0)
    calm = [value for value in good if value.seconds <= best * (1 + SLOW_ROUND)]
    if calm:
        yield _row(run_id, run, phase, calm, is_prompt, "")
    for number, value in medians.items():
        if value in calm:
            continue
        slower = value.seconds / best - 1 if best else 0.0
        doubt = (
            value.doubt
            or f"round {number} was {slower:.0%} slower than the run's best: a hot or busy machine?"
        )
        yield _row(run_id, run, phase, [value], is_prompt, doubt)


def _median(values: Sequence[_Value]) -> _Value:
    every = [value.seconds for value in values]
    seconds = statistics.median(every)
    noise = max(LEAST_NOISE, _spread(every))
    doubt = next((value.doubt for value in values if value.doubt), "")
    return replace(values[0], seconds=seconds, doubt=doubt, noise=noise)


def _spread(seconds: Sequence[float]) -> float:
    """Standard error of the middle of some times, as a share."""
    if len(seconds) < 2:
        return LEAST_NOISE
    return float(statistics.stdev(seconds) / statistics.median(seconds) / len(seconds) ** 0.5)


def _row(run_id: str, run: Run, phase: str, values: Sequence[_Value], is_prompt: bool, doubt: str) -> Row:
    seconds = [value.seconds for value in values]
    middle, n_tokens = statistics.median(seconds), values[0].n_tokens
    noise = max(_spread(seconds), *(value.noise / len(values) ** 0.5 for value in values))
    if is_prompt and phase == SHORT:
        noise = max(noise, SHORT_PROMPT_NOISE)
    workload = Workload(n_tokens, 1, 0) if is_prompt else Workload(1, 1, n_tokens)
    make: Any = prompt_row if is_prompt else decode_row
    row: Row = make(
        replace(run.problem, workload=workload), run.assignment, run.counts, run=run_id,
        measured_s=middle, noise=noise, label=f"{run.name}, {phase}", doubt=doubt,
    )  # fmt: skip
    return row


def _memory(run_id: str, records: Sequence[Record], machine: Machine) -> Iterable[MemorySample]:
    for number in sorted({record.round for record in records}):
        mine = [record for record in records if record.round == number]
        planned = next((r.buffers_mib for r in reversed(mine) if r.buffers_mib), None)
        predicted = next((r.predicted.self_mib for r in reversed(mine) if r.predicted is not None), None)
        for device in machine.devices:
            figure = _of(planned or predicted or {}, device.name)
            start = [_taken(r, device.name) for r in mine if r.phase == START]
            peak = [_taken(r, device.name) for r in mine if r.phase != PLAN]
            known = [value for value in peak if value is not None]
            if figure is not None and known:
                at_start = next((value for value in reversed(start) if value is not None), None)
                yield MemorySample(run_id, device.name, figure, at_start, max(known))


def _of(figures: dict[str, float], device: str) -> float | None:
    """A device's figure; the engine calls a worker "RPC0[host:port]"."""
    if device in figures:
        return figures[device]
    return next((value for name, value in figures.items() if name.startswith(f"{device}[")), None)


def _taken(record: Record, device: str) -> float | None:
    """MiB that the server took of a device in a phase: its own, or all that came since it began."""
    peak = (record.devices or {}).get(device)
    if peak is None:
        return None
    if peak.own_mib is not None:
        return peak.own_mib
    return None if peak.before_mib is None else peak.peak_mib - peak.before_mib
