"""A model, a machine and a request → the solution set's row: the stored one where it is of this problem."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from placement.errors import PlacementError
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import Problem, Program
from placement.solve.request import Request
from placement.solve.solve import make_problem, solve_request
from placement.solve.store import commands, read_solutions, save_solutions, solution_folder, solution_set_row


def choice_row(
    model: Model,
    machine: Machine,
    request: Request,
    root: Path | None,
    *,
    is_fresh: bool = False,
    tell: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """The row of `place solve` for this problem; solved and kept under `root`, if any, where none is there.

    Raises:
        PlacementError: nothing fits.
        InputError: the request breaks a rule.
    """
    say = tell or (lambda _text: None)
    problem, _ = make_problem(model, machine, request)
    path = solution_folder(root, problem) / "solution.toml" if root is not None else None
    if not is_fresh and path is not None and path.is_file():
        row = read_solutions(path)
        if _is_of(row, problem):
            say(f"solutions from {path}")
            return row
    say(f"solving for {model.name}")
    result = solve_request(model, machine, request)
    if not result.solutions:
        raise PlacementError(f"{model.name} on {machine.name}: {result.message or 'nothing fits'}")
    row = solution_set_row(problem, result, commands(problem, result))
    if path is not None:
        save_solutions(path, problem, row)
    return row


def best_arguments(model: Model, machine: Machine, program: Program = "llama-server") -> tuple[str, ...]:
    """The recommended solution's arguments for the model's own profile.

    Raises:
        PlacementError: nothing fits.
    """
    result = solve_request(model, machine, Request(program=program))
    if not result.solutions:
        raise PlacementError(f"{model.name} on {machine.name}: {result.message or 'nothing fits'}")
    return result.solutions[0].args


def _is_of(row: dict[str, Any], problem: Problem) -> bool:
    """Whether a stored set is of this model, program and reserve; its folder says the rest."""
    asked = (problem.model.digest, problem.program, problem.reserve_mib)
    return asked == (row["model_digest"], row.get("program"), row.get("reserve_mib"))
