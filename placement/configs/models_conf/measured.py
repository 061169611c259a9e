"""The run records of a problem → what was measured of a choice, for the comments of a models.conf."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.configs.models_conf.choice import Choice, Measured
from placement.inputs.engine_options import OPTIONS
from placement.inputs.identity import is_same_machine, machine_identity
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.llamacpp.arguments import parse
from placement.solve.request import Request
from placement.solve.solve import make_problem
from placement.solve.store import solution_folders

if TYPE_CHECKING:
    from placement.measure.records.schema import Record

PLACEMENT_FIELDS = tuple(dict.fromkeys(option.field for option in OPTIONS if option.is_placement))


def placement_of(tokens: tuple[str, ...] | list[str]) -> dict[str, Any]:
    """What arguments say about placement, field by field."""
    said = parse(tokens)
    return {name: getattr(said, name) for name in PLACEMENT_FIELDS}


def measured_of(
    choice: Choice, model: Model, machine: Machine, request: Request, root: Path
) -> Measured | None:
    """What the newest runs of exactly this placement showed; None without a good one.

    Raises:
        InputError: the run records cannot be read.
    """
    from placement.measure.records.log import RunLog, is_same_key
    from placement.measure.verify.decide import result_of

    problem, _ = make_problem(model, machine, request)
    mine = machine_identity(machine)
    here = [
        each
        for folder in solution_folders(root, problem)
        for each in RunLog(folder).read()
        if is_same_machine(each.key.machine, mine)
    ]
    runs = sorted((r for r in here if _is_of(r, model.digest, choice)), key=lambda record: record.at)
    newest = [each for each in runs if each.run_id == runs[-1].run_id and is_same_key(each.key, runs[-1].key)]
    result = result_of(newest, problem.workload) if newest else None
    if result is None or not result.n_good:
        return None
    return Measured(
        memory_mib={name: peak.peak_mib for name, peak in result.devices.items()},
        splits_decode=result.splits_decode,
        decode_tps=result.decode_tps,
        prompt_tps=result.prompt_tps,
        engine_build=newest[-1].key.engine_build,
        date=newest[-1].at[:10],
    )


def _is_of(record: Record, digest: str, choice: Choice) -> bool:
    same_model = record.key.model_digest == digest and record.role == "solution"
    return same_model and placement_of(record.arguments) == placement_of(choice.args)
