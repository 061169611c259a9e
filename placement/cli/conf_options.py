"""The options and helpers of the commands that read a models.conf or a stored solution."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

if TYPE_CHECKING:
    from placement.configs.models_conf.find_model import ModelFinder

defaults_option = click.option(
    "--defaults",
    "defaults_text",
    default="",
    metavar="'…'",
    help="Arguments that every profile runs with although no section says so, such as '-ctk q8_0 -ctv q8_0'.",
)


map_option = click.option(
    "--map",
    "pairs",
    multiple=True,
    metavar="SECTION=MODEL",
    help="Which model a section runs; remembered for the next time.",
)


def finder_of(file: str, pairs: tuple[str, ...]) -> ModelFinder:
    """A finder with the remembered mapping and the pairs given now, which are remembered."""
    from placement.configs.models_conf.find_model import ModelFinder, read_mapping, remember

    kept = remember(pairs) if pairs else None
    if kept is not None:
        click.echo(f"place: mapping remembered in {kept}", err=True)
    return ModelFinder(read_mapping(pairs), Path(file).resolve().parent)


solution_option = click.option(
    "--solution", "solution_name", metavar="NAME", help="Which solution [the recommended one]."
)


stored_option = click.option(
    "--out",
    "root",
    default="solutions",
    show_default=True,
    metavar="DIR",
    help="Where solutions are stored; one that fits is taken from there.",
)


fresh_option = click.option(
    "--fresh", "is_fresh", is_flag=True, help="Solve even where a solution is stored."
)
