"""`place profiles`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from placement.cli import options
from placement.cli.conf_options import defaults_option, finder_of, map_option

if TYPE_CHECKING:
    from placement.configs.models_conf.review import ProfileReview


@click.command()
@click.argument("file", type=click.Path(dir_okay=False))
@options.machine_option
@defaults_option
@map_option
@click.option("--section", "names", multiple=True, metavar="NAME", help="Only these sections.")
@click.option("--no-solve", is_flag=True, help="Only what each profile costs now.")
@click.option(
    "--out", "root", default="solutions", show_default=True, metavar="DIR", help="Where solutions are stored."
)
@click.option("--fresh", "is_fresh", is_flag=True, help="Solve even where a solution is stored.")
@options.reserve_option
@options.program_option
@options.json_option
def command(
    file: str,
    machine_name: str | None,
    defaults_text: str,
    pairs: tuple[str, ...],
    names: tuple[str, ...],
    no_solve: bool,
    root: str,
    is_fresh: bool,
    is_json: bool,
    **given: Any,
) -> None:
    """Say what every profile of a models.conf costs now, what place would do instead, and the gain.

    A section's keys are llama.cpp's own variables without LLAMA_ARG_ (CTX_SIZE, N_GPU_LAYERS, FIT, …);
    EXTRA_ARGS holds further arguments, which win. Its model is the one given with --map, else the one of its
    model file, else the one of its name. Cache types that a section lacks come from --defaults, else from
    the model's description. A section that cannot be read is reported and does not stop the others; the
    exit code is then 2.

    \b
    Example:
      place profiles models.conf --defaults '-ctk q8_0 -ctv q8_0'
    """
    from placement.configs.models_conf.models_conf import read_models_conf
    from placement.configs.models_conf.review import Defaults, review

    conf = read_models_conf(file)
    sections = [conf.section(name) for name in names] or None
    result = review(
        conf, options.machine_of(machine_name), finder_of(file, pairs), Defaults.of_text(defaults_text),
        options.request_of(given), sections=sections, is_solved=not no_solve, root=Path(root),
        is_fresh=is_fresh, progress=lambda name: click.echo(f"place: [{name}]", err=True),
    )  # fmt: skip
    profiles = list(result)
    _print(file, conf.problems, profiles, is_json)
    if any(each.problem is not None for each in profiles):
        raise click.exceptions.Exit(2)


def _print(file: str, problems: Sequence[str], profiles: list[ProfileReview], is_json: bool) -> None:
    from placement.cli.show.profile_tables import review_lines
    from placement.configs.models_conf.review import profile_row

    if is_json:
        options.echo_json({"file": file, "profiles": [profile_row(each) for each in profiles]})
    else:
        click.echo("\n".join([*review_lines(profiles), *(f"note: {text}" for text in problems)]))
