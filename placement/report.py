"""Tables and sentences for the terminal, from solutions and checks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from placement.solution import DeviceUse, Solution

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from placement.check import Check
    from placement.solving import Outcome

FULL_SHARE = 0.97  # a device that uses this much of its cap counts as full


def _console() -> Console:
    from rich.console import Console

    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160
    return console


def _layers(solution: Solution) -> str:
    homes = solution.assignment.homes
    parts = [f"CPU {homes.count('CPU')}"] if "CPU" in homes else []
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
    for title in ("splits\ndecode", "splits\nprompt", "decode\nt/s", "prompt\nt/s", "turn\ns", "headroom\nMiB", "gap"):
        table.add_column(title, justify="right")
    table.add_column("label")
    for each in solutions:
        cards = [f"{name} {_memory(use)}" for name, use in each.devices.items() if name != "Host"]
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
            each.label + ("" if each.is_exact else " (coarse)"),
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


def print_solutions(outcome: Outcome) -> None:
    """The whole answer of `place solve` for a person."""
    console = _console()
    found, problem = outcome.found, outcome.problem
    turn = problem.workload
    console.print(
        f"[bold]{found.model}[/bold] on [bold]{found.machine}[/bold]: {problem.settings.ctx_tokens:,} tokens of context,"
        f" {problem.settings.kv_type_k} KV, {problem.settings.n_slots} slot(s); a turn reads {turn.prompt_tokens:,}"
        f" and writes {turn.generate_tokens:,} tokens at depth {turn.depth_tokens:,}"
    )
    if not found.solutions:
        console.print(f"{found.status}: {found.message}")
        return
    console.print(solution_table(found.solutions))
    best = found.solutions[0]
    for line in full_lines(best):
        console.print(line)
    console.print(f"\n[bold]{best.name}[/bold] ({found.status}, within {best.gap or 0:.2%} of the best possible turn):")
    print(outcome.row()["solutions"][0]["command"])
    if outcome.path is not None:
        kept = "written" if outcome.is_new else "same inputs as before, unchanged"
        console.print(f"\n{outcome.path} ({kept})")


def print_check(result: Check) -> None:
    """The whole answer of `place check` for a person."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    console = _console()
    table = Table(box=SIMPLE_HEAD, pad_edge=False)
    table.add_column("device", style="bold")
    for title in ("weights", "context", "compute", "runtime", "used MiB", "cap MiB", "headroom"):
        table.add_column(title, justify="right")
    for name, use in result.devices.items():
        cells = (use.weights_mib, use.context_mib, use.compute_mib, use.runtime_mib, use.used_mib, use.cap_mib)
        table.add_row(name, *(f"{cell:,.0f}" for cell in cells), f"{use.headroom_mib:,.0f}")
    coarse = "" if result.is_exact else " (coarse)"
    console.print(f"[bold]{result.model}[/bold] on [bold]{result.machine}[/bold], {result.label}{coarse}")
    console.print(table)
    prompt_tps = result.speed.prompt_tps
    prompt = "-" if prompt_tps is None else f"{prompt_tps:,.0f}"
    console.print(f"splits: {result.splits_decode} decode, {result.splits_prompt} prompt")
    console.print(f"speed (estimated): {result.speed.decode_tps:.1f} t/s decode, {prompt} t/s prompt")
    console.print("fits" if result.fits else "[bold]does not fit[/bold]")
    for words in result.unknown_arguments:
        print(f"kept, not a placement argument: {' '.join(words)}")
    for advice in result.advice:
        print(f"- {advice.message}")
