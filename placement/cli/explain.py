"""`place explain`."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from typing import TYPE_CHECKING

import click

from placement.cli import options

if TYPE_CHECKING:
    from placement.check import Check
    from placement.machine import Machine
    from placement.model import Model
    from placement.problem import Program

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
@options.json_option
def command(
    model_name: str,
    arguments: str | None,
    machine_name: str | None,
    program: Program,
    width: int | None,
    is_json: bool,
) -> None:
    """Draw where every layer of MODEL lives, where its experts are, and where its KV cache is.

    One column is one layer; 0, 1, … are the GPUs in the engine's order, c is the CPU.

    \b
    Example:
      place explain gpt-oss-120b --args '-c 131072 -ngl 99 -ot exps=CPU -ctk q8_0 -ctv q8_0'
    """
    from placement.arguments import parse
    from placement.check import check, check_row
    from placement.explain import layer_row
    from placement.profiles import best_arguments

    model, machine = options.load(model_name), options.load_machine(machine_name)
    tokens = best_arguments(model, machine, program) if arguments is None else arguments
    result = check(model, machine, parse(tokens), program)
    if is_json:
        options.echo_json({**check_row(result), "layers": layer_row(model, result.assignment)})
        return
    for line in _lines(model, machine, result, width or max(80, shutil.get_terminal_size().columns)):
        click.echo(line)


def _lines(model: Model, machine: Machine, result: Check, columns: int) -> Iterator[str]:
    """The drawing, each device in its colour."""
    from placement.explain import explain

    colours = {name: _COLOURS[i % len(_COLOURS)] for i, name in enumerate(result.assignment.devices)}
    for line in explain(model, machine, result.assignment, result.devices, columns):
        styled = [click.style(text.text, fg={**colours, "CPU": _CPU_COLOUR}.get(text.role)) for text in line]
        yield "".join(styled)
