"""Tables and sentences for the terminal, from solutions and checks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from placement.inputs.problem import CPU, HOST
from placement.predict.solution import DeviceUse, Solution, label_words
from placement.solve.why import next_best_line, next_layer_lines

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table
    from rich.text import Text

    from placement.predict.check import Check
    from placement.solve.questions import Rated
    from placement.solve.run import Outcome

FULL_SHARE = 0.97  # a device that uses this much of its cap counts as full


PIPE_COLUMNS = 160  # where there is no terminal to ask


def _rendered(parts: Iterable[RenderableType], is_terminal: bool) -> str:
    """The parts as text: as wide as the terminal, styled where it has colours; sentences are not wrapped."""
    import io

    from rich.console import Console

    out = io.StringIO()
    width = None if is_terminal else PIPE_COLUMNS
    console = Console(file=out, width=width, force_terminal=is_terminal, highlight=False, markup=False)
    for part in parts:
        console.print(part, soft_wrap=not hasattr(part, "columns"))
    return out.getvalue()


def _head(model: str, machine: str, rest: str) -> Text:
    from rich.text import Text

    return Text.assemble((model, "bold"), " on ", (machine, "bold"), rest)


def _layers(solution: Solution) -> str:
    homes = solution.assignment.homes
    parts = [f"{CPU} {homes.count(CPU)}"] if CPU in homes else []
    parts += [f"{name} {homes.count(name)}" for name in solution.assignment.devices]
    return "\n".join(parts)


def _memory(use: DeviceUse) -> str:
    return f"{use.used_mib:,.0f} {use.used_mib / use.total_mib:.0%}"


def solution_table(solutions: tuple[Solution, ...]) -> Table:
    """The Pareto table: a row a solution."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("solution", style="bold")
    for title in ("layers", "experts\non CPU", "MiB and share\nof each card", "host\nMiB", "ub"):
        table.add_column(title, justify="left" if title == "layers" else "right")
    for title in (
        "splits\ndecode",
        "splits\nprompt",
        "decode\nt/s",
        "prompt\nt/s",
        "turn\ns",
        "headroom\nMiB",
        "gap",
    ):
        table.add_column(title, justify="right")
    table.add_column("label")
    for each in solutions:
        cards = [f"{name} {_memory(use)}" for name, use in each.devices.items() if name != HOST]
        prompt_tps = each.speed.prompt_tps
        table.add_row(
            each.name,
            _layers(each),
            str(each.n_host_layers()),
            "\n".join(cards) or "-",
            f"{each.devices['Host'].self_mib:,.0f}",
            str(each.assignment.settings.ubatch_tokens),
            str(each.splits_decode),
            str(each.splits_prompt),
            f"{each.speed.decode_tps:.1f}",
            "-" if prompt_tps is None else f"{prompt_tps:,.0f}",
            f"{each.speed.turn_s:.2f}",
            f"{each.headroom_mib:,.0f}",
            "-" if each.gap is None else f"{each.gap:.2%}",
            label_words(each.label, is_exact=each.is_exact),
        )
    return table


def full_lines(solution: Solution) -> list[str]:
    """One line for each device that is full: what fills it."""
    lines = []
    for name, use in solution.devices.items():
        cap = use.cap_mib - use.runtime_mib
        if cap <= 0 or use.self_mib < FULL_SHARE * cap:
            continue
        what = f"weights {use.weights_mib:,.0f}, context {use.context_mib:,.0f}, compute buffers {use.compute_mib:,.0f}"
        beside = f" (beside {use.runtime_mib:,.0f} of runtime)" if use.runtime_mib else ""
        lines.append(f"{name} is full: {use.self_mib:,.0f} of {cap:,.0f} MiB{beside}: {what}")
    return lines


def solutions_text(outcome: Outcome, is_terminal: bool = False) -> str:
    """The whole answer of `place solve` for a person."""
    return _rendered(_solution_parts(outcome), is_terminal)


def _solution_parts(outcome: Outcome) -> Iterator[RenderableType]:
    found, turn, settings = outcome.found, outcome.problem.workload, outcome.problem.settings
    kv_types = "/".join(settings.kv_types)
    yield _head(
        found.model,
        found.machine,
        f": {settings.ctx_tokens:,} tokens of context, {kv_types} KV, {settings.n_slots} slot(s); a turn"
        f" reads {turn.prompt_tokens:,} and writes {turn.generate_tokens:,} tokens at depth {turn.depth_tokens:,}",
    )
    if not found.solutions:
        yield f"{found.status}: {found.message}"
        return
    yield solution_table(found.solutions)
    yield from _note_lines(found.solutions)
    best = found.solutions[0]
    yield from full_lines(best)
    yield from next_layer_lines(outcome.problem, best)
    if (line := next_best_line(found)) is not None:
        yield line
    yield from outcome.reasons
    yield f"\n{best.name} ({found.status}, within {best.gap or 0:.2%} of the best possible turn):"
    yield outcome.row()["solutions"][0]["command"]
    if outcome.path is not None:
        kept = "written" if outcome.is_new else "same inputs as before, unchanged"
        yield f"\n{outcome.path} ({kept})"


def check_text(result: Check, is_terminal: bool = False) -> str:
    """The whole answer of `place check` for a person."""
    return _rendered(_check_parts(result), is_terminal)


def _check_parts(result: Check) -> Iterator[RenderableType]:
    speed = result.speed
    prompt = "-" if speed.prompt_tps is None else f"{speed.prompt_tps:,.0f}"
    yield _head(result.model, result.machine, f", {label_words(result.label, is_exact=result.is_exact)}")
    yield from _note_lines([result])
    yield device_table(result.devices)
    yield f"splits: {result.splits_decode} decode, {result.splits_prompt} prompt"
    yield f"speed (estimated): {speed.decode_tps:.1f} t/s decode, {prompt} t/s prompt"
    yield "fits" if result.fits else "does not fit"
    for words in result.unknown_arguments:
        yield f"kept, not a placement argument: {' '.join(words)}"
    for advice in result.advice:
        yield f"- {advice.message}"


def _note_lines(found: Iterable[Check | Solution]) -> Iterator[str]:
    """Why figures are not exact, each reason once."""
    notes = dict.fromkeys(note for each in found for note in each.notes)
    return (f"coarse: {note}" for note in notes)


def device_table(devices: dict[str, DeviceUse]) -> Table:
    """What each device holds, in MiB."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("device", style="bold")
    for title in ("weights", "context", "compute", "runtime", "used MiB", "cap MiB", "headroom"):
        table.add_column(title, justify="right")
    for name, use in devices.items():
        cells = (
            use.weights_mib,
            use.context_mib,
            use.compute_mib,
            use.runtime_mib,
            use.used_mib,
            use.cap_mib,
        )
        table.add_row(name, *(f"{cell:,.0f}" for cell in cells), f"{use.headroom_mib:,.0f}")
    return table


def comparison_text(rated: Sequence[Rated], machine: str, is_terminal: bool) -> str:
    """Several models' fastest placements in one table."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    is_exact = all(each.best.is_exact for each in rated if each.best is not None)
    title = f"fastest placements on {machine} (estimated{'' if is_exact else ', coarse'})"
    table = Table(box=SIMPLE_HEAD, pad_edge=False, title=title)
    table.add_column("model", style="bold")
    for title in ("GiB", "decode t/s", "prompt t/s", "turn s", "layers on CPU", "ub", "headroom MiB"):
        table.add_column(title, justify="right")
    for each in rated:
        size = f"{each.model.n_bytes / 2**30:.1f}"
        if each.best is None:
            table.add_row(each.model.name, size, "does not fit", "", "", "", "", "")
            continue
        best = each.best
        table.add_row(
            each.model.name, size, f"{best.speed.decode_tps:.1f}", f"{best.speed.prompt_tps or 0:,.0f}",
            f"{best.speed.turn_s:.2f}", str(best.n_host_layers()),
            str(best.assignment.settings.ubatch_tokens), f"{best.headroom_mib:,.0f}",
        )  # fmt: skip
    notes = _note_lines(each.best for each in rated if each.best is not None)
    return _rendered([table, *notes], is_terminal)
