"""Compares place's choices with llama.cpp's own `--fit` by bytes and splits alone, with no term of our speed model.

    python -m benchmarks.fit [FOLDER] [--rates NAME] [--cases TEXT]

FOLDER (default ../shared/golden) holds `*/MODEL.json` and `fit.jsonl`: what `--fit` chose under a margin. A turn reads
2,000 and writes 500 tokens at a quarter of the context. `same` is our choice at the same memory, ubatch and load
mode; `free` has every lever, the same margin, and is held against --fit as shipped (ubatch 512, memory-mapped).
A ratio is our turn by --fit's: below 1 we are faster. Exits 1 where we are slower.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.golden import MACHINES, ROOT
from placement.inputs.groups import is_expert_stack
from placement.inputs.machine import Machine
from placement.inputs.machine_files import read_machine
from placement.inputs.model import Model
from placement.inputs.model_files.files import model_from_facts
from placement.inputs.problem import CPU, Assignment, Workload
from placement.llamacpp.arguments import parse
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.emit.resolve import resolve
from placement.llamacpp.memory import kv_bytes_read, placed_tensors, static_memory
from placement.predict.check import default_workload
from placement.solve.request import Request
from placement.solve.solve import solve_request
from placement.units import MIB

TOLERANCE = 1.002  # the proven gap
PROGRAM = "llama-fit-params"


@dataclass(frozen=True, slots=True)
class SpeedRates:
    """Seconds per GB read on a card of 1,008 GB/s and on the CPU, per split and node, and GB/s of the link."""

    gpu_s_per_gb: float = 1.0e-3
    cpu_s_per_gb: float = 37e-3
    split_s: float = 45e-6
    boundary_s: float = 45e-6
    node_s: float = 1.33e-6
    mapped_gb_per_s: float = 11.0
    pinned_gb_per_s: float = 23.0

    def turn_s(self, model: Model, machine: Machine, assignment: Assignment, workload: Workload) -> float:
        """Seconds of a turn."""
        plan = plan_compute(model, machine, assignment, PROGRAM)
        speed = {each.name: 1008 / each.bandwidth_gb_per_s * self.gpu_s_per_gb for each in machine.devices}
        speed[CPU] = self.cpu_s_per_gb
        n_ubatches = -(-workload.prompt_tokens // assignment.settings.ubatch_tokens)
        decode_s = plan.splits_decode * self.split_s + plan.n_nodes_decode * self.node_s
        prompt_s = plan.splits_prompt * self.split_s + plan.n_nodes_prompt * self.node_s
        used, all_experts = (int(model.get(key, 0) or 0) for key in ("expert_used_count", "expert_count"))
        link = (
            self.pinned_gb_per_s if assignment.settings.load_mode in ("none", "dio") else self.mapped_gb_per_s
        )
        stages = dict.fromkeys(speed, 0.0)
        for placed, where in placed_tensors(model, machine, assignment):
            if placed.kind == "input":
                continue
            gb = placed.tensor.n_bytes / 1e9
            share = used / all_experts if is_expert_stack(placed.tensor) and all_experts else 1.0
            decode_s += gb * share * speed[where]
            stages[where] += gb / link if where == CPU and assignment.devices else gb * speed[where]
        depths = kv_bytes_read(model, assignment.settings, workload.depth_tokens)
        for n_bytes, home in zip(depths, assignment.homes, strict=False):
            decode_s += n_bytes / 1e9 * speed[home]
        if (
            plan.n_copies > 1 and n_ubatches > 1
        ):  # stages overlap: the longest counts for each ubatch but the first
            prompt_s += (sum(stages.values()) + (n_ubatches - 1) * max(stages.values())) / n_ubatches
        else:
            prompt_s += sum(stages.values())
        return prompt_s * n_ubatches + decode_s * workload.generate_tokens


SPEED_RATES = {
    "fitted": SpeedRates(),  # to the first user's six speeds
    "slow splits": SpeedRates(split_s=150e-6, boundary_s=150e-6),
    "fast cpu": SpeedRates(cpu_s_per_gb=12e-3, split_s=60e-6),
    "fast link": SpeedRates(mapped_gb_per_s=25.0, pinned_gb_per_s=50.0),
}


@dataclass
class Case:
    """One row of fit.jsonl with its model and a machine whose caps are --fit's."""

    row: dict[str, Any]
    model: Model
    machine: Machine

    @property
    def name(self) -> str:
        """What tells it from others."""
        row = self.row
        return f"{row['model']} {row['machine']} c{row['ctx']} ub{row['ubatch']} margin {row['margin']}"

    @property
    def workload(self) -> Workload:
        """The turn."""
        return default_workload(self.model, self.row["ctx"], 2000, 500)

    def fit(self) -> Assignment:
        """What --fit chose."""
        return resolve(self.model, self.machine, parse(self.row["fit_args"]), PROGRAM)

    def ours(self, **asked: Any) -> Assignment | None:
        """What place chooses under the same margin."""
        request = Request(
            ctx_tokens=self.row["ctx"],
            kv_type=self.row["kv"],
            n_slots=1,
            reserve_mib=self.row["margin"],
            program=PROGRAM,
            **asked,
        )
        result = solve_request(self.model, self.machine, request).solutions
        return result[0].assignment if result else None

    def is_within_margin(self, assignment: Assignment) -> bool:
        """Whether a placement keeps the margin free on every card."""
        memory = static_memory(self.model, self.machine, assignment)
        compute = plan_compute(self.model, self.machine, assignment, PROGRAM).compute_bytes
        return all(
            memory[name].weights_bytes + memory[name].context_bytes + compute[name]
            <= (self.machine.device(name).usable_mib - self.row["margin"]) * MIB
            for name in assignment.devices
        )


def cases(folder: Path) -> list[Case]:
    """The rows of fit.jsonl."""
    results = []
    for line in (folder / "fit.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        machine = read_machine(MACHINES / f"{row['machine']}.toml")
        devices = tuple(dataclasses.replace(each, runtime_mib=0.0) for each in machine.devices)
        model = model_from_facts(next(folder.glob(f"*/{row['model']}.json")))
        results.append(Case(row, model, dataclasses.replace(machine, devices=devices)))
    return results


def rated(case: Case, rate_names: list[str]) -> tuple[list[float], list[float] | None, bool]:
    """Ratios of our turn by --fit's under each set of rates, `same` and `free`, and whether --fit leaves some on the CPU."""
    fit, workload = case.fit(), case.workload
    same = case.ours(ubatch_tokens=case.row["ubatch"], load_modes=("auto",))
    is_partial = CPU in fit.homes[:-1] or any(where == CPU for _, where in fit.moved)
    free = case.ours() if case.row["ubatch"] == 512 else None
    rows: list[list[float]] = []
    for ours in (same, free):
        if ours is None:
            rows.append([])
            continue
        assert case.is_within_margin(ours), case.name
        turns = [
            [SPEED_RATES[name].turn_s(case.model, case.machine, each, workload) for each in (ours, fit)]
            for name in rate_names
        ]
        rows.append([mine / theirs for mine, theirs in turns])
    return rows[0], rows[1] or None, is_partial


def main() -> None:
    """Print a line a case and the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT.parent / "shared" / "golden")
    parser.add_argument("--rates", action="append", choices=tuple(SPEED_RATES), help="[all]")
    parser.add_argument("--cases", default="", help="only cases whose name has this")
    asked = parser.parse_args()
    names = asked.rates or list(SPEED_RATES)
    print(f"{'case':58}  {'same: ' + ' / '.join(names)}, free: …")
    worst, partial, whole = 0.0, [], []
    for case in cases(asked.folder):
        if asked.cases not in case.name:
            continue
        same, free, is_partial = rated(case, names)
        if not same:
            print(f"{case.name:58}  nothing fits", flush=True)
            continue
        worst = max(worst, *same)
        if free is not None:
            (partial if is_partial else whole).append(free)
        words = ["  ".join(f"{ratio:5.3f}" for ratio in row) for row in (same, free or [])]
        print(f"{case.name:58}  {words[0]}    {words[1]}", flush=True)
    print(f"same memory, ubatch and load mode: worst ratio {worst:.3f}")
    for label, rows in (("some on the CPU", partial), ("all on GPUs", whole)):
        if rows:
            means = ", ".join(
                f"{name} {statistics.mean(column):.3f}"
                for name, column in zip(names, zip(*rows, strict=True), strict=True)
            )
            print(
                f"every lever free, {label}: {len(rows)} cases, mean ratio {means}; worst {max(map(max, rows)):.3f}"
            )
    sys.exit(worst > TOLERANCE)


if __name__ == "__main__":
    main()
