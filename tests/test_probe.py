"""The probe: its models, llama-bench's arguments and answers, and what it seeds."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from machine_simulator import Simulated, bare_machine
from verify_support import cluster, cpu_machine

import placement.inputs.detect
from placement.cli import cli
from placement.engine.find import Engine
from placement.engine.rpc import rpc_workers
from placement.errors import EngineFailed, EngineOutputError
from placement.inputs.machine import Coefficient
from placement.inputs.model_files.files import read_model
from placement.inputs.problem import Workload
from placement.llamacpp.compute import plan_compute
from placement.measure.calibrate.features import decode_row, prompt_row
from placement.measure.calibrate.parameters import prior_of
from placement.measure.probe import (
    PROBE_PROGRAM,
    ProbeShape,
    bench_arguments,
    cases,
    middle_of,
    placed,
    probe,
    read_bench,
    write_model,
)
from placement.predict.cost import graph_counts

BENCH = """#!{python}
import json, sys
from pathlib import Path
words = sys.argv[1:]
args = dict(zip(words[::2], words[1::2]))
log = Path({log!r})
with log.open("a") as file:
    file.write(json.dumps(words) + "\\n")
rows = [each for each in json.loads(Path({times!r}).read_text()) if each["key"] == " ".join(words[2:])]
print(json.dumps(rows))
"""


@pytest.fixture
def bench(tmp_path: Path) -> tuple[Engine, Simulated]:
    """A llama-bench that takes as long as a simulated machine does."""
    simulated, rows = Simulated(21, misfit=0.0, noise=0.0), []
    for case in cases(bare_machine()):
        path = tmp_path / f"{case.shape.name}.gguf"
        write_model(case.shape, path)
        model = read_model(path)
        problem, assignment = placed(case, model, bare_machine())
        counts = graph_counts(plan_compute(model, bare_machine(), assignment, PROBE_PROGRAM))
        from placement.llamacpp.emit.arguments import emit_arguments

        words = bench_arguments(emit_arguments(model, bare_machine(), assignment, PROBE_PROGRAM))
        asked = [
            "-p",
            str(case.n_prompt),
            "-n",
            str(case.n_generate),
            "-d",
            str(case.depth),
            "-r",
            "3",
            "-o",
            "json",
        ]
        key = " ".join([*words, *asked])
        if case.n_prompt:
            read = replace(problem, workload=Workload(case.n_prompt, 1, case.depth))
            seconds = simulated.true_s(prompt_row(read, assignment, counts))
            rows.append({"key": key, "n_prompt": case.n_prompt, "n_gen": 0, "avg_ns": seconds * 1e9})
        if case.n_generate:
            deep = replace(problem, workload=Workload(1, 1, case.depth + case.n_generate // 2))
            seconds = simulated.true_s(decode_row(deep, assignment, counts)) * case.n_generate
            rows.append({"key": key, "n_prompt": 0, "n_gen": case.n_generate, "avg_ns": seconds * 1e9})
    times, log = tmp_path / "times.json", tmp_path / "log"
    times.write_text(json.dumps(rows))
    script = tmp_path / PROBE_PROGRAM
    script.write_text(BENCH.format(python=sys.executable, log=str(log), times=str(times)))
    script.chmod(0o755)
    return Engine(tmp_path, {PROBE_PROGRAM: script}), simulated


def test_arguments_are_as_llama_bench_takes_them() -> None:
    """Lists with other separators, flags with values, and nothing that only a server knows."""
    server = "--rpc a:1,b:2 -ngl 9 -ts 4,5 -dev CUDA1,CUDA0 -ot x=CPU,y=CPU -c 99 -b 8 -np 1 -fit off -nkvo"
    server += " --no-op-offload"
    expected = "-rpc a:1,b:2 -ngl 9 -ts 4/5 -dev CUDA1/CUDA0 -ot x=CPU;y=CPU -b 8 -nkvo 1 -nopo 1"
    assert bench_arguments(server.split()) == expected.split()


@pytest.mark.parametrize(
    "text", ["", "oops", "[1]", '[{"n_prompt": 1, "n_gen": 0, "avg_ns": 0}]', '[{"n_gen": 1}]']
)
def test_what_is_no_list_of_tests_is_refused(text: str) -> None:
    """Anything else is an error of the engine's output."""
    with pytest.raises(EngineOutputError):
        read_bench(text)


def test_tests_are_found_behind_other_output() -> None:
    """Warnings before the JSON do not matter."""
    tests = read_bench('loading\n[{"n_prompt": 8, "n_gen": 0, "avg_ns": 5}]\n')
    assert [test["n_prompt"] for test in tests] == [8]


def test_a_probe_model_takes_no_disk(tmp_path: Path) -> None:
    """The weights are a hole."""
    path = tmp_path / "m.gguf"
    write_model(ProbeShape("m", 4, 1024, 4096), path)
    assert path.stat().st_size > 50e6
    assert path.stat().st_blocks * 512 < 1e6


@pytest.mark.parametrize("usable_mib", [256.0, 2000.0, 24000.0])
def test_wide_models_leave_room(usable_mib: float) -> None:
    """A probe takes at most about an eighth of a card for weights."""
    machine = cluster("127.0.0.1:1", usable_mib=usable_mib)
    sizes = [
        4 * 16 * case.shape.n_embd**2 * 34 / 32 / 2**20 for case in cases(machine) if "wide" in case.name
    ]
    assert max(sizes[:-1]) <= usable_mib / 8 or max(case.shape.n_embd for case in cases(machine)) <= 256 * 4


def test_a_machine_without_gpus_is_probed_too() -> None:
    """The CPU's own cases are always there: its weights, its layers, and a cache that it reads."""
    assert [case.name for case in cases(cpu_machine())] == ["CPU wide", "CPU narrow", "CPU narrow, deep"]


@pytest.mark.parametrize("usable_mib", [60.0, 300.0, 24000.0])
def test_a_deep_cache_takes_much_of_a_token_and_fits(usable_mib: float) -> None:
    """At most a quarter of the memory, and on slow devices more bytes than the weights, where there is room."""
    case = next(each for each in cases(cluster("127.0.0.1:1", usable_mib=usable_mib)) if each.depth)
    cache_mib = 4 * case.shape.n_layer * case.shape.n_embd * case.depth / 2**20
    assert cache_mib <= max(usable_mib / 4, 7)
    assert cache_mib >= 48 or usable_mib < 512


def test_a_probe_finds_the_machines_truth(bench: tuple[Engine, Simulated]) -> None:
    """Bandwidths, link, splits and boundaries come out within a fifth."""
    engine, simulated = bench
    found = probe(bare_machine(), engine, "2026-01-02")
    values = {each.name: each.new.value for each in found.changes}
    for name in (
        "read_efficiency.CUDA0", "read_efficiency.CUDA1", "cpu_read_efficiency", "split_us", "boundary_us", "node_us",
        "kv_read_efficiency.CPU",
        "pinned_link_efficiency.CUDA0", "pageable_link_efficiency.CUDA0", "cpu_tflops_per_thread",
    ):  # fmt: skip
        assert values[name] == pytest.approx(simulated.machine.coefficients[name].value, rel=0.2), name
    assert found.failed == ()


def test_what_is_detected_says_so_and_is_the_next_prior(bench: tuple[Engine, Simulated]) -> None:
    """Source, date, an uncertainty of at least a tenth, and a history of what was there."""
    found = probe(bare_machine(), bench[0], "2026-01-02")
    kept = found.machine.coefficients["cpu_read_efficiency"]
    assert (kept.source, kept.date) == ("detected", "2026-01-02")
    assert kept.uncertainty is not None and kept.uncertainty >= 0.1 * kept.value
    assert prior_of(found.machine, "cpu_read_efficiency") == kept
    assert [each.coefficient.value for each in found.machine.history if each.name == "split_us"] == [45.0]


def test_what_runs_have_taught_is_not_overwritten(bench: tuple[Engine, Simulated]) -> None:
    """A calibrated coefficient stays."""
    known = Coefficient(0.41, "fraction", "calibrated", "2026-01-01", 9, 0.01)
    machine = replace(bare_machine(), coefficients={"cpu_read_efficiency": known})
    assert probe(machine, bench[0], "2026-01-02").machine.coefficients["cpu_read_efficiency"] == known


def test_a_spent_budget_is_said(bench: tuple[Engine, Simulated]) -> None:
    """Cases that there was no time for are named."""
    with pytest.raises(EngineFailed, match="budget"):
        probe(bare_machine(), bench[0], "2026-01-02", budget_s=0.5)


@pytest.mark.engine
def test_a_real_engine_is_probed_on_two_workers(engine: Engine) -> None:
    """llama-bench runs the models made here on two workers and the CPU; each device's bandwidth is detected."""
    if PROBE_PROGRAM not in engine.binaries:
        pytest.skip("this engine has no llama-bench")
    with rpc_workers(engine, 2) as workers:
        machine = cluster(*(each.endpoint for each in workers), usable_mib=300)
        found = probe(machine, engine, "2026-01-02", budget_s=20)
    assert {row.kind for row in found.rows} == {"decode", "prompt"}
    assert found.machine.coefficients["read_efficiency.RPC0"].source == "detected"


def test_a_host_without_a_gpu_is_not_taken_for_the_reference_machine(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """What is measured here belongs to this machine: it must be named where no card tells it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setattr(placement.inputs.detect, "detect_hardware", lambda: (None, "no GPU here"))
    ran = CliRunner().invoke(cli, ["machine", "probe"], standalone_mode=False)
    assert str(ran.exception) == "--machine: no GPU here: name the file of the machine that is measured"


def test_one_disturbed_repeat_does_not_count() -> None:
    """The middle of llama-bench's repeats is taken, and their usual distance is the noise."""
    seconds, noise = middle_of({"avg_ns": 5e9, "samples_ns": [1.0e9, 1.02e9, 9e9]})
    assert seconds == pytest.approx(1.02)
    assert noise < 0.05


def test_the_end_of_a_program_is_named(bench: tuple[Engine, Simulated]) -> None:
    """A build for another processor dies of SIGILL, and the case says so."""
    engine, _ = bench
    engine.program(PROBE_PROGRAM).write_text("#!/bin/sh\nkill -ILL $$\n")
    with pytest.raises(EngineFailed, match="was ended by SIGILL"):
        probe(cpu_machine(), engine, "2026-01-02")
