"""`place calibrate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from placement.cli import options

if TYPE_CHECKING:
    from placement.measure.calibrate.fit import Calibration
    from placement.measure.calibrate.report import CalibrationReport


@click.command()
@options.machine_option
@click.option("--out", "out_folder", metavar="DIR", help="Where solutions/ lies [./solutions].")
@click.option("--dry-run", "is_dry", is_flag=True, help="Print what would change; write nothing.")
@click.option("--mix", "is_mixed", is_flag=True, help="Fit all engine builds, drivers and clocks together.")
@click.option(
    "--chance",
    type=click.FloatRange(min=0.0001, max=0.5),
    default=0.01,
    show_default=True,
    help="Of running out of memory, for the margin.",
)
@options.json_option
def command(
    machine_name: str | None,
    out_folder: str | None,
    is_dry: bool,
    is_mixed: bool,
    chance: float,
    is_json: bool,
) -> None:
    """Refit the machine's speed and memory coefficients from all its runs in solutions/*/runs.jsonl.

    Decode and prompts apart, robustly, pulled towards what is believed without runs. What the runs do not tell
    keeps its value and is listed with the placement that would tell it. Records of another engine build,
    driver or memory clock are left out and counted. The machine file keeps the values it had.

    \b
    Example:
      place calibrate --machine machines/mine.toml --dry-run
    """
    from placement.inputs.recognise import learned_path
    from placement.measure.calibrate.whole import calibrate_machine

    machine = options.machine_of(machine_name)
    root = Path(out_folder or "solutions")
    changed, report = calibrate_machine(machine, root, options.now(), is_mixed, chance)
    path = learned_path(machine_name, machine)
    is_written, failure = options.keep_learned(changed, path, bool(report.changes) and not is_dry)
    ending = None if failure is not None else _ending(report, path, is_dry)
    _show(report, path, is_written, ending, is_json)
    if failure is not None:
        raise failure
    if not report.data.rows:
        raise click.exceptions.Exit(1)


def _show(report: CalibrationReport, path: Path, is_written: bool, ending: str | None, is_json: bool) -> None:
    from placement.measure.calibrate.report import calibration_row

    if is_json:
        options.echo_json({**calibration_row(report), "path": str(path), "is_written": is_written})
        return
    print_calibration(report)
    if ending is not None:
        click.echo(ending)


def _ending(report: CalibrationReport, path: Path, is_dry: bool) -> str:
    if not report.data.rows:
        return "no runs of this machine: run place verify or place tune first"
    if not report.changes:
        return f"{path}: nothing changes"
    return f"{path}: {len(report.changes)} values {'would change' if is_dry else 'written'}"


def print_calibration(report: CalibrationReport) -> None:
    """Print the runs' errors, the coefficients, what is not known, and the changes."""
    from placement.measure.calibrate import report as words

    for fit in report.fits:
        if fit.errors:
            _print_errors(fit)
            _print_coefficients(fit)
    for line in words.calibration_summary(report):
        click.echo(f"- {line}")
    for fit in report.fits:
        if fit.errors:
            for name, text in words.advice(report.told, fit.unidentified):
                click.echo(f"- {name} keeps its prior: {text}")
    if report.changes:
        click.echo("\nchanges:")
    for each in report.changes:
        old = "-" if each.old is None else f"{each.old.value:g}"
        spread = "" if each.new.uncertainty is None else f" ± {each.new.uncertainty:.2g}"
        click.echo(f"  {each.name}: {old} → {each.new.value:g}{spread} {each.new.unit} ({each.new.source})")


def _print_errors(fit: Calibration) -> None:
    grid = _table(f"{fit.kind}: predicted over measured time", "run", "measured", "before", "without it", "")
    for each in fit.errors:
        after = "-" if each.after is None else f"{each.after:+.1%}"
        note = "" if each.is_counted else "not counted"
        grid.add_row(each.label, _seconds(each.measured_s), f"{each.before:+.1%}", after, note)
    _print(grid)


def _print_coefficients(fit: Calibration) -> None:
    grid = _table(f"{fit.kind}: coefficients", "name", "prior", "value", "±", "unit", "runs", "known")
    for each in fit.parameters:
        known = "prior" if each.name in fit.unidentified else f"{1 - fit.left[each.name] ** 2:.0%}"
        value, spread = fit.values[each.name], fit.uncertainties[each.name]
        row = (each.name, f"{each.prior:.4g}", f"{value:.4g}", f"{spread:.2g}", each.unit)
        grid.add_row(*row, str(fit.n_samples[each.name]), known)
    _print(grid)


def _table(title: str, *columns: str) -> Any:
    from rich.table import Table

    grid = Table(title=title, title_justify="left")
    for i, name in enumerate(columns):
        grid.add_column(name, justify="left" if i == 0 else "right")
    return grid


def _print(grid: Any) -> None:
    import sys

    from rich.console import Console

    Console(width=None if sys.stdout.isatty() else 160, markup=False, highlight=False).print(grid)


def _seconds(value: float) -> str:
    return f"{value * 1e3:.2f} ms" if value < 1 else f"{value:.2f} s"
