"""`place import`."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "-o", "--out", "out", type=click.Path(path_type=Path), help="Description to write [models/NAME.toml]."
)
def command(file: Path, out: Path | None) -> None:
    """Describe a GGUF FILE (any part of a split set) without reading its weights.

    \b
    Example:
      place import Qwen3-Coder-Next-UD-Q5_K_XL-00001-of-00002.gguf -o models/my-qwen.toml
    """
    from placement.inputs.model_files.files import read_model, save_model
    from placement.solve.store import slug

    model = read_model(file)
    path = out if out is not None else Path("models") / f"{slug(model.name)}.toml"
    save_model(model, path)
    click.echo(
        f"{path}: {model.architecture}, {len(model.tensors)} tensors, {model.n_bytes / 1e9:.2f} GB of weights"
    )
