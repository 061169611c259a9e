"""Compares `plan_compute` with recorded plans.

python benchmarks/golden_compute.py FOLDER [plans.jsonl] [MODEL or KIND] [-q]
"""

from __future__ import annotations

import json
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

from placement.arguments import parse
from placement.compute import plan_compute
from placement.emit import resolve
from placement.machine import Cpu, Device, Machine
from placement.model import Model, Tensor

CARDS = {
    "4090": ("NVIDIA GeForce RTX 4090", "8.9", 24576, 24000),
    "5070ti": ("NVIDIA GeForce RTX 5070 Ti", "12.0", 16384, 12800),
    "3090": ("NVIDIA GeForce RTX 3090", "8.6", 24576, 24100),
    "5090": ("NVIDIA GeForce RTX 5090", "12.0", 32607, 31900),
    "3060": ("NVIDIA GeForce RTX 3060", "8.6", 12288, 11800),
}
MACHINES = {
    "4090+5070ti": ("4090", "5070ti"),
    "3090": ("3090",),
    "4x3090": ("3090",) * 4,
    "5090+3090+3060": ("5090", "3090", "3060"),
}


def machine(name: str) -> Machine:
    """The virtual machine of that name in the golden facts."""
    devices = []
    for i, card in enumerate(MACHINES[name]):
        description, capability, total, free = CARDS[card]
        devices.append(
            Device(f"CUDA{i}", total, free, 0, 1000, 25, description, compute_capability=capability)
        )
    return Machine(name, tuple(devices), Cpu(65536, 50, 16))


def model(folder: Path, name: str) -> Model:
    """A golden model."""
    found = next(path for path in folder.glob(f"*/{name}.json"))
    facts = json.loads(found.read_text())
    metadata = {k: tuple(v) if isinstance(v, list) else v for k, v in facts["metadata"].items()}
    tensors = tuple(Tensor(n, tuple(shape) + (1,) * (4 - len(shape)), t) for n, shape, t in facts["tensors"])
    return Model(name, metadata, facts["metadata_types"], tensors)


def compare(row: dict[str, Any], plan: Any) -> dict[str, Any]:
    """How far a plan is from the recorded row."""
    mib = {name: size / 1048576 for name, size in plan.compute_bytes.items()}
    errors = {}
    for name, device in row["devices"].items():
        errors[name] = int(mib.get(name, 0.0)) - device["compute"]
    return {
        "tg": plan.splits_decode - row["splits"]["tg"],
        "pp": plan.splits_prompt - row["splits"]["pp"],
        "copies": plan.n_copies - row["sched_copies"],
        "compute": errors,
    }


def main() -> None:
    """Print every row that differs, and a summary by model and kind."""
    folder = Path(sys.argv[1])
    plans = sys.argv[2] if len(sys.argv) > 2 else "plans.jsonl"
    only = sys.argv[3] if len(sys.argv) > 3 else ""
    is_quiet = "-q" in sys.argv
    models: dict[str, Model] = {}
    table: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0] * 6)
    slowest = 0.0
    times: list[tuple[float, str, str, str]] = []
    for line in (folder / plans).read_text().splitlines():
        row = json.loads(line)
        if only and only != "-q" and only not in (row["model"], row["kind"]):
            continue
        if row["model"] not in models:
            models[row["model"]] = model(folder, row["model"])
        counts = table[row["model"], row["kind"]]
        counts[0] += 1
        host = machine(row["machine"])
        try:
            assignment = resolve(models[row["model"]], host, parse(row["args"]), "llama-fit-params")
            start = time.perf_counter()
            plan = plan_compute(models[row["model"]], host, assignment, "llama-fit-params")
            taken = time.perf_counter() - start
            slowest = max(slowest, taken)
            times.append((taken, row["model"], row["kind"], " ".join(row["args"])))
        except Exception as exc:
            counts[5] += 1
            if not is_quiet:
                print("FAIL", row["model"], row["kind"], type(exc).__name__, exc, " ".join(row["args"]))
            continue
        diff = compare(row, plan)
        is_off = any(abs(v) > max(1, 0.0 * row["devices"][k]["compute"]) for k, v in diff["compute"].items())
        is_bad = any(
            abs(v) > max(32, 0.03 * row["devices"][k]["compute"]) or v < -64
            for k, v in diff["compute"].items()
        )
        counts[1] += diff["tg"] != 0
        counts[2] += diff["pp"] != 0
        counts[3] += is_off
        counts[4] += is_bad
        if (diff["tg"] or diff["pp"] or is_off or diff["copies"]) and not is_quiet:
            print(
                row["model"],
                row["machine"],
                row["kind"],
                diff,
                row["splits"],
                {k: d["compute"] for k, d in row["devices"].items()},
                " ".join(row["args"]),
            )
    total = [0] * 6
    print(f"{'model':24}{'kind':10} rows  tg  pp  mib  bad  fail")
    for (name, kind), counts in sorted(table.items()):
        total = [a + b for a, b in zip(total, counts, strict=True)]
        if any(counts[1:]) or not is_quiet:
            print(f"{name:24}{kind:10}" + "".join(f"{n:5}" for n in counts))
    for taken, name, kind, args in sorted(times)[-5:]:
        print(f"{taken * 1000:5.0f} ms {name} {kind} {args}")
    print(f"median {sorted(times)[len(times) // 2][0] * 1000:.0f} ms" if times else "")
    print(f"{'all':34}" + "".join(f"{n:5}" for n in total), f"slowest {slowest * 1000:.0f} ms")


if __name__ == "__main__":
    main()
