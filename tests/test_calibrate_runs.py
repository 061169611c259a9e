"""Run records → rows: what belongs together is fitted, what does not is told."""

from __future__ import annotations

from pathlib import Path

import pytest
from machine_simulator import (
    GROWTH_MIB,
    RUNTIME_MIB,
    Simulated,
    bare_machine,
    model,
    placements,
    solution_file,
)

from placement.calibrate.features import predict_s
from placement.calibrate.runs import find_runs
from placement.calibrate.whole import calibrate_machine, fit_both
from placement.errors import InputError

NAME = "qwen3-30b-a3b-q4"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A solutions folder of one model, without records."""
    found = tmp_path / "qwen3-30b-a3b-q4--simulated--w"
    solution_file(found, model(NAME))
    return found


def test_a_run_gives_its_tokens_and_prompts(folder: Path) -> None:
    """Five timings of one run: two decode rows at two depths, three prompt rows."""
    Simulated(1).keep(folder, placements()[0])
    found = find_runs(folder.parent, bare_machine())
    assert [row.kind for row in found.rows] == ["decode"] * 2 + ["prompt"] * 3


def test_rows_have_the_times_of_the_placement_that_was_run(folder: Path) -> None:
    """Without noise a row's terms on the true machine are the measured time: the arguments gave the placement."""
    simulated = Simulated(2, noise=0.0, misfit=0.0)
    for placed in placements()[:6]:
        simulated.keep(folder, placed)
    rows = find_runs(folder.parent, bare_machine()).rows
    assert [predict_s(row, simulated.machine) for row in rows] == pytest.approx(
        [row.measured_s for row in rows]
    )


@pytest.mark.parametrize(
    "key", [{"engine_build": "b2"}, {"driver": "580"}, {"memory_clock": "CUDA0 9001 MHz"}]
)
def test_records_of_other_conditions_are_left_out_and_counted(folder: Path, key: dict[str, str]) -> None:
    """Another build, driver or memory clock is not mixed in: the newest conditions count."""
    Simulated(1).keep(folder, placements()[0], **key)
    Simulated(1).keep(folder, placements()[1], round_=2)
    found = find_runs(folder.parent, bare_machine())
    assert {row.run for row in found.rows} == {"p1"}
    assert [n for _, n in found.left_out] == [6]
    assert next(iter(key.values())) in found.left_out[0][0]


def test_all_conditions_are_fitted_together_when_asked(folder: Path) -> None:
    """`is_mixed` takes every build."""
    Simulated(1).keep(folder, placements()[0], engine_build="b0")
    Simulated(1).keep(folder, placements()[1], round_=2)
    assert {row.run for row in find_runs(folder.parent, bare_machine(), is_mixed=True).rows} == {"p0", "p1"}


def test_records_of_another_machine_are_left_out(folder: Path) -> None:
    """A machine with other cards has its own records."""
    Simulated(1).keep(folder, placements()[0], machine=Simulated(1).machine)
    other = bare_machine().__class__("other", bare_machine().devices, bare_machine().cpu)
    found = find_runs(folder.parent, other)
    assert (found.rows, [n for _, n in found.left_out]) == ((), [6])


def test_a_round_that_is_much_slower_is_doubted(folder: Path) -> None:
    """The second of two rounds was 40 % slower: it is a row of its own that says so."""
    simulated = Simulated(3)
    simulated.keep(folder, placements()[0])
    simulated.keep(folder, placements()[0], round_=2, throttle=1.4)
    rows = find_runs(folder.parent, bare_machine()).rows
    assert sorted({row.doubt.partition(" was")[0] for row in rows}) == ["", "round 2"]


def test_a_folder_whose_model_is_gone_is_skipped_with_a_reason(folder: Path) -> None:
    """A model that is another by now cannot tell what its runs read."""
    Simulated(1).keep(folder, placements()[0])
    path = folder / "solution.toml"
    path.write_text(path.read_text().replace(model(NAME).digest, "0" * 16))
    found = find_runs(folder.parent, bare_machine())
    assert (found.rows, len(found.skipped)) == ((), 1)
    assert "model" in found.skipped[0]


def test_a_broken_record_is_an_error_that_names_its_line(folder: Path) -> None:
    """A line in the middle that is not a record is not skipped silently."""
    Simulated(1).keep(folder, placements()[0])
    path = folder / "runs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", *lines[1:]]) + "\n")
    with pytest.raises(InputError, match="line 2"):
        find_runs(folder.parent, bare_machine())


def test_memory_samples_are_what_was_taken_beside_the_plan(folder: Path) -> None:
    """Each device of each round has what the engine planned, the take at start, and the most."""
    Simulated(1).keep(folder, placements()[0])
    for sample in find_runs(folder.parent, bare_machine()).memory:
        assert sample.start_mib - sample.planned_mib == pytest.approx(RUNTIME_MIB, abs=50)
        assert sample.peak_mib - sample.planned_mib == pytest.approx(RUNTIME_MIB + GROWTH_MIB, abs=50)


def test_a_whole_calibration_predicts_runs_that_were_left_out(folder: Path) -> None:
    """Records in, machine out: leave-one-out errors of eight runs fall to a few percent."""
    simulated = Simulated(9)
    for placed in placements()[:8]:
        simulated.keep(folder, placed)
    _, report = calibrate_machine(bare_machine(), folder.parent, "2026-01-02", with_advice=False)
    decode, prompt = report.fits
    assert sorted(abs(each.after) for each in decode.errors)[len(decode.errors) // 2] <= 0.06
    assert sorted(abs(each.after) for each in prompt.errors)[len(prompt.errors) // 2] <= 0.12


def test_advice_names_the_one_placement_that_would_tell(folder: Path) -> None:
    """What stays at its prior is listed; a boundary is told by experts on the other card."""
    one_card = [each for each in placements() if len(each.assignment.devices) == 1]
    for placed in one_card[:4]:
        Simulated(9).keep(folder, placed)
    _, report = calibrate_machine(bare_machine(), folder.parent, "2026-01-02")
    telling = report.told["boundary_us"]
    assert set(report.told) == {name for fit in report.fits for name in fit.unidentified}
    assert telling is not None and "CUDA0" in telling.trial and "CUDA1" in telling.trial
    assert telling.left <= 0.9


def test_no_records_change_nothing(tmp_path: Path) -> None:
    """An empty folder leaves the machine as it is."""
    machine, report = calibrate_machine(bare_machine(), tmp_path, "2026-01-02")
    assert machine == bare_machine()
    assert report.changes == ()


def test_the_fit_of_nothing_is_the_priors() -> None:
    """Both fits exist without records."""
    from placement.calibrate.runs import Found

    assert [fit.n_rows for fit in fit_both(bare_machine(), Found())] == [0, 0]
