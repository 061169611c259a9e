"""`place machine probe`; attached to the group in `machine`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from placement.cli import options

if TYPE_CHECKING:
    from placement.measure.probe import Probed


@click.command()
@options.machine_option
@options.engine_option
@click.option(
    "--budget",
    "budget_s",
    type=click.FloatRange(min=5),
    default=120.0,
    show_default=True,
    metavar="SECONDS",
    help="Cases that do not fit in it are left out.",
)
@click.option("--dry-run", "is_dry", is_flag=True, help="Print what would change; write nothing.")
@options.json_option
def command(machine_name: str | None, engine_name: str, budget_s: float, is_dry: bool, is_json: bool) -> None:
    """Measure this machine in two minutes with llama-bench on small models made here.

    Seeds the speed coefficients of a new machine before any big model is loaded: bandwidth of every device and
    of the CPU, the link, splits and boundaries. Values from runs (place calibrate) are not overwritten.

    \b
    Example:
      place machine probe --machine machines/mine.toml
    """
    from placement.cli.verify import running_engine
    from placement.inputs.recognise import learned_path
    from placement.measure.probe import probe

    machine = options.own_machine(machine_name)
    result = probe(machine, running_engine(engine_name), options.now(), budget_s, options.warn)
    path = learned_path(machine_name, machine)
    is_written, failure = options.keep_learned(result.machine, path, bool(result.changes) and not is_dry)
    if is_json:
        options.echo_json(probe_row(result, str(path), is_written))
    else:
        _print(result, path if is_written or is_dry else None, is_dry)
    if failure is not None:
        raise failure


def _print(result: Probed, path: Path | None, is_dry: bool) -> None:
    for each in result.changes:
        old = "-" if each.old is None else f"{each.old.value:g}"
        spread = "" if each.new.uncertainty is None else f" ± {each.new.uncertainty:.2g}"
        click.echo(f"{each.name}: {old} → {each.new.value:g}{spread} {each.new.unit}")
    if path is not None:
        click.echo(f"{path}: {len(result.changes)} values {'would change' if is_dry else 'written'}")


def probe_row(result: Probed, path: str, is_written: bool) -> dict[str, Any]:
    """The probe as JSON."""
    return {
        "machine": result.machine.name,
        "path": path,
        "is_written": is_written,
        "wall_s": round(result.wall_s, 1),
        "timings": [{"case": row.label, "kind": row.kind, "seconds": row.measured_s} for row in result.rows],
        "failed": list(result.failed),
        "changes": [
            {
                "name": each.name,
                "old": None if each.old is None else each.old.value,
                "new": each.new.value,
                "unit": each.new.unit,
                "uncertainty": each.new.uncertainty,
                "source": each.new.source,
            }
            for each in result.changes
        ],
    }
