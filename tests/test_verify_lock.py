"""One verify per machine; what a dead one left behind is ended."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from placement.measure.verify.lock import MachineBusy, machine_lock, reap, require_free

SLEEPER = [sys.executable, "-c", "import time; time.sleep(60)"]


def test_second_holder_is_refused(tmp_path: Path) -> None:
    """While one holds the lock another gets an error that names the holder's process."""
    with (
        machine_lock(tmp_path / "lock"),
        pytest.raises(MachineBusy, match=rf"process {os.getpid()}\b"),
        machine_lock(tmp_path / "lock"),
    ):
        pass


def test_busy_machine_is_refused_early(tmp_path: Path) -> None:
    """Whoever asks before solving is refused while another verify runs, and not afterwards."""
    with machine_lock(tmp_path / "lock"), pytest.raises(MachineBusy):
        require_free(tmp_path / "lock")
    assert require_free(tmp_path / "lock") == 0


def test_lock_is_free_afterwards(tmp_path: Path) -> None:
    """When the first has ended, also by an exception, the next gets the lock."""
    with pytest.raises(ValueError, match="x"), machine_lock(tmp_path / "lock"):
        raise ValueError("x")
    with machine_lock(tmp_path / "lock") as (_, n_reaped):
        assert n_reaped == 0
    assert (tmp_path / "lock").read_bytes() == b""


def test_killed_holder_frees_the_lock(tmp_path: Path) -> None:
    """A holder that is killed leaves no lock, and the server it had noted is ended by the next."""
    server = subprocess.Popen(SLEEPER, start_new_session=True)
    code = (
        "import sys, time; from pathlib import Path; from placement.measure.verify.lock import machine_lock\n"
        "with machine_lock(Path(sys.argv[1])) as (lock, _):\n"
        "    lock.note_server(int(sys.argv[2])); print('held', flush=True); time.sleep(60)\n"
    )
    arguments = [sys.executable, "-c", code, str(tmp_path / "lock"), str(server.pid)]
    with subprocess.Popen(
        arguments, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "held\n"
        holder.kill()
    with machine_lock(tmp_path / "lock") as (_, n_reaped):
        assert n_reaped == 1
    assert not psutil.pid_exists(server.pid)
    server.wait(5)


def test_torn_lock_file_is_no_obstacle(tmp_path: Path) -> None:
    """A lock file whose holder died while writing it is taken like an empty one."""
    (tmp_path / "lock").write_text('{"pid": 1, "servers": [[')
    with machine_lock(tmp_path / "lock") as (_, n_reaped):
        assert n_reaped == 0


def test_reused_pid_is_not_killed() -> None:
    """A process that has a noted pid but another birth is somebody else's."""
    stranger = subprocess.Popen(SLEEPER)
    try:
        assert reap([[stranger.pid, psutil.Process(stranger.pid).create_time() - 5]]) == 0
        assert stranger.poll() is None
    finally:
        stranger.kill()
        stranger.wait()


def test_dead_server_in_the_list_is_ignored() -> None:
    """A noted server that has ended already is not counted."""
    assert reap([[2**22 - 1, 1.0]]) == 0


def test_noted_servers_are_in_the_file(tmp_path: Path) -> None:
    """The lock's file names its holder and each server once."""
    path = tmp_path / "lock"
    child = subprocess.Popen(SLEEPER)
    try:
        with machine_lock(path) as (lock, _):
            lock.note_server(child.pid)
            lock.note_server(child.pid)
            state = json.loads(path.read_text())
            assert [pid for pid, _ in state["servers"]] == [child.pid]
            assert state["since"] <= time.time()
    finally:
        child.kill()
        child.wait()
