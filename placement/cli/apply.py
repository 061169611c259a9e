"""`place apply`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

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
    from placement.configs.models_conf.whole import Placed


def engine_build(name: str) -> str | None:
    """The build of the engine that `--engine` names, such as "b11434"; None without an engine."""
    from placement.engine.find import describe_engine, find_engine
    from placement.errors import EngineMissing

    try:
        engine = find_engine(name)
    except EngineMissing:
        if name != "auto":
            raise
        return None
    info = describe_engine(engine) if engine is not None else None
    return None if info is None else (f"b{info.build}" if info.build is not None else info.version)


@click.command()
@options.model_argument
@click.argument("file", type=click.Path(dir_okay=False))
@solution_option
@click.option("--section", "section_name", metavar="NAME", help="The section [the one that runs MODEL].")
@options.machine_option
@defaults_option
@map_option
@stored_option
@fresh_option
@options.reserve_option
@options.engine_option
@click.option("--dry-run", is_flag=True, help="Print the diff; FILE stays as it is.")
def command(
    model_name: str,
    file: str,
    solution_name: str | None,
    section_name: str | None,
    machine_name: str | None,
    defaults_text: str,
    pairs: tuple[str, ...],
    root: str,
    is_fresh: bool,
    engine_name: str,
    dry_run: bool,
    **given: Any,
) -> None:
    """Write a solution for MODEL into its section of a models.conf, with the reasons as comments.

    Only the section's placement arguments change: sampler and other arguments keep their order, the lines
    that were replaced stay as comments, and everything else stays byte for byte. The file as it was is kept
    as FILE.bak. Doing it again changes nothing.

    \b
    Example:
      place apply gpt-oss-120b models.conf --dry-run
    """
    from datetime import date

    from placement.configs.models_conf.models_conf import read_models_conf
    from placement.configs.models_conf.review import Defaults
    from placement.configs.models_conf.whole import place_in_conf

    placed = place_in_conf(
        options.load(model_name), options.machine_of(machine_name), read_models_conf(file),
        finder_of(file, pairs), Defaults.of_text(defaults_text), options.request_of(given),
        section_name=section_name or model_name, solution_name=solution_name, root=Path(root),
        is_fresh=is_fresh, date=date.today().isoformat(), engine_build=engine_build(engine_name), tell=_tell,
    )  # fmt: skip
    _write(placed, file, dry_run)


def _write(placed: Placed, file: str, dry_run: bool) -> None:
    name = placed.section.name
    if dry_run:
        click.echo(placed.applied.diff() or f"[{name}] is this solution already: nothing to change")
    elif placed.applied.write():
        backup = f"{Path(file).resolve()}.bak"
        click.echo(f"[{name}] is now {placed.choice.name}; the file as it was: {backup}")
    else:
        click.echo(f"[{name}] is this solution already: nothing written")


def _tell(text: str) -> None:
    click.echo(f"place: {text}", err=True)
