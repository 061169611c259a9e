"""Compares `static_memory` with recorded llama.cpp plans: every device of every row, in MiB.

Usage: python benchmarks/golden_memory.py [FOLDER] [--machines FOLDER] [--show N]
FOLDER holds `*/MODEL.json` and `plans*.jsonl` (see tests/golden/README.md); models without facts there are
the shipped descriptions.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from pathlib import Path
from typing import Any

from placement.arguments import parse
from placement.emit import resolve
from placement.machine_files import read_machine
from placement.memory import layer_context_bytes, layer_kv_bytes, static_memory
from placement.model import Model
from placement.model_files import load_model, model_from_facts
from placement.problem import Assignment
from placement.units import MIB

ROOT = Path(__file__).resolve().parent.parent
TOLERANCE_MIB = 1
CONTEXT_TOLERANCE_MIB = 0.02  # the log rounds to 0.01 per cache


def find_model(folder: Path, name: str) -> Model:
    """The model's recorded facts, else the shipped description of that name."""
    facts = next(folder.glob(f"*/{name}.json"), None)
    return model_from_facts(facts) if facts else load_model(str(ROOT / "models" / f"{name}.toml"))


def device_differences(recorded: dict[str, Any], ours: dict[str, Any]) -> list[tuple[str, float]]:
    """Ours minus recorded, in whole MiB as the engine floors them."""
    found = []
    for name, parts in recorded.items():
        memory = ours.get(name)
        weights, context = (memory.weights_bytes, memory.context_bytes) if memory else (0, 0)
        found.append((f"{name} model", weights // MIB - parts["model"]))
        found.append((f"{name} context", context // MIB - parts["context"]))
    return found


def context_differences(model: Model, plan: Assignment, row: dict[str, Any]) -> list[tuple[str, float]]:
    """Ours minus recorded for all caches and all states, in MiB with decimals."""
    kv_bytes = sum(layer_kv_bytes(model, plan.settings))
    state_bytes = sum(layer_context_bytes(model, plan.settings)) - kv_bytes
    found = [("kv_mib", kv_bytes / MIB - sum(row.get("kv_mib") or [0]))]
    if row.get("rs_mib"):
        found.append(("rs_mib", state_bytes / MIB - sum(row["rs_mib"])))
    return found


def compare(folder: Path, machines: Path, show: int) -> int:
    """Print the errors by file and quantity and the first `show` mismatches; return how many are off."""
    n_off: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    worst: dict[str, float] = {}
    models: dict[str, Model] = {}
    seconds, n_rows = 0.0, 0
    for file in sorted(folder.glob("plans*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            model = models.setdefault(
                row["model"], models.get(row["model"]) or find_model(folder, row["model"])
            )
            machine = read_machine(machines / f"{row['machine']}.toml")
            plan = resolve(model, machine, parse(row["args"]), "llama-fit-params")
            start = time.perf_counter()
            ours = static_memory(model, machine, plan)
            seconds, n_rows = seconds + time.perf_counter() - start, n_rows + 1
            found = device_differences(row["devices"], ours) + context_differences(model, plan, row)
            for what, difference in found:
                key = f"{file.name} {what.split()[-1]}"
                totals[key] += 1
                worst[key] = max(worst.get(key, 0.0), abs(difference))
                if abs(difference) > (CONTEXT_TOLERANCE_MIB if what.endswith("_mib") else TOLERANCE_MIB):
                    n_off[key] += 1
                    if n_off.total() <= show:
                        print(
                            row["model"], row["kind"], what, f"{difference:+.3f}", " ".join(row["args"])[:200]
                        )
    for key, total in totals.items():
        print(f"{key:32} {total:6} values, {n_off[key]:4} off, worst {worst[key]:.3f} MiB")
    print(f"{n_rows} rows, {seconds / max(n_rows, 1) * 1e3:.2f} ms each")
    return n_off.total()


def main() -> None:
    """Compare and exit 1 on any value off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "tests/golden")
    parser.add_argument("--machines", type=Path, default=ROOT / "tests/golden/machines")
    parser.add_argument("--show", type=int, default=20)
    options = parser.parse_args()
    raise SystemExit(1 if compare(options.folder, options.machines, options.show) else 0)


if __name__ == "__main__":
    main()
