"""Plans a placement with the user's llama.cpp: memory per device and graph splits, without loading weights.

llama-fit-params sizes logits for a whole ubatch, as llama-bench does; llama-server prints what it will take
itself before it loads anything when it is asked to fit, and is ended there.
"""

from __future__ import annotations

import contextlib
import functools
import re
import shlex
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from placement.engine.cache import PlanCache
from placement.engine.find import Engine, read_program_flags
from placement.engine.flags import Flags
from placement.engine.logs import EngineMemory, PlanReading, has_all_buffers, is_whole, read_plan
from placement.engine.outcome import failure_line, is_unconnected, is_unexplained, require_success, unreadable
from placement.engine.rpc import endpoints_of, exclusive
from placement.engine.run import Finished, run, run_many
from placement.errors import EngineFailed, EngineTimeout, InputError
from placement.inputs.engine_options import names_of
from placement.inputs.model import Model

_FIT_FLAGS = (
    *names_of("-fit", "-fitt", "-fitc"),
    "-fitp",
    "--fit-print",
)  # the last two: llama-fit-params' own
_MEASURED = re.compile(
    r"projected to use|failed to fit params|encountered an error while trying to fit"
    r"|fitting params to free memory took"
)
_FIT_ERROR = re.compile(r"encountered an error while trying to fit")
_NOISE = re.compile(
    r"llama_graph_n_input_tensors|create_tensor|: layer +\d+|llama_model_loader: - |buffer type overridden"
)
_TAIL_LINES = 40
_TRIES = 8  # on a busy machine llama-fit-params loses its last lines in one run of five
_RPC_TRIES = 5  # a worker that is just leaving its last client refuses the next one
_RPC_PAUSE_S = 0.1
_PAUSE_S = 0.02


@dataclass(frozen=True, slots=True)
class EnginePlan:
    """What the engine will take: MiB by device ("Host" is everything in host memory), splits and graph nodes.

    `program` is the one that measured; `extra_buffers` are those of Host that llama-fit-params leaves out of
    its short output; `kv_mib` and `rs_mib` hold one entry per cache. What the log does not say is None.
    """

    program: str
    devices: dict[str, EngineMemory]
    extra_buffers: dict[str, EngineMemory]
    splits_prompt: int | None
    splits_decode: int | None
    nodes_prompt: int | None
    nodes_decode: int | None
    n_copies: int | None
    fa_enabled: bool | None
    kv_mib: tuple[float, ...]
    rs_mib: tuple[float, ...]
    config_files: tuple[str, ...] = ()
    log_tail: str = ""
    wall_s: float = 0.0
    is_cached: bool = False


@contextlib.contextmanager
def model_path(model: Model | Path | str) -> Iterator[Path]:
    """Give the path of a GGUF to plan with: the model's own file, or a header-only export for a while.

    Raises:
        InputError: the file is not there or no GGUF, or the model cannot be exported.
    """
    if not isinstance(model, Model):
        yield _checked(Path(model))
        return
    if model.files and Path(model.files[0]).is_file():
        yield Path(model.files[0])
        return
    from placement.inputs.model_files.files import export_header

    with tempfile.TemporaryDirectory(prefix="place-model-") as folder:
        path = Path(folder) / "header.gguf"
        export_header(model, path)
        yield path


def _checked(path: Path) -> Path:
    """The engine may abort on these two without a line that says why."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(path, f"cannot be read: {error.strerror}") from error
    if magic != b"GGUF":
        raise InputError(path, "is not a GGUF file")
    return path


@functools.lru_cache(maxsize=16)
def _flags(engine: Engine, program: str, fingerprint: str) -> Flags:
    return read_program_flags(engine, program)


def program_flags(engine: Engine, program: str) -> Flags:
    """Return a program's flags; asked once per build."""
    return _flags(engine, program, engine.fingerprint())


def without_fit(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments without `-fit`, `-fitt`, `-fitc` and `-fitp` and their values."""
    kept: list[str] = []
    rest = iter(arguments)
    for argument in rest:
        if argument in _FIT_FLAGS:
            next(rest, None)
        else:
            kept.append(argument)
    return tuple(kept)


@dataclass(frozen=True)
class _Request:
    """One plan to make."""

    engine: Engine
    model: Model | Path | str
    program: str  # the one that measures
    arguments: tuple[str, ...]
    cache: PlanCache | None
    timeout_s: float
    cancel: threading.Event | None

    def known(self) -> EnginePlan | None:
        if self.cache is None:
            return None
        reading = self.cache.get(self.model, self.program, self.arguments)
        return None if reading is None else _plan_of(reading, self.program, is_cached=True)

    def make(self, path: Path) -> EnginePlan:
        began_s = time.monotonic()
        finished, reading = _measure(self, path)
        if self.cache is not None:
            self.cache.put(self.model, self.program, self.arguments, reading)
        made = _plan_of(reading, self.program, is_cached=False)
        return replace(made, log_tail=_tail(finished.text), wall_s=time.monotonic() - began_s)


def plan(
    engine: Engine,
    model: Model | Path | str,
    arguments: Sequence[str],
    *,
    program: str = "llama-fit-params",
    cache: PlanCache | None = None,
    timeout_s: float = 60.0,
    cancel: threading.Event | None = None,
) -> EnginePlan:
    """Plan `arguments` (placement and context, without the model's path) as `program` would run them.

    Programs other than llama-server are planned by llama-fit-params, and so is llama-server where the
    engine has none that can fit. The arguments are planned as they stand: `-fit` and its targets are dropped.

    Raises:
        EngineFailed: the engine refused the arguments or the model, or crashed.
        EngineTimeout, EngineOutputError, EngineMissing: as their names say.
    """
    measuring = measuring_program(engine, program)
    request = _Request(engine, model, measuring, tuple(arguments), cache, timeout_s, cancel)
    if (known := request.known()) is not None:
        return known
    with model_path(model) as path:
        return request.make(path)


def plan_many(
    engine: Engine,
    model: Model | Path | str,
    arguments: Sequence[Sequence[str]],
    *,
    program: str = "llama-fit-params",
    cache: PlanCache | None = None,
    timeout_s: float = 60.0,
    n_side_by_side: int = 4,
) -> list[EnginePlan]:
    """Plan several placements of one model side by side, in their order; those on RPC workers one by one.

    Raises:
        EngineError: of the first that failed; the others are stopped.
    """
    measuring = measuring_program(engine, program)
    has_rpc = any(endpoints_of(each) for each in arguments)
    with model_path(model) as path:

        def one(each: Sequence[str], cancel: threading.Event) -> EnginePlan:
            request = _Request(engine, model, measuring, tuple(each), cache, timeout_s, cancel)
            return request.known() or request.make(path)

        return run_many(one, arguments, n_side_by_side=1 if has_rpc else n_side_by_side)


def measuring_program(engine: Engine, program: str) -> str:
    """Return the program that measures a plan for `program`: itself if it is a llama-server that can fit.

    Raises:
        EngineError: the engine has neither, or its help cannot be read.
    """
    if program == "llama-server" and program in engine.binaries and "-fit" in program_flags(engine, program):
        return program
    engine.program("llama-fit-params")
    return "llama-fit-params"


def _command(
    engine: Engine, path: Path, arguments: Sequence[str], program: str, *, is_terse: bool = False
) -> list[str | Path]:
    flags = program_flags(engine, program)
    options = [] if is_terse else ["-lv", "5"] if "-lv" in flags else ["-v"]
    options += ["--log-jsonl"] if "--log-jsonl" in flags else []
    if program == "llama-server":
        options += ["-fit", "on", "-fitt", "0", "--host", "127.0.0.1", "--port", "0"]
    elif "-fitp" in flags:
        options += ["-fitp", "on"]
    return [engine.program(program), "-m", path, *flags.spell(without_fit(arguments)), *options]


def _measure(request: _Request, path: Path) -> tuple[Finished, PlanReading]:
    """Run the measuring program until its log is whole; the last reading if it never is.

    Raises:
        EngineError: it failed, or no run printed a breakdown.
    """
    command = _command(request.engine, path, request.arguments, request.program)
    is_server = request.program == "llama-server"
    stop_when = _is_measured if is_server else None
    for attempt in range(_TRIES):
        time.sleep(_PAUSE_S * attempt)
        finished = run_on(
            endpoints_of(request.arguments),
            command,
            timeout_s=request.timeout_s,
            stop_when=stop_when,
            cancel=request.cancel,
        )
        require_success(_explained(request, path, finished))
        if is_server and (not finished.is_stopped or _FIT_ERROR.search(finished.text)):
            raise EngineFailed(failure_line(finished))
        reading = read_plan(finished.text)
        if reading is not None and is_whole(finished.text, reading):
            break
    if reading is None or not has_all_buffers(finished.text, reading):
        raise unreadable(finished, "memory breakdown")
    return finished, reading


def _explained(request: _Request, path: Path, finished: Finished) -> Finished:
    """Return a run whose log says why it failed, where the full log lost that with its last lines.

    The engine's log has a thread of its own (common/log.cpp) that an abort ends: of a full log a third of the
    runs lose the reason, of a log without the details none did.
    """
    if not is_unexplained(finished):
        return finished
    terse = _command(request.engine, path, request.arguments, request.program, is_terse=True)
    again = run_on(
        endpoints_of(request.arguments), terse, timeout_s=request.timeout_s, cancel=request.cancel,
        stop_when=_is_measured if request.program == "llama-server" else None,
    )  # fmt: skip
    return again if again.returncode != 0 and not is_unexplained(again) else finished


def _is_measured(line: str) -> bool:
    return _MEASURED.search(line) is not None


def run_on(
    endpoints: Sequence[str],
    command: Sequence[str | Path],
    *,
    timeout_s: float,
    stop_when: Callable[[str], bool] | None = None,
    cancel: threading.Event | None = None,
) -> Finished:
    """Run a command that uses the RPC workers at `endpoints` (or none) alone on them.

    Raises:
        EngineError: as `run` does; a time-out says that a worker may be busy.
    """
    try:
        with exclusive(endpoints, timeout_s):
            for attempt in range(_RPC_TRIES if endpoints else 1):
                time.sleep(_RPC_PAUSE_S * attempt)
                finished = run(command, timeout_s=timeout_s, stop_when=stop_when, cancel=cancel)
                if not is_unconnected(finished):
                    break
            return finished
    except EngineTimeout as error:
        if not endpoints:
            raise
        busy = ", ".join(endpoints)
        raise EngineTimeout(f"{error} (a worker serves one client at a time: is {busy} busy?)") from error


def fit_arguments(
    engine: Engine, model: Model | Path | str, arguments: Sequence[str], *, timeout_s: float = 120.0
) -> tuple[str, ...]:
    """Return what llama.cpp's own `--fit` chooses (`-c`, `-ngl`, `-ts`, `-ot`); `-fitt` and `-fitc` are its.

    Raises:
        EngineError: it could not fit, failed, or printed no arguments.
    """
    program = engine.program("llama-fit-params")
    spelt = program_flags(engine, "llama-fit-params").spell(arguments)
    with model_path(model) as path:
        finished = run_on(endpoints_of(arguments), [program, "-m", path, *spelt], timeout_s=timeout_s)
    require_success(finished)
    lines = [line for line in finished.stdout.splitlines() if line.startswith("-c ")]
    if not lines:
        raise unreadable(finished, "fitted arguments")
    return tuple(shlex.split(lines[-1]))


def _plan_of(reading: PlanReading, program: str, *, is_cached: bool) -> EnginePlan:
    return EnginePlan(
        program=program,
        devices=reading.devices,
        extra_buffers=reading.extra_buffers,
        splits_prompt=reading.splits_prompt,
        splits_decode=reading.splits_decode,
        nodes_prompt=reading.nodes_prompt,
        nodes_decode=reading.nodes_decode,
        n_copies=reading.n_copies,
        fa_enabled=reading.fa_enabled,
        kv_mib=reading.kv_mib,
        rs_mib=reading.rs_mib,
        config_files=reading.config_files,
        is_cached=is_cached,
    )


def _tail(text: str) -> str:
    lines = [line for line in text.splitlines() if not _NOISE.search(line)]
    return "\n".join(lines[-_TAIL_LINES:])
