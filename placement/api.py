"""The library's calls: a model and a machine by name or file, what to do with them, and plain records as answers.

What holds: nothing is printed and nothing is written; a llama.cpp is run only where `engine` names one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict, Unpack

if TYPE_CHECKING:
    from placement.inputs.machine import Machine
    from placement.inputs.model import Model
    from placement.inputs.problem import Program
    from placement.predict.check import Check
    from placement.predict.cost import Speed
    from placement.predict.solution import DeviceUse
    from placement.solve.request import FixedSettings, LoadMode, Objective


class RequestFields(TypedDict, total=False):
    """The fields of `Request`, which says what they mean and what stands where one is left out."""

    ctx_tokens: int | None
    n_slots: int | None
    kv_type: str | None
    ubatch_tokens: int | None
    prompt_tokens: int
    generate_tokens: int
    depth_tokens: int | None
    reserve_mib: float
    objective: Objective
    n_best: int
    program: Program
    min_decode_tps: float | None
    pins: Sequence[str]
    n_gpu_layers: int | None
    tensor_split: Sequence[float] | None
    devices: Sequence[str] | None
    max_cpu_layers: int | None
    keep: str
    fixed: FixedSettings
    load_modes: Sequence[LoadMode]
    time_limit_s: float
    seed: int


@dataclass(frozen=True, slots=True)
class Placement:
    """One placement: what to run and what is predicted of it.

    `args` place the model, `command` is the whole shell line; `gap` is (turn − bound) / turn, None where the
    placement was not searched for by its turn; `label` says whether memory was estimated or planned.
    """

    name: str
    args: tuple[str, ...]
    command: str
    speed: Speed  # seconds, and tokens per second
    gap: float | None
    status: str
    label: str
    devices: dict[str, DeviceUse]  # MiB: the GPUs in the engine's order, then "Host"
    headroom_mib: float


@dataclass(frozen=True, slots=True)
class Result:
    """What a solve found, the recommended placement first; `message` says why there is none.

    `status` is OPTIMAL, FEASIBLE or INFEASIBLE.
    """

    status: str
    solutions: tuple[Placement, ...]
    message: str
    warnings: tuple[str, ...]

    @property
    def best(self) -> Placement:
        """The recommended placement.

        Raises:
            PlacementError: nothing fits; the message says which cap fails by how much.
        """
        from placement.errors import PlacementError

        if not self.solutions:
            raise PlacementError(self.message or "nothing fits")
        return self.solutions[0]


def load_model(name_or_path: str | Path) -> Model:
    """Read a model by the name of a description, or from a `.toml` description or a `.gguf` file's header.

    Raises:
        InputError: there is no such name or file, or it cannot be read.
    """
    from placement.inputs.model_files.files import resolve_model

    return resolve_model(name_or_path)


def load_machine(name_or_path: str | Path) -> Machine:
    """Read a machine by its name or from its file.

    Raises:
        InputError: there is no such name or file, or it cannot be read.
    """
    from placement.inputs.machine_files import resolve_machine

    return resolve_machine(str(name_or_path))


def detect_machine() -> Machine:
    """Describe the machine here, with what was learned of it where a machine file knows it.

    Raises:
        PlacementError: there is no GPU, or no driver that describes it.
    """
    from placement.errors import PlacementError
    from placement.inputs.detect import detect_hardware as detect
    from placement.inputs.recognise import with_learned

    result, reason = detect()
    if result is None:
        raise PlacementError(reason)
    return with_learned(result, lambda _text: None)


def solve(
    model: Model, machine: Machine, *, engine: str | Path = "off", **asked: Unpack[RequestFields]
) -> Result:
    """Find the fastest placement of a model, with a proof of how close to optimal it is.

    `asked` are the fields of `Request` (`ctx_tokens=65_536`, `objective="decode"`, …). `engine` is "off" for
    estimates, "auto", or the llama.cpp that plans. What is impossible is a status, not an error.

    Raises:
        InputError: a value breaks its rule, or does not fit the model or the machine.
        EngineError: the engine that was named is missing or failed.
    """
    from placement.solve.request import Request
    from placement.solve.run import EngineChoice, find_solutions
    from placement.solve.store import commands

    warnings: list[str] = []
    request = Request(**{name: _frozen(value) for name, value in asked.items()})  # type: ignore[arg-type]
    solved = find_solutions(model, machine, request, EngineChoice(str(engine)), warn=warnings.append)
    result, lines = solved.solution_set, commands(solved.problem, solved.solution_set)
    placements = tuple(
        Placement(
            name=each.name,
            args=each.args,
            command=lines[each.name],
            speed=each.speed,
            gap=each.gap,
            status=each.status,
            label=each.label,
            devices=each.devices,
            headroom_mib=each.headroom_mib,
        )
        for each in result.solutions
    )
    told = tuple(text.removeprefix("place: ").removeprefix("warning: ") for text in warnings)
    return Result(result.status, placements, result.message, told)


def check(
    model: Model,
    machine: Machine,
    arguments: str | Sequence[str],
    *,
    program: Program = "llama-server",
    reserve_mib: float = 0.0,
    engine: str | Path = "off",
    is_compared: bool = True,
) -> Check:
    """Tell memory, splits, speed and advice for llama.cpp arguments, one text or a list of words.

    `is_compared` solves the same problem to tell what the arguments cost; `reserve_mib` stays free on every
    GPU; `engine` as in `solve`.

    Raises:
        InputError: an argument that the engine would refuse, or a value that breaks its rule.
        EngineError: the engine that was named is missing or failed.
    """
    from placement.llamacpp.arguments import parse
    from placement.solve.request import Request
    from placement.solve.run import EngineChoice, run_check

    parsed = parse(arguments)
    request = Request(program=program, reserve_mib=reserve_mib)
    choice = EngineChoice(str(engine), parsed.rpc)
    return run_check(model, machine, parsed, request, engine=choice, is_compared=is_compared)


def _frozen(value: object) -> object:
    return tuple(value) if isinstance(value, list) else value
