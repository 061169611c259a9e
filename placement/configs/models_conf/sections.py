"""A models.conf and a model → the section that runs it, and what to solve for in its place."""

from __future__ import annotations

from placement.configs.models_conf.find_model import ModelFinder
from placement.configs.models_conf.models_conf import ModelsConf, Section
from placement.configs.models_conf.review import Defaults, read_profile
from placement.errors import InputError
from placement.inputs.engine_options import names_of
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.solve.request import Request


def section_of(conf: ModelsConf, name: str, model: Model, finder: ModelFinder) -> Section:
    """The section of that name, or else the only one that runs the model.

    Raises:
        InputError: there is none, or more than one.
    """
    if any(section.name == name for section in conf.sections):
        return conf.section(name)
    running = []
    for section in conf.sections:
        try:
            result, _ = finder.find(section, _model_path(section))
        except InputError:
            continue
        if result.digest == model.digest:
            running.append(section.name)
    if len(running) == 1:
        return conf.section(running[0])
    rule = f"is run by several sections ({', '.join(running)}): name one with --section" if running else ""
    known = ", ".join(section.name for section in conf.sections) or "none"
    raise InputError(conf.where, rule or f"no section runs this model; its sections: {known}", value=name)


def _model_path(section: Section) -> str | None:
    tokens = section.tokens()
    return next((tokens[i + 1] for i, token in enumerate(tokens[:-1]) if token in names_of("-m")), None)


def section_request(
    section: Section, model: Model, machine: Machine, defaults: Defaults, request: Request
) -> tuple[Request, tuple[str, ...]]:
    """What to solve for so that the section keeps its context, slots and cache type; and notes on it.

    Raises:
        InputError: the section cannot be read.
    """
    profile = read_profile(section, machine, lambda _section, _path: (model, "as named"), defaults, request)
    if profile.problem is not None:
        raise InputError(f"[{section.name}]", profile.problem)
    return profile.request, profile.notes
