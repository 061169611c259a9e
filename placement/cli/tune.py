"""`place tune`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from placement.cli import options

if TYPE_CHECKING:
    from placement.inputs.machine import Machine
    from placement.inputs.model import Model
    from placement.measure.tune.lines import Tuned

_TIME = re.compile(r"(\d+(?:\.\d+)?)\s*([smh]?)")


class Duration(click.ParamType):  # type: ignore[type-arg]
    """20m, 90s, 1h; a bare number is minutes."""

    name = "time"

    def convert(self, value: Any, param: Any, ctx: Any) -> float:
        """Seconds."""
        match = _TIME.fullmatch(str(value))
        if match is None or not float(match[1]):
            self.fail(f"{value!r} is no time: 20m, 90s or 1h", param, ctx)
        return float(match[1]) * {"s": 1, "m": 60, "h": 3600, "": 60}[match[2]]


@click.command()
@options.model_argument
@click.option("--model-file", metavar="X.gguf", help="The weights to run [MODEL, where that is a .gguf].")
@options.machine_option
@click.option(
    "--budget",
    "budget_s",
    type=Duration(),
    default="20m",
    show_default=True,
    metavar="TIME",
    help="Stop then.",
)
@options.ctx_option
@options.parallel_option()
@options.kv_option("f16, q8_0, q4_0, …")
@options.ubatch_option
@options.prompt_option("Tokens read.")
@options.generate_option("Tokens written.")
@options.depth_option("Tokens there")
@options.reserve_option
@click.option("--dry-run", "is_dry", is_flag=True, help="Leave the machine file as it is.")
@options.engine_option
@click.option("--out", "out_folder", metavar="DIR", help="Where solutions/ lies [./solutions].")
@options.json_option
def command(
    model_name: str,
    model_file: str | None,
    machine_name: str | None,
    is_dry: bool,
    is_json: bool,
    **given: Any,
) -> None:
    """Find the best placement of MODEL by measuring few: solve, run, refit the machine, solve again.

    Ends when the best measured placement is within its noise of the best predicted one, or with the budget.
    Everything measured is kept: the same command goes on where it ended. The choice was run beside llama.cpp's
    own --fit and did not measure slower.

    \b
    Example:
      place tune qwen3-coder-q5 --model-file Qwen3-Coder-Next-Q5.gguf --budget 20m
    """
    from placement.inputs.recognise import learned_path

    model, machine = options.load(model_name), options.machine_of(machine_name)
    weights = options.weights_path(model, model_file)
    tuned, path = _tune(model, machine, weights, given, is_json), learned_path(machine_name, machine)
    is_written, failure = options.keep_learned(tuned.machine, path, bool(tuned.changes) and not is_dry)
    if is_json:
        row = _row(tuned, model.name, str(weights))
        options.echo_json({**row, "path": str(path), "is_written": is_written})
    else:
        _print(tuned, str(weights), path if is_written or is_dry else None, is_dry)
    if failure is not None:
        raise failure
    if tuned.report is None or tuned.report.verdict.recommended is None:
        raise click.exceptions.Exit(1)


def _print(tuned: Tuned, model_path: str, path: Path | None, is_dry: bool) -> None:
    from placement.cli.verify import print_verify

    if tuned.report is not None:
        print_verify(tuned.report, model_path)
    click.echo(f"- ended: {tuned.why}")
    if tuned.error is not None:
        click.echo(f"- decode speeds predicted from the other runs are off by {tuned.error:.1%}, the median")
    if tuned.changes and path is not None:
        click.echo(f"- {path}: {len(tuned.changes)} values {'would change' if is_dry else 'written'}")


def _tune(model: Model, machine: Machine, weights: Path, given: dict[str, Any], is_quiet: bool) -> Tuned:
    from placement.cli.signals import ended_by_signals
    from placement.cli.verify import progress_listener, running_engine
    from placement.measure.tune.loop import tune
    from placement.measure.verify.run import Options
    from placement.solve.run import EngineChoice

    options.require_weights(weights)
    engine, planner = running_engine(given["engine_name"]), EngineChoice(given["engine_name"])
    root, wanted = Path(given["out_folder"] or "solutions"), Options(budget_s=given["budget_s"])
    request = options.request_of(given)
    with ended_by_signals(), progress_listener(is_quiet) as listener:
        return tune(model, machine, weights, engine, request, planner, root, wanted, listener, options.warn)


def _row(tuned: Tuned, model: str, model_path: str) -> dict[str, Any]:
    from placement.cli.show.verify_tables import verify_row

    report = tuned.report
    return {
        "model": model,
        "machine": tuned.machine.name,
        "is_settled": tuned.is_converged,
        "why": tuned.why,
        "error": None if tuned.error is None else round(tuned.error, 5),
        "steps": [
            {
                "step": each.step,
                "candidate": each.candidate,
                "predicted_tps": round(each.predicted_tps, 3),
                "measured_tps": None if each.measured_tps is None else round(each.measured_tps, 3),
                "error": None if each.error is None else round(each.error, 5),
                "predicted_turn_s": round(each.predicted_turn_s, 4),
                "measured_turn_s": None if each.measured_turn_s is None else round(each.measured_turn_s, 4),
                "status": each.status,
                "learned": list(each.learned),
            }
            for each in tuned.lines
        ],
        "report": None if report is None else verify_row(report, model, tuned.machine.name, model_path),
    }
