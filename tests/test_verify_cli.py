"""`place verify` as a user meets it, against a fake llama-server."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result
from verify_support import fake_engine, write_model

from placement.cli import cli
from placement.measure.verify import lock
from placement.measure.verify.lock import MachineBusy

MACHINE = "[cpu]\nthreads = 1\nusable_mib = 4000\nbandwidth_gb_per_s = 20\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs `place verify` on a tiny model on a machine without GPUs, in a folder of its own."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(lock, "default_lock_path", lambda: tmp_path / "lock")
    write_model(tmp_path / "tiny.gguf", n_layer=1, n_embd=64)
    (tmp_path / "cpu.toml").write_text(MACHINE)
    fake_engine(tmp_path / "engine")
    given = [
        "--machine",
        "cpu.toml",
        "--engine",
        "engine",
        "--ctx",
        "1024",
        "--prompt",
        "200",
        "--rounds",
        "1",
    ]

    def go(*arguments: str, model: str = "tiny.gguf") -> Result:
        return CliRunner().invoke(
            cli, ["verify", model, *given, "--repeats", "1", "--seconds", "0", *arguments]
        )

    return go


def test_table_and_command_are_printed(place: Any, tmp_path: Path) -> None:
    """A verify prints the table, the reasons and the exact command; --show prints the same again."""
    ran = place()
    assert ran.exit_code == 0, ran.output
    assert "recommended: " in ran.stdout and "llama-server -m tiny.gguf" in ran.stdout
    shown = place("--show")
    assert (shown.exit_code, shown.stdout) == (0, ran.stdout)
    assert len(list(tmp_path.glob("solutions/*/runs.jsonl"))) == 1


@pytest.mark.parametrize("more", [[], ["--ubatch", "256"], ["--objective", "decode"], ["--reserve", "10"]])
def test_every_run_lies_beside_its_solution_and_is_calibrated_from(
    place: Any, tmp_path: Path, more: list[str]
) -> None:
    """Whatever was asked for: --show finds the runs, and so does `place calibrate`."""
    ran = place(*more)
    assert ran.exit_code == 0, ran.output
    (runs,) = tmp_path.glob("solutions/*/runs.jsonl")
    assert runs.with_name("solution.toml").is_file()
    assert place("--show", *more).stdout == ran.stdout
    learned = CliRunner().invoke(cli, ["calibrate", "--machine", "cpu.toml", "--json"])
    row = json.loads(learned.stdout)
    assert learned.exit_code == 0 and row["n_runs"] >= 1
    assert [each for each in row["skipped"] if "fit:" not in each] == []


def test_json_is_one_object(place: Any) -> None:
    """--json prints one object on stdout, whatever is said on stderr."""
    ran = place("--json")
    row = json.loads(ran.stdout)
    assert row["label"] == "measured"
    assert row["recommended"] in [each["name"] for each in row["results"]]


def test_show_before_a_run_is_an_input_error(place: Any) -> None:
    """--show with nothing measured raises the error that main turns into exit code 2."""
    assert place("--show").exception.exit_code == 2


def test_description_without_weights_is_refused(place: Any) -> None:
    """A MODEL without weights on this disk needs --model-file, and the error names it."""
    assert "--model-file" in str(place(model="qwen3-30b-a3b-q4").exception)


def test_engine_off_is_refused(place: Any) -> None:
    """Nothing can be measured with the engine switched off."""
    assert "running needs a llama.cpp" in str(place("--engine", "off").exception)


def test_busy_machine_is_refused_before_the_solve(place: Any, tmp_path: Path) -> None:
    """While another verify runs the second is refused before it plans anything on the devices."""
    with lock.machine_lock(tmp_path / "lock"):
        assert isinstance(place().exception, MachineBusy)
    assert not (tmp_path / "solutions").exists()
