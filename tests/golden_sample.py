"""The recorded plans in `tests/golden`, with the model, machine and assignment that each row is about."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from placement.inputs.machine import Machine
from placement.inputs.machine_files import read_machine
from placement.inputs.model import Model
from placement.inputs.model_files.files import model_from_facts, read_model
from placement.inputs.problem import Assignment
from placement.llamacpp.arguments import parse
from placement.llamacpp.emit.resolve import resolve

GOLDEN = Path(__file__).parent / "golden"
DESCRIPTIONS = Path(__file__).parent.parent / "models"

Row = dict[str, Any]
ROWS: tuple[Row, ...] = tuple(
    json.loads(line) for line in (GOLDEN / "plans.jsonl").read_text(encoding="utf-8").splitlines()
)


def row_id(row: Row) -> str:
    """A short name of the row for test reports."""
    return f"{row['model']}-{row['kind']}-{ROWS.index(row)}"


@functools.cache
def model(name: str) -> Model:
    """The model of that name: a recorded header, else the shipped description."""
    facts = GOLDEN / "models" / f"{name}.json"
    return model_from_facts(facts) if facts.exists() else read_model(str(DESCRIPTIONS / f"{name}.toml"))


@functools.cache
def machine(name: str) -> Machine:
    """The virtual cards that a row was recorded on."""
    return read_machine(GOLDEN / "machines" / f"{name}.toml")


def assignment(row: Row) -> Assignment:
    """What the row's arguments mean for its model on its machine."""
    return resolve(model(row["model"]), machine(row["machine"]), parse(row["args"]), "llama-fit-params")
