"""`place solve`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import click

from placement.cli import options
from placement.llamacpp.context_rules import MAX_SLOTS
from placement.solve.request import LEAST_TIME_S, MOST_BEST, Request

if TYPE_CHECKING:
    from placement.inputs.machine import Machine
    from placement.inputs.model import Model
    from placement.solve.questions import Maximize
    from placement.solve.run import Outcome


@click.command()
@options.model_argument
@options.machine_option
@options.ctx_option
@options.parallel_option(MAX_SLOTS)
@options.kv_option("f16, q8_0, q4_0, … or auto.")
@options.ubatch_option
@options.prompt_option()
@options.generate_option()
@options.depth_option("Tokens already there")
@options.reserve_option
@options.objective_option
@click.option("--pin", "pins", multiple=True, metavar="'REGEX=DEV'", help="Tensors that stay on a device.")
@click.option(
    "--ngl", "n_gpu_layers", type=click.IntRange(min=0), help="Keep -ngl N: the first layers on the CPU."
)
@click.option(
    "--ts", "tensor_split", metavar="A,B,…", callback=options.layer_counts, help="Keep these layer counts."
)
@click.option(
    "--devices",
    metavar="DEV,…",
    callback=options.device_names,
    help="Use these cards in this order (none: the CPU).",
)
@click.option("--max-cpu-layers", type=click.IntRange(min=0), help="Layers that may use the CPU.")
@click.option(
    "--threads",
    "fixed",
    type=click.IntRange(min=1),
    callback=options.fixed_threads,
    metavar="N",
    help="Keep -t N: CPU threads [one a core, or fewer where thread_us says so].",
)
@click.option("--keep", metavar="'ARGS'", help="llama.cpp arguments that stay; the rest is solved.")
@click.option("--min-decode", "min_decode_tps", type=options.Finite(min=0, min_open=True), metavar="T",
              help="At least T tokens per second.")  # fmt: skip
@click.option(
    "--maximize",
    type=click.Choice(["prompt", "headroom", "context"]),
    help="What to have most of, with --min-decode.",
)
@click.option(
    "--max-ctx",
    "is_max_ctx",
    is_flag=True,
    help="The largest context that stays on the GPUs (or keeps --min-decode).",
)
@click.option(
    "--compare",
    "others",
    multiple=True,
    metavar="MODEL",
    help="Rate other models beside this one, in one table.",
)
@click.option("--why", "is_why", is_flag=True, help="Also what more memory would give (solves again).")
@click.option(
    "--top",
    "n_best",
    type=click.IntRange(min=1, max=MOST_BEST),
    metavar="K",
    help="Also the K best placements that differ in a range of layers or in two layers' experts.",
)
@click.option(
    "--time-limit", "time_limit_s", type=options.Finite(min=LEAST_TIME_S),
    default=options.REQUEST_DEFAULTS.time_limit_s, show_default=True, metavar="SECONDS",
    help="Of each search: then the best so far is taken, with its gap.",
)  # fmt: skip
@click.option(
    "--seed", type=click.IntRange(min=0), default=options.REQUEST_DEFAULTS.seed, show_default=True,
    help="CP-SAT's seed.",
)  # fmt: skip
@options.program_option
@options.engine_option
@click.option("--rpc", multiple=True, metavar="HOST:PORT", help="RPC servers whose devices may be used.")
@click.option("--out", "out_folder", metavar="DIR", help="Where solutions/ lies [./solutions].")
@options.json_option
def command(
    model_name: str,
    machine_name: str | None,
    is_json: bool,
    engine_name: str,
    rpc: tuple[str, ...],
    others: tuple[str, ...],
    maximize: Maximize | None,
    is_max_ctx: bool,
    is_why: bool,
    out_folder: str | None,
    **given: Any,
) -> None:
    """Find the fastest placement of MODEL, with a proof of how close to optimal it is.

    Prints the Pareto table with `aggressive` (the fastest within every cap) and `moderate` (the fastest that
    also keeps 5 % of every card free), what fills each device, and the exact arguments; writes
    solutions/MODEL--MACHINE--WORKLOAD/solution.toml.

    \b
    Example:
      place solve qwen3-coder-q5 --ctx 262144
    """
    from placement.solve.run import EngineChoice, run_solve

    model, machine = options.load(model_name), options.machine_of(machine_name, rpc)
    if others:
        _compare([model, *map(options.load, others)], machine, options.request_of(given), is_json)
        return
    with options.progress() as tell:
        outcome = run_solve(
            model, machine, options.request_of(given), engine=EngineChoice(engine_name, rpc, machine_name is None),
            maximize=maximize, is_max_ctx=is_max_ctx, is_why=is_why,
            out_folder=out_folder, warn=options.warn, progress=tell,
        )  # fmt: skip
    _print(outcome, is_json)
    if not outcome.found.solutions:
        raise click.exceptions.Exit(1)


def _print(outcome: Outcome, is_json: bool) -> None:
    if is_json:
        options.echo_json(outcome.row())
        return
    from placement.cli.show.report import solutions_text

    click.echo(solutions_text(outcome, sys.stdout.isatty()), nl=False)


def _compare(models: Sequence[Model], machine: Machine, request: Request, is_json: bool) -> None:
    from placement.solve.run import run_compare

    rows, rated = run_compare(models, machine, request)
    if is_json:
        options.echo_json({"machine": machine.name, "models": rows})
        return
    from placement.cli.show.report import comparison_text

    click.echo(comparison_text(rated, machine.name, sys.stdout.isatty()), nl=False)
