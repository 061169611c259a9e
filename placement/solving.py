"""One whole solve as the command line asks for it: options → problem → solutions → the file that keeps them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from placement.emit import shell_command
from placement.errors import InputError
from placement.machine import Machine
from placement.model import Model
from placement.problem import Problem, Settings
from placement.solution import Judge, Solution, SolutionSet
from placement.solve import Request, best_choice, make_problem, solve
from placement.store import save_solutions, solution_folder, solution_set_row


@dataclass(frozen=True)
class Outcome:
    """A solve with where it was kept; `is_new` is False when the same inputs had given the same file before."""

    problem: Problem
    found: SolutionSet
    path: Path | None
    is_new: bool

    def row(self) -> dict[str, Any]:
        """The JSON object of the contract."""
        return solution_set_row(self.problem, self.found, commands(self.problem, self.found))


def commands(problem: Problem, found: SolutionSet) -> dict[str, str]:
    """The shell line of each solution by name."""
    path = problem.model.files[0] if problem.model.files else f"{problem.model.name}.gguf"
    program = problem.program if problem.program != "llama-fit-params" else "llama-server"
    return {
        each.name: shell_command(program, path, list(each.args), list(found.extra_args))
        for each in found.solutions
    }


def make_request(asked: dict[str, Any], model: Model) -> Request:
    """The request of the command line's options.

    Raises:
        InputError: an option's value breaks its rule.
    """
    ubatch = asked.get("ubatch") or "auto"
    if ubatch != "auto" and (not str(ubatch).isdigit() or int(ubatch) < 1):
        raise InputError("--ubatch", "must be auto or a positive number", value=ubatch)
    return Request(
        ctx_tokens=asked.get("ctx_tokens"),
        n_slots=asked.get("n_slots"),
        kv_type=asked.get("kv_type"),
        ubatch_tokens=None if ubatch == "auto" else int(ubatch),
        prompt_tokens=asked.get("prompt_tokens") or 2000,
        generate_tokens=asked.get("generate_tokens") or 500,
        depth_tokens=asked.get("depth_tokens"),
        reserve_mib=asked.get("reserve_mib") or 0.0,
        objective=asked.get("objective") or "turn",
        top=asked.get("top") or 12,
        program=asked.get("program") or "llama-server",
        time_limit_s=asked.get("time_limit_s") or 10.0,
        seed=asked.get("seed") if asked.get("seed") is not None else 1,
    )


def run_solve(
    model: Model,
    machine: Machine,
    asked: dict[str, Any],
    out_folder: str | None = None,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Solve and keep the result in solution.toml; nothing is written when nothing fits."""
    request = make_request(asked, model)
    tell = warn or (lambda _text: None)
    machine, judge = with_engine(asked, machine, tell)
    problem, _ = make_problem(model, machine, request)
    found = solve(model, machine, request, judge, progress)
    for warning in found.warnings:
        tell(f"place: warning: {warning}")
    if not found.solutions:
        return Outcome(problem, found, None, False)
    path = solution_folder(Path(out_folder or "solutions"), problem) / "solution.toml"
    row = solution_set_row(problem, found, commands(problem, found))
    is_new = save_solutions(path, problem, row)
    return Outcome(problem, found, path, is_new)


def with_engine(
    asked: dict[str, Any], machine: Machine, tell: Callable[[str], None]
) -> tuple[Machine, Judge | None]:
    """The machine with the RPC devices asked for, and the engine as judge where there is one."""
    spec = asked.get("engine_name") or "auto"
    servers = [server for each in asked.get("rpc") or () for server in each.split(",") if server]
    if spec == "off" and not servers:
        return machine, None
    from placement.planning import choose_engine, engine_judge, with_rpc_devices

    if servers:
        from placement.engine import find_engine

        machine = with_rpc_devices(machine, servers, None if spec == "off" else find_engine(spec))
    engine, reason = choose_engine(spec, machine)
    if reason:
        tell(f"place: {reason}")
    return machine, engine_judge(engine) if engine is not None else None


def rival(problem: Problem) -> Solution | None:
    """The solver's own choice for a checked problem: its context, KV types and slots, everything else free."""
    settings = Settings(
        ctx_tokens=problem.settings.ctx_tokens,
        n_slots=problem.settings.n_slots,
        is_kv_unified=problem.settings.is_kv_unified,
        kv_type_k=problem.settings.kv_type_k,
        kv_type_v=problem.settings.kv_type_k,
        flash_attention="on",
    )
    return best_choice(replace(problem, settings=settings), Request(time_limit_s=3.0))
