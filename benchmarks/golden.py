"""Compares whole checks with recorded llama.cpp plans: weights, context, compute buffers and splits, in every row.

    python -m benchmarks.golden [FOLDER] [--by kind|model|both]

FOLDER (default ../shared/golden) holds `*/MODEL.json` and `plans*.jsonl` (see tests/golden/README.md). A row is one
placement planned by llama-fit-params with the CUDA backend; all figures there are whole MiB, rounded down.
Exits 1 when a tolerance is broken: 1 MiB for weights and context; max(3 %, 32 MiB) for compute buffers.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement.inputs.machine import Machine
from placement.inputs.machine_files import read_machine
from placement.inputs.model import Model
from placement.inputs.model_files.files import model_from_facts
from placement.llamacpp.arguments import parse
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.emit.resolve import resolve
from placement.llamacpp.memory import static_memory
from placement.units import MIB

ROOT = Path(__file__).resolve().parent.parent
MACHINES = ROOT / "tests" / "golden" / "machines"
STATIC_TOLERANCE_MIB = 1
COMPUTE_TOLERANCE = (0.03, 32)


@dataclass
class Tally:
    """Errors of the rows of one line of the table."""

    n_rows: int = 0
    worst_weights_mib: int = 0
    worst_context_mib: int = 0
    worst_compute_mib: int = 0
    n_compute_off: int = 0
    n_decode_off: int = 0
    n_prompt_off: int = 0
    n_failed: int = 0

    def add(self, row: dict[str, Any], model: Model, machine: Machine) -> None:
        """Count one row."""
        self.n_rows += 1
        assignment = resolve(model, machine, parse(row["args"]), "llama-fit-params")
        static = static_memory(model, machine, assignment)
        plan = plan_compute(model, machine, assignment, "llama-fit-params")
        for name, facts in row["devices"].items():
            memory = static[name]
            compute = plan.compute_bytes.get(name, 0) // MIB - facts["compute"]
            self.worst_weights_mib = max(
                self.worst_weights_mib, abs(memory.weights_bytes // MIB - facts["model"])
            )
            self.worst_context_mib = max(
                self.worst_context_mib, abs(memory.context_bytes // MIB - facts["context"])
            )
            self.worst_compute_mib = max(self.worst_compute_mib, abs(compute))
            share, least = COMPUTE_TOLERANCE
            self.n_compute_off += abs(compute) > max(least, share * facts["compute"])
        self.n_decode_off += plan.splits_decode != row["splits"]["tg"]
        self.n_prompt_off += plan.splits_prompt != row["splits"]["pp"]

    def cells(self) -> str:
        """The tally as table cells."""
        worst = (self.worst_weights_mib, self.worst_context_mib, self.worst_compute_mib)
        counts = (self.n_compute_off, self.n_decode_off, self.n_prompt_off, self.n_failed)
        return " | ".join(f"{value:>4}" for value in (self.n_rows, *worst, *counts))

    @property
    def is_good(self) -> bool:
        """Whether every tolerance holds."""
        static = max(self.worst_weights_mib, self.worst_context_mib) <= STATIC_TOLERANCE_MIB
        return static and not (self.n_compute_off or self.n_failed)


HEAD = "| rows | weights | context | compute | compute off | decode ≠ | prompt ≠ | failed |"


def tallies(folder: Path, by: str) -> dict[tuple[str, str], Tally]:
    """Tallies by (file, kind or model)."""
    models: dict[str, Model] = {}
    machines: dict[str, Machine] = {}
    results: dict[tuple[str, str], Tally] = defaultdict(Tally)
    for file in sorted(folder.glob("plans*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            name, host = row["model"], row["machine"]
            if name not in models:
                models[name] = model_from_facts(next(folder.glob(f"*/{name}.json")))
            if host not in machines:
                machines[host] = read_machine(MACHINES / f"{host}.toml")
            keys = {"kind": (row["kind"],), "model": (name,), "both": (f"{name} {row['kind']}",)}[by]
            for key in (*keys, "all"):
                tally = results[file.stem, key]
                try:
                    tally.add(row, models[name], machines[host])
                except Exception as error:
                    tally.n_failed += 1
                    print(f"{name} {' '.join(row['args'])}: {error!r}", file=sys.stderr)
    return results


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT.parent / "shared" / "golden")
    parser.add_argument("--by", choices=("kind", "model", "both"), default="kind")
    asked = parser.parse_args()
    result = tallies(asked.folder, asked.by)
    print(f"| file | {asked.by} {HEAD}")
    print("|---" * 10 + "|")
    for (file, key), tally in sorted(
        result.items(), key=lambda item: (item[0][0], item[0][1] == "all", item[0][1])
    ):
        print(f"| {file} | {key} | {tally.cells()} |")
    sys.exit(0 if result and all(tally.is_good for tally in result.values()) else 1)


if __name__ == "__main__":
    main()
