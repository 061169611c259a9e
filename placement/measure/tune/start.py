"""What a tuning starts from: the conditions that hold now, and the speeds of a machine that nobody has measured."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from placement.errors import EngineError
from placement.inputs.machine import Machine

if TYPE_CHECKING:
    from placement.engine.find import Engine
    from placement.measure.records.schema import Key

PROBE_SHARE = 0.1  # of the budget, for a machine without any coefficient


def current_key(engine: Engine, machine: Machine, model_file: Path) -> Key:
    """What is measured now depends on this, and on what is asked.

    Raises:
        InputError: the model file cannot be read.
        EngineError: the engine does not answer.
    """
    from placement.inputs.model_files.files import read_model
    from placement.measure.verify.keys import make_key
    from placement.measure.verify.prompts import Asked
    from placement.measure.verify.watch import load_nvml

    return make_key(engine, machine, read_model(model_file), Asked(), load_nvml())


def probed(machine: Machine, engine: Engine, budget_s: float | None, tell: Callable[[str], None]) -> Machine:
    """A machine of which no speed is known with what a probe detects; as it is where it cannot be probed."""
    from placement.measure.probe import BUDGET_S, probe

    most_s = BUDGET_S if budget_s is None else min(BUDGET_S, PROBE_SHARE * budget_s)
    tell(f"place: no speed of {machine.name} is known: probing it for at most {most_s:.0f} s")
    date = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    try:
        return probe(machine, engine, date, most_s, tell).machine
    except EngineError as error:
        tell(f"place: not probed: {error}")
        return machine
