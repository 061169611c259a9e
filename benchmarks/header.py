"""Turns a header with a real-sized vocabulary into times: reading it, and reading and writing descriptions.

    python benchmarks/header.py

Prints the best of several runs beside its budget, and gguf-py's own reader for comparison; exits 1 when a
budget is exceeded. Needs the `dev` extra.
"""

from __future__ import annotations

import random
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import gguf

from placement.inputs.gguf_header.facts import TensorInfo
from placement.inputs.gguf_header.split import read_header
from placement.inputs.gguf_header.write import write_header
from placement.inputs.model_files.files import export_header, read_model, save_model

N_TOKENS, N_MERGES = 150_000, 300_000
DESCRIPTION = Path(__file__).parent.parent / "models" / "qwen3-coder-q5.toml"


def make_header(path: Path) -> None:
    """Write a header-only file with the tensors of a shipped model, a vocabulary and its merges."""
    model, chance = read_model(DESCRIPTION), random.Random(0)
    tokens = tuple("x" * chance.randint(1, 14) for _ in range(N_TOKENS))
    merges = tuple("x" * chance.randint(3, 16) for _ in range(N_MERGES))
    vocabulary = {
        "tokenizer.ggml.tokens": ("[string]", tokens),
        "tokenizer.ggml.merges": ("[string]", merges),
        "tokenizer.ggml.scores": ("[float32]", (0.0,) * N_TOKENS),
        "tokenizer.ggml.token_type": ("[int32]", (1,) * N_TOKENS),
    }
    metadata = {**model.metadata, **{key: value for key, (_, value) in vocabulary.items()}}
    types = {**model.metadata_types, **{key: type_ for key, (type_, _) in vocabulary.items()}}
    write_header(path, metadata, types, [TensorInfo(t.name, t.shape, t.type) for t in model.tensors])


def best_ms(work: Callable[[], object], n_runs: int) -> float:
    """Milliseconds of the fastest of some runs."""
    times = []
    for _ in range(n_runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return 1000 * min(times)


def main() -> int:
    """Measure, print, and say by the exit code whether all budgets held."""
    with tempfile.TemporaryDirectory() as folder:
        path, out = Path(folder) / "x.gguf", Path(folder) / "out"
        make_header(path)
        model = read_model(DESCRIPTION)
        rows: list[tuple[str, float, float | None]] = [
            ("read a header, 150k tokens and 300k merges", best_ms(lambda: read_header(path), 5), 300.0),
            ("the same by gguf.GGUFReader", best_ms(lambda: gguf.GGUFReader(path), 1), None),
            ("read qwen3-coder-q5.toml", best_ms(lambda: read_model(DESCRIPTION), 9), 30.0),
            (
                "write it as a description",
                best_ms(lambda: save_model(model, out.with_suffix(".toml")), 9),
                None,
            ),
            ("write it as a header-only GGUF", best_ms(lambda: export_header(model, out), 9), None),
        ]
    for name, value_ms, budget_ms in rows:
        budget = "" if budget_ms is None else f"  (budget {budget_ms:.0f} ms)"
        print(f"{name:45}{value_ms:9.1f} ms{budget}")
    return int(any(budget is not None and value > budget for _, value, budget in rows))


if __name__ == "__main__":
    sys.exit(main())
