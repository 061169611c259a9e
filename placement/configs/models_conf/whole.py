"""A model and a models.conf → the file with the model's solution in its section: what `place apply` does."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from placement.configs.models_conf.apply import Applied, apply_choice
from placement.configs.models_conf.choice import Choice, choice_of
from placement.configs.models_conf.choice_row import choice_row
from placement.configs.models_conf.find_model import ModelFinder
from placement.configs.models_conf.measured import measured_of
from placement.configs.models_conf.models_conf import ModelsConf, Section
from placement.configs.models_conf.review import Defaults
from placement.configs.models_conf.sections import section_of, section_request
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.solve.request import Request


@dataclass(frozen=True, slots=True)
class Placed:
    """The section, the choice that it gets, and the file before and after."""

    section: Section
    choice: Choice
    applied: Applied


def place_in_conf(
    model: Model,
    machine: Machine,
    conf: ModelsConf,
    finder: ModelFinder,
    defaults: Defaults,
    request: Request,
    *,
    section_name: str,
    solution_name: str | None,
    root: Path,
    is_fresh: bool,
    date: str,
    engine_build: str | None,
    tell: Callable[[str], None],
) -> Placed:
    """Choose for the section of that name, else the one that runs the model; the file is not written yet.

    Of `request` the turn, the reserve and the program count. Solutions are taken from and kept under `root`.

    Raises:
        InputError: there is no such section or solution, or one cannot be read or written.
        PlacementError: nothing fits.
    """
    section = section_of(conf, section_name, model, finder)
    request, notes = section_request(section, model, machine, defaults, request)
    for note in notes:
        tell(note)
    choice = choice_of(choice_row(model, machine, request, root, is_fresh=is_fresh, tell=tell), solution_name)
    measured = measured_of(choice, model, machine, request, root)
    applied = apply_choice(
        conf, section.name, choice, date=date, engine_build=engine_build, measured=measured
    )
    return Placed(section, choice, applied)
