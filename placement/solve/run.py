"""One whole solve as the command line asks for it: request → problem → solutions → the file that keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import Problem, Settings
from placement.inputs.recognise import with_learned
from placement.llamacpp.arguments import Arguments
from placement.llamacpp.memory import startable
from placement.predict.check import Check, check_arguments
from placement.predict.solution import EnginePlanner, Solution, SolutionSet
from placement.solve.constraints import constraints_of
from placement.solve.questions import Maximize, Rated, Tell, answered, compare
from placement.solve.request import Request
from placement.solve.solve import best_choice, make_problem, solve_request
from placement.solve.store import commands, save_solutions, solution_folder, solution_set_row
from placement.solve.why import sensitivity


@dataclass(frozen=True, slots=True)
class EngineChoice:
    """Which llama.cpp plans, "auto", "off" or where it lies, and the RPC servers whose devices take part.

    What is known of a machine that was detected is looked for again once its RPC devices are known.
    """

    name: str = "auto"
    rpc: tuple[str, ...] = ()  # each "host:port", or several with commas
    is_machine_detected: bool = False


AUTO_ENGINE, NO_ENGINE = EngineChoice(), EngineChoice("off")


@dataclass(frozen=True, slots=True)
class Solved:
    """A request with its questions answered, its problem, and what was found."""

    request: Request
    problem: Problem
    found: SolutionSet


@dataclass(frozen=True)
class Outcome:
    """A solve with where it was kept; `is_new` is False when the same inputs had given the same file before."""

    problem: Problem
    found: SolutionSet
    path: Path | None
    is_new: bool
    reasons: tuple[str, ...] = ()  # what more memory would give, where it was asked for

    def row(self) -> dict[str, Any]:
        """The JSON object of the contract."""
        row = solution_set_row(self.problem, self.found, commands(self.problem, self.found))
        return {**row, "why": list(self.reasons)} if self.reasons else row


def find_solutions(
    model: Model,
    machine: Machine,
    request: Request,
    engine: EngineChoice = AUTO_ENGINE,
    *,
    maximize: Maximize | None = None,
    is_max_ctx: bool = False,
    warn: Tell | None = None,
    progress: Tell | None = None,
) -> Solved:
    """Answer the questions of a request (`maximize`, `is_max_ctx`, KV type auto), then solve it.

    Raises:
        InputError: the request does not fit the model or the machine, or `maximize` lacks a decode speed.
        EngineError: the engine that was named is missing or failed.
    """
    tell = warn or (lambda _text: None)
    machine, engine_planner = with_engine(engine, machine, request.program, tell)
    request, answer = answered(model, machine, request, maximize, is_max_ctx, progress)
    if answer:
        tell(f"place: {answer}")
    problem, _ = make_problem(model, machine, request)
    found = solve_request(model, machine, request, engine_planner, progress)
    for warning in found.warnings:
        tell(f"place: warning: {warning}")
    return Solved(request, problem, found)


def run_solve(
    model: Model,
    machine: Machine,
    request: Request,
    *,
    engine: EngineChoice = AUTO_ENGINE,
    maximize: Maximize | None = None,
    is_max_ctx: bool = False,
    is_why: bool = False,
    out_folder: str | None = None,
    warn: Tell | None = None,
    progress: Tell | None = None,
) -> Outcome:
    """Solve as `find_solutions` and keep the result in solution.toml; nothing is written when nothing fits.

    `is_why` solves again with more memory; without an `out_folder` the file lies under ./solutions.

    Raises:
        InputError: the request does not fit the model or the machine, or `maximize` lacks a decode speed.
        EngineError: the engine that was named is missing or failed.
    """
    if is_why:
        request = replace(request, n_best=max(request.n_best, 2))  # one to tell the best from
    solved = find_solutions(
        model, machine, request, engine,
        maximize=maximize, is_max_ctx=is_max_ctx, warn=warn, progress=progress,
    )  # fmt: skip
    problem, found = solved.problem, solved.found
    if not found.solutions:
        return Outcome(problem, found, None, False)
    path = kept_folder(out_folder, problem, solved.request) / "solution.toml"
    row = solution_set_row(problem, found, commands(problem, found))
    is_new = save_solutions(path, problem, row)
    reasons = tuple(sensitivity(problem, found, solved.request)) if is_why else ()
    return Outcome(problem, found, path, is_new, reasons)


def kept_folder(out_folder: str | None, problem: Problem, request: Request) -> Path:
    """Where a request's solutions are kept, and the records of their runs beside them."""
    return solution_folder(Path(out_folder or "solutions"), problem, _variant(problem, request))


def _variant(problem: Problem, request: Request) -> str:
    """What tells this request's solutions from those of the same workload without constraints; mostly nothing."""
    parts = [constraint.text for constraint in constraints_of(problem.model, problem.machine, request)]
    parts += [f"{name} {value}" for name, value in request.fixed_settings()]
    parts += [request.objective] if request.objective != "turn" else []
    parts += [f"reserve {request.reserve_mib:g}"] if request.reserve_mib else []
    parts += [f"ubatch {request.ubatch_tokens}"] if request.ubatch_tokens else []
    parts += [f"min {request.min_decode_tps:g}"] if request.min_decode_tps else []
    parts += [request.program] if request.program != "llama-server" else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8] if parts else ""


def run_compare(
    models: Sequence[Model], machine: Machine, request: Request
) -> tuple[list[dict[str, Any]], list[Rated]]:
    """Several models under one request: rows for JSON, and what they are made of.

    Pins and kept arguments are of one model's tensors, so they do not count.
    """
    rated = compare(models, machine, replace(request, keep="", pins=()))
    rows = [
        {
            "model": each.model.name,
            "bytes": each.model.n_bytes,
            "fits": each.best is not None,
            "decode_tps": round(each.best.speed.decode_tps, 3) if each.best else None,
            "prompt_tps": round(each.best.speed.prompt_tps or 0.0, 2) if each.best else None,
            "turn_s": round(each.best.speed.turn_s, 4) if each.best else None,
            "n_host_layers": each.best.n_host_layers() if each.best else None,
            "args": list(each.best.args) if each.best else None,
        }
        for each in rated
    ]
    return rows, rated


def with_engine(
    choice: EngineChoice, machine: Machine, program: str, tell: Tell
) -> tuple[Machine, EnginePlanner | None]:
    """The machine with the RPC devices asked for, and the engine as planner where there is one.

    Raises:
        InputError: an RPC server cannot be used, or a named engine lacks the machine's devices.
        EngineError: a named engine is missing or broken.
    """
    servers = [server for each in choice.rpc for server in each.split(",") if server]
    if choice.name == "off" and not servers:
        return machine, None
    from placement.solve.engine_planner import choose_engine, make_engine_planner, with_rpc_devices

    if servers:
        from placement.engine.find import find_engine

        machine = with_rpc_devices(
            machine, servers, None if choice.name == "off" else find_engine(choice.name)
        )
        if choice.is_machine_detected:
            machine = with_learned(machine, tell)
    engine, reason = choose_engine(choice.name, machine)
    if reason:
        tell(f"place: {reason}")
    return machine, make_engine_planner(engine, machine, program) if engine is not None else None


def run_check(
    model: Model,
    machine: Machine,
    arguments: Arguments,
    request: Request,
    *,
    engine: EngineChoice = AUTO_ENGINE,
    is_compared: bool = True,
    warn: Tell | None = None,
) -> Check:
    """Check arguments with the engine where there is one; of `request` the program and the reserve count.

    Raises:
        InputError: an argument that the engine would refuse.
        EngineError: the engine that was named is missing or failed.
    """
    machine, engine_planner = with_engine(engine, machine, request.program, warn or (lambda _text: None))
    return check_arguments(
        model, machine, arguments, request.program,
        reserve_mib=request.reserve_mib, engine_planner=engine_planner, our_choice=our_choice if is_compared else None,
    )  # fmt: skip


def our_choice(problem: Problem) -> Solution | None:
    """The solver's own choice for a checked problem: the same context memory, everything else free.

    Where the engine would not start with what was checked, the nearest that it starts with is solved for. None
    where it starts with none, or nothing fits.
    """
    checked = problem.settings
    kept = Settings(
        ctx_tokens=checked.ctx_tokens,
        n_slots=checked.n_slots,
        is_kv_unified=checked.is_kv_unified,
        kv_type_k=checked.kv_type_k,
        kv_type_v=checked.kv_type_v,
        flash_attention="off" if checked.flash_attention == "off" else "on",
        is_kv_offloaded=checked.is_kv_offloaded,
        is_swa_full=checked.is_swa_full,
    )
    settings = startable(problem.model, kept)
    if settings is None:
        return None
    return best_choice(replace(problem, settings=settings), Request(time_limit_s=3.0))
