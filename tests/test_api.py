"""The library as `import placement` offers it."""

from __future__ import annotations

import dataclasses
import importlib
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from solving_support import expert_model, one_card, two_cards

import placement as pl
from placement.api import RequestFields
from placement.inputs.machine_files import machine_toml
from placement.inputs.model_files.files import save_model

ROOT = Path(__file__).parent.parent
MODEL, MACHINE = expert_model(4), two_cards(300, 200)


@pytest.fixture(scope="module")
def result() -> pl.Result:
    """A solve of a small model."""
    return pl.solve(MODEL, MACHINE, ctx_tokens=1024, ubatch_tokens=512)


def python(*words: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own that finds this package."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True)


def test_importing_loads_no_library() -> None:
    """Neither solver nor numpy nor pydantic is loaded until something is used, nor is any module of ours."""
    foreign = {"ortools", "numpy", "pydantic", "scipy", "click"}
    code = (
        "import sys, placement; "
        f"print([m for m in sys.modules if m.partition('.')[0] in {foreign} or m.startswith('placement.')])"
    )
    assert "[]" == python("-c", code).stdout.strip()


@pytest.mark.parametrize("name", pl.__all__)
def test_every_name_offered_is_there(name: str) -> None:
    """`__all__` lists what can be had, and `dir` shows it."""
    assert callable(getattr(pl, name))
    assert name in dir(pl)


def test_solve_stays_a_function_when_the_wing_of_its_name_is_imported() -> None:
    """Importing the wing `placement.solve` does not take the function's place."""
    importlib.import_module("placement.solve")
    assert "placement.api" == pl.solve.__module__


def test_an_unknown_name_is_an_attribute_error() -> None:
    """A typo is found as in any module."""
    with pytest.raises(AttributeError, match="slove"):
        pl.slove  # noqa: B018


def test_keywords_are_the_fields_of_a_request() -> None:
    """`solve` takes every field of `Request`, and no other."""
    assert {each.name for each in dataclasses.fields(pl.Request)} == set(RequestFields.__annotations__)


def test_solve_gives_the_best_first(result: pl.Result) -> None:
    """The recommended placement is the first, with speed, gap, arguments and the line that runs it."""
    best = result.best
    assert ("OPTIMAL", result.solutions[0]) == (result.status, best)
    assert best.gap is not None and 0 <= best.gap <= 0.005
    assert best.speed.decode_tps > 0
    assert best.command.startswith("llama-server -m tiny-experts.gguf ")


def test_check_agrees_with_solve(result: pl.Result) -> None:
    """The best placement's arguments, as a list or as one text, cost what the solve said."""
    for arguments in (result.best.args, shlex.join(result.best.args)):
        report = pl.check(MODEL, MACHINE, arguments, is_compared=False)
        assert (result.best.devices, True) == (report.devices, report.fits)


def test_lists_are_taken_for_tuples() -> None:
    """What a user writes as a list is one."""
    match = pl.solve(MODEL, MACHINE, ctx_tokens=1024, ubatch_tokens=512, devices=["CUDA1"])
    assert {"CUDA1", "Host"} == set(match.best.devices)


def test_infeasible_is_a_status() -> None:
    """What fits nowhere has no placement and says why; asking for the best is an error with the same words."""
    match = pl.solve(MODEL, one_card(40, host_mib=100), ctx_tokens=1024)
    assert ("INFEASIBLE", ()) == (match.status, match.solutions)
    assert "lacks" in match.message
    with pytest.raises(pl.PlacementError, match="lacks"):
        match.best  # noqa: B018


def test_a_bad_word_is_an_input_error() -> None:
    """Names, files and values that cannot be are refused before anything is solved."""
    for call in (
        lambda: pl.solve(MODEL, MACHINE, objective="fastest"),  # type: ignore[arg-type]
        lambda: pl.solve(MODEL, MACHINE, devices=["CUDA7"]),
        lambda: pl.check(MODEL, MACHINE, "-ngl many"),
        lambda: pl.check(MODEL, MACHINE, "", program="llama"),  # type: ignore[arg-type]
        lambda: pl.load_model("nosuch"),
        lambda: pl.load_machine("nosuch"),
    ):
        with pytest.raises(pl.InputError):
            call()


def test_files_are_read(tmp_path: Path) -> None:
    """A model's description and a machine's file are taken by path."""
    save_model(MODEL, tmp_path / "tiny.toml")
    (tmp_path / "pair.toml").write_text(machine_toml(MACHINE))
    assert MODEL.digest == pl.load_model(tmp_path / "tiny.toml").digest
    assert MACHINE.devices == pl.load_machine(tmp_path / "pair.toml").devices


def test_no_gpu_is_an_error_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that cannot be detected is never guessed."""
    monkeypatch.setattr("placement.inputs.detect.detect_hardware", lambda: (None, "no GPU here"))
    with pytest.raises(pl.PlacementError, match="no GPU here"):
        pl.detect_machine()


def test_the_package_is_the_command() -> None:
    """`python -m placement` is `place`."""
    ran = python("-m", "placement", "--version")
    assert (0, f"place, version {pl.__version__}") == (ran.returncode, ran.stdout.strip())
