"""Whole verifies with the real llama-server on small random models: measured, starved, killed, stopped, resumed."""

from __future__ import annotations

import contextlib
import os
import re
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from verify_support import (
    QUICK,
    SMALL,
    Lines,
    cluster,
    cpu_machine,
    problem_of,
    quick,
    set_of,
    solution,
    write_model,
)

from placement.engine.find import Engine
from placement.engine.rpc import rpc_workers
from placement.inputs.model_files.files import read_model
from placement.measure.records.log import RunLog
from placement.measure.verify.phases import MOST_REPEATS, PATIENCE
from placement.measure.verify.run import VerifyReport, verify
from placement.solve.request import Request
from placement.solve.solve import make_problem, solve_request

pytestmark = pytest.mark.engine

CPU_ARGS = ("-ngl", "0", "-c", "1024", "-np", "1", "-t", "1", "-fa", "on", "-fit", "off")
OTHER_ARGS = (*CPU_ARGS, "-ub", "256")
HASTY = replace(QUICK, prompt_s=3.0, stop_s=0.3)


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "dense.gguf")


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("models") / "moe.gguf", is_moe=True)


def servers() -> list[psutil.Process]:
    """Every llama-server that this process started and that still runs."""
    return [each for each in psutil.Process().children(recursive=True) if "llama-server" in each.name()]


def run_on_cpu(
    engine: Engine, model_file: Path, tmp_path: Path, listener: Lines, **more: Any
) -> VerifyReport:
    """Verify two hand-made solutions on the CPU."""
    problem = problem_of(read_model(model_file), cpu_machine())
    result = set_of(problem, solution("aggressive", *CPU_ARGS), solution("other", *OTHER_ARGS))
    options = quick(tmp_path, **more)
    return verify(problem, result, model_file, engine, tmp_path / "runs", options, listener)


def statuses(report: VerifyReport) -> dict[str, str]:
    return {each.name: each.status for each in report.verdict.results}


def test_dense_model_on_the_cpu(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """Without a GPU the same phases are measured, with the server's buffers, splits and host memory."""
    report = run_on_cpu(engine, dense, tmp_path, Lines())
    assert set(statuses(report).values()) == {"ok"}
    run = [each for each in RunLog(tmp_path / "runs").read() if each.candidate == "aggressive"]
    start = next(each for each in run if each.phase == "start")
    assert start.buffers_mib is not None and start.buffers_mib["Host"] > 1
    assert start.splits_decode is not None
    timings = {each.phase: each.timing for each in run if each.timing is not None}
    assert (timings["short prompt"].n_prompt, timings["short prompt"].n_generated) == (16, 16)
    assert (timings["long prompt"].n_prompt, timings["canary"].n_prompt) == (200, 256)
    assert all(each.host is not None and each.host.rss_mib for each in run if each.phase == "canary")


def test_speed_is_what_the_server_measures(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """The t/s recorded are those of llama-server's own log for the same request."""
    run_on_cpu(engine, dense, tmp_path, Lines())
    record = next(each for each in RunLog(tmp_path / "runs").read() if each.phase == "short prompt")
    assert record.timing is not None
    logged = re.findall(r" eval time = +([\d.]+) ms / +16 tokens", Path(record.log).read_text())
    assert any(abs(float(ms) - record.timing.generate_s * 1e3) < 0.011 for ms in logged)


def test_phases_are_repeated_for_a_while(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """Small models are asked again until a phase took its seconds; a rerun that wants more adds what is missing."""
    problem = problem_of(read_model(dense), cpu_machine())
    result = set_of(problem, solution("aggressive", *CPU_ARGS))
    counts = []
    for seconds in (0.2, 0.4):
        options = replace(quick(tmp_path, has_fit=False), asked=replace(SMALL, least_s=seconds))
        report = verify(problem, result, dense, engine, tmp_path / "runs", options, Lines())
        timed = [each for each in RunLog(tmp_path / "runs").read() if each.timing is not None]
        for phase in ("short prompt", "long prompt", "canary"):
            mine = [each for each in timed if each.phase == phase]
            took_s = sum(each.timing.prompt_s + each.timing.generate_s for each in mine if each.timing)
            assert took_s >= seconds or len(mine) == MOST_REPEATS
            took_s -= mine[-1].timing.prompt_s + mine[-1].timing.generate_s
            assert took_s < PATIENCE * seconds
            assert [each.repeat for each in mine] == list(range(len(mine)))
        counts.append(len(timed))
    assert report.is_complete and counts[0] <= counts[1]
    assert len({each.campaign for each in timed}) == 1


def test_moe_model_on_two_workers(engine: Engine, moe: Path, tmp_path: Path) -> None:
    """Solved for two unequal workers, run on them beside --fit, and never slower than it."""
    model = read_model(moe)
    with rpc_workers(engine, 2) as workers:
        machine = cluster(*(each.endpoint for each in workers), usable_mib=11)
        asked = Request(
            ctx_tokens=1024, prompt_tokens=200, generate_tokens=20, load_modes=("auto",), time_limit_s=3
        )
        problem, _ = make_problem(model, machine, asked)
        result = solve_request(model, machine, asked)
        report = verify(problem, result, moe, engine, tmp_path / "runs", quick(tmp_path, top=1), Lines())
    assert set(statuses(report).values()) == {"ok"}
    picked, fit = report.verdict.recommended, report.verdict.results[-1]
    assert picked is not None and picked.turn_s is not None and fit.turn_s is not None
    assert (fit.role, picked.turn_s <= fit.turn_s) == ("fit", True)
    ours = report.verdict.results[0]
    assert ours.predicted is not None and ours.predicted.label == "planned"
    assert ours.splits_decode == ours.predicted.splits_decode
    assert set(ours.devices) == {"RPC0", "RPC1"}


def test_fit_keeps_to_the_cap(engine: Engine, moe: Path, tmp_path: Path) -> None:
    """--fit takes no more of a worker than the candidate's cap: its target is what is free less the cap."""
    problem_model, cap_mib = read_model(moe), 8.0
    with rpc_workers(engine, 1) as workers:
        machine = cluster(workers[0].endpoint, usable_mib=cap_mib)
        problem = problem_of(problem_model, machine)
        args = ("--rpc", workers[0].endpoint, *CPU_ARGS)
        result = set_of(problem, solution("aggressive", *args))
        verify(problem, result, moe, engine, tmp_path / "runs", quick(tmp_path), Lines())
    run = [each for each in RunLog(tmp_path / "runs").read() if each.role == "fit"]
    start = next(each for each in run if each.phase == "start")
    assert start.buffers_mib is not None
    assert start.buffers_mib.get("RPC0", 0.0) <= cap_mib + 1  # the engine prints what is free in whole MiB


@contextlib.contextmanager
def starved_worker(engine: Engine, log: Path, limit_mib: int) -> Iterator[str]:
    """A worker that may take no more address space than this: the kernel refuses it memory."""
    program = str(engine.program("ggml-rpc-server"))
    with contextlib.ExitStack() as stack:
        import socket

        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        worker = subprocess.Popen(
            ["prlimit", f"--as={limit_mib << 20}", program, "-H", "127.0.0.1", "-p", str(port), "-t", "1"],
            stdout=stack.enter_context(log.open("wb")),
            stderr=subprocess.STDOUT,
        )
        stack.callback(worker.wait)
        stack.callback(worker.kill)
        deadline_s = time.monotonic() + 10
        while not psutil.Process(worker.pid).net_connections() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        yield f"127.0.0.1:{port}"


def test_starved_worker_is_out_of_memory_at_start(engine: Engine, moe: Path, tmp_path: Path) -> None:
    """A worker that really refuses memory makes OOM at start, and the next candidate is measured."""
    with starved_worker(engine, tmp_path / "worker.log", 60) as endpoint:
        machine = cluster(endpoint)
        problem = problem_of(read_model(moe), machine)
        args = ("--rpc", endpoint, "-ngl", "99", "-np", "1", "-t", "1", "-fa", "on", "-fit", "off")
        result = set_of(
            problem,
            solution("aggressive", *args, "-c", "131072", devices=("RPC0",)),
            solution("other", *args, "-c", "1024", devices=("RPC0",)),
        )
        report = verify(problem, result, moe, engine, tmp_path / "runs", quick(tmp_path), Lines())
    assert statuses(report)["aggressive"] == "oom-at-start"
    assert statuses(report)["other"] == "ok"
    failed = [each for each in RunLog(tmp_path / "runs").read() if each.outcome == "oom-at-start"]
    assert any("failed to allocate" in line for line in failed[0].log_tail)


def test_refused_memory_in_inference(
    engine: Engine, dense: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server that is refused memory while it reads a prompt is OOM in inference, with the reason recorded."""
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")  # no spare heaps: the next large allocation is refused

    def starve(progress: Any) -> None:
        if (progress.candidate, progress.phase) == ("aggressive", "long prompt"):
            for server in servers():
                limit = server.memory_info().vms + (128 << 10)
                resource.prlimit(server.pid, resource.RLIMIT_AS, (limit, limit))

    problem = problem_of(read_model(dense), cpu_machine(), 4096)
    args = [word.replace("1024", "4096") for word in CPU_ARGS]
    result = set_of(problem, solution("aggressive", *args), solution("other", *args, "-ub", "256"))
    options = replace(quick(tmp_path), asked=replace(SMALL, long_prompt=2000))
    report = verify(problem, result, dense, engine, tmp_path / "runs", options, Lines(starve))
    assert statuses(report)["aggressive"] == "oom-in-inference"
    assert statuses(report)["other"] == "ok"
    failed = [each for each in RunLog(tmp_path / "runs").read() if each.outcome != "ok"]
    assert "bad_alloc" in failed[0].detail


def after(seconds: float, number: int) -> None:
    """Send a signal to the server a moment after the phase has begun."""
    threading.Timer(seconds, lambda: [server.send_signal(number) for server in servers()]).start()


def test_server_that_dies_is_a_crash(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """A server killed while it generates is a crash that names the signal, and the run goes on."""

    def kill(progress: Any) -> None:
        if (progress.candidate, progress.phase) == ("aggressive", "long prompt"):
            after(0.0, signal.SIGABRT)
            time.sleep(0.2)

    report = run_on_cpu(engine, dense, tmp_path, Lines(kill))
    assert (statuses(report)["aggressive"], statuses(report)["other"]) == ("crash", "ok")
    failed = [each for each in RunLog(tmp_path / "runs").read() if each.outcome == "crash"]
    assert "SIGABRT" in failed[0].detail


def test_stopped_server_is_a_hang(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """A server that no longer answers is a hang after its time-out; it is ended and the run goes on."""

    def stop(progress: Any) -> None:
        if (progress.candidate, progress.phase) == ("aggressive", "long prompt"):
            for server in servers():
                server.send_signal(signal.SIGSTOP)

    report = run_on_cpu(engine, dense, tmp_path, Lines(stop), limits=HASTY)
    assert (statuses(report)["aggressive"], statuses(report)["other"]) == ("hang", "ok")
    assert servers() == []


def test_engine_without_the_device_is_a_wrong_build(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """A CPU build asked for CUDA0 would silently run on the CPU: it is named instead, and not run."""
    from verify_support import cluster as workers

    from placement.inputs.machine import Device

    card = Device("CUDA0", 24576, 24000, 480, 1008, 25)
    problem = problem_of(read_model(dense), replace(workers(), devices=(card,)))
    result = set_of(problem, solution("aggressive", *CPU_ARGS, devices=("CUDA0",)))
    report = verify(problem, result, dense, engine, tmp_path / "runs", quick(tmp_path), Lines())
    assert set(statuses(report).values()) == {"wrong-build"}
    assert report.verdict.recommended is None


SCRIPT = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from test_verify_engine import run_on_cpu
from verify_support import Lines
from placement.cli.signals import ended_by_signals
from placement.engine.find import find_engine
folder = Path(sys.argv[3])
listener = Lines(lambda p: print(p.candidate, p.round, p.phase, flush=True))
with ended_by_signals():
    report = run_on_cpu(find_engine(sys.argv[4]), Path(sys.argv[5]), folder, listener, rounds=2)
print("SAID", listener.said, flush=True)
print("DONE", report.is_complete, flush=True)
"""


def place(engine: Engine, model: Path, folder: Path) -> subprocess.Popen[str]:
    """A verify in a process of its own."""
    tests = Path(__file__).parent
    arguments = [str(tests), str(tests.parent), str(folder), str(engine.folder), str(model)]
    return subprocess.Popen([sys.executable, "-c", SCRIPT, *arguments], stdout=subprocess.PIPE, text=True)


def left_behind(model: Path) -> list[int]:
    """Processes of anyone that still run this model's file."""
    return [each.pid for each in psutil.process_iter(["cmdline"]) if str(model) in (each.info["cmdline"] or [])
            and "llama-server" in " ".join(each.info["cmdline"])]  # fmt: skip


def is_empty_soon(model: Path) -> bool:
    deadline_s = time.monotonic() + 5
    while left_behind(model) and time.monotonic() < deadline_s:
        time.sleep(0.05)
    return not left_behind(model)


def test_killed_place_resumes(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """Killed with -9 again and again, place leaves no server and repeats no measured phase, and ends complete."""
    n_phases = 0
    for kill_at in (4, 9, 7):
        with place(engine, dense, tmp_path) as process:
            assert process.stdout is not None
            for index, _ in enumerate(process.stdout, start=1):
                if index == kill_at:
                    process.kill()
                    break
        assert is_empty_soon(dense)
        n_phases = len(RunLog(tmp_path / "runs").read())
    with place(engine, dense, tmp_path) as process:
        assert process.stdout is not None
        output = process.stdout.read()
    assert "DONE True" in output and f"{n_phases} phases are recorded" in output
    n_candidates = 4  # two solutions and a --fit for each: their batches differ
    measured = [
        (each.candidate, each.round, each.phase)
        for each in RunLog(tmp_path / "runs").read()
        if each.timing is not None and each.phase != "warm-up"
    ]
    assert len(measured) == len(set(measured)) == n_candidates * 2 * 3


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_stopped_place_leaves_nothing(engine: Engine, dense: Path, tmp_path: Path, number: int) -> None:
    """Ctrl-C, a termination and a closed terminal end the server and free the lock."""
    with place(engine, dense, tmp_path) as process:
        assert process.stdout is not None
        for line in process.stdout:
            if "short prompt" in line:
                process.send_signal(number)
                break
        process.stdout.read()
        process.wait(20)
    assert left_behind(dense) == []
    assert (tmp_path / "lock").read_bytes() == b""


def test_measures_are_small(dense: Path, moe: Path) -> None:
    """The models of these tests are a few MB: the whole file runs in a minute or two."""
    assert max(os.path.getsize(dense), os.path.getsize(moe)) < 16_000_000
    assert SMALL.canary <= 256
