"""`place machine show|detect|probe`."""

from __future__ import annotations

from pathlib import Path

import click

from placement.cli import options
from placement.cli.probe import command as probe_command


@click.group()
def command() -> None:
    """Show, detect or probe a machine.

    \b
    Example:
      place machine show rtx4090-rtx5070ti
    """


@command.command()
@click.argument("name", required=False)
@options.json_option
def show(name: str | None, is_json: bool) -> None:
    """Print a machine file (default: the machine here, or the reference machine without a GPU).

    \b
    Example:
      place machine show
    """
    _print(name, is_json)


@command.command()
@click.option("-o", "--out", type=click.Path(path_type=Path), help="Write the machine file there.")
@options.json_option
def detect(out: Path | None, is_json: bool) -> None:
    """Read the GPUs through NVML and the host through psutil; without a GPU the reference machine is shown.

    \b
    Example:
      place machine detect -o machines/mine.toml
    """
    machine = options.detected_machine()
    if out is not None:
        from placement.inputs.machine_files import save_machine

        save_machine(machine, out)
        click.echo(f"{out}: written", err=True)
    _echo(machine, is_json)


command.add_command(probe_command, "probe")


def _print(name: str | None, is_json: bool) -> None:
    _echo(options.machine_of(name), is_json)


def _echo(machine: object, is_json: bool) -> None:
    import dataclasses
    from typing import cast

    from placement.inputs.machine import Machine
    from placement.inputs.machine_files import machine_toml

    result = cast(Machine, machine)
    if is_json:
        options.echo_json(dataclasses.asdict(result))
    else:
        click.echo(machine_toml(result), nl=False)
