"""Fits → the machine: memory with a stated chance, values with their history, the file and the command."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from machine_simulator import Simulated, bare_machine, model, placements, pool, solution_file

from placement.cli import cli
from placement.inputs.machine import Coefficient, margin_mib
from placement.inputs.machine_files import machine_toml, own_machine_path, read_machine, save_machine
from placement.measure.calibrate.applied import KEPT_PER_NAME, apply_fit
from placement.measure.calibrate.data import MemorySample
from placement.measure.calibrate.fit import Calibration, calibrate
from placement.measure.calibrate.memory import fit_memory
from placement.measure.calibrate.parameters import prior_of


def samples(*over_mib: float, device: str = "CUDA0") -> list[MemorySample]:
    return [MemorySample(str(i), device, 10000.0, 10400.0, 10000.0 + each) for i, each in enumerate(over_mib)]


def fit(seed: int = 1, n: int = 8) -> Calibration:
    simulated = Simulated(seed)
    return calibrate(bare_machine(), simulated.runs(pool()[0][:n]), with_errors=False)


def test_runtime_and_growth_are_medians_beside_the_plan() -> None:
    """400 MiB at start and about 60 more later."""
    (result,) = fit_memory(bare_machine(), samples(455, 460, 470))
    assert (result.runtime_mib, result.growth_mib, result.most_mib) == (400.0, 60.0, 470.0)


def test_a_device_without_samples_has_no_fit() -> None:
    """Unknown stays unknown."""
    assert [each.device for each in fit_memory(bare_machine(), samples(450))] == ["CUDA0"]


def test_the_margin_shrinks_with_runs_and_grows_with_certainty() -> None:
    """More runs of the same narrow it; a smaller chance of running out widens it."""
    few, many = (fit_memory(bare_machine(), samples(*[450, 460] * n))[0].margin_mib for n in (1, 8))
    surer = fit_memory(bare_machine(), samples(*[450, 460] * 8), chance=0.001)[0].margin_mib
    assert many < few and many < surer


@pytest.mark.parametrize("n", [3, 8, 20])
def test_the_stated_chance_is_kept(n: int) -> None:
    """Of 3,000 machines whose takes spread by 40 MiB, at most 1 % need more in the next run than was kept."""
    rng, short = random.Random(n), 0
    for _ in range(3000):
        (result,) = fit_memory(bare_machine(), samples(*(rng.gauss(500, 40) for _ in range(n))))
        short += rng.gauss(500, 40) > result.runtime_mib + result.growth_mib + result.margin_mib
    assert short / 3000 <= 0.013


def test_the_machine_gets_runtime_and_margin() -> None:
    """The solver's runtime is what runs take, growth included; the margin is read by its own name."""
    memory = fit_memory(bare_machine(), samples(455, 460, 470))
    machine, _ = apply_fit(bare_machine(), [], memory, "2026-01-02")
    assert machine.device("CUDA0").runtime_mib == 460.0
    assert margin_mib(machine, "CUDA0") == pytest.approx(memory[0].margin_mib, abs=0.1)
    assert margin_mib(machine, "CUDA1") is None


def test_identified_values_carry_source_date_samples_and_uncertainty() -> None:
    """What the machine file says of a calibrated value."""
    machine, changes = apply_fit(bare_machine(), [fit()], (), "2026-01-02")
    kept = machine.coefficients["node_us"]
    assert (kept.source, kept.date, kept.unit) == ("calibrated", "2026-01-02", "us")
    assert kept.n_samples and kept.uncertainty
    assert "node_us" in {each.name for each in changes}


def test_what_is_not_identified_is_not_written() -> None:
    """A coefficient at its prior does not claim to be calibrated."""
    result = fit(n=3)
    machine, _ = apply_fit(bare_machine(), [result], (), "2026-01-02")
    written = {name for name, each in machine.coefficients.items() if each.source == "calibrated"}
    assert not written & set(result.unidentified)


def test_a_boundary_without_runs_keeps_its_prior_when_splits_are_learned() -> None:
    """The machine file then says the boundary's prior: silence would mean the new split_us."""
    machine, _ = apply_fit(bare_machine(), [fit(n=3)], (), "2026-01-02")
    from placement.predict.terms import coefficient

    expected = 45.0 if "boundary_us" in fit(n=3).unidentified else fit(n=3).values["boundary_us"]
    assert coefficient(machine, "boundary_us") == pytest.approx(expected, rel=1e-4)


def test_the_same_fit_twice_changes_nothing() -> None:
    """A second calibration of the same records writes nothing and adds no history."""
    machine, _ = apply_fit(bare_machine(), [fit()], fit_memory(bare_machine(), samples(450)), "2026-01-02")
    again, changes = apply_fit(machine, [fit()], fit_memory(machine, samples(450)), "2026-01-03")
    assert (again, changes) == (machine, ())


def test_history_keeps_what_was_there() -> None:
    """Each change keeps the value before it, the default too."""
    first, _ = apply_fit(bare_machine(), [fit(1)], (), "2026-01-02")
    second, _ = apply_fit(first, [fit(2)], (), "2026-01-03")
    past = [(each.coefficient.value, each.until) for each in second.history if each.name == "node_us"]
    assert past == [(1.3, "2026-01-02"), (first.coefficients["node_us"].value, "2026-01-03")]


def test_history_is_bounded_and_keeps_its_oldest() -> None:
    """The newest ten values of a name stay, and the one that priors come from."""
    machine = bare_machine()
    for i in range(KEPT_PER_NAME + 5):
        machine, _ = apply_fit(machine, [fit(i, n=4)], (), f"2026-01-{i + 1:02d}")
    past = [each for each in machine.history if each.name == "node_us"]
    assert len(past) <= KEPT_PER_NAME + 1
    assert prior_of(machine, "node_us").value == 1.3


def test_history_round_trips_through_the_file(tmp_path: Path) -> None:
    """A calibrated machine's file is read back as it was written."""
    machine, _ = apply_fit(bare_machine(), [fit()], fit_memory(bare_machine(), samples(450)), "2026-01-02")
    save_machine(machine, tmp_path / "m.toml")
    assert read_machine(tmp_path / "m.toml") == machine


def test_a_shipped_machine_is_never_written_to() -> None:
    """The reference machine's own file belongs in the user's folder."""
    from placement.inputs.machine_files import REFERENCE_MACHINE, resolve_machine

    path = own_machine_path(REFERENCE_MACHINE, resolve_machine(REFERENCE_MACHINE))
    assert path.name == f"{REFERENCE_MACHINE}.toml"
    assert "placement" not in path.parts


def test_a_shipped_file_named_by_its_path_is_not_written_to() -> None:
    """Nor where somebody points at it inside the package."""
    from placement.files import PACKAGE_DATA
    from placement.inputs.machine_files import REFERENCE_MACHINE

    shipped = PACKAGE_DATA / "machines" / f"{REFERENCE_MACHINE}.toml"
    assert shipped.is_file()
    path = own_machine_path(str(shipped), read_machine(shipped))
    assert PACKAGE_DATA not in path.resolve().parents
    assert path.name == shipped.name


@pytest.mark.parametrize("name", ["a/b", "../up", "två kort"])
def test_a_machines_name_is_one_file_name(name: str) -> None:
    """Whatever a machine is called, its file lies in the user's folder."""
    path = own_machine_path(None, replace(bare_machine(), name=name))
    assert path.parent.name == "machines" and path.suffix == ".toml"


def test_a_detected_value_is_the_newer_prior() -> None:
    """What a probe found after defaults is what fits start from; what was calibrated is not."""
    probed = Coefficient(1.6, "us", "detected", uncertainty=0.5)
    machine = bare_machine().__class__(
        "m", bare_machine().devices, bare_machine().cpu, coefficients={"node_us": probed}
    )
    changed, _ = apply_fit(machine, [calibrate(machine, Simulated(1).runs(pool()[0][:8]))], (), "2026-01-02")
    assert changed.coefficients["node_us"].source == "calibrated"
    assert prior_of(changed, "node_us").value == 1.6


@pytest.fixture
def place(tmp_path: Path) -> tuple[list[str], Path]:
    """Arguments of `place calibrate` over six recorded runs, and the machine file."""
    path = tmp_path / "simulated.toml"
    save_machine(bare_machine(), path)
    folder = tmp_path / "solutions" / "m--simulated--w"
    solution_file(folder, model("qwen3-30b-a3b-q4"))
    for placed in placements()[:6]:
        Simulated(9).keep(folder, placed)
    return ["calibrate", "--machine", str(path), "--out", str(folder.parent)], path


def test_the_command_writes_the_machine_file(place: tuple[list[str], Path]) -> None:
    """`place calibrate` leaves calibrated values, a history and the old file beside it."""
    arguments, path = place
    result = CliRunner().invoke(cli, arguments)
    assert result.exit_code == 0, result.output
    machine = read_machine(path)
    assert machine.history and path.with_name("simulated.toml.bak").is_file()
    assert any(each.source == "calibrated" for each in machine.coefficients.values())


def test_a_dry_run_shows_the_changes_and_writes_nothing(place: tuple[list[str], Path]) -> None:
    """`--dry-run` prints old → new and leaves the file alone."""
    arguments, path = place
    result = CliRunner().invoke(cli, [*arguments, "--dry-run"])
    assert result.exit_code == 0, result.output
    assert path.read_text() == machine_toml(bare_machine())
    assert "node_us: - →" in result.output and "would change" in result.output


def test_a_read_only_file_costs_no_report(place: tuple[list[str], Path]) -> None:
    """What was found is printed; then one line says that nothing was written, and the exit code is 2."""
    arguments, path = place
    path.chmod(0o444)
    shown = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert "median error" in shown.stdout
    assert "is read-only" in str(shown.exception)
    row = CliRunner().invoke(cli, [*arguments, "--json"], standalone_mode=False)
    assert json.loads(row.stdout)["is_written"] is False
    assert path.read_text() == machine_toml(bare_machine())


def test_the_json_holds_errors_and_unknowns(place: tuple[list[str], Path]) -> None:
    """One object with the errors of every run and what would identify what is not known."""
    arguments, _ = place
    row = json.loads(CliRunner().invoke(cli, [*arguments, "--json"]).stdout)
    decode = row["kinds"]["decode"]
    assert {"before", "after"} <= set(decode["errors"][0])
    assert row["is_written"] and any(not each["is_identified"] for each in decode["coefficients"])


def test_without_runs_the_command_says_so(tmp_path: Path) -> None:
    """No records: exit 1 and a line that says what to run."""
    save_machine(bare_machine(), tmp_path / "m.toml")
    arguments = ["calibrate", "--machine", str(tmp_path / "m.toml"), "--out", str(tmp_path)]
    result = CliRunner().invoke(cli, arguments, standalone_mode=False)
    assert "no runs of this machine" in result.output
