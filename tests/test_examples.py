"""Every example runs as it is and says something."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=[path.stem for path in EXAMPLES])
def test_example_runs(path: Path, tmp_path: Path) -> None:
    """It ends well, prints lines, warns of nothing, and writes no file."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    ran = subprocess.run(
        [sys.executable, "-W", "error", path], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert (0, "") == (ran.returncode, ran.stderr)
    assert ran.stdout.strip()
    assert [] == list(tmp_path.iterdir())


def test_there_are_examples() -> None:
    """The folder is found."""
    assert EXAMPLES
