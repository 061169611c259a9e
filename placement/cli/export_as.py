"""`place export-as`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from placement.cli import options
from placement.cli.conf_options import (
    defaults_option,
    finder_of,
    fresh_option,
    map_option,
    solution_option,
    stored_option,
)

if TYPE_CHECKING:
    from placement.configs.formats.launch import Launch
    from placement.inputs.machine import Machine

FORMATS = ("command", "preset", "llama-swap", "compose", "systemd", "json", "ik_llama", "koboldcpp")


@click.command()
@click.argument("format_name", metavar="FORMAT", type=click.Choice(FORMATS))
@click.argument("model_names", metavar="MODEL...", nargs=-1)
@click.option(
    "--conf", "conf_file", metavar="FILE", help="Export the sections of a models.conf as they stand."
)
@solution_option
@options.machine_option
@defaults_option
@map_option
@stored_option
@fresh_option
@click.option(
    "--file",
    "files",
    multiple=True,
    metavar="MODEL=PATH",
    help="Where a model's GGUF file is [what its section, or the header read, says; else MODEL.gguf].",
)
@click.option(
    "--server", default="llama-server", show_default=True, metavar="PATH", help="The server's program."
)
@click.option(
    "--port", type=click.IntRange(1, 65535), default=8080, show_default=True, help="The server's port."
)
def command(
    format_name: str,
    model_names: tuple[str, ...],
    conf_file: str | None,
    solution_name: str | None,
    machine_name: str | None,
    defaults_text: str,
    pairs: tuple[str, ...],
    root: str,
    is_fresh: bool,
    files: tuple[str, ...],
    server: str,
    port: int,
) -> None:
    """Print the choice as FORMAT: a command line, a llama-server router preset, llama-swap YAML, a Docker
    Compose service, a systemd unit, JSON, or the command line of ik_llama.cpp or KoboldCpp.

    command, preset, llama-swap and json take any number of models, the others one. What a format or a
    program cannot say is refused by name.

    \b
    Examples:
      place export-as preset glm-flash-q4 gpt-oss-120b > models.ini
      place export-as systemd gpt-oss-120b --file gpt-oss-120b=/models/gpt-oss-120b.gguf
    """
    from placement.configs.formats.launches import launches_of_conf, with_files
    from placement.configs.formats.write import written
    from placement.configs.models_conf.models_conf import read_models_conf
    from placement.configs.models_conf.review import Defaults

    machine = options.machine_of(machine_name)
    if conf_file is not None:
        conf, finder = read_models_conf(conf_file), finder_of(conf_file, pairs)
        defaults = Defaults.of_text(defaults_text)
        launches = launches_of_conf(conf, machine, finder, defaults, model_names)
    else:
        launches = [_launch(name, machine, solution_name, Path(root), is_fresh) for name in model_names]
    launches = with_files(launches, dict(_pair(text) for text in files))
    launches = [replace(launch, program=server, port=port) for launch in launches]
    click.echo(written(format_name, launches), nl=False)


def _launch(name: str, machine: Machine, solution_name: str | None, root: Path, is_fresh: bool) -> Launch:
    """The launch of a model's solution for its own profile."""
    from placement.configs.formats.launches import launch_of_choice
    from placement.configs.models_conf.choice import choice_of
    from placement.configs.models_conf.choice_row import choice_row
    from placement.solve.request import Request

    model = options.load(name)
    tell = lambda text: click.echo(f"place: {text}", err=True)  # noqa: E731
    row = choice_row(model, machine, Request(), root, is_fresh=is_fresh, tell=tell)
    choice = choice_of(row, solution_name)
    return launch_of_choice(choice, model, model.profile.extra_args)


def _pair(text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not equals or not name or not path:
        raise click.BadParameter("must be MODEL=PATH", param_hint="--file")
    return name, path
