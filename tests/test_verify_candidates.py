"""What is run, in which order, and what --fit is given."""

from __future__ import annotations

from dataclasses import replace

from verify_support import cluster, solution

from placement.engine.find import ListedDevice
from placement.inputs.machine import Coefficient, Cpu, Device, Machine
from placement.measure.verify.candidates import (
    VerifyCandidate,
    caps_mib,
    choose,
    fit_targets_mib,
    make_candidates,
    without_placement,
)

CARDS = Machine("cards", (Device("CUDA0", 24576, 24000, 480, 1008, 25),), Cpu(60000, 50, 16))


def test_moderate_comes_first() -> None:
    """The order is moderate, aggressive, the others as they stood."""
    results = [solution(name, name) for name in ("aggressive", "moderate", "b", "a")]
    assert [each.name for each in choose(results, 3)] == ["moderate", "aggressive", "b"]


def test_same_arguments_run_once() -> None:
    """Where moderate is aggressive one run serves both, and it is called aggressive."""
    results = [solution("aggressive", "x"), solution("moderate", "x"), solution("b", "y")]
    assert [each.name for each in choose(results, 9)] == ["aggressive", "b"]


def test_fit_follows_the_named() -> None:
    """--fit at the memory of moderate and aggressive runs before the others, so that a budget includes it."""
    results = [
        solution("moderate", "-ngl", "1"),
        solution("aggressive", "-ngl", "2"),
        solution("b", "-ngl", "3"),
    ]
    names = [each.name for each in make_candidates(results, CARDS, ())]
    assert names == ["moderate", "aggressive", "fit:moderate", "fit:aggressive", "b"]


def test_fit_keeps_context_and_batches_only() -> None:
    """--fit decides all that places: -ngl, -ts, -dev, -ot, --cpu-moe go, context and cache types stay."""
    text = "-ngl 9 -ts 1,2 -dev CUDA0 -ot a=CPU --cpu-moe -c 4096 -ub 512 -ctk q8_0 -fa on -fit off --jinja"
    assert without_placement(text.split()) == (
        "-c",
        "4096",
        "-ub",
        "512",
        "-ctk",
        "q8_0",
        "-fa",
        "on",
        "--jinja",
    )


def test_moderate_cap_leaves_its_reserve() -> None:
    """Moderate may take the usable memory less runtime, the reserve asked and 5 % of the card."""
    assert caps_mib(solution("moderate"), CARDS, 100) == {"CUDA0": 24000 - 480 - 100 - 0.05 * 24576}
    assert caps_mib(solution("aggressive"), CARDS, 100) == {"CUDA0": 24000 - 480 - 100}


def test_moderate_cap_leaves_what_runs_have_taught() -> None:
    """A learned margin stands for the 5 %, as in the solve; aggressive has none."""
    learned = Coefficient(300.0, "MiB", "calibrated")
    cards = replace(CARDS, coefficients={"margin_mib.CUDA0": learned})
    assert caps_mib(solution("moderate"), cards, 100) == {"CUDA0": 24000 - 480 - 100 - 300}
    assert caps_mib(solution("aggressive"), cards, 100) == {"CUDA0": 24000 - 480 - 100}


def test_fit_target_is_free_less_cap() -> None:
    """A card with 23,600 MiB free and a cap of 23,420 leaves 180 free; a device nobody named is left alone."""
    devices = [ListedDevice("CUDA0", "", 24576, 23600.5), ListedDevice("CUDA1", "", 8000, 7000)]
    assert fit_targets_mib({"CUDA0": 23420}, devices) == [181, 7000]


def test_fit_target_is_never_negative() -> None:
    """A card that has less free than the cap gets the target 0, which --fit understands."""
    assert fit_targets_mib({"CUDA0": 9000}, [ListedDevice("CUDA0", "", 9999, 8000)]) == [0]


def test_free_memory_does_not_change_the_identity() -> None:
    """--fit is the same run on a rerun when only the memory free at the moment differs."""
    fit = make_candidates([solution("aggressive", "-ngl", "2", "-c", "512")], CARDS, ())[1]
    one, two = (fit.arguments_on([ListedDevice("CUDA0", "", 24576, free)]) for free in (23600, 23700))
    assert one != two
    assert one[-2:] == ("-fitt", "80")
    assert fit.run_id == VerifyCandidate("again", "fit", fit.arguments, fit.caps_mib).run_id


def test_profile_arguments_are_kept() -> None:
    """The owner's own arguments go to every candidate, --fit included."""
    result = make_candidates([solution("aggressive", "-ngl", "2")], cluster("h:1"), ("--jinja",))
    assert all("--jinja" in each.arguments for each in result)


def test_fit_may_use_the_workers_that_a_placement_leaves_alone() -> None:
    """A placement on the CPU names no worker; llama.cpp's own --fit beside it is given all of them, once."""
    machine = cluster("h:1", "h:2")
    alone = solution("aggressive", "-ngl", "0")
    both = solution("other", "--rpc", "h:1,h:2", "-ngl", "2", devices=("RPC0", "RPC1"))
    results = {each.name: each.arguments for each in make_candidates([alone, both], machine, ())}
    assert results["aggressive"] == ("-ngl", "0")
    assert results["fit:aggressive"] == ("--rpc", "h:1,h:2", "-fit", "on")
    assert "fit:other" not in results
