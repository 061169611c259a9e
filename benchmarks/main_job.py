"""Times the main job: the installed `place solve MODEL` at each shipped model's own context, and its imports.

Usage: python benchmarks/main_job.py [--runs N] [MODEL …]
Run it with the Python of the environment that `place` is installed in. Every run is a new process. `cold` is
the first one after the environment's files were dropped from the page cache; `warm` is the median of those
after it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

MACHINE = "rtx4090-rtx5070ti"
SLOWEST_IMPORTS = 12
_IMPORT = re.compile(r"import time:\s+(\d+) \|\s+(\d+) \| (\s*)(\S+)")


def place(*words: str) -> list[str]:
    """The command line of the `place` beside this Python."""
    return [str(Path(sys.executable).parent / "place"), *words]


def solve_words(model: str, out: str) -> list[str]:
    """The main job of a model, without an engine."""
    return place("solve", model, "--machine", MACHINE, "--engine", "off", "--out", out, "--json")


def model_names() -> list[str]:
    """The models that this `place` knows outside a checkout."""
    with tempfile.TemporaryDirectory() as folder:
        shown = subprocess.run(
            place("models", "--json"), cwd=folder, capture_output=True, text=True, check=True
        )
    return [row["name"] for row in json.loads(shown.stdout)["models"]]


def drop_from_page_cache(folder: Path) -> None:
    """Ask the kernel to forget the files of a folder; needs no rights, and the kernel may refuse."""
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            handle = os.open(path, os.O_RDONLY)
            try:
                os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)


def run(words: list[str], folder: str) -> tuple[float, str]:
    """Wall seconds of a new process, and what it printed."""
    start = time.perf_counter()
    done = subprocess.run(
        words, cwd=folder, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False
    )
    seconds = time.perf_counter() - start
    if done.returncode:
        raise SystemExit(f"{' '.join(words)} failed: {done.stderr.strip()}")
    return seconds, done.stdout


def solve_row(model: str, n_runs: int) -> str:
    """One line of the table: cold and warm seconds, the solver's status, the first solution's figures."""
    with tempfile.TemporaryDirectory() as folder:
        drop_from_page_cache(Path(sysconfig.get_path("purelib")))
        cold_s, _ = run(solve_words(model, "cold"), folder)
        warm = [run(solve_words(model, f"warm{i}"), folder) for i in range(n_runs)]
    found = json.loads(warm[-1][1])
    best = found["solutions"][0]
    gap = "-" if best["gap"] is None else f"{best['gap']:.2%}"
    warm_s = statistics.median(seconds for seconds, _ in warm)
    return (
        f"{model:20}{cold_s:8.2f}{warm_s:8.2f}{found['status']:>8}{gap:>8}{best['splits']['decode']:>8}"
        f"{best['speed']['decode_tps']:>8.1f}{best['speed']['prompt_tps']:>9.0f}"
    )


def import_rows(model: str) -> list[tuple[int, int, str]]:
    """(own microseconds, with what it imports, module) of every import of one main job."""
    with tempfile.TemporaryDirectory() as folder:
        words = [sys.executable, "-X", "importtime", *solve_words(model, "imports")]
        done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
    lines = map(_IMPORT.match, done.stderr.splitlines())
    return [(int(found[1]), int(found[2]), found[4]) for found in lines if found]


def by_package(rows: list[tuple[int, int, str]]) -> dict[str, float]:
    """Own milliseconds summed by top-level package, the standard library as one, slowest first."""
    sums: dict[str, float] = {}
    for own_us, _, module in rows:
        package = module.split(".")[0]
        package = "(standard library)" if package in sys.stdlib_module_names else package
        sums[package] = sums.get(package, 0.0) + own_us / 1000
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("models", nargs="*", metavar="MODEL")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args()
    models = asked.models or model_names()
    titles = "".join(f"{title:>8}" for title in ("cold s", "warm s", "status", "gap", "splits", "dec t/s"))
    print(f"{'model':20}{titles}{'pp t/s':>9}")
    for model in models:
        print(solve_row(model, asked.runs), flush=True)
    sums = by_package(import_rows(models[0]))
    print(f"\nimports of the {models[0]} run under -X importtime: {sum(sums.values()):.0f} ms")
    for package, ms in list(sums.items())[:SLOWEST_IMPORTS]:
        print(f"  {package:24} {ms:7.1f} ms")


if __name__ == "__main__":
    main()
