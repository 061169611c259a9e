"""A report → the first user's result table: measured beside predicted, as text cells and as JSON rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from placement.inputs.problem import HOST
from placement.llamacpp.emit.arguments import shell_command
from placement.measure.records import log as records
from placement.measure.verify.decide import CandidateResult
from placement.measure.verify.run import VerifyReport

DASH = "-"
_MEMORY_WORDS = {
    records.OK: "no",
    records.OOM_START: "at start",
    records.OOM_INFERENCE: "in inference",
    records.OOM_INTERMITTENT: "in some rounds",
}


def seen_devices(report: VerifyReport) -> list[str]:
    """Return the devices that any candidate's memory was seen or predicted on, in their order."""
    names: dict[str, None] = {}
    for result in report.verdict.results:
        names.update(dict.fromkeys(result.devices))
        if result.predicted is not None:
            names.update(dict.fromkeys(result.predicted.self_mib))
    return sorted(name for name in names if name != HOST)


def header(report: VerifyReport) -> list[str]:
    """Return the column heads; a cell "a (b)" is measured and predicted."""
    devices = [f"{name} MiB" for name in seen_devices(report)]
    return ["candidate", *devices, "splits bs=1", "t/s", "at depth", "prompt t/s", "turn s", "OOM?", "notes"]


def rows(report: VerifyReport) -> list[list[str]]:
    """Return the cells of every candidate, the recommended one marked with a star."""
    devices = seen_devices(report)
    return [
        _cells(result, devices, result is report.verdict.recommended) for result in report.verdict.results
    ]


def _cells(result: CandidateResult, devices: Sequence[str], is_recommended: bool) -> list[str]:
    predicted = result.predicted
    return [
        f"{result.name}{' *' if is_recommended else ''}",
        *(_memory(result, name) for name in devices),
        _pair(result.splits_decode, predicted.splits_decode if predicted else None, "{:.0f}"),
        _pair(result.decode_tps, None, "{:.1f}"),
        _pair(result.depth_tps, predicted.decode_tps if predicted else None, "{:.1f}"),
        _pair(result.prompt_tps, predicted.prompt_tps if predicted else None, "{:.0f}"),
        _pair(result.turn_s, predicted.turn_s if predicted else None, "{:.2f}"),
        _MEMORY_WORDS.get(result.status, DASH),
        "; ".join([f"{result.n_good} of {result.n_rounds} rounds", *_short(result)]),
    ]


def _short(result: CandidateResult) -> list[str]:
    status = [] if result.status in _MEMORY_WORDS else [result.status]
    notes = list(dict.fromkeys(note.split("; its log is")[0] for note in result.notes))
    return [*status, *notes]


def _memory(result: CandidateResult, name: str) -> str:
    """ "17285 70% (17101)": the card's peak, its share of the card, the engine's own as predicted."""
    peak = result.devices.get(name)
    predicted = result.predicted.self_mib.get(name) if result.predicted is not None else None
    if peak is None:
        return DASH if predicted is None else f"{DASH} ({predicted:.0f})"
    share = f" {peak.peak_mib / peak.total_mib:.0%}" if peak.total_mib else ""
    return f"{peak.peak_mib:.0f}{share}" + ("" if predicted is None else f" ({predicted:.0f})")


def _pair(measured: float | None, predicted: float | None, form: str) -> str:
    shown = DASH if measured is None else form.format(measured)
    return shown if predicted is None else f"{shown} ({form.format(predicted)})"


def verify_summary(report: VerifyReport) -> list[str]:
    """Return the verdict in sentences, the noise floor and what is missing included."""
    verdict = report.verdict
    lines = [*verdict.reasons]
    if verdict.noise is not None:
        lines.append(
            f"noise floor of a turn: ±{verdict.noise:.1%} in one round; more rounds tell smaller differences apart"
        )
    if not report.is_complete:
        lines.append("not all rounds were run: place verify again measures the rest")
    return lines


def verify_row(report: VerifyReport, model: str, machine: str, model_path: str) -> dict[str, Any]:
    """Return the report as JSON, every number measured unless its key says predicted."""
    verdict = report.verdict
    picked = verdict.recommended
    return {
        "model": model,
        "machine": machine,
        "label": "measured",
        "campaign": report.campaign,
        "is_complete": report.is_complete,
        "noise": None if verdict.noise is None else round(verdict.noise, 5),
        "recommended": None if picked is None else picked.name,
        "command": None if picked is None else command(picked, model_path),
        "ties": list(verdict.ties),
        "reasons": list(verdict.reasons),
        "results": [_result_row(result) for result in verdict.results],
    }


def command(result: CandidateResult, model_path: str) -> str:
    """Return the shell line that runs a candidate's arguments."""
    return shell_command("llama-server", model_path, result.arguments)


def _result_row(result: CandidateResult) -> dict[str, Any]:
    predicted = result.predicted
    return {
        "name": result.name,
        "role": result.role,
        "status": result.status,
        "rounds": {"good": result.n_good, "run": result.n_rounds},
        "args": list(result.arguments),
        "devices": {
            name: peak.model_dump(exclude_none=True) for name, peak in sorted(result.devices.items())
        },
        "splits": {"decode": result.splits_decode},
        "speed": {
            "decode_tps": _rounded(result.decode_tps),
            "depth_tps": _rounded(result.depth_tps),
            "prompt_tps": _rounded(result.prompt_tps),
            "turn_s": _rounded(result.turn_s),
            "turns_s": [round(turn, 4) for turn in result.turns_s],
        },
        "load_s": _rounded(result.load_s),
        "predicted": None if predicted is None else predicted.model_dump(exclude_none=True),
        "fit_args": None if result.fit_arguments is None else list(result.fit_arguments),
        "notes": list(result.notes),
    }


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 4)
