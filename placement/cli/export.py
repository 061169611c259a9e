"""`place export`."""

from __future__ import annotations

from pathlib import Path

import click

from placement.cli import options


@click.command()
@options.model_argument
@click.argument("out", type=click.Path(path_type=Path))
@click.option("--overwrite", is_flag=True, help="Replace a file that holds weights.")
def command(model_name: str, out: Path, overwrite: bool) -> None:
    """Write MODEL as a header-only sparse GGUF that llama-fit-params can plan; it takes kilobytes on disk.

    \b
    Example:
      place export qwen3-coder-q5 qwen.gguf
    """
    from placement.inputs.model_files.files import export_header

    n_bytes = export_header(options.load(model_name), out, overwrite=overwrite)
    click.echo(f"{out}: header only, {n_bytes / 1e9:.2f} GB long, a hole where the weights would be")
