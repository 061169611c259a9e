"""`place verify`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from placement.cli import options

if TYPE_CHECKING:
    from placement.engine import Engine
    from placement.model import Model
    from placement.verify.run import Options, Progress, Report
    from placement.verify.watch import Sample


@click.command()
@options.model_argument
@click.option("--model-file", metavar="X.gguf", help="The weights to run [MODEL, where that is a .gguf].")
@options.machine_option
@click.option("--ctx", "ctx_tokens", type=click.IntRange(min=1), help="Context tokens over all slots.")
@click.option("--parallel", "n_slots", type=click.IntRange(min=1), help="Slots (-np).")
@click.option("--kv", "kv_type", metavar="TYPE", help="KV cache type, K and V alike: f16, q8_0, q4_0, …")
@click.option("--ubatch", metavar="N|auto", default="auto", show_default=True, help="Physical batch (-ub).")
@options.prompt_option
@options.generate_option
@click.option(
    "--depth", "depth_tokens", type=click.IntRange(min=0), help="Tokens there [a quarter of --ctx]."
)
@options.reserve_option
@options.objective_option
@click.option(
    "--top", "n_top", type=click.IntRange(min=1), default=3, show_default=True, help="Solutions run."
)
@click.option("--rounds", type=click.IntRange(min=1), default=3, show_default=True, help="Rounds of all.")
@click.option(
    "--repeats", type=click.IntRange(min=1), default=3, show_default=True, help="Short prompts, at least."
)
@click.option(
    "--seconds", "least_s", type=click.FloatRange(min=0), default=3.0, show_default=True,
    help="Repeat each prompt for so long: small models are done in no time.",
)  # fmt: skip
@click.option("--budget", "budget_min", type=click.FloatRange(min=0.05), metavar="MINUTES", help="Stop then.")
@click.option("--full-depth", "is_full_depth", is_flag=True, help="Fill the whole context, not a quarter.")
@click.option(
    "--timeout", "timeout_s", type=click.FloatRange(min=1), default=900.0, show_default=True,
    metavar="SECONDS", help="A phase that takes longer hangs (four times as long for the canary).",
)  # fmt: skip
@click.option("--fresh", "is_fresh", is_flag=True, help="Measure all anew; earlier records stay in the file.")
@click.option("--show", "is_shown", is_flag=True, help="Print the table of what was measured; run nothing.")
@options.engine_option
@click.option("--out", "out_folder", metavar="DIR", help="Where solutions/ lies [./solutions].")
@options.json_option
def command(model_name: str, machine_name: str | None, is_json: bool, **asked: Any) -> None:
    """Run the best solutions of MODEL and llama.cpp's own --fit, and say which to use.

    Candidates run in turns: moderate, aggressive, --fit at the memory of each, then the others. Every phase
    that finishes is kept in solutions/MODEL--MACHINE--WORKLOAD/runs.jsonl; after Ctrl-C, a crash or a kill
    the same command goes on where it stopped. Nothing that measured slower than --fit is recommended.

    \b
    Example:
      place verify qwen3-coder-q5 --model-file Qwen3-Coder-Next-Q5.gguf --ctx 262144 --budget 60
    """
    from placement.verify.table import report_row

    model = options.load(model_name)
    machine = options.load_machine(machine_name)
    path = Path(asked["model_file"] or (model.files[0] if model.files else f"{model.name}.gguf"))
    report = (
        _show(model, machine, asked) if asked["is_shown"] else _verify(model, machine, path, asked, is_json)
    )
    if is_json:
        options.echo_json(report_row(report, model.name, machine.name, str(path)))
    else:
        print_report(report, str(path))
    if report.verdict.recommended is None:
        raise click.exceptions.Exit(1)


def _show(model: Model, machine: Any, asked: dict[str, Any]) -> Report:
    from placement.solve import make_problem
    from placement.solving import kept_folder, make_request
    from placement.verify.run import show

    request = make_request(asked, model)
    problem, _ = make_problem(model, machine, request)
    return show(kept_folder(asked["out_folder"], problem, request), problem)


def _verify(model: Model, machine: Any, path: Path, asked: dict[str, Any], is_json: bool) -> Report:
    from placement.errors import InputError
    from placement.solving import run_solve
    from placement.verify.lock import require_free
    from placement.verify.run import verify

    if not path.is_file():
        raise InputError("--model-file", "running needs the weights: there is no such file", value=str(path))
    engine = running_engine(asked["engine_name"])
    require_free()  # the solve would plan on the workers that another verify measures
    outcome = run_solve(model, machine, asked, asked["out_folder"], lambda text: click.echo(text, err=True))
    if outcome.path is None:
        raise InputError("verify", f"there is no solution to run: {outcome.found.message}")
    with progress_listener(is_json) as listener:
        wanted = _options(asked, outcome.problem)
        return verify(outcome.problem, outcome.found, path, engine, outcome.path.parent, wanted, listener)


def running_engine(name: str) -> Engine:
    """The llama.cpp that runs the weights; planning is not enough."""
    from placement.engine import find_engine
    from placement.errors import InputError

    engine = find_engine(name)
    if engine is None:
        raise InputError("--engine", "running needs a llama.cpp", value=name)
    return engine


def _options(asked: dict[str, Any], problem: Any) -> Options:
    from dataclasses import replace

    from placement.verify.phases import Limits
    from placement.verify.run import Options, asked_of

    budget_min, timeout_s = asked["budget_min"], asked["timeout_s"]
    return Options(
        top=asked["n_top"],
        rounds=asked["rounds"],
        budget_s=None if budget_min is None else budget_min * 60,
        is_fresh=asked["is_fresh"],
        asked=replace(
            asked_of(problem, asked["is_full_depth"]), repeats=asked["repeats"], least_s=asked["least_s"]
        ),
        limits=Limits(start_s=timeout_s, prompt_s=timeout_s, canary_s=4 * timeout_s),
    )


def print_report(report: Report, model_path: str) -> None:
    """Print the result table, why, and the arguments to use."""
    from rich.console import Console
    from rich.table import Table

    from placement.verify import table

    grid = Table(title="measured (predicted)", title_justify="left")
    for name in table.header(report):
        grid.add_column(name, justify="left" if name in ("candidate", "OOM?", "notes") else "right")
    for row in table.rows(report):
        grid.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(grid)
    for line in table.summary(report):
        click.echo(f"- {line}")
    chosen = report.verdict.recommended
    if chosen is not None:
        click.echo(f"\nrecommended: {chosen.name}\n{table.command(chosen, model_path)}")


@contextlib.contextmanager
def progress_listener(is_quiet: bool) -> Iterator[_Lines]:
    """Live progress on a terminal, plain lines elsewhere; all on stderr."""
    if is_quiet or not sys.stderr.isatty():
        yield _Lines(is_quiet)
        return
    from rich.console import Console
    from rich.live import Live

    live = _LiveLines()
    with Live(console=Console(stderr=True), get_renderable=live.text, refresh_per_second=4, transient=True):
        yield live


def _place_of(progress: Progress) -> str:
    from placement.verify.phases import MEASURED_PHASES

    speed = "" if progress.decode_tps is None else f", {progress.decode_tps:.1f} t/s so far"
    left = "" if progress.left_s is None else f", about {_time(progress.left_s)} left"
    number = f" {progress.repeat + 1}" if progress.phase in MEASURED_PHASES else ""
    done = f"[{progress.n_done}/{progress.n_visits}]"
    return f"{done} round {progress.round}: {progress.candidate}: {progress.phase}{number}{speed}{left}"


def _time(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


class _Lines:
    """Progress as lines."""

    def __init__(self, is_quiet: bool = False) -> None:
        self._is_quiet = is_quiet

    def say(self, text: str) -> None:
        """Print what the user should know."""
        click.echo(f"place: {text}", err=True)

    def phase(self, progress: Progress) -> None:
        """Print each phase as it begins."""
        if not self._is_quiet:
            click.echo(_place_of(progress), err=True)

    def sample(self, sample: Sample) -> None:
        """Memory is not printed line by line."""


class _LiveLines(_Lines):
    """Progress as two lines that are drawn again."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._progress: Progress | None = None
        self._sample: Sample | None = None

    def phase(self, progress: Progress) -> None:
        """Take the phase that begins."""
        with self._lock:
            self._progress = progress

    def sample(self, sample: Sample) -> None:
        """Take the memory as it is now."""
        with self._lock:
            self._sample = sample

    def text(self) -> str:
        """What is drawn: the phase, and the memory against the caps."""
        with self._lock:
            progress, sample = self._progress, self._sample
        if progress is None:
            return "starting"
        return f"{_place_of(progress)}\n{_memory_of(progress, sample)}".replace("[", "\\[")


def _memory_of(progress: Progress, sample: Sample | None) -> str:
    if sample is None:
        return ""
    parts = [
        f"{name} {taken:.0f}"
        + (f" of {progress.caps_mib[name]:.0f} MiB" if name in progress.caps_mib else " MiB")
        for name, taken in sample.taken_mib.items()
    ]
    parts += [f"server {sample.rss_mib:.0f} MiB of host memory"] if sample.rss_mib is not None else []
    parts += [f"{sample.available_mib:.0f} MiB free"] if sample.available_mib is not None else []
    return "memory: " + ", ".join(parts)
