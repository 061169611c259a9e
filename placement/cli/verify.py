"""`place verify`."""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import click

from placement.cli import options

if TYPE_CHECKING:
    from pathlib import Path

    from placement.engine.find import Engine
    from placement.inputs.machine import Machine
    from placement.inputs.model import Model
    from placement.inputs.problem import Problem
    from placement.measure.verify.run import Options, Progress, VerifyReport
    from placement.measure.verify.watch import Sample


@click.command()
@options.model_argument
@click.option("--model-file", metavar="X.gguf", help="The weights to run [MODEL, where that is a .gguf].")
@options.machine_option
@options.ctx_option
@options.parallel_option()
@options.kv_option("f16, q8_0, q4_0, …")
@options.ubatch_option
@options.prompt_option()
@options.generate_option()
@options.depth_option("Tokens there")
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
def command(model_name: str, machine_name: str | None, is_json: bool, **given: Any) -> None:
    """Run the best solutions of MODEL and llama.cpp's own --fit, and say which to use.

    Candidates run in turns: moderate, aggressive, --fit at the memory of each, then the others. Every phase
    that finishes is kept in solutions/MODEL--MACHINE--WORKLOAD/runs.jsonl; after Ctrl-C, a crash or a kill
    the same command goes on where it stopped. Nothing that measured slower than --fit is recommended.

    \b
    Example:
      place verify qwen3-coder-q5 --model-file Qwen3-Coder-Next-Q5.gguf --ctx 262144 --budget 60
    """
    from placement.cli.show.verify_tables import verify_row

    model = options.load(model_name)
    machine = options.machine_of(machine_name)
    path = options.weights_path(model, given["model_file"])
    report = (
        _show(model, machine, given) if given["is_shown"] else _verify(model, machine, path, given, is_json)
    )
    if is_json:
        options.echo_json(verify_row(report, model.name, machine.name, str(path)))
    else:
        print_verify(report, str(path))
    if report.verdict.recommended is None:
        raise click.exceptions.Exit(1)


def _show(model: Model, machine: Machine, given: dict[str, Any]) -> VerifyReport:
    from placement.measure.verify.run import decide_again
    from placement.solve.run import kept_folder
    from placement.solve.solve import make_problem

    request = options.request_of(given)
    problem, _ = make_problem(model, machine, request)
    return decide_again(kept_folder(given["out_folder"], problem, request), problem)


def _verify(model: Model, machine: Machine, path: Path, given: dict[str, Any], is_json: bool) -> VerifyReport:
    from placement.cli.signals import ended_by_signals
    from placement.errors import InputError
    from placement.measure.verify.lock import require_free
    from placement.measure.verify.run import verify
    from placement.solve.run import EngineChoice, run_solve

    options.require_weights(path)
    engine = running_engine(given["engine_name"])
    require_free()  # the solve would plan on the workers that another verify measures
    outcome = run_solve(
        model, machine, options.request_of(given),
        engine=EngineChoice(given["engine_name"]), out_folder=given["out_folder"], warn=options.warn,
    )  # fmt: skip
    if outcome.path is None:
        raise InputError("verify", f"there is no solution to run: {outcome.found.message}")
    with ended_by_signals(), progress_listener(is_json) as listener:
        wanted = _options(given, outcome.problem)
        return verify(outcome.problem, outcome.found, path, engine, outcome.path.parent, wanted, listener)


def running_engine(name: str) -> Engine:
    """The llama.cpp that runs the weights; planning is not enough."""
    from placement.engine.find import find_engine
    from placement.errors import InputError

    engine = find_engine(name)
    if engine is None:
        raise InputError("--engine", "running needs a llama.cpp", value=name)
    return engine


def _options(given: dict[str, Any], problem: Problem) -> Options:
    from dataclasses import replace

    from placement.measure.verify.phases import Limits
    from placement.measure.verify.run import Options, asked_of

    budget_min, timeout_s = given["budget_min"], given["timeout_s"]
    return Options(
        top=given["n_top"],
        rounds=given["rounds"],
        budget_s=None if budget_min is None else budget_min * 60,
        is_fresh=given["is_fresh"],
        asked=replace(
            asked_of(problem, given["is_full_depth"]), repeats=given["repeats"], least_s=given["least_s"]
        ),
        limits=Limits(start_s=timeout_s, prompt_s=timeout_s, canary_s=4 * timeout_s),
    )


def print_verify(report: VerifyReport, model_path: str) -> None:
    """Print the result table, why, and the arguments to use."""
    from rich.console import Console
    from rich.table import Table

    from placement.cli.show import verify_tables as table

    grid = Table(title="measured (predicted)", title_justify="left")
    for name in table.header(report):
        grid.add_column(name, justify="left" if name in ("candidate", "OOM?", "notes") else "right")
    for row in table.rows(report):
        grid.add_row(*row)
    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(grid)
    for line in table.verify_summary(report):
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
    from placement.measure.verify.phases import MEASURED_PHASES

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
