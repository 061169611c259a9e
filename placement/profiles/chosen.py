"""A model, a machine and a request → the solution set's row: the stored one where it is of this problem."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from placement.errors import InputError, PlacementError
from placement.machine import Machine
from placement.model import Model
from placement.problem import Problem
from placement.profiles.find_model import ModelFinder
from placement.profiles.models_conf import ModelsConf, Section
from placement.profiles.survey import Defaults, read_profile
from placement.solve import Request, make_problem, solve
from placement.solving import commands
from placement.store import read_solutions, save_solutions, solution_folder, solution_set_row


def chosen_row(
    model: Model,
    machine: Machine,
    request: Request,
    root: Path,
    *,
    is_fresh: bool = False,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The row of `place solve` for this problem; solved and kept under `root` where no fitting one is there.

    Raises:
        PlacementError: nothing fits.
        InputError: the request breaks a rule.
    """
    say = tell or (lambda _text: None)
    problem, _ = make_problem(model, machine, request)
    path = solution_folder(root, problem) / "solution.toml"
    if not is_fresh and path.is_file():
        row = read_solutions(path)
        if _is_of(row, problem):
            say(f"solutions from {path}")
            return row
    say(f"solving for {model.name}")
    found = solve(model, machine, request)
    if not found.solutions:
        raise PlacementError(f"{model.name} on {machine.name}: {found.message or 'nothing fits'}")
    row = solution_set_row(problem, found, commands(problem, found))
    save_solutions(path, problem, row)
    return row


def best_arguments(model: Model, machine: Machine, program: str = "llama-server") -> tuple[str, ...]:
    """The recommended solution's arguments for the model's own profile.

    Raises:
        PlacementError: nothing fits.
    """
    found = solve(model, machine, Request(program=program))
    if not found.solutions:
        raise PlacementError(f"{model.name} on {machine.name}: {found.message or 'nothing fits'}")
    return found.solutions[0].args


def _is_of(row: dict[str, Any], problem: Problem) -> bool:
    """Whether a stored set is of this model, program and reserve; its folder says the rest."""
    asked = (problem.model.digest, problem.program, problem.reserve_mib)
    return asked == (row["model_digest"], row.get("program"), row.get("reserve_mib"))


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
            found, _ = finder.find(section, _model_path(section))
        except InputError:
            continue
        if found.digest == model.digest:
            running.append(section.name)
    if len(running) == 1:
        return conf.section(running[0])
    rule = f"is run by several sections ({', '.join(running)}): name one with --section" if running else ""
    known = ", ".join(section.name for section in conf.sections) or "none"
    raise InputError(conf.where, rule or f"no section runs this model; its sections: {known}", value=name)


def _model_path(section: Section) -> str | None:
    tokens = section.tokens()
    return next((tokens[i + 1] for i, token in enumerate(tokens[:-1]) if token in ("-m", "--model")), None)


def request_of(
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
