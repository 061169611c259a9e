"""Run records of a machine → the rows and memory samples to fit; what does not belong together is told, not mixed.

Records belong together when they are of the same machine, engine build, driver and memory clocks; the newest
such group is used. Their folders and the records themselves name the model; a run's arguments give its placement
again. The same record in two folders counts once, and a placement is one run however often it was run.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from placement.errors import InputError
from placement.inputs.identity import Known, is_same_machine, machine_identity
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import Problem, Workload
from placement.llamacpp.arguments import parse
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.emit.resolve import resolve
from placement.measure.calibrate.data import Conditions, FitData, MemorySample, Run
from placement.measure.calibrate.models import Models
from placement.measure.calibrate.timings import run_rows, timing_noise
from placement.measure.records.log import OK, RUNS, RunLog, each_once
from placement.measure.records.phase_names import PLAN, START
from placement.measure.verify.candidates import FIT, without_placement
from placement.predict.cost import graph_counts

if TYPE_CHECKING:
    from placement.measure.records.schema import Key, Record

RUN_PROGRAM = "llama-server"


def conditions_of(key: Key) -> Conditions:
    """The conditions that a record was made under."""
    return Conditions(key.engine_build, key.engine_fingerprint, key.driver, key.memory_clock)


def find_runs(
    root: Path, machine: Machine, is_mixed: bool = False, conditions: Conditions | None = None
) -> FitData:
    """Read every `runs.jsonl` below a solutions folder: those under `conditions`, or the newest that timed anything.

    `is_mixed` takes all builds and drivers together. A line that is no record is told, and the others count.

    Raises:
        InputError: a file of records cannot be read.
    """
    kept, skipped = _read_all(root)
    everything = [record for _, record in kept]
    is_mine = _recognised(everything, machine)
    mine = [record for record in everything if is_mine[record.key.machine]]
    if conditions is None:
        newest = max(filter(_is_timed, mine), key=lambda record: record.at, default=None)
        conditions = None if newest is None else conditions_of(newest.key)
    left_out = Counter(
        f"another machine ({_words(record.key.machine)})"
        for record in everything
        if not is_mine[record.key.machine]
    )
    usable = [record for record in mine if is_mixed or conditions_of(record.key) == conditions]
    if not is_mixed:
        left_out.update(
            conditions_of(record.key).words() for record in mine if conditions_of(record.key) != conditions
        )
    ids = {id(record) for record in usable}
    pairs = [(folder, record) for folder, record in kept if id(record) in ids]
    result = _fit_data(root, pairs, machine)
    return replace(
        result, conditions=conditions, left_out=tuple(left_out.items()), skipped=(*skipped, *result.skipped)
    )


def _recognised(records: Iterable[Record], machine: Machine) -> dict[Known, bool]:
    """Of every machine that has records, whether it is this one."""
    mine = machine_identity(machine)
    return {each: is_same_machine(each, mine) for each in {record.key.machine for record in records}}


def _words(known: Known) -> str:
    return known if isinstance(known, str) else known.words()


def _read_all(root: Path) -> tuple[list[tuple[Path, Record]], list[str]]:
    """(folder and record, each record once; what was skipped, and why)."""
    folders: dict[int, Path] = {}
    everything: list[Record] = []
    skipped: list[str] = []
    for path in sorted(root.glob(f"*/{RUNS}")):
        records, broken = RunLog(path.parent).read_whole_lines()
        skipped += broken
        everything += records
        folders.update(dict.fromkeys(map(id, records), path.parent))
    return [(folders[id(each)], each) for each in each_once(everything)], skipped


def _is_timed(record: Record) -> bool:
    return record.timing is not None and record.outcome == OK


def _fit_data(root: Path, pairs: Sequence[tuple[Path, Record]], machine: Machine) -> FitData:
    """Rows and memory samples of records that belong together, by run."""
    runs: dict[str, list[tuple[Path, Record]]] = {}
    for folder, record in pairs:
        runs.setdefault(run_name(record.key.model_digest, record.run_id), []).append((folder, record))
    models, noises = Models(root), {}
    for name, mine in runs.items():
        noises[name] = timing_noise([record for _, record in mine])
    usual = statistics.median([each for each in noises.values() if each is not None] or [0.0])
    result, skipped = FitData(), dict[str, None]()
    for name, mine in runs.items():
        folder, records = mine[0][0], [record for _, record in mine]
        words = f"{folder.name}/{records[0].candidate}"
        try:
            run = _run(name, words, records, models.find(folder, records), machine)
        except InputError as error:
            skipped[f"{words}: {error}"] = None
            continue
        if run is not None:
            own = noises[name]
            rows = tuple(run_rows(run, records, usual if own is None else max(own, usual / 2)))
            memory = tuple(_memory(name, records, machine))
            result = replace(
                result,
                rows=result.rows + rows,
                memory=result.memory + memory,
                runs=result.runs + ((run,) if rows else ()),
            )
    return replace(result, skipped=tuple(skipped))


def run_name(model_digest: str, run_id: str) -> str:
    """What tells a run from those of other models with the same arguments."""
    return f"{model_digest}/{run_id}"


def _run(id_: str, name: str, records: Sequence[Record], model: Model, machine: Machine) -> Run | None:
    """The placement of a run; None where nothing of it was timed.

    Raises:
        InputError: its arguments do not say where things are.
    """
    if not any(map(_is_timed, records)):
        return None
    last = next((r for r in reversed(records) if r.phase == PLAN and r.outcome == OK), records[-1])
    arguments = last.arguments
    if last.role == FIT:
        if last.fit_arguments is None:
            raise InputError("runs.jsonl", "what --fit chose was not recorded")
        arguments = (*without_placement(arguments), *last.fit_arguments)
    assignment = resolve(model, machine, parse(list(arguments)), RUN_PROGRAM)
    counts = graph_counts(plan_compute(model, machine, assignment, RUN_PROGRAM))
    started = next((r for r in reversed(records) if r.splits_decode is not None), None)
    if started is not None:
        prompt = started.splits_prompt if started.splits_prompt is not None else counts.splits_prompt
        counts = replace(counts, splits_decode=started.splits_decode or 0, splits_prompt=prompt)
    problem = Problem(model, machine, assignment.settings, Workload(), RUN_PROGRAM)
    return Run(id_, name, problem, assignment, counts)


def _memory(run_id: str, records: Sequence[Record], machine: Machine) -> Iterable[MemorySample]:
    for number in dict.fromkeys((record.campaign, record.round) for record in records):
        mine = [record for record in records if (record.campaign, record.round) == number]
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
