"""`place models`."""

from __future__ import annotations

import click

from placement.cli import options


@click.command()
@options.json_option
def command(is_json: bool) -> None:
    """List the models that have a description, nearest folder first.

    \b
    Example:
      place models
    """
    from placement.inputs.model_files.files import model_names, resolve_model

    rows = [(name, resolve_model(name)) for name in model_names()]
    if is_json:
        listed = [{"name": n, "description": each.description, "bytes": each.n_bytes} for n, each in rows]
        options.echo_json({"models": listed})
        return
    width = max((len(name) for name, _ in rows), default=0)
    for name, model in rows:
        click.echo(f"{name:<{width}}  {model.n_bytes / 2**30:6.1f} GiB  {model.description}")
