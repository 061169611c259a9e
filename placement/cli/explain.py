"""`place explain`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from placement.cli import options

if TYPE_CHECKING:
    from placement.inputs.machine import Machine
    from placement.inputs.model import Model
    from placement.inputs.problem import Program
    from placement.predict.check import Check

_COLOURS = ("green", "blue", "magenta", "cyan", "bright_green", "bright_blue")
_CPU_COLOUR = "yellow"


@click.command()
@options.model_argument
@click.option(
    "--args", "arguments", metavar="'…'", help="llama-server arguments to draw [the recommended solution's]."
)
@options.machine_option
@options.program_option
@click.option("--width", type=click.IntRange(min=40), help="Columns [the terminal's, at least 80].")
@click.option(
    "--svg",
    "picture",
    type=click.Path(path_type=Path, dir_okay=False),
    metavar="FILE",
    help="Also write the map to FILE as an SVG picture.",
)
@options.json_option
def command(
    model_name: str,
    arguments: str | None,
    machine_name: str | None,
    program: Program,
    width: int | None,
    picture: Path | None,
    is_json: bool,
) -> None:
    """Draw where every layer of MODEL lives, where its experts are, and where its KV cache is.

    One column is one layer; 0, 1, … are the GPUs in the engine's order, c is the CPU.

    \b
    Example:
      place explain gpt-oss-120b --args '-c 131072 -ngl 99 -ot exps=CPU -ctk q8_0 -ctv q8_0'
    """
    from placement.cli.show.explain import layer_row
    from placement.cli.show.explain_svg import save_layer_map
    from placement.predict.check import check_row

    model, machine = options.load(model_name), options.machine_of(machine_name)
    result = _checked(model, machine, arguments, program)
    if picture is not None:
        save_layer_map(picture, model, machine, result.assignment, result.devices)
    if is_json:
        options.echo_json({**check_row(result), "layers": layer_row(model, result.assignment)})
        return
    for line in _lines(model, machine, result, width or max(80, shutil.get_terminal_size().columns)):
        click.echo(line)
    if picture is not None:
        click.echo(f"\n{picture} (written)")


def _checked(model: Model, machine: Machine, arguments: str | None, program: Program) -> Check:
    """What is drawn: the arguments as they stand, or the recommended solution's."""
    from placement.configs.models_conf.choice_row import best_arguments
    from placement.llamacpp.arguments import parse
    from placement.predict.check import check_arguments

    tokens = best_arguments(model, machine, program) if arguments is None else arguments
    return check_arguments(model, machine, parse(tokens), program)


def _lines(model: Model, machine: Machine, result: Check, columns: int) -> Iterator[str]:
    """The drawing, each device in its colour."""
    from placement.cli.show.explain import explain

    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(result.assignment.devices)}
    for line in explain(model, machine, result.assignment, result.devices, columns, result.notes):
        styled = [click.style(text.text, fg={**colours, "CPU": _CPU_COLOUR}.get(text.role)) for text in line]
        yield "".join(styled)
