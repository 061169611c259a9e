"""Compares `static_memory` with recorded llama.cpp plans: every device of every row, in MiB.

Usage: python benchmarks/golden_memory.py FOLDER [--show N]
FOLDER holds `models/*.json`, `archs/*.json` and `plans*.jsonl` (see tests/golden/README.md).
"""

from __future__ import annotations

import argparse
import itertools
import json
import re
import struct
from bisect import bisect_right
from collections import Counter
from pathlib import Path

from placement.architecture import describe
from placement.machine import Cpu, Device, Machine
from placement.memory import layer_context_bytes, layer_kv_bytes, static_memory
from placement.model import Model
from placement.model_files import model_from_facts
from placement.problem import CPU, Assignment, Settings
from placement.units import MIB

CARDS = {  # total and free MiB of the machines that the plans were recorded on
    "4090+5070ti": ((24576, 24000), (16384, 12800)),
    "3090": ((24576, 24100),),
    "4x3090": ((24576, 24100),) * 4,
    "5090+3090+3060": ((32607, 31900), (24576, 24100), (12288, 11800)),
}
EXPERTS = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"


def machine(name: str) -> Machine:
    """A machine of the recorded plans; only its names and free memory matter here."""
    cards = CARDS[name]
    devices = tuple(Device(f"CUDA{i}", total, free, 480, 1000, 25) for i, (total, free) in enumerate(cards))
    return Machine(name, devices, Cpu(65536, 50, 16))


def f32(value: float) -> float:
    """The nearest 32-bit float."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def parse(args: list[str]) -> dict[str, str]:
    """Option to value; flags map to ""."""
    options: dict[str, str] = {}
    i = 0
    while i < len(args):
        is_flag = args[i] in ("-nkvo", "-cmoe")
        options[args[i]] = "" if is_flag else args[i + 1]
        i += 1 if is_flag else 2
    return options


def homes(n_layer_all: int, options: dict[str, str], devices: tuple[Device, ...]) -> tuple[str, ...]:
    """Each layer's device and the output's (load_tensors of llama-model.cpp)."""
    n_gpu_layers = int(options.get("-ngl", "-1"))
    n_gpu_layers = n_layer_all + 1 if n_gpu_layers < 0 else n_gpu_layers
    given = [float(part) for part in re.split(r"[,/]", options["-ts"])] if "-ts" in options else []
    given += [0.0] * (len(devices) - len(given))
    splits = given[: len(devices)] if any(given) else [device.usable_mib * MIB for device in devices]
    sums = list(itertools.accumulate((f32(value) for value in splits), lambda a, b: f32(a + b)))
    points = [f32(value / sums[-1]) for value in sums]
    start, active = max(n_layer_all + 1 - n_gpu_layers, 0), min(n_gpu_layers, n_layer_all + 1)
    found = []
    for i in range(n_layer_all + 1):
        on_gpu = i >= start and i - start < active
        found.append(devices[bisect_right(points, f32((i - start) / active))].name if on_gpu else CPU)
    return tuple(found)


def assignment(model: Model, machine: Machine, args: list[str]) -> Assignment:
    """The assignment that these llama.cpp arguments mean on the machine."""
    options = parse(args)
    devices = machine.devices
    if "-dev" in options:
        devices = tuple(machine.device(name) for name in options["-dev"].split(","))
    if options.get("-sm") == "none":
        devices = (devices[int(options.get("-mg", "0"))],)
    overrides = [entry.rsplit("=", 1) for entry in options.get("-ot", "").split(",") if entry]
    if "-cmoe" in options:
        overrides.append([EXPERTS, CPU])
    for i in range(int(options.get("-ncmoe", "0"))):
        overrides.append([rf"blk\.{i}{EXPERTS}", CPU])
    compiled = [(re.compile(pattern), device) for pattern, device in overrides]
    moved = []
    for placed in describe(model).tensors:
        target = next((device for regex, device in compiled if regex.search(placed.tensor.name)), None)
        if target is not None and not placed.is_copy:
            moved.append((placed.tensor.name, target))
    settings = Settings(
        ctx_tokens=int(options["-c"]),
        n_slots=int(options.get("-np", "1")),
        kv_type_k=options.get("-ctk", "f16"),
        kv_type_v=options.get("-ctv", "f16"),
        batch_tokens=int(options.get("-b", "2048")),
        ubatch_tokens=int(options.get("-ub", "512")),
        is_kv_offloaded="-nkvo" not in options,
        has_overrides=bool(overrides),
    )
    names = tuple(device.name for device in devices)
    return Assignment(names, homes(describe(model).n_layer_all, options, devices), tuple(moved), settings)


def compare(folder: Path, show: int) -> int:
    """Print the error distribution and the first `show` mismatches; return how many values are off."""
    errors: Counter[str] = Counter()
    totals: Counter[str] = Counter()
    worst: Counter[str] = Counter()
    shown = 0
    models: dict[str, Model] = {}
    for file in sorted(folder.glob("plans*.jsonl")):
        for line in file.read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            if row["model"] not in models:
                path = next(folder.glob(f"*/{row['model']}.json"))
                models[row["model"]] = model_from_facts(path)
            differences = row_differences(models[row["model"]], row)
            for what, difference in differences:
                key = f"{file.name} {what.split()[-1]}"
                totals[key] += 1
                worst[key] = max(worst[key], abs(difference))
                if abs(difference) > (0.02 if what.endswith("_mib") else 1):
                    errors[key] += 1
                    if shown < show:
                        shown += 1
                        print(
                            row["model"], row["kind"], what, f"{difference:+.3f}", " ".join(row["args"])[:200]
                        )
    for key in totals:
        print(f"{key:32} {totals[key]:6} values, {errors[key]:4} off, worst {worst[key]:.3f} MiB")
    return sum(errors.values())


def row_differences(model: Model, row: dict[str, object]) -> list[tuple[str, float]]:
    """What we say minus what the engine said, in MiB: floored per device, exact for KV and state."""
    virtual = machine(str(row["machine"]))
    plan = assignment(model, virtual, list(row["args"]))  # type: ignore[call-overload]
    ours = static_memory(model, virtual, plan)
    recorded: dict[str, dict[str, int]] = row["devices"]  # type: ignore[assignment]
    found: list[tuple[str, float]] = []
    for name, parts in recorded.items():
        memory = ours.get(name)
        weights, context = (memory.weights_bytes, memory.context_bytes) if memory else (0, 0)
        found.append((f"{name} model", weights // MIB - parts["model"]))
        found.append((f"{name} context", context // MIB - parts["context"]))
    kv_bytes = sum(layer_kv_bytes(model, plan.settings))
    state_bytes = sum(layer_context_bytes(model, plan.settings)) - kv_bytes
    found.append(("kv_mib", kv_bytes / MIB - sum(row.get("kv_mib") or [0])))  # type: ignore[call-overload]
    if row.get("rs_mib"):
        found.append(("rs_mib", state_bytes / MIB - sum(row["rs_mib"])))  # type: ignore[call-overload]
    return found


def main() -> None:
    """Compare and exit 1 on any value off."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--show", type=int, default=20)
    options = parser.parse_args()
    raise SystemExit(1 if compare(options.folder, options.show) else 0)


if __name__ == "__main__":
    main()
