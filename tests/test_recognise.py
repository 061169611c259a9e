"""A machine found here and the file that knows it: which file counts, what is taken from it, what is written to it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from machine_simulator import Simulated, model, placements, solution_file
from test_identity import OTHERS, changed, here

import placement.inputs.detect
from placement.cli import cli
from placement.errors import InputError
from placement.inputs.machine import Coefficient, Machine
from placement.inputs.machine_files import read_machine, save_machine
from placement.inputs.recognise import learned_path, save_learned, with_learned

SPLIT = Coefficient(61.0, "us", "calibrated", "2026-01-02", 5, 3.0)


def knowing(machine: Machine) -> Machine:
    """The machine once runs have taught it a coefficient."""
    return replace(machine, coefficients={"split_us": SPLIT})


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder and an empty user's folder; returns the latter's machines/."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    return tmp_path / "config" / "place" / "machines"


def test_the_file_that_has_learned_of_this_machine_is_used_and_named(folder: Path) -> None:
    """Coefficients, history and speeds are the file's; one line says which file it is."""
    save_machine(replace(knowing(here()), name="mine"), folder / "any.toml")
    said: list[str] = []
    found = with_learned(here(), said.append)
    assert (found.name, found.coefficients) == ("mine", {"split_us": SPLIT})
    assert len(said) == 1 and str(folder / "any.toml") in said[0]


def test_no_device_is_filled_beyond_what_is_free_now(folder: Path) -> None:
    """The smaller of the file's cap and what the driver says is free; a much smaller cap is told."""
    known = changed(1, usable_mib=9000.0)(knowing(here()))
    save_machine(known, folder / "host.toml")
    said: list[str] = []
    found = with_learned(changed(0, usable_mib=20000.0)(here()), said.append)
    assert [each.usable_mib for each in found.devices] == [20000.0, 9000.0]
    assert "caps CUDA1 at 9,000 of 15,800 MiB free" in said[0]


@pytest.mark.parametrize("change", OTHERS)
def test_a_file_of_another_machine_is_not_used(folder: Path, change: Callable[[Machine], Machine]) -> None:
    """The host's name on the file is not enough."""
    save_machine(change(knowing(here())), folder / "host.toml")
    assert with_learned(here(), pytest.fail) == here()


def test_a_file_that_has_learned_nothing_is_not_used(folder: Path) -> None:
    """A machine file somebody wrote is for --machine."""
    save_machine(replace(here(), coefficients={"split_us": Coefficient(50, "us")}), folder / "host.toml")
    assert with_learned(here(), pytest.fail) == here()


def test_the_nearest_folder_counts_and_in_it_the_newest(folder: Path) -> None:
    """./machines stands before the user's folder."""
    old = replace(SPLIT, value=50.0, date="2025-01-01")
    save_machine(knowing(here()), folder / "user.toml")
    save_machine(replace(here(), coefficients={"split_us": old}), Path("machines/a-old.toml"))
    save_machine(replace(knowing(here()), name="newest"), Path("machines/b-new.toml"))
    assert with_learned(here(), lambda _text: None).name == "newest"


def test_a_broken_file_is_told_and_passed_over(folder: Path) -> None:
    """One bad file does not stop a solve."""
    save_machine(knowing(here()), folder / "host.toml")
    (folder / "broken.toml").write_text("name = ")
    said: list[str] = []
    assert with_learned(here(), said.append).coefficients == {"split_us": SPLIT}
    assert "broken.toml" in said[0] and "not considered" in said[0]


def test_what_is_learned_goes_to_the_file_that_knows_the_machine(folder: Path) -> None:
    """Whatever its name; without one the user's folder, under the host's name."""
    assert learned_path(None, here()) == folder / "host.toml"
    save_machine(knowing(here()), folder / "any.toml")
    assert learned_path(None, here()) == folder / "any.toml"


def test_another_machines_file_of_the_same_name_is_not_overwritten(folder: Path) -> None:
    """Two hosts of one name have two files."""
    save_machine(changed(0, uuid="GPU-9")(here()), folder / "host.toml")
    assert learned_path(None, here()) == folder / "host-2.toml"


def test_what_its_owner_wrote_stays(folder: Path) -> None:
    """Saving changes coefficients, history and runtimes, never a cap."""
    path = folder / "host.toml"
    save_machine(changed(0, usable_mib=20000.0)(here()), path)
    save_learned(changed(0, usable_mib=3000.0, runtime_mib=333.0)(knowing(here())), path)
    kept = read_machine(path)
    assert (kept.devices[0].usable_mib, kept.devices[0].runtime_mib) == (20000.0, 333.0)
    assert kept.coefficients == {"split_us": SPLIT}


def test_a_read_only_file_is_left_alone(folder: Path) -> None:
    """The error names the file."""
    path = folder / "host.toml"
    save_machine(here(), path)
    path.chmod(0o444)
    with pytest.raises(InputError, match=r"host\.toml: is read-only"):
        save_learned(knowing(here()), path)
    assert read_machine(path) == here()


def test_after_calibrating_a_detected_machine_the_next_command_uses_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`place calibrate` without --machine, then `place machine show` without --machine: what was learned is there."""
    monkeypatch.setattr(placement.inputs.detect, "detect_hardware", lambda: (here(), ""))
    runs = Path("solutions/m--host--w")
    solution_file(runs, model("qwen3-30b-a3b-q4"))
    for placed in placements()[:4]:
        Simulated(9).keep(runs, placed, machine=here())
    assert CliRunner().invoke(cli, ["calibrate"]).exit_code == 0
    shown = CliRunner().invoke(cli, ["machine", "show"])
    assert shown.stderr.count(f"using {folder / 'host.toml'}") == 1
    assert 'source = "calibrated"' in shown.stdout
    again = CliRunner().invoke(cli, ["calibrate"])
    assert "nothing changes" in again.stdout


def test_detect_shows_the_driver_alone(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`place machine detect` says nothing that was learned."""
    monkeypatch.setattr(placement.inputs.detect, "detect_hardware", lambda: (here(), ""))
    save_machine(knowing(here()), folder / "host.toml")
    assert "coefficients" not in CliRunner().invoke(cli, ["machine", "detect"]).stdout
