"""Whole verifies against a fake llama-server that fails as often as failures have names."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from verify_support import (
    QUICK,
    Lines,
    cpu_machine,
    fake_engine,
    problem_of,
    quick,
    set_of,
    solution,
    write_model,
)

from placement.errors import InputError
from placement.inputs.machine import Cpu, Machine
from placement.inputs.model_files.files import read_model
from placement.measure.records.log import RunLog
from placement.measure.verify.lock import MachineBusy, machine_lock
from placement.measure.verify.run import VerifyReport, decide_again, verify
from placement.solve.store import solution_folder

HASTY = replace(QUICK, start_s=1.5, prompt_s=1.0, canary_s=1.0, stop_s=0.3)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real header; the fake server does not read it."""
    return write_model(tmp_path_factory.mktemp("model") / "tiny.gguf", n_layer=1, n_embd=64)


@pytest.fixture
def run(tmp_path: Path, model_file: Path) -> Any:
    """Verifies the solutions named by keyword against a server that behaves as their values say."""

    def go(listener: Lines | None = None, options: Any = None, names: str = "", **modes: Any) -> VerifyReport:
        model = read_model(model_file)
        problem = problem_of(model, cpu_machine())
        wanted = names.split() or [name for name in modes if "." not in name and name != "fit"]
        found = set_of(problem, *(solution(name, "-ngl", name) for name in wanted))
        engine = fake_engine(tmp_path / "engine", **modes)
        return verify(
            problem,
            found,
            model_file,
            engine,
            tmp_path / "runs",
            options or quick(tmp_path),
            listener or Lines(),
        )

    return go


@pytest.fixture
def run_on(tmp_path: Path, model_file: Path) -> Any:
    """Verifies one solution on a machine, in the folder that is named after it; all lie below one root."""

    def go(machine: Machine, listener: Lines) -> VerifyReport:
        problem = problem_of(read_model(model_file), machine)
        found = set_of(problem, solution("aggressive", "-ngl", "aggressive"))
        engine = fake_engine(tmp_path / "engine", aggressive="ok")
        folder = solution_folder(tmp_path / "solutions", problem)
        return verify(problem, found, model_file, engine, folder, quick(tmp_path), listener)

    return go


def statuses(report: VerifyReport) -> dict[str, str]:
    return {each.name: each.status for each in report.verdict.results}


def starts(tmp_path: Path) -> list[str]:
    return (tmp_path / "engine" / "starts").read_text().split()


def test_all_good_is_measured_and_decided(run: Any, tmp_path: Path) -> None:
    """Every candidate is measured in every phase, and the fastest that --fit does not beat is recommended."""
    report = run(moderate="ok", aggressive="ok", **{"moderate.ms": 10, "aggressive.ms": 5, "fit.ms": 20})
    assert statuses(report) == {"moderate": "ok", "aggressive": "ok", "fit:moderate": "ok"}
    assert report.verdict.recommended.name == "aggressive"
    phases = [each.phase for each in RunLog(tmp_path / "runs").read() if each.candidate == "moderate"]
    assert phases == ["plan", "start", "warm-up", "short prompt", "long prompt", "canary", "stop"]


def test_fit_is_recommended_when_it_is_faster(run: Any) -> None:
    """A --fit that measured faster than all ours is what is recommended, with its own arguments."""
    report = run(aggressive="ok", **{"aggressive.ms": 20, "fit.ms": 10})
    assert report.verdict.recommended.name == "fit:aggressive"
    assert report.verdict.recommended.arguments == ("-fit", "on")


@pytest.mark.parametrize(
    ("mode", "status"),
    [
        ("start:oom", "oom-at-start"),
        ("long:pool", "oom-in-inference"),
        ("short:assert", "crash"),
        ("start:hang", "hang"),
        ("canary:hang", "hang"),
        ("start:port", "port-taken"),
        ("start:argument", "wrong-build"),
    ],
)
def test_failure_is_named_and_the_run_goes_on(run: Any, tmp_path: Path, mode: str, status: str) -> None:
    """Each failure has its name, its last log lines are recorded, and the next candidate is measured."""
    report = run(options=quick(tmp_path, limits=HASTY), aggressive=mode, other="ok")
    assert statuses(report) == {"aggressive": status, "other": "ok", "fit:aggressive": "ok"}
    failed = [each for each in RunLog(tmp_path / "runs").read() if each.outcome != "ok"]
    assert len(failed) == 1
    assert failed[0].detail and failed[0].log_tail


def test_no_server_is_left(run: Any, tmp_path: Path) -> None:
    """After hangs and crashes no child process of ours is left, and the lock is free."""
    run(options=quick(tmp_path, limits=HASTY), aggressive="canary:hang", moderate="short:assert")
    assert psutil.Process().children(recursive=True) == []
    with machine_lock(tmp_path / "lock") as (_, n_reaped):
        assert n_reaped == 0


def test_intermittent_oom_is_named(run: Any, tmp_path: Path) -> None:
    """Out of memory in the first round only is intermittent, and moderate is recommended for it."""
    report = run(options=quick(tmp_path, rounds=2), aggressive="long:once", moderate="ok", **{"fit.ms": 50})
    assert statuses(report)["aggressive"] == "oom-intermittent"
    assert report.verdict.recommended.name == "moderate"


def test_rounds_interleave(run: Any, tmp_path: Path) -> None:
    """Candidates take turns, A B C A B C, so that drift favours none."""
    run(options=quick(tmp_path, rounds=2), aggressive="ok", moderate="ok")
    assert starts(tmp_path) == ["moderate", "aggressive", "fit"] * 2


def test_crashed_candidate_is_not_run_again(run: Any, tmp_path: Path) -> None:
    """A candidate that crashed or hung has lost: later rounds spend no time on it."""
    run(options=quick(tmp_path, rounds=2), aggressive="short:assert", moderate="ok")
    assert starts(tmp_path).count("aggressive") == 1


def test_rerun_of_a_whole_campaign_starts_nothing(run: Any, tmp_path: Path) -> None:
    """When all is measured a rerun says so, runs no server and decides the same."""
    first = run(aggressive="ok")
    before, listener = starts(tmp_path), Lines()
    again = run(listener, aggressive="ok")
    assert starts(tmp_path) == before
    assert any("resuming campaign" in line for line in listener.said)
    assert again.verdict == first.verdict


def test_interrupted_run_resumes_with_the_phase_in_flight(run: Any, tmp_path: Path) -> None:
    """After an end in the long prompt, the rerun measures the long prompt and what follows, and no short prompt."""

    def stop(progress: Any) -> None:
        if progress.phase == "long prompt":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(Lines(stop), aggressive="ok")
    assert psutil.Process().children(recursive=True) == []
    listener = Lines()
    report = run(listener, aggressive="ok")
    assert [phase for name, _, phase, _ in listener.phases if name == "aggressive"] == [
        "plan", "start", "warm-up", "long prompt", "canary", "stop",
    ]  # fmt: skip
    assert statuses(report)["aggressive"] == "ok"


def test_fresh_measures_anew(run: Any, tmp_path: Path) -> None:
    """--fresh begins a new campaign; the old records stay in the file."""
    first = run(aggressive="ok")
    second = run(options=quick(tmp_path, is_fresh=True), aggressive="ok")
    assert second.campaign != first.campaign
    assert second.n_records * 2 == len(RunLog(tmp_path / "runs").read())


def test_another_build_is_measured_anew(run: Any, tmp_path: Path) -> None:
    """Records of another build of llama.cpp are left aside, and that is said."""
    run(aggressive="ok")
    listener = Lines()
    (tmp_path / "engine" / "libllama.so").write_text("new")
    run(listener, aggressive="ok")
    assert any("of another build" in line for line in listener.said)
    assert starts(tmp_path) == ["aggressive", "fit"] * 2


def test_rebuilt_engine_is_a_wrong_build(run: Any, tmp_path: Path) -> None:
    """A llama.cpp that changes under a running verify is named, not measured as if it were the old one."""

    def rebuild(progress: Any) -> None:
        if progress.phase == "stop":
            (tmp_path / "engine" / "libllama.so").write_text(progress.candidate)

    report = run(Lines(rebuild), aggressive="ok")
    assert statuses(report)["fit:aggressive"] == "wrong-build"


def test_port_taken_is_tried_again_by_a_rerun(run: Any, tmp_path: Path) -> None:
    """What says nothing about the placement is run again: a port that was taken, for one."""
    assert not run(options=quick(tmp_path, limits=HASTY), aggressive="start:port").is_complete
    report = run(options=quick(tmp_path, limits=HASTY), aggressive="ok")
    assert statuses(report)["aggressive"] == "ok"


def test_spent_budget_keeps_what_was_measured(run: Any, tmp_path: Path) -> None:
    """A budget of nothing runs nothing, says so, and the next run measures the rest."""
    listener = Lines()
    report = run(listener, options=quick(tmp_path, budget_s=0.0), aggressive="ok")
    assert not report.is_complete and report.verdict.results == ()
    assert any("the time given is over" in line for line in listener.said)
    assert run(aggressive="ok").is_complete


def test_wrong_model_file_is_named(run: Any, tmp_path: Path, model_file: Path) -> None:
    """A file that is not the model solved for starts no server; every candidate says what differs."""
    model = read_model(model_file)
    other = write_model(tmp_path / "other.gguf", n_layer=2, n_embd=64)
    problem = problem_of(model, cpu_machine())
    found = set_of(problem, solution("aggressive", "-ngl", "aggressive"))
    engine = fake_engine(tmp_path / "engine")
    listener = Lines()
    report = verify(problem, found, other, engine, tmp_path / "runs", quick(tmp_path), listener)
    assert set(statuses(report).values()) == {"model-mismatch"}
    assert report.verdict.recommended is None
    assert not (tmp_path / "engine" / "starts").exists()
    assert "tensors, not" in listener.said[0]


def test_show_prefers_what_was_measured(run: Any, tmp_path: Path, model_file: Path) -> None:
    """A later try with a wrong file does not hide the table of what was measured."""
    report = run(aggressive="ok")
    problem = problem_of(read_model(model_file), cpu_machine())
    found = set_of(problem, solution("aggressive", "-ngl", "aggressive"))
    other = write_model(tmp_path / "other.gguf", n_layer=2, n_embd=64)
    engine = fake_engine(tmp_path / "engine", aggressive="ok")
    verify(problem, found, other, engine, tmp_path / "runs", quick(tmp_path), Lines())
    assert decide_again(tmp_path / "runs", problem).verdict == report.verdict


def test_other_name_in_the_header_is_the_same_model(run: Any, tmp_path: Path, model_file: Path) -> None:
    """A name or licence in the header makes no other model: neither memory nor speed depend on it."""
    model = read_model(model_file)
    renamed = replace(model, metadata={**model.metadata, "general.name": "another"})
    problem = problem_of(renamed, cpu_machine())
    found = set_of(problem, solution("aggressive", "-ngl", "aggressive"))
    engine = fake_engine(tmp_path / "engine")
    report = verify(problem, found, model_file, engine, tmp_path / "runs", quick(tmp_path), Lines())
    assert statuses(report)["aggressive"] == "ok"


def test_second_verify_is_refused(run: Any, tmp_path: Path) -> None:
    """Two verifies at once on one machine are refused: the second would spoil both."""
    with machine_lock(tmp_path / "lock"), pytest.raises(MachineBusy):
        run(aggressive="ok")


def test_torn_record_is_said_and_survived(run: Any, tmp_path: Path) -> None:
    """A torn last line costs its phase only: the rerun says where it is kept and goes on."""
    run(aggressive="ok")
    path = tmp_path / "runs" / "runs.jsonl"
    path.write_bytes(path.read_bytes()[:-30])
    listener = Lines()
    report = run(listener, aggressive="ok")
    assert any("torn" in line for line in listener.said)
    assert statuses(report)["fit:aggressive"] == "ok"


def test_show_decides_from_the_records(run: Any, tmp_path: Path, model_file: Path) -> None:
    """--show gives the verdict again without an engine."""
    report = run(aggressive="ok")
    problem = problem_of(read_model(model_file), cpu_machine())
    assert decide_again(tmp_path / "runs", problem).verdict == report.verdict


def test_a_renamed_machine_goes_on_where_it_stopped(run_on: Any, tmp_path: Path, model_file: Path) -> None:
    """What ran under the machine's old name, in the folder of that name, is not run again, and is shown."""
    first, before = run_on(cpu_machine(), Lines()), starts(tmp_path)
    renamed, listener = replace(cpu_machine(), name="rig"), Lines()
    again = run_on(renamed, listener)
    assert starts(tmp_path) == before
    assert any("resuming campaign" in line for line in listener.said)
    problem = problem_of(read_model(model_file), renamed)
    shown = decide_again(solution_folder(tmp_path / "solutions", problem), problem)
    assert again.verdict == first.verdict == shown.verdict


def test_records_of_a_namesake_are_not_used(run_on: Any, tmp_path: Path, model_file: Path) -> None:
    """Other hardware under the same name is measured anew, and the table does not show what ran elsewhere."""
    run_on(cpu_machine(), Lines())
    before, namesake = starts(tmp_path), replace(cpu_machine(), cpu=Cpu(8000, 20, 64))
    problem = problem_of(read_model(model_file), namesake)
    with pytest.raises(InputError, match="no records of this machine"):
        decide_again(solution_folder(tmp_path / "solutions", problem), problem)
    run_on(namesake, Lines())
    assert len(starts(tmp_path)) == 2 * len(before)


def test_show_without_records_says_what_to_do(tmp_path: Path) -> None:
    """--show before any run is an input error."""
    with pytest.raises(InputError, match="run place verify first"):
        decide_again(tmp_path, problem_of(read_model(write_model(tmp_path / "m.gguf")), cpu_machine()))
