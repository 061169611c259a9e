"""Run records → rows: what belongs together is fitted, what does not is told."""

from __future__ import annotations

import shutil
from dataclasses import replace
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

from placement.llamacpp.arguments import parse
from placement.llamacpp.emit.resolve import resolve
from placement.measure.calibrate.features import predict_s
from placement.measure.calibrate.runs import find_runs
from placement.measure.calibrate.whole import calibrate_machine, fit_both
from placement.measure.records.log import RunLog

NAME = "qwen3-30b-a3b-q4"


def run_of(name: str) -> str:
    return f"{model(NAME).digest}/{name}"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A solutions folder of one model, without records."""
    result = tmp_path / "qwen3-30b-a3b-q4--simulated--w"
    solution_file(result, model(NAME))
    return result


def test_a_run_gives_its_tokens_and_prompts(folder: Path) -> None:
    """Five timings of one run: two decode rows at two depths, three prompt rows."""
    Simulated(1).keep(folder, placements()[0])
    result = find_runs(folder.parent, bare_machine())
    assert [row.kind for row in result.rows] == ["decode"] * 2 + ["prompt"] * 3


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
    result = find_runs(folder.parent, bare_machine())
    assert {row.run for row in result.rows} == {run_of("p1")}
    assert [n for _, n in result.left_out] == [6]
    assert next(iter(key.values())) in result.left_out[0][0]


def test_all_conditions_are_fitted_together_when_asked(folder: Path) -> None:
    """`is_mixed` takes every build."""
    Simulated(1).keep(folder, placements()[0], engine_build="b0")
    Simulated(1).keep(folder, placements()[1], round_=2)
    assert {row.run for row in find_runs(folder.parent, bare_machine(), is_mixed=True).rows} == {
        run_of("p0"),
        run_of("p1"),
    }


def test_records_of_another_machine_are_left_out(folder: Path) -> None:
    """A machine with other cards has its own records, though it has the same name."""
    Simulated(1).keep(folder, placements()[0])
    cards = bare_machine().devices
    other = replace(bare_machine(), devices=(replace(cards[0], description="another"), cards[1]))
    result = find_runs(folder.parent, other)
    assert (result.rows, result.left_out) == ((), (("another machine (CUDA0 + CUDA1)", 6),))


def test_records_of_a_renamed_machine_count(folder: Path) -> None:
    """What was measured before the machine file got another name is fitted."""
    Simulated(1).keep(folder, placements()[0])
    renamed = find_runs(folder.parent, replace(bare_machine(), name="rig"))
    assert [row.measured_s for row in renamed.rows] == [
        row.measured_s for row in find_runs(folder.parent, bare_machine()).rows
    ]
    assert len(renamed.rows) == 5


@pytest.mark.parametrize(("digest", "n_rows"), [("8949d5ed", 5), ("00000000", 0)])
def test_old_records_count_by_the_digest_of_their_machine(folder: Path, digest: str, n_rows: int) -> None:
    """Records that have "NAME/DIGEST" instead of the machine's parts are read, whatever the name."""
    log = RunLog(folder)
    Simulated(1).keep(folder, placements()[0])
    records = log.read()
    log.path.unlink()
    for each in records:
        key = each.key.model_copy(update={"machine": f"old-name/{digest}"})
        log.append(each.model_copy(update={"key": key}))
    assert len(find_runs(folder.parent, bare_machine()).rows) == n_rows


def test_a_round_that_is_much_slower_is_doubted(folder: Path) -> None:
    """The second of two rounds was 40 % slower: it is a row of its own that says so."""
    simulated = Simulated(3)
    simulated.keep(folder, placements()[0])
    simulated.keep(folder, placements()[0], round_=2, throttle=1.4)
    rows = find_runs(folder.parent, bare_machine()).rows
    assert sorted({row.doubt.partition(" was")[0] for row in rows}) == ["", "round 2"]


def test_the_error_of_a_disturbed_round_does_not_count(folder: Path) -> None:
    """It is shown, marked as not counted; the same run's good round counts."""
    simulated = Simulated(3)
    for placed in placements()[:3]:
        simulated.keep(folder, placed)
    simulated.keep(folder, placements()[0], round_=2, throttle=1.4)
    decode, _ = fit_both(bare_machine(), find_runs(folder.parent, bare_machine()))
    mine = [each for each in decode.errors if each.run == run_of("p0")]
    assert sorted(each.is_counted for each in mine) == [False, False, True, True]
    assert {each.is_counted for each in mine if each.after < -0.2} == {False}


def test_a_model_that_is_gone_is_skipped_with_a_reason(folder: Path) -> None:
    """Records of a digest that no model here has cannot tell what was read."""
    Simulated(1).keep(folder, placements()[0], model_digest="0" * 16)
    path = folder / "solution.toml"
    path.write_text(path.read_text().replace(model(NAME).digest, "0" * 16))
    result = find_runs(folder.parent, bare_machine())
    assert (result.rows, len(result.skipped)) == ((), 1)
    assert "its model is not found" in result.skipped[0]


def test_runs_without_a_solution_file_are_fitted_too(folder: Path) -> None:
    """Records in a folder of their own name their model by digest: another folder's solutions know it."""
    other = folder.with_name("elsewhere--simulated--w--0a1b2c3d")
    Simulated(1).keep(other, placements()[0])
    assert {row.run for row in find_runs(folder.parent, bare_machine()).rows} == {run_of("p0")}


def test_the_file_that_ran_tells_the_model(tmp_path: Path) -> None:
    """Without any solutions the record's own file does."""
    from verify_support import write_model

    from placement.inputs.model_files.files import read_model

    file = write_model(tmp_path / "tiny.gguf")
    tiny = read_model(file)
    placed = placements()[0]
    arguments = ("-ngl", "0", "-c", "4096", "-np", "1", "-fa", "on", "-fit", "off")
    assignment = resolve(tiny, bare_machine(), parse(list(arguments)), "llama-server")
    problem = replace(placed.problem, model=tiny, settings=assignment.settings)
    log = RunLog(tmp_path / "solutions" / "unknown--m--w")
    for record in Simulated(1).records(problem, assignment, "p", arguments):
        log.append(record.model_copy(update={"model_file": str(file)}))
    assert {row.run for row in find_runs(tmp_path / "solutions", bare_machine()).rows} == {f"{tiny.digest}/p"}


def test_a_broken_line_is_told_and_the_others_count(folder: Path) -> None:
    """A line in the middle that is no record is named; a torn last line is nobody's fault."""
    Simulated(1).keep(folder, placements()[0])
    path = folder / "runs.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], "{}", *lines[1:], lines[1][:40]]))
    result = find_runs(folder.parent, bare_machine())
    assert [row.kind for row in result.rows] == ["decode"] * 2 + ["prompt"] * 3
    assert len(result.skipped) == 1 and f"{path}: line 2" in result.skipped[0]


def test_a_record_counts_once_however_often_it_is_kept(folder: Path) -> None:
    """Copied folders and doubled lines teach nothing more."""
    Simulated(1).keep(folder, placements()[0])
    once = find_runs(folder.parent, bare_machine())
    text = (folder / "runs.jsonl").read_text()
    (folder / "runs.jsonl").write_text(text + text)
    shutil.copytree(folder, folder.with_name("z-copy"))
    assert find_runs(folder.parent, bare_machine()) == once


def test_a_placement_is_one_run_in_whatever_folders_it_ran(folder: Path) -> None:
    """The same arguments and model under two workloads are left out together, and rounds add up."""
    Simulated(1).keep(folder, placements()[0])
    Simulated(1).keep(folder.with_name("m--simulated--w2"), placements()[0], campaign="later")
    result = find_runs(folder.parent, bare_machine())
    assert (len(result.runs), len(result.rows)) == (1, 5)


def test_models_with_the_same_arguments_are_different_runs(folder: Path) -> None:
    """A run is told from another by its model and its arguments."""
    Simulated(1).keep(folder, placements()[0])
    Simulated(1).keep(folder, placements("gemma-3-27b-q4")[0])
    solution_file(folder.with_name("g"), model("gemma-3-27b-q4"))
    assert len({row.run for row in find_runs(folder.parent, bare_machine()).rows}) == 2


def test_another_depth_is_another_row(folder: Path) -> None:
    """A campaign that asked for a deeper canary is not averaged with an earlier one."""
    log = RunLog(folder)
    Simulated(1).keep(folder, placements()[0])
    for record in log.read():
        if record.phase == "canary":
            deeper = record.timing.model_copy(update={"n_prompt": 16000})
            log.append(record.model_copy(update={"campaign": "deep", "timing": deeper}))
    results = [row for row in find_runs(folder.parent, bare_machine()).rows if "canary" in row.label]
    assert [row.kind for row in results] == ["decode", "decode", "prompt", "prompt"]


def test_a_failed_run_of_a_new_build_does_not_hide_what_was_measured(folder: Path) -> None:
    """The newest conditions are those under which something was timed."""
    Simulated(1).keep(folder, placements()[0])
    failed = RunLog(folder).read()[0]
    key = failed.key.model_copy(update={"engine_build": "b2"})
    RunLog(folder).append(failed.model_copy(update={"key": key, "at": "2027-01-01", "outcome": "crash"}))
    result = find_runs(folder.parent, bare_machine())
    assert result.conditions.engine_build == "b1"
    assert len(result.rows) == 5 and [n for _, n in result.left_out] == [1]


def test_rounds_of_a_noisy_run_are_not_taken_for_disturbed(folder: Path) -> None:
    """Where the repeats of one round differ by 8 %, a round that is 12 % slower says nothing."""
    placed, log = placements()[0], RunLog(folder)
    for number, slower in ((1, 1.0), (2, 1.12)):
        simulated = Simulated(3, noise=0.0)
        simulated.keep(folder, placed, round_=number, throttle=slower)
        short = next(r for r in log.read() if r.phase == "short prompt" and r.round == number)
        for repeat, off in enumerate((0.92, 1.08), start=1):
            timing = short.timing.model_copy(update={"generate_s": short.timing.generate_s * off})
            log.append(short.model_copy(update={"repeat": repeat, "timing": timing}))
    rows = find_runs(folder.parent, bare_machine()).rows
    assert {row.doubt for row in rows} == {""}
    assert min(row.noise for row in rows) > 0.03


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
    information = report.told["boundary_us"]
    assert set(report.told) == {name for fit in report.fits for name in fit.unidentified}
    assert information is not None and "CUDA0" in information.trial and "CUDA1" in information.trial
    assert information.left <= 0.9


def test_no_records_change_nothing(tmp_path: Path) -> None:
    """An empty folder leaves the machine as it is."""
    machine, report = calibrate_machine(bare_machine(), tmp_path, "2026-01-02")
    assert machine == bare_machine()
    assert report.changes == ()


def test_the_fit_of_nothing_is_the_priors() -> None:
    """Both fits exist without records."""
    from placement.measure.calibrate.data import FitData

    assert [fit.n_rows for fit in fit_both(bare_machine(), FitData())] == [0, 0]
