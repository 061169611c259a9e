"""llama-server really runs small models: asked, timed, starved, killed and hung, each outcome by its name."""

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
from tiny_models import write_tiny_model

from placement.engine.find import Engine, find_engine
from placement.engine.plan import plan
from placement.engine.rpc import rpc_workers
from placement.engine.serve import Server, ServerFailed, ServerHung, serve
from placement.errors import EngineMissing, InputError

pytestmark = pytest.mark.engine

ARGUMENTS = ["-c", "2048", "-np", "1", "-fa", "on", "-fit", "off", "-t", "2"]
Log = Callable[[], Path]


@pytest.fixture(scope="module")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("dense") / "dense.gguf", is_moe=False)


@pytest.fixture(scope="module")
def moe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_model(tmp_path_factory.mktemp("moe") / "moe.gguf", is_moe=True)


def ended(server: Server) -> bool:
    return server.process.poll() is not None


def test_timings(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """The server reads every prompt token anew, writes exactly as many as asked, and times both."""
    with serve(engine, dense, ARGUMENTS, log=tmp_path / "log") as server:
        for _ in range(2):
            timings = server.completion(list(range(3, 103)), 20)
            assert (timings.n_prompt, timings.n_generated, timings.n_cached) == (100, 20, 0)
            assert timings.prompt_tps and timings.generate_tps
            assert timings.wall_s * 1e3 >= timings.prompt_ms + timings.generate_ms
        assert server.load_s is not None
        assert not ended(server)
    assert ended(server)


def test_text_prompt(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """Text is tokenised by the server, and the same text gives the same number of tokens."""
    with serve(engine, dense, ARGUMENTS, log=tmp_path / "log") as server:
        assert server.completion("hello world", 1).n_prompt in (
            len(server.tokenize("hello world")),
            len(server.tokenize("hello world")) + 1,  # with the begin-of-sequence token
        )


def test_run_takes_what_the_plan_says(engine: Engine, moe: Path, tmp_path: Path) -> None:
    """On two workers the run's buffers and decode splits are those of the plan, experts on the host."""
    with rpc_workers(engine, 2) as workers:
        rpc = ["--rpc", ",".join(worker.endpoint for worker in workers)]
        arguments = [*rpc, *ARGUMENTS, "-ngl", "99", "-ts", "4,3", "-ot", r"blk\.[12]\.ffn_.*_exps=CPU"]
        planned = plan(engine, moe, arguments, program="llama-server")
        with serve(engine, moe, arguments, log=tmp_path / "log") as server:
            server.completion([5] * 50, 5)
            run = server.reading()
    assert run is not None
    assert run.splits_decode == planned.splits_decode
    for name in ("RPC0", "RPC1"):
        ours, theirs = run.devices[name], planned.devices[name]
        for part in ("weights_mib", "context_mib", "compute_mib"):
            assert getattr(ours, part) == pytest.approx(getattr(theirs, part), abs=1.01), (name, part)


def test_dies_while_writing(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """A server killed while it writes is a crash, at once, with the signal in the message."""
    with serve(engine, dense, ARGUMENTS, log=tmp_path / "log") as server:
        killer = threading.Timer(0.7, server.process.send_signal, [signal.SIGSEGV])
        killer.start()
        with pytest.raises(ServerFailed, match="SIGSEGV") as caught:
            server.completion([5, 6, 7], 1_000_000, options={"n_discard": 1000})
    assert caught.value.outcome == "crash"
    assert caught.value.log.is_file()


def test_hangs_while_writing(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """A server that stops answering is hung after the time it was given, and is ended."""
    with serve(engine, dense, ARGUMENTS, log=tmp_path / "log", stop_grace_s=0.5) as server:
        server.process.send_signal(signal.SIGSTOP)
        with pytest.raises(ServerHung, match=r"did not answer /completion within 1 s") as caught:
            server.completion([5, 6, 7], 5, timeout_s=1)
        assert caught.value.outcome == "hang"
    assert ended(server)


def test_hangs_at_start(fake_engine: Callable[..., Engine], header: Path, tmp_path: Path) -> None:
    """A server that never gets ready is hung after its start-up time."""
    engine = fake_engine("sleep 1000", program="llama-server")
    with (
        pytest.raises(ServerHung, match=r"was not ready within 0\.5 s"),
        serve(engine, header, [], log=tmp_path / "log", start_timeout_s=0.5, stop_grace_s=0),
    ):
        pass


def test_taken_port(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """Another server on the port asked for is not taken for ours."""
    with (
        serve(engine, dense, ARGUMENTS, log=tmp_path / "one") as first,
        pytest.raises(ServerFailed, match="couldn't bind") as caught,
        serve(engine, dense, ARGUMENTS, log=tmp_path / "two", port=first.port),
    ):
        pass
    assert caught.value.outcome == "port-taken"


def limited(engine: Engine, folder: Path, limit_kib: int) -> Engine:
    """The engine under a limit of address space that really refuses memory."""
    folder.mkdir()
    script = folder / "llama-server"
    script.write_text(f'#!/bin/sh\nulimit -v {limit_kib}\nexec {engine.program("llama-server")} "$@"\n')
    script.chmod(0o755)
    found = find_engine(folder)
    assert found is not None
    return found


def test_memory_that_is_refused(engine: Engine, moe: Path, tmp_path: Path) -> None:
    """A cache that the limit does not allow is out of memory at start, with the size in the message."""
    starved = limited(engine, tmp_path / "limited", 3_000_000)
    arguments = [*ARGUMENTS, "-c", "1000192"]
    with (
        pytest.raises(ServerFailed, match=r"failed to allocate.*buffer") as caught,
        serve(starved, moe, arguments, log=tmp_path / "log", start_timeout_s=60),
    ):
        pass
    assert caught.value.outcome == "oom-at-start"


@pytest.mark.parametrize(
    ("body", "outcome"),
    [
        ("echo 'CUDA error: out of memory' >&2; kill -ABRT $$", "oom-at-start"),
        ("echo 'x.cpp:1: GGML_ASSERT(y) failed' >&2; kill -ABRT $$", "crash"),
        ("exit 1", "crash"),
        ("echo 'error: invalid argument: -x' >&2; exit 1", "bad-argument"),
        ("echo 'llama_model_load: error loading model: bad' >&2; exit 1", "bad-model"),
    ],
)
def test_outcomes_at_start(
    fake_engine: Callable[..., Engine], header: Path, tmp_path: Path, body: str, outcome: str
) -> None:
    """Each end at start has its name."""
    engine = fake_engine(body, program="llama-server")
    with pytest.raises(ServerFailed) as caught, serve(engine, header, [], log=tmp_path / "log"):
        pass
    assert caught.value.outcome == outcome


def test_refused_request(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """A prompt longer than the context is refused by the server, which lives on."""
    with serve(engine, dense, ARGUMENTS, log=tmp_path / "log") as server:
        with pytest.raises(ServerFailed, match="refused") as caught:
            server.completion([5] * 3000, 5)
        assert caught.value.outcome == "error"
        assert server.completion([5] * 30, 5).n_generated == 5


def test_stopped_by_the_user(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """An exception inside the context ends the server and goes on."""
    with pytest.raises(KeyboardInterrupt), serve(engine, dense, ARGUMENTS, log=tmp_path / "log") as server:
        raise KeyboardInterrupt
    assert ended(server)


CLIENT = """
from pathlib import Path
from placement.engine.find import find_engine
from placement.engine.serve import serve
with serve(find_engine({folder!r}), {model!r}, {arguments!r}, log=Path({log!r})) as server:
    Path({pid!r}).write_text(str(server.pid))
    server.completion([5, 6], 1_000_000)
"""


def test_kill_of_place(engine: Engine, dense: Path, tmp_path: Path) -> None:
    """kill -9 of place ends the server, which then holds no memory and no port."""
    pid = tmp_path / "pid"
    code = CLIENT.format(
        folder=str(engine.folder),
        model=str(dense),
        arguments=ARGUMENTS,
        log=str(tmp_path / "log"),
        pid=str(pid),
    )
    client = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (pid.exists() and pid.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    server = int(pid.read_text())
    client.kill()
    client.wait()
    while time.monotonic() < deadline:
        try:
            os.kill(server, 0)
            if Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[0] in "ZX":
                return
        except OSError:
            return
        time.sleep(0.05)
    pytest.fail("the server outlived place")


def test_no_weights(engine: Engine, tmp_path: Path) -> None:
    """A model without its file cannot be run, and the message says what is missing."""
    with (
        pytest.raises(InputError, match="does not exist"),
        serve(engine, tmp_path / "none.gguf", [], log=tmp_path / "log"),
    ):
        pass


def test_no_server(fake_engine: Callable[..., Engine], header: Path, tmp_path: Path) -> None:
    """An engine without llama-server says so."""
    engine = fake_engine("exit 0")
    with (
        pytest.raises(EngineMissing, match="has no llama-server"),
        serve(engine, header, [], log=tmp_path / "log"),
    ):
        pass
