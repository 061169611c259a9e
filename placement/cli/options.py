"""Options that several commands share, and what they stand for."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from placement.inputs.problem import PROGRAMS
from placement.solve.request import OBJECTIVES, FixedSettings, Request

if TYPE_CHECKING:
    from placement.errors import PlacementError
    from placement.inputs.machine import Machine
    from placement.inputs.model import Model

REQUEST_DEFAULTS = Request()

F = TypeVar("F", bound=Callable[..., Any])

model_argument = click.argument("model_name", metavar="MODEL")
machine_option = click.option(
    "--machine", "machine_name", metavar="M", help="Machine name or file (default: the GPUs found here)."
)
json_option = click.option("--json", "is_json", is_flag=True, help="One JSON object on stdout.")
program_option = click.option(
    "--program",
    type=click.Choice(PROGRAMS),
    default=REQUEST_DEFAULTS.program,
    show_default=True,
    help="Whose buffers are sized: llama-server's logits are for its slots, the others' for a whole ubatch.",
)


class Finite(click.FloatRange):
    """A number within bounds that is one: not nan, not infinite."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The number."""
        if not math.isfinite(result := super().convert(value, param, ctx)):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return result


class Ubatch(click.ParamType):  # type: ignore[type-arg]
    """A physical batch; auto is None."""

    name = "ubatch"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int | None:
        """Tokens, or None for auto."""
        from placement.errors import InputError

        if value in ("", "auto"):
            return None
        if not str(value).isdigit() or int(value) < 1:
            raise InputError("--ubatch", "must be auto or a positive number", value=value)
        return int(value)


reserve_option = click.option(
    "--reserve",
    "reserve_mib",
    type=Finite(min=0),
    default=REQUEST_DEFAULTS.reserve_mib,
    metavar="MIB",
    help="Keep that much free on every GPU, on top of its runtime.",
)
ctx_option = click.option(
    "--ctx", "ctx_tokens", type=click.IntRange(min=1), help="Context tokens over all slots."
)
ubatch_option = click.option(
    "--ubatch",
    "ubatch_tokens",
    type=Ubatch(),
    metavar="N|auto",
    default="auto",
    show_default=True,
    help="Physical batch (-ub).",
)


def parallel_option(most: int | None = None) -> Callable[[F], F]:
    """The slots."""
    return click.option("--parallel", "n_slots", type=click.IntRange(min=1, max=most), help="Slots (-np).")


def kv_option(types: str) -> Callable[[F], F]:
    """The KV cache type; `types` are those that its help lists."""
    words = f"KV cache type, K and V alike: {types}"
    return click.option("--kv", "kv_type", metavar="TYPE", help=words)


def depth_option(what: str) -> Callable[[F], F]:
    """The turn's depth; `what` begins its help."""
    words = f"{what} [a quarter of --ctx]."
    return click.option("--depth", "depth_tokens", type=click.IntRange(min=0), help=words)


def prompt_option(words: str = "Tokens that a turn reads.") -> Callable[[F], F]:
    """The turn's prompt."""
    return click.option(
        "--prompt", "prompt_tokens", type=click.IntRange(min=1), default=REQUEST_DEFAULTS.prompt_tokens,
        show_default=True, help=words,
    )  # fmt: skip


def generate_option(words: str = "Tokens that a turn writes.") -> Callable[[F], F]:
    """The turn's answer."""
    return click.option(
        "--generate", "generate_tokens", type=click.IntRange(min=1), default=REQUEST_DEFAULTS.generate_tokens,
        show_default=True, help=words,
    )  # fmt: skip


objective_option = click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default=REQUEST_DEFAULTS.objective,
    show_default=True,
    help="What is made fast: the whole turn, or only its writing or reading.",
)
engine_option = click.option(
    "--engine",
    "engine_name",
    default="auto",
    show_default=True,
    metavar="auto|off|PATH",
    help="The llama.cpp that plans: a folder or a binary in it; off never touches one.",
)


def fixed_threads(_ctx: click.Context, _param: click.Parameter, n_threads: int | None) -> FixedSettings:
    """The fixed settings of --threads."""
    return FixedSettings(n_threads=n_threads)


def layer_counts(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[float, ...] | None:
    """The numbers of --ts, read as the engine reads its own."""
    from placement.llamacpp.arguments import parse

    return parse(["-ts", text]).tensor_split if text else None


def device_names(_ctx: click.Context, _param: click.Parameter, text: str | None) -> tuple[str, ...] | None:
    """The names of --devices."""
    return tuple(name.strip() for name in text.split(",")) if text else None


def request_of(given: Mapping[str, Any]) -> Request:
    """The request of a command's options: those with the name of one of its fields.

    Raises:
        InputError: a value breaks its rule.
    """
    names = {each.name for each in dataclasses.fields(Request)}
    return Request(**{name: value for name, value in given.items() if name in names and value is not None})


def load(model_name: str) -> Model:
    """The model of a MODEL argument."""
    from placement.inputs.model_files.files import resolve_model

    return resolve_model(model_name)


def machine_of(name: str | None, rpc: Sequence[str] = ()) -> Machine:
    """The machine of a --machine option; without one the machine here, or the reference machine and a line.

    Where a file has learned of the machine here it counts, and a line names it; with RPC servers that file is
    looked for once their devices are known. With RPC servers and no GPU it is this host alone.
    """
    from placement.inputs.machine_files import resolve_machine
    from placement.inputs.recognise import with_learned

    if name is not None:
        return resolve_machine(name)
    result, reason = _machine_here(bool(rpc))
    if result is None:
        return _reference_machine(reason)
    return result if rpc else with_learned(result, warn)


def weights_path(model: Model, model_file: str | None) -> Path:
    """The weights that run: the file named, else the one that MODEL was read from."""
    return Path(model_file or (model.files[0] if model.files else f"{model.name}.gguf"))


def require_weights(path: Path) -> None:
    """Refuse to run what is not there.

    Raises:
        InputError: there is no such file.
    """
    from placement.errors import InputError

    if not path.is_file():
        raise InputError("--model-file", "running needs the weights: there is no such file", value=str(path))


def own_machine(name: str | None) -> Machine:
    """As `machine_of`, for what is measured here and kept: never the reference machine in its stead.

    Raises:
        InputError: no machine is named, and there is no GPU to know this one by.
    """
    from placement.errors import InputError

    reason = "" if name is not None else _machine_here(has_rpc=False)[1]
    if reason:
        raise InputError("--machine", f"{reason}: name the file of the machine that is measured")
    return machine_of(name)


def keep_learned(machine: Machine, path: Path, is_wanted: bool) -> tuple[bool, PlacementError | None]:
    """Write what was learned; (whether it was written, why not). What was found is shown before the error is."""
    from placement.errors import InputError
    from placement.inputs.recognise import save_learned

    try:
        if is_wanted:
            save_learned(machine, path)
    except InputError as error:
        return False, error
    return is_wanted, None


def detected_machine() -> Machine:
    """The machine here as its driver describes it; without a GPU the reference machine, and a line says so."""
    result, reason = _machine_here(has_rpc=False)
    return _reference_machine(reason) if result is None else result


def _machine_here(has_rpc: bool) -> tuple[Machine | None, str]:
    from placement.inputs.detect import detect_cpu, detect_hardware
    from placement.inputs.machine import Machine

    result, reason = detect_hardware()
    return (Machine("rpc", (), detect_cpu()) if result is None and has_rpc else result), reason


def _reference_machine(reason: str) -> Machine:
    from placement.inputs.machine_files import REFERENCE_MACHINE, resolve_machine

    click.echo(
        f"place: {reason}: using the reference machine {REFERENCE_MACHINE} (choose with --machine)", err=True
    )
    return resolve_machine(REFERENCE_MACHINE)


def warn(text: str) -> None:
    """A line on stderr, beside what a command prints."""
    click.echo(text, err=True)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str], None]]:
    """A line on a terminal's stderr that says what is being done, gone at the end; nothing elsewhere."""
    if not sys.stderr.isatty():
        yield lambda _text: None
        return
    shown = 0

    def tell(text: str) -> None:
        nonlocal shown
        click.echo("\r" + f"solving: {text}".ljust(shown), nl=False, err=True)
        shown = max(shown, len(text) + 9)

    try:
        yield tell
    finally:
        click.echo("\r" + " " * shown + "\r", nl=False, err=True)


def now() -> str:
    """The moment, as the files keep it."""
    import datetime

    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def echo_json(row: object) -> None:
    """Print one JSON object."""
    import json

    click.echo(json.dumps(row, indent=2, ensure_ascii=False))
