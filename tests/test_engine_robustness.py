"""Engines that hang, die, lie or print garbage: one clear error each, in time, and nothing left running."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from placement.engine.find import Engine, describe_engine, find_engine
from placement.engine.plan import plan, plan_many
from placement.engine.run import kill_group, run, run_many, start_logged
from placement.errors import (
    EngineError,
    EngineFailed,
    EngineMissing,
    EngineOutputError,
    EngineTimeout,
    InputError,
)

FakeEngine = Callable[..., Engine]
GOOD = "printf 'CUDA0 100 20 3 \\nHost 5 0 1 \\nsched_reserve: graph: nodes = 9, splits = 2\\n'"


def is_running(pid: int) -> bool:
    try:
        status = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return False
    return status.rpartition(")")[2].split()[0] not in "ZX"


def ended(pid: int, within_s: float = 3.0) -> bool:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if not is_running(pid):
            return True
        time.sleep(0.02)
    return False


def kept_file(error: EngineError) -> Path:
    return Path(str(error).rpartition("its last lines are in ")[2].split(" (")[0])


def test_good_fake(fake_engine: FakeEngine, header: Path) -> None:
    """The fake that the other tests break answers when it is whole."""
    assert plan(fake_engine(GOOD), header, ["-c", "4096"]).devices["CUDA0"].weights_mib == 100


def test_hang(fake_engine: FakeEngine, header: Path) -> None:
    """A hung engine is stopped at the time-out, and the error says how long it had."""
    began = time.monotonic()
    with pytest.raises(EngineTimeout, match=r"llama-fit-params did not finish within 0\.5 s"):
        plan(fake_engine("sleep 1000"), header, [], timeout_s=0.5)
    assert time.monotonic() - began < 5


def test_hang_that_ignores_signals(fake_engine: FakeEngine, header: Path) -> None:
    """An engine that ignores SIGTERM and SIGINT is ended all the same."""
    engine = fake_engine("trap '' TERM INT HUP; while :; do sleep 1; done")
    with pytest.raises(EngineTimeout):
        plan(engine, header, [], timeout_s=0.5)


def test_grandchildren_are_ended(fake_engine: FakeEngine, header: Path, tmp_path: Path) -> None:
    """What the engine itself has started ends with it."""
    engine = fake_engine(f"sleep 1000 & echo $! > {tmp_path}/pid; wait")
    with pytest.raises(EngineTimeout):
        plan(engine, header, [], timeout_s=0.5)
    assert ended(int((tmp_path / "pid").read_text()))


def test_pipe_held_by_a_grandchild(fake_engine: FakeEngine, header: Path, tmp_path: Path) -> None:
    """An engine that has ended is not waited for because something it started keeps the pipe open."""
    engine = fake_engine(f"sleep 1000 & echo $! > {tmp_path}/pid; {GOOD}")
    began = time.monotonic()
    assert "Host" in plan(engine, header, []).devices
    assert time.monotonic() - began < 5
    assert ended(int((tmp_path / "pid").read_text()))


def test_true(fake_engine: FakeEngine, header: Path) -> None:
    """An engine that says nothing and succeeds, as /bin/true does, is not believed."""
    with pytest.raises(EngineOutputError, match="printed no memory breakdown"):
        plan(fake_engine("exit 0"), header, [])


def test_true_everywhere(tmp_path: Path, header: Path) -> None:
    """/bin/true in the engine's place fails at its help already, planned or described."""
    (tmp_path / "llama-fit-params").symlink_to("/bin/true")
    engine = find_engine(tmp_path)
    assert engine is not None
    for ask in (lambda: describe_engine(engine), lambda: plan(engine, header, [])):
        with pytest.raises(EngineError, match="llama-fit-params"):
            ask()


def test_false(fake_engine: FakeEngine, header: Path) -> None:
    """An engine that fails without a word is quoted as such."""
    with pytest.raises(EngineFailed, match="ended with exit status 1 and printed nothing"):
        plan(fake_engine("exit 1"), header, [])


def test_garbage(fake_engine: FakeEngine, header: Path) -> None:
    """Random bytes are an unreadable answer."""
    with pytest.raises(EngineOutputError, match="printed no memory breakdown"):
        plan(fake_engine("head -c 300000 /dev/urandom"), header, [])


@pytest.mark.parametrize(
    "line",
    [
        '{"type":"fit_memory_breakdown","data":{"unit":"MiB","rows":[{"name":"CUDA0"}]}}',
        '{"type":"fit_memory_breakdown","data":',
        '{"type":"fit_memory_breakdown","data":{"rows":[]}}',
        "x | memory breakdown [MiB] | total |",
        "CUDA0 100 20",
    ],
)
def test_half_an_answer(fake_engine: FakeEngine, header: Path, line: str) -> None:
    """A breakdown that is cut off or empty is an unreadable answer."""
    with pytest.raises(EngineOutputError, match="printed no memory breakdown"):
        plan(fake_engine(f"cat <<'X'\n{line}\nX"), header, [])


def test_endless_output(fake_engine: FakeEngine, header: Path) -> None:
    """An engine that prints without end is stopped."""
    with pytest.raises(EngineOutputError, match="printed more than 64 MiB"):
        plan(fake_engine("exec cat /dev/zero"), header, [])


def test_killed(fake_engine: FakeEngine, header: Path) -> None:
    """An engine killed from outside is reported with the signal, though it had answered in part."""
    with pytest.raises(EngineFailed, match="was killed by SIGKILL"):
        plan(fake_engine(f"{GOOD}; kill -9 $$"), header, [])


def test_abort(fake_engine: FakeEngine, header: Path) -> None:
    """An abort is quoted with the assertion that failed."""
    body = "echo 'x.cpp:7: GGML_ASSERT(n > 0) failed' >&2; echo bye >&2; kill -ABRT $$"
    with pytest.raises(EngineFailed, match=r"was killed by SIGABRT: x\.cpp:7: GGML_ASSERT\(n > 0\) failed"):
        plan(fake_engine(body), header, [])


def test_unknown_flag(fake_engine: FakeEngine, header: Path) -> None:
    """A flag that the build does not know is named."""
    body = "echo 'error: invalid argument: -xyz' >&2; exit 1"
    with pytest.raises(EngineFailed, match="invalid argument: -xyz"):
        plan(fake_engine(body), header, ["-xyz"])


def test_last_lines_are_kept(fake_engine: FakeEngine, header: Path) -> None:
    """The error names a file with the command and the last lines of what was printed."""
    with pytest.raises(EngineFailed) as caught:
        plan(fake_engine("echo what went wrong >&2; exit 7"), header, ["-c", "4096"])
    text = kept_file(caught.value).read_text()
    assert "-c 4096" in text
    assert "what went wrong" in text


def test_one_line(fake_engine: FakeEngine, header: Path) -> None:
    """Whatever the engine prints, the error is one line."""
    with pytest.raises(EngineFailed) as caught:
        plan(fake_engine("printf 'a\\nb\\nerror: c\\n\\n' >&2; exit 1"), header, [])
    assert "\n" not in str(caught.value)


def test_vanished(fake_engine: FakeEngine, header: Path) -> None:
    """An engine that is removed after it was found is missing, in words."""
    engine = fake_engine(GOOD)
    engine.program("llama-fit-params").unlink()
    with pytest.raises(EngineMissing, match=r"llama-fit-params is not there any more"):
        plan(engine, header, [])


def test_wrong_machine(tmp_path: Path, header: Path) -> None:
    """A file that is no program for this machine is an error of the engine."""
    (tmp_path / "llama-fit-params").write_bytes(b"\x7fELF nonsense")
    (tmp_path / "llama-fit-params").chmod(0o755)
    engine = find_engine(tmp_path)
    assert engine is not None
    with pytest.raises(EngineError, match="llama-fit-params"):
        plan(engine, header, [])


@pytest.mark.parametrize("content", [None, b"not a model"])
def test_model_file(fake_engine: FakeEngine, tmp_path: Path, content: bytes | None) -> None:
    """A model file that is missing or no GGUF is the user's input, refused before the engine is asked."""
    path = tmp_path / "x.gguf"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=r"x\.gguf"):
        plan(fake_engine(GOOD), path, [])


def test_first_failure_ends_the_others(fake_engine: FakeEngine, header: Path) -> None:
    """Of plans side by side the one that failed is reported, and the others do not run on."""
    engine = fake_engine('case "$*" in *bad*) echo "error: it" >&2; exit 1;; *) sleep 1000;; esac')
    began = time.monotonic()
    with pytest.raises(EngineFailed, match="error: it"):
        plan_many(engine, header, [["a"], ["b"], ["bad"]], timeout_s=60)
    assert time.monotonic() - began < 5


def test_side_by_side_is_bounded() -> None:
    """No more run at once than allowed, all run, and results keep the order."""
    lock = threading.Lock()
    now, most = 0, 0

    def job(item: int, cancel: threading.Event) -> int:
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.01)
        with lock:
            now -= 1
        return item * item

    assert run_many(job, range(12), n_side_by_side=3) == [n * n for n in range(12)]
    assert most == 3


CLIENT = """
import sys
from placement.engine.run import run
run(["/bin/sh", "-c", "echo $$ > {pid}; exec sleep 1000"], timeout_s=100)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_death_of_place(tmp_path: Path, number: signal.Signals) -> None:
    """Ctrl-C and even kill -9 of place leave no engine behind."""
    pid = tmp_path / "pid"
    client = subprocess.Popen([sys.executable, "-c", CLIENT.format(pid=pid)], stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 20
        while not (pid.exists() and pid.read_text().strip()) and time.monotonic() < deadline:
            time.sleep(0.02)
        engine_pid = int(pid.read_text())
        assert is_running(engine_pid)
        client.send_signal(number)
        client.wait(10)
        assert ended(engine_pid)
    finally:
        client.kill()


def test_environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """LLAMA_* and GGML_* settings and the user's configuration do not reach the engine; the cards' do."""
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "77")
    monkeypatch.setenv("GGML_CUDA_DEVICES", "9")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    seen = dict(line.split("=", 1) for line in run(["env"]).stdout.splitlines() if "=" in line)
    assert not [name for name in seen if name.startswith(("LLAMA_", "GGML_")) and name != "GGML_NO_BACKTRACE"]
    assert seen["GGML_NO_BACKTRACE"] == "1"
    assert seen["CUDA_VISIBLE_DEVICES"] == "1,0"
    assert not os.path.exists(seen["XDG_CONFIG_HOME"])


def test_no_shell() -> None:
    """Arguments reach the program as they are."""
    assert run(["printf", "%s", "$HOME; `id` *"]).stdout == "$HOME; `id` *"


def test_stop_at_a_line() -> None:
    """A run ends at the line that was waited for, and says so."""
    finished = run(["sh", "-c", "echo one; echo two; sleep 1000"], stop_when=lambda line: line == "two")
    assert finished.is_stopped
    assert finished.stdout == "one\ntwo\n"


def test_programs_outlive_a_reader_that_goes_away(tmp_path: Path) -> None:
    """What we start ignores SIGPIPE: an RPC worker goes on when its client is ended in the middle of an answer."""
    process = start_logged(["sleep", "30"], tmp_path / "log")
    try:
        status = Path(f"/proc/{process.pid}/status").read_text()
    finally:
        kill_group(process)
    ignored = int(next(line for line in status.splitlines() if line.startswith("SigIgn")).split()[1], 16)
    assert ignored >> (signal.SIGPIPE - 1) & 1
