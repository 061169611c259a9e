"""`place solve`."""

from __future__ import annotations

import sys
from typing import Any

import click

from placement.cli import options


@click.command()
@options.model_argument
@options.machine_option
@click.option("--ctx", "ctx_tokens", type=click.IntRange(min=1), help="Context tokens over all slots.")
@click.option("--parallel", "n_slots", type=click.IntRange(min=1, max=256), help="Slots (-np).")
@click.option(
    "--kv", "kv_type", metavar="TYPE", help="KV cache type, K and V alike: f16, q8_0, q4_0, … or auto."
)
@click.option("--ubatch", metavar="N|auto", default="auto", show_default=True, help="Physical batch (-ub).")
@options.prompt_option
@options.generate_option
@click.option(
    "--depth", "depth_tokens", type=click.IntRange(min=0), help="Tokens already there [a quarter of --ctx]."
)
@options.reserve_option
@options.objective_option
@click.option("--pin", "pins", multiple=True, metavar="'REGEX=DEV'", help="Tensors that stay on a device.")
@click.option("--ngl", type=click.IntRange(min=0), help="Keep -ngl N: the first layers on the CPU.")
@click.option("--ts", metavar="A,B,…", help="Keep these layer counts.")
@click.option("--devices", metavar="DEV,…", help="Use these cards in this order (none: the CPU).")
@click.option("--max-cpu-layers", type=click.IntRange(min=0), help="Layers that may use the CPU.")
@click.option(
    "--threads",
    "n_threads",
    type=click.IntRange(min=1),
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
    "rivals",
    multiple=True,
    metavar="MODEL",
    help="Rate other models beside this one, in one table.",
)
@click.option("--why", "is_why", is_flag=True, help="Also what more memory would give (solves again).")
@click.option(
    "--top",
    "n_best",
    type=click.IntRange(min=1, max=50),
    metavar="K",
    help="Also the K best placements that differ in a range of layers or in two layers' experts.",
)
@click.option(
    "--time-limit", "time_limit_s", type=options.Finite(min=0.05), default=10.0, show_default=True,
    metavar="SECONDS", help="Of each search: then the best so far is taken, with its gap.",
)  # fmt: skip
@click.option("--seed", type=click.IntRange(min=0), default=1, show_default=True, help="CP-SAT's seed.")
@options.program_option
@options.engine_option
@click.option("--rpc", multiple=True, metavar="HOST:PORT", help="RPC servers whose devices may be used.")
@click.option("--out", "out_folder", metavar="DIR", help="Where solutions/ lies [./solutions].")
@options.json_option
def command(
    model_name: str, machine_name: str | None, is_json: bool, out_folder: str | None, **asked: Any
) -> None:
    """Find the fastest placement of MODEL, with a proof of how close to optimal it is.

    Prints the Pareto table with `aggressive` (the fastest within every cap) and `moderate` (the fastest that
    also keeps 5 % of every card free), what fills each device, and the exact arguments; writes
    solutions/MODEL--MACHINE--WORKLOAD/solution.toml.

    \b
    Example:
      place solve qwen3-coder-q5 --ctx 262144
    """
    from placement.solving import run_compare, run_solve

    model = options.load(model_name)
    machine = options.load_machine(machine_name, asked["rpc"])
    asked["is_detected"] = machine_name is None
    if asked["rivals"]:
        models = [model, *map(options.load, asked["rivals"])]
        rows, rated = run_compare(models, machine, asked)
        if is_json:
            options.echo_json({"machine": machine.name, "models": rows})
        else:
            from placement.report import comparison_text

            click.echo(comparison_text(rated, machine.name, sys.stdout.isatty()), nl=False)
        return
    with options.progress() as tell:
        outcome = run_solve(model, machine, asked, out_folder, options.warn, tell)
    if is_json:
        options.echo_json(outcome.row())
    else:
        from placement.report import solutions_text

        click.echo(solutions_text(outcome, sys.stdout.isatty()), nl=False)
    if not outcome.found.solutions:
        raise click.exceptions.Exit(1)
