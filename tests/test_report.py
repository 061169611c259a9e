from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
from solving_support import card, expert_model, one_card, two_cards

from placement.cli.show.report import check_text, comparison_text, full_lines, solutions_text
from placement.inputs.machine import Machine
from placement.llamacpp.arguments import parse
from placement.predict.check import check_arguments
from placement.predict.solution import DeviceUse, Solution
from placement.solve.questions import compare
from placement.solve.request import Request
from placement.solve.run import NO_ENGINE, Outcome, run_solve

ASKED = Request(ubatch_tokens=512)


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> Outcome:
    """A solve of a small model on two cards that hold half of it."""
    folder = str(tmp_path_factory.mktemp("solutions"))
    return run_solve(expert_model(8), two_cards(400, 250), ASKED, engine=NO_ENGINE, out_folder=folder)


def test_every_solution_has_a_row(outcome: Outcome) -> None:
    """The table names every solution, its label, and the layers of its cards."""
    text = solutions_text(outcome)
    for each in outcome.solution_set.solutions:
        assert each.name in text
        for name in each.assignment.devices:
            assert f"{name} {each.assignment.homes.count(name)}" in text
    assert "estimated" in text


def test_exact_command_is_one_line(outcome: Outcome) -> None:
    """The recommended command stands on one line of its own, unwrapped, as in the JSON object."""
    assert outcome.row()["solutions"][0]["command"] in solutions_text(outcome).splitlines()


def test_fullness_is_explained(outcome: Outcome) -> None:
    """Every full device has a line that says what fills it."""
    best = outcome.solution_set.solutions[0]
    lines = full_lines(best)
    assert lines
    assert all("is full" in line and "weights" in line and "compute buffers" in line for line in lines)


def of(use: DeviceUse, outcome: Outcome) -> Solution:
    """The recommended solution with this use of CUDA0 alone."""
    return dataclasses.replace(outcome.solution_set.solutions[0], devices={"CUDA0": use})


@pytest.mark.parametrize(
    ("compute_mib", "is_full"), [(100.0, False), (169.0, False), (171.0, True), (200.0, True)]
)
def test_full_begins_at_97_percent(compute_mib: float, is_full: bool, outcome: Outcome) -> None:
    """A device counts as full from 97 % of what its runtime leaves."""
    use = DeviceUse(500.0, 300.0, compute_mib, 200.0, 1200.0, 1300.0)
    assert bool(full_lines(of(use, outcome))) is is_full


def test_markup_in_names_is_printed(outcome: Outcome) -> None:
    """A model or machine whose name looks like markup is printed as it is called."""
    result = dataclasses.replace(outcome.solution_set, model="[/red]", machine="[bold]x")
    text = solutions_text(dataclasses.replace(outcome, solution_set=result))
    assert "[/red] on [bold]x" in text


def test_markup_in_checks_is_printed() -> None:
    """So it is in a check."""
    machine = dataclasses.replace(one_card(4000), name="[/x]")
    text = check_text(check_arguments(expert_model(2), machine, parse("-c 4096 -ngl 99")))
    assert "tiny-experts on [/x], estimated" in text


def test_check_shows_every_device() -> None:
    """A check has a row for each device and the host, splits, speed, and whether it fits."""
    result = check_arguments(expert_model(2), two_cards(4000, 4000), parse("-c 4096 -ngl 99 --jinja"))
    text = check_text(result)
    for words in (
        "CUDA0",
        "CUDA1",
        "Host",
        f"splits: {result.splits_decode} decode",
        "t/s decode",
        "\nfits",
        "--jinja",
    ):
        assert words in text


def test_check_that_does_not_fit() -> None:
    """A check over a cap says that it does not fit."""
    result = check_arguments(expert_model(2), one_card(50), parse("-c 4096 -ngl 99"))
    assert "does not fit" in check_text(result)


def unmirrored() -> Machine:
    """A machine with one Vulkan card."""
    return dataclasses.replace(one_card(4000), devices=(card("Vulkan0", 4000),))


def test_check_on_an_unmirrored_backend_says_so_at_the_top() -> None:
    """The label is coarse, and the line below it says why."""
    head, why, *_ = check_text(
        check_arguments(expert_model(2), unmirrored(), parse("-c 4096 -ngl 99"))
    ).splitlines()
    assert head.endswith(", estimated (coarse)")
    assert why.startswith("coarse: Vulkan0: llama.cpp's Vulkan backend is not mirrored here")


def test_solve_on_an_unmirrored_backend_says_so_once(tmp_path: Path) -> None:
    """Every row's label is coarse; one line below the table says why."""
    outcome = run_solve(expert_model(2), unmirrored(), ASKED, engine=NO_ENGINE, out_folder=str(tmp_path))
    text = solutions_text(outcome)
    assert text.count("estimated (coarse)") == len(outcome.solution_set.solutions)
    assert text.count("backend is not mirrored here") == 1


def test_comparison_on_an_unmirrored_backend_is_coarse() -> None:
    """So does a comparison's title."""
    rated = compare([expert_model(2)], unmirrored(), Request())
    text = comparison_text(rated, "other", is_terminal=False)
    assert "(estimated, coarse)" in text and "Vulkan backend is not mirrored" in text


def test_mixed_cache_is_in_the_head(outcome: Outcome) -> None:
    """Both types stand where they differ, one where they do not."""
    settings = dataclasses.replace(outcome.problem.settings, kv_type_v="f16")
    mixed = dataclasses.replace(outcome, problem=dataclasses.replace(outcome.problem, settings=settings))
    assert ", q8_0 KV," in solutions_text(outcome)
    assert ", q8_0/f16 KV," in solutions_text(mixed)


def test_terminal_gets_colours(outcome: Outcome) -> None:
    """A terminal gets styles, a pipe plain text."""
    assert "\x1b[" in solutions_text(outcome, is_terminal=True)
    assert "\x1b[" not in solutions_text(outcome)
