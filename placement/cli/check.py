"""`place check`."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Any

import click

from placement.cli import options

if TYPE_CHECKING:
    from placement.predict.check import Check


@click.command()
@options.model_argument
@click.option(
    "--args", "arguments", default="", metavar="'…'", help="llama-server arguments, as you would type them."
)
@options.machine_option
@options.program_option
@options.reserve_option
@options.engine_option
@click.option(
    "--compare/--no-compare", "is_compared", default=True, help="Tell the cost against place's own choice."
)
@options.json_option
def command(
    model_name: str,
    arguments: str,
    machine_name: str | None,
    engine_name: str,
    is_compared: bool,
    is_json: bool,
    **given: Any,
) -> None:
    """Memory, splits, predicted speed and advice for any llama.cpp arguments.

    LLAMA_ARG_* variables count as the engine counts them: after the arguments. Exits with 1 when a device
    would be over its cap.

    \b
    Example:
      place check glm-flash --args '-c 131072 -ngl 99 -ts 33,15 -ctk q8_0 -ctv q8_0 -fa on -fit off'
    """
    from placement.inputs.engine_options import VARIABLE_PREFIX
    from placement.llamacpp.arguments import parse
    from placement.solve.run import EngineChoice, run_check

    model = options.load(model_name)
    environment = {name: value for name, value in os.environ.items() if name.startswith(VARIABLE_PREFIX)}
    parsed = parse(arguments, environment)
    result = run_check(
        model, options.machine_of(machine_name, parsed.rpc), parsed, options.request_of(given),
        engine=EngineChoice(engine_name, parsed.rpc, not machine_name), is_compared=is_compared,
        warn=options.warn,
    )  # fmt: skip
    _print(result, is_json)
    if not result.fits:
        raise click.exceptions.Exit(1)


def _print(result: Check, is_json: bool) -> None:
    from placement.cli.show.report import check_text
    from placement.predict.check import check_row

    if is_json:
        options.echo_json(check_row(result))
    else:
        click.echo(check_text(result, sys.stdout.isatty()), nl=False)
