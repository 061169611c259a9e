"""One whole solve as the command line asks for it: options → problem → solutions → the file that keeps them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from placement.arguments import parse
from placement.emit import shell_command
from placement.errors import InputError
from placement.machine import Machine
from placement.memory import startable
from placement.model import Model
from placement.problem import Problem, Settings
from placement.recognise import with_learned
from placement.solution import Judge, Solution, SolutionSet
from placement.solve import Request, best_choice, make_problem, solve
from placement.store import save_solutions, solution_folder, solution_set_row
from placement.why import sensitivity
from placement.wishes import (
    Wish,
    devices_wish,
    kept_wishes,
    max_cpu_layers_wish,
    ngl_wish,
    pin_wish,
    ts_wish,
)

if TYPE_CHECKING:
    from placement.questions import Rated

Tell = Callable[[str], None]


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


def commands(problem: Problem, found: SolutionSet) -> dict[str, str]:
    """The shell line of each solution by name."""
    path = problem.model.files[0] if problem.model.files else f"{problem.model.name}.gguf"
    program = problem.program if problem.program != "llama-fit-params" else "llama-server"
    return {
        each.name: shell_command(program, path, list(each.args), list(found.extra_args))
        for each in found.solutions
    }


def make_request(asked: dict[str, Any], model: Model, machine: Machine | None = None) -> Request:
    """The request of the command line's options; wishes need the machine.

    Raises:
        InputError: an option's value breaks its rule.
    """
    ubatch = asked.get("ubatch") or "auto"
    if ubatch != "auto" and (not str(ubatch).isdigit() or int(ubatch) < 1):
        raise InputError("--ubatch", "must be auto or a positive number", value=ubatch)
    request = Request(
        ctx_tokens=asked.get("ctx_tokens"),
        n_slots=asked.get("n_slots"),
        kv_type=asked.get("kv_type"),
        ubatch_tokens=None if ubatch == "auto" else int(ubatch),
        prompt_tokens=asked.get("prompt_tokens") or 2000,
        generate_tokens=asked.get("generate_tokens") or 500,
        depth_tokens=asked.get("depth_tokens"),
        reserve_mib=asked.get("reserve_mib") or 0.0,
        objective=asked.get("objective") or "turn",
        n_best=max(asked.get("n_best") or 0, 2 if asked.get("is_why") else 0),
        program=asked.get("program") or "llama-server",
        time_limit_s=asked.get("time_limit_s") or 10.0,
        seed=int(asked.get("seed", 1)),
        min_decode_tps=asked.get("min_decode_tps"),
        fixed=(("n_threads", asked["n_threads"]),) if asked.get("n_threads") else (),
    )
    if machine is None:
        return request
    request = replace(request, wishes=tuple(_wishes(asked, model, machine)))
    return _kept(request, model, machine, asked["keep"]) if asked.get("keep") else request


def _wishes(asked: dict[str, Any], model: Model, machine: Machine) -> Iterator[Wish]:
    """The wishes of the options.

    Raises:
        InputError: one breaks its rule.
    """
    devices = [name.strip() for name in asked["devices"].split(",")] if asked.get("devices") else None
    if devices is not None:
        yield devices_wish(machine, devices)
    if asked.get("ts"):
        shares = parse(["-ts", asked["ts"]]).tensor_split or ()
        yield ts_wish(model, machine, shares, devices, asked.get("ngl"))
    if asked.get("ngl") is not None:
        yield ngl_wish(model, machine, asked["ngl"])
    if asked.get("max_cpu_layers") is not None:
        yield max_cpu_layers_wish(asked["max_cpu_layers"])
    for text in asked.get("pins") or ():
        yield pin_wish(model, machine, text)


def _kept(request: Request, model: Model, machine: Machine, text: str) -> Request:
    """The request with the arguments that the user keeps: placement as wishes, settings as they stand."""
    wishes, kept = kept_wishes(model, machine, text)
    fields = {
        "batch_tokens": kept.batch_tokens,
        "is_kv_offloaded": kept.is_kv_offloaded,
        "is_swa_full": kept.is_swa_full,
        "is_op_offloaded": kept.is_op_offloaded,
        "is_kv_unified": kept.is_kv_unified,
        "flash_attention": kept.flash_attention,
        "n_threads": kept.n_threads,
        "kv_type_k": kept.kv_type_k,
        "kv_type_v": kept.kv_type_v,
    }
    return replace(
        request,
        ctx_tokens=request.ctx_tokens or kept.ctx_tokens,
        n_slots=request.n_slots or kept.n_slots,
        wishes=(*request.wishes, *wishes),
        fixed=(*request.fixed, *((name, value) for name, value in fields.items() if value is not None)),
        extra_args=tuple(word for words in kept.other for word in words),
    )


def _answered(
    request: Request, model: Model, machine: Machine, asked: dict[str, Any], tell: Tell
) -> tuple[Request, str]:
    """The request with its questions answered (KV type, context, headroom), and the answers in words."""
    from placement import questions

    told = []
    if request.kv_type == "auto":
        kv_type, words = questions.choose_kv_type(model, machine, request, tell)
        request = replace(request, kv_type=kv_type or "q4_0")
        told.append(words)
    if asked.get("is_max_ctx") or asked.get("maximize") == "context":
        found, words = questions.max_context(model, machine, request, tell)
        if found is not None:
            request = found
            told.append(f"the largest context that keeps {words}: {found.ctx_tokens:,} tokens")
        else:
            told.append(words)
    if asked.get("maximize") == "headroom":
        roomy = questions.max_headroom(model, machine, request, tell)
        if roomy is not None:
            request = roomy
            told.append(f"the largest reserve on every GPU: {roomy.reserve_mib:,.0f} MiB")
    if asked.get("maximize") == "prompt":
        request = replace(request, objective="prompt")
    return request, "; ".join(told)


def run_solve(
    model: Model,
    machine: Machine,
    asked: dict[str, Any],
    out_folder: str | None = None,
    warn: Callable[[str], None] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Outcome:
    """Solve and keep the result in solution.toml; nothing is written when nothing fits."""
    tell = warn or (lambda _text: None)
    if asked.get("maximize") and asked.get("min_decode_tps") is None:
        raise InputError("--maximize", "needs --min-decode T", value=asked["maximize"])
    machine, judge = with_engine(asked, machine, tell)
    request, answer = _answered(
        make_request(asked, model, machine), model, machine, asked, progress or (lambda _text: None)
    )
    if answer:
        tell(f"place: {answer}")
    problem, _ = make_problem(model, machine, request)
    found = solve(model, machine, request, judge, progress)
    for warning in found.warnings:
        tell(f"place: warning: {warning}")
    if not found.solutions:
        return Outcome(problem, found, None, False)
    path = kept_folder(out_folder, problem, request) / "solution.toml"
    row = solution_set_row(problem, found, commands(problem, found))
    is_new = save_solutions(path, problem, row)
    reasons = tuple(sensitivity(problem, found, request)) if asked.get("is_why") else ()
    return Outcome(problem, found, path, is_new, reasons)


def kept_folder(out_folder: str | None, problem: Problem, request: Request) -> Path:
    """Where a request's solutions are kept, and the records of their runs beside them."""
    return solution_folder(Path(out_folder or "solutions"), problem, _variant(request))


def _variant(request: Request) -> str:
    """What tells this request's solutions from those of the same workload without wishes; mostly nothing."""
    parts = [wish.text for wish in request.wishes] + [f"{name} {value}" for name, value in request.fixed]
    parts += [request.objective] if request.objective != "turn" else []
    parts += [f"reserve {request.reserve_mib:g}"] if request.reserve_mib else []
    parts += [f"ubatch {request.ubatch_tokens}"] if request.ubatch_tokens else []
    parts += [f"min {request.min_decode_tps:g}"] if request.min_decode_tps else []
    parts += [request.program] if request.program != "llama-server" else []
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:8] if parts else ""


def run_compare(
    models: Sequence[Model], machine: Machine, asked: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[Rated]]:
    """Several models under one request: rows for JSON, and what they are made of."""
    from placement.questions import compare

    rated = compare(models, machine, make_request({**asked, "keep": None, "pins": ()}, models[0], machine))
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
        if asked.get("is_detected"):
            machine = with_learned(machine, tell)
    engine, reason = choose_engine(spec, machine)
    if reason:
        tell(f"place: {reason}")
    program = asked.get("program") or "llama-server"
    return machine, engine_judge(engine, machine, program) if engine is not None else None


def rival(problem: Problem) -> Solution | None:
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
