"""Run records survive kills: what was appended is read back, a torn end is kept aside."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from verify_support import KEY, good_round, record

from placement.errors import InputError
from placement.measure.records.log import RunLog, latest_campaign, of_campaign


def test_records_come_back_in_order(tmp_path: Path) -> None:
    """What is appended is read back, equal and in order."""
    log, run = RunLog(tmp_path / "new" / "folder"), good_round("aggressive")
    for each in run:
        log.append(each)
    assert log.read() == run


def test_no_file_is_no_records(tmp_path: Path) -> None:
    """A folder without runs.jsonl has no records."""
    assert RunLog(tmp_path).read() == []


@pytest.mark.parametrize("is_ended", [True, False])
def test_torn_last_line_is_kept_aside(tmp_path: Path, is_ended: bool) -> None:
    """A last line that is no record goes to runs.jsonl.torn, and the others stay as they are."""
    log = RunLog(tmp_path)
    log.append(record("plan"))
    log.append(record("start"))
    whole = log.path.read_bytes()
    torn = whole.splitlines()[1][:40]
    log.path.write_bytes(whole + torn + (b"\n" if is_ended else b""))
    said = log.mend()
    assert said is not None and "torn" in said
    assert log.path.read_bytes() == whole
    assert (tmp_path / "runs.jsonl.torn").read_bytes() == torn + b"\n"


@given(cut=st.integers(min_value=1, max_value=400))
@settings(max_examples=40, deadline=None)
def test_any_cut_loses_at_most_the_last_record(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    """Wherever the last line is cut, the records before it are read and appending goes on."""
    log = RunLog(tmp_path_factory.mktemp("cut"))
    log.append(record("plan"))
    before = log.path.stat().st_size
    log.append(record("start"))
    size = log.path.stat().st_size
    os.truncate(log.path, max(before, size - cut))
    log.mend()
    log.append(record("warm-up"))
    phases = [each.phase for each in log.read()]
    assert phases in (["plan", "warm-up"], ["plan", "start", "warm-up"])


def test_lost_newline_is_given_back(tmp_path: Path) -> None:
    """A whole record without its newline is a record, and the next one has its own line."""
    log = RunLog(tmp_path)
    log.append(record("plan"))
    log.path.write_bytes(log.path.read_bytes().rstrip(b"\n"))
    assert log.mend() is None
    log.append(record("start"))
    assert [each.phase for each in log.read()] == ["plan", "start"]


def test_broken_middle_line_is_named(tmp_path: Path) -> None:
    """A line that is no record and not the last is an error with its number."""
    log = RunLog(tmp_path)
    log.append(record("plan"))
    with log.path.open("ab") as file:
        file.write(b"{}\n")
    log.append(record("start"))
    with pytest.raises(InputError, match="line 2 is not a run record"):
        log.read()


def test_unknown_field_is_refused(tmp_path: Path) -> None:
    """A record with a field that nobody knows is not read as if it had none."""
    log = RunLog(tmp_path)
    log.append(record("plan"))
    text = log.path.read_text()
    log.path.write_text(text.replace('"phase"', '"speed":1,"phase"') + text)
    with pytest.raises(InputError, match="line 1"):
        log.read()


def test_newer_format_is_named(tmp_path: Path) -> None:
    """Records of a newer place are refused, not misread."""
    log = RunLog(tmp_path)
    log.append(record("plan", format=2))
    log.append(record("start"))
    with pytest.raises(InputError, match="newer place"):
        log.read()


def test_unwritable_file_is_named(tmp_path: Path) -> None:
    """A runs.jsonl that cannot be opened is an input error with its path."""
    log = RunLog(tmp_path)
    log.path.mkdir()
    with pytest.raises(InputError, match=r"runs\.jsonl"):
        log.append(record("plan"))


def test_campaign_is_found_by_key() -> None:
    """Records under another key never belong to the campaign that goes on."""
    other = KEY.model_copy(update={"engine_build": "b2"})
    run = [record("plan", campaign="old"), record("plan", campaign="new", key=other)]
    assert latest_campaign(run, KEY) == "old"
    assert latest_campaign(run) == "new"
    assert of_campaign(run, "old") == run[:1]


def test_kill_while_appending_leaves_a_readable_file(tmp_path: Path) -> None:
    """A process killed among hundreds of appends leaves a file that mends to whole records."""
    code = (
        "import sys; from pathlib import Path; from verify_support import record\n"
        "from placement.measure.records.log import RunLog\n"
        "log = RunLog(Path(sys.argv[1]))\n"
        "i = 0\n"
        "while True:\n"
        "    log.append(record('short prompt', repeat=i)); i += 1\n"
    )
    paths = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parent.parent)])
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}
    )
    log = RunLog(tmp_path)
    deadline_s = time.monotonic() + 30
    while not (log.path.exists() and log.path.stat().st_size > 20_000) and time.monotonic() < deadline_s:
        time.sleep(0.02)
    writer.send_signal(signal.SIGKILL)
    writer.wait()
    log.mend()
    repeats = [each.repeat for each in log.read()]
    assert repeats == list(range(len(repeats))) and len(repeats) > 10
