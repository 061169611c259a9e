"""A machine with known coefficients that "runs" placements: noise, throttling, swapping and outliers included.

Its times come from `cost.evaluate`'s terms under coefficients that no fit has seen, times what no model explains:
an error of each placement's own, noise of each run, and now and then a disturbed run.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from placement.inputs.groups import movable_groups
from placement.inputs.identity import machine_identity
from placement.inputs.machine import Coefficient, Cpu, Device, Machine
from placement.inputs.model import Model, Tensor
from placement.inputs.model_files.files import resolve_model
from placement.inputs.problem import CPU, Assignment, Problem, Settings, Workload
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.emit.arguments import emit_arguments
from placement.measure.calibrate.choosing import (
    LEAST_ROUNDS,
    MORE_ROUNDS,
    Proposal,
    choose_runs,
    forecast_turns,
    is_converged,
    rounds_to_tell,
    surprising,
    worth_again,
)
from placement.measure.calibrate.features import TimingRow, decode_row, predict_s, prompt_row
from placement.measure.calibrate.fit import calibrate
from placement.measure.calibrate.parameters import parameters
from placement.measure.records.log import RunLog
from placement.measure.records.schema import DevicePeak, Key, Record, Timing
from placement.measure.verify.decide import LEAST_NOISE
from placement.measure.verify.times import middle
from placement.predict.check import device_use
from placement.predict.cost import GraphCounts, graph_counts
from placement.predict.terms import DECODE, PROMPT

TRUE_SPREAD = 0.22  # how far true coefficients lie from the defaults
RUNTIME_MIB, GROWTH_MIB = 430.0, 60.0
KEY: dict[str, Any] = {"engine_build": "b1", "engine_fingerprint": "f", "plan": "p", "driver": "570"}
HOST = ("node_us", "cpu_read_efficiency")  # as near the defaults on a machine without cards as on others
ZEROS = {"layer_us": 2.0, "token_us": 120.0}  # mean of what the defaults say is nothing


def bare_machine() -> Machine:
    """Two unequal cards and a host, without any coefficient."""
    devices = (
        Device("CUDA0", 24576, 24000, 480, 1008, 25, compute_capability="8.9", tflops=165),
        Device("CUDA1", 16384, 15800, 480, 896, 25, compute_capability="12.0", tflops=88),
    )
    return Machine("simulated", devices, Cpu(120000, 60, 16))


def three_cards() -> Machine:
    """Three cards of very unequal speed and memory."""
    devices = (
        Device("CUDA0", 32607, 31800, 480, 1792, 50, compute_capability="12.0", tflops=210),
        Device("CUDA1", 24576, 23900, 480, 936, 12, compute_capability="8.6", tflops=71),
        Device("CUDA2", 12288, 11700, 480, 360, 12, compute_capability="8.6", tflops=51),
    )
    return Machine("simulated", devices, Cpu(120000, 80, 24))


def workers() -> Machine:
    """Two workers of unequal memory behind a network, and no card here."""
    devices = (
        Device("RPC0", 24000, 24000, 0, 400, 1, address="10.0.0.2:50052"),
        Device("RPC1", 16000, 16000, 0, 200, 1, address="10.0.0.3:50052"),
    )
    return Machine("simulated", devices, Cpu(64000, 50, 8))


def no_card() -> Machine:
    """A host alone."""
    return Machine("simulated", (), Cpu(120000, 60, 16))


MACHINES = {"two cards": bare_machine, "three cards": three_cards, "workers": workers, "no card": no_card}


@dataclass(frozen=True)
class Placed:
    """A placement to run: what the runs of it need to know."""

    name: str
    problem: Problem
    assignment: Assignment
    counts: GraphCounts


@lru_cache(maxsize=4)
def model(name: str) -> Model:
    """A shipped model."""
    return resolve_model(name)


@lru_cache(maxsize=8)
def two_families(name: str) -> Model:
    """The model with i-quants for half of its experts and floats for its attention."""
    plain = model(name)

    def changed(tensor: Tensor) -> Tensor:
        if "attn_" in tensor.name and len(tensor.shape) > 1:
            return replace(tensor, type="F16")
        is_iq = "_exps" in tensor.name and (tensor.layer or 0) % 2
        return replace(tensor, type="IQ4_XS") if is_iq else tensor

    return replace(plain, name=f"{name}-two", tensors=tuple(map(changed, plain.tensors)))


@lru_cache(maxsize=16)
def placements(
    name: str = "qwen3-30b-a3b-q4", n: int = 40, seed: int = 0, kind: str = "two cards"
) -> tuple[Placed, ...]:
    """Random sensible placements of a model: device orders, cuts, experts off their home, ubatches, load modes."""
    rng, result = random.Random(seed), {}
    picked = two_families(name.removesuffix("+")) if name.endswith("+") else model(name)
    while len(result) < n:
        each = _random(picked, rng, len(result), MACHINES[kind]())
        result.setdefault((each.assignment, each.problem.workload), each)
    return tuple(result.values())


def _orders(machine: Machine) -> list[tuple[str, ...]]:
    names = tuple(device.name for device in machine.devices)
    if len(names) == 2:
        a, b = names
        return [(a, b), (b, a), (a,), (b,), (a, b)]
    return [order for n in range(1, len(names) + 1) for order in itertools.permutations(names, n)] or [()]


def _random(model: Model, rng: random.Random, number: int, machine: Machine) -> Placed:
    order = rng.choice(_orders(machine))
    depth = rng.choice([128, 2000, 16000])
    ubatch = rng.choice([256, 512, 1024, 2048])
    settings = Settings(
        ctx_tokens=32768, kv_type_k="q8_0", kv_type_v="q8_0", batch_tokens=max(2048, ubatch), ubatch_tokens=ubatch,
        flash_attention="on", load_mode=rng.choice(["auto", "none"]),
    )  # fmt: skip
    groups = movable_groups(model, n_layers := max(t.layer or 0 for t in model.tensors) + 1)
    cuts = sorted(rng.randint(4, n_layers - 4) for _ in order[1:])
    homes = tuple(order[sum(i >= cut for cut in cuts)] if order else CPU for i in range(n_layers + 1))
    moved: list[tuple[str, str]] = []
    target = rng.choice([CPU, CPU, CPU, *(order[-1:] if len(order) > 1 and order[0] < order[-1] else []), ""])
    n_moved, kinds = rng.randint(1, n_layers), rng.choice([(), (), ("down",), ("gate_up",)])
    for layer in sorted(rng.sample(range(n_layers), n_moved)) if target else ():
        if homes[layer] != target:
            kept = [group for group in groups[layer] if not kinds or group.kind in (*kinds, "ffn")]
            moved += [(t.name, target) for group in kept for t in group.tensors]
    settings = replace(settings, has_overrides=bool(moved) or rng.random() < 0.5)
    problem = Problem(model, machine, settings, Workload(2000, 500, depth))
    assignment = Assignment(order, homes, tuple(moved), settings)
    plan = plan_compute(model, machine, assignment, "llama-server")
    return Placed(f"p{number}", problem, assignment, graph_counts(plan))


def rows_of(placed: Placed) -> tuple[TimingRow, TimingRow]:
    """The decode and the prompt row of a placement, not measured."""
    args = (placed.problem, placed.assignment, placed.counts)
    return (
        decode_row(*args, run=placed.name, label=placed.name),
        prompt_row(*args, run=placed.name, label=placed.name),
    )


@lru_cache(maxsize=8)
def pool(
    name: str = "qwen3-30b-a3b-q4", n: int = 40, seed: int = 0, kind: str = "two cards"
) -> tuple[tuple[TimingRow, ...], tuple[TimingRow, ...]]:
    """(decode rows, prompt rows) of random placements."""
    rows = [rows_of(each) for each in placements(name, n, seed, kind)]
    return tuple(row for row, _ in rows), tuple(row for _, row in rows)


class Simulated:
    """A machine whose coefficients are known to it alone."""

    def __init__(
        self,
        seed: int,
        spread: float = TRUE_SPREAD,
        noise: float = 0.01,
        misfit: float = 0.015,
        base: Machine | None = None,
    ) -> None:
        self.rng = random.Random(seed)
        self.noise, self.misfit, self.seed = noise, misfit, seed
        true, base = {}, base or bare_machine()
        for each in (*parameters(base, DECODE), *parameters(base, PROMPT)):
            if each.is_log:
                is_host = each.name in HOST
                off = spread if is_host or not spread else max(spread, each.spread / 2)
                value = each.prior * math.exp(self.rng.gauss(0.0, off))
                value = min(value, 0.98) if each.name == "pipeline_overlap" else value
            else:
                value = self.rng.expovariate(1.0 / ZEROS[each.base]) if spread else 0.0
            true[each.name] = Coefficient(value, each.unit)
        self.machine = replace(base, coefficients=true)

    def true_s(self, row: TimingRow) -> float:
        """What a placement takes when nothing disturbs it: the model's time and the placement's own error."""
        own = random.Random(f"{self.seed}/{row.run}/{row.kind}").gauss(0.0, self.misfit)
        return predict_s(row, self.machine) * math.exp(own)

    def run(self, row: TimingRow, throttle: float = 1.0) -> TimingRow:
        """The row as measured, `throttle` times slower."""
        measured_s = self.true_s(row) * math.exp(self.rng.gauss(0.0, self.noise)) * throttle
        return replace(row, measured_s=measured_s, noise=self.noise)

    def runs(self, rows: Sequence[TimingRow]) -> list[TimingRow]:
        """All rows as measured."""
        return [self.run(row) for row in rows]

    def records(
        self,
        problem: Problem,
        assignment: Assignment,
        name: str,
        arguments: Sequence[str],
        round_: int = 1,
        throttle: float = 1.0,
        role: str = "solution",
        campaign: str = "simulated",
        repeats: int = 1,
        **key: str | None,
    ) -> list[Record]:
        """The records of one round of a placement: all its phases, `throttle` times slower."""
        plan = plan_compute(problem.model, problem.machine, assignment, "llama-server")
        counts = graph_counts(plan)

        def timing(n_prompt: int, n_generated: int) -> Timing:
            deep = replace(problem, workload=Workload(1, 1, n_prompt + n_generated // 2))
            read = replace(problem, workload=Workload(n_prompt, 1, 0))
            token = self.run(decode_row(deep, assignment, counts, run=name), throttle).measured_s
            prompt = self.run(prompt_row(read, assignment, counts, run=name), throttle).measured_s
            return Timing(
                n_prompt=n_prompt, prompt_s=prompt, n_generated=n_generated, generate_s=token * n_generated
            )

        uses = device_use(problem, assignment, plan)
        planned = {device: use.self_mib for device, use in uses.items()}
        common = {
            "campaign": campaign, "at": f"2026-01-01T00:00:{round_:02d}+00:00", "round": round_, "role": role,
            "key": Key(**{**KEY, "machine": machine_identity(problem.machine),
                         "model_digest": problem.model.digest, **key}),
            "candidate": name, "run_id": name, "arguments": tuple(arguments), "outcome": "ok", "wall_s": 1.0,
        }  # fmt: skip

        def taken(more_mib: float) -> dict[str, DevicePeak]:
            more = {device: more_mib + self.rng.gauss(0.0, 10.0) for device in assignment.devices}
            return {d: DevicePeak(peak_mib=planned[d] + m, own_mib=planned[d] + m) for d, m in more.items()}

        return [
            Record(**common, phase="plan"),
            Record(**common, phase="start", splits_prompt=counts.splits_prompt, splits_decode=counts.splits_decode,
                   buffers_mib=planned, devices=taken(RUNTIME_MIB)),
            *(
                Record(**common, phase="short prompt", repeat=i, timing=timing(64, 128),
                       devices=taken(RUNTIME_MIB + GROWTH_MIB))
                for i in range(repeats)
            ),
            Record(**common, phase="long prompt", timing=timing(2000, 16), devices=taken(RUNTIME_MIB + GROWTH_MIB)),
            Record(**common, phase="canary", timing=timing(8000, 64), devices=taken(RUNTIME_MIB + GROWTH_MIB)),
            Record(**common, phase="stop"),
        ]  # fmt: skip

    def keep(self, folder: Path, placed: Placed, **more: Any) -> None:
        """Append a placement's records to a folder's runs.jsonl."""
        problem = replace(placed.problem, machine=more.pop("machine", placed.problem.machine))
        arguments = emit_arguments(problem.model, problem.machine, placed.assignment, "llama-server")
        log = RunLog(folder)
        for record in self.records(problem, placed.assignment, placed.name, arguments, **more):
            log.append(record)


def solution_file(folder: Path, model: Model) -> None:
    """The least solution.toml that names a folder's model."""
    folder.mkdir(parents=True, exist_ok=True)
    text = f'model = "{model.name}"\nmodel_digest = "{model.digest}"\nmachine = "simulated"\nsolutions = []\n'
    (folder / "solution.toml").write_text(text + "[workload]\nctx_tokens = 32768\n")


def tuned_choice(
    seed: int, noise: float = 0.01, spread: float = TRUE_SPREAD, most_runs: int = 8, throttled: float = 0.0
) -> tuple[float, int]:
    """(choice's true turn over the true optimum's, less one; runs made) of a tuning over the pool.

    `throttled`: the chance that a run is 30 % slow. What is nearly the best is run twice more, as `tune` does.
    """
    simulated = Simulated(seed, spread=spread, noise=noise)
    proposals = [Proposal(d.run, d, p, 500) for d, p in zip(*pool(), strict=True)]
    by_key = {each.key: each for each in proposals}
    rows: list[TimingRow] = []
    turns: dict[str, float] = {}

    def turn(each: Proposal) -> tuple[TimingRow, TimingRow, float]:
        hot = 1.3 if simulated.rng.random() < throttled else 1.0
        token, prompt = simulated.run(each.decode, hot), simulated.run(each.prompt, hot)
        return token, prompt, (prompt.measured_s or 0.0) + each.generate_tokens * (token.measured_s or 0.0)

    while True:
        decode = calibrate(bare_machine(), rows, DECODE, with_errors=False)
        prompt = calibrate(bare_machine(), rows, PROMPT, decode.values, with_errors=False)
        fits = (decode, prompt)
        if len(turns) >= most_runs or is_converged(fits, proposals, turns, LEAST_NOISE):
            break
        for each in choose_runs(fits, proposals, turns):
            token, read, seconds = turn(each)
            if surprising(fits, [each], {each.key: seconds}):
                token, read, seconds = min((token, read, seconds), turn(each), key=lambda result: result[2])
            rows += [token, read]
            turns[each.key] = seconds
    n_runs = len(turns)
    predicted = dict(zip(by_key, map(float, forecast_turns(fits, proposals).turns_s), strict=True))
    rounds_s, most = {key: [seconds] for key, seconds in turns.items()}, rounds_to_tell(noise)
    for n_rounds in (*range(LEAST_ROUNDS, most, MORE_ROUNDS), most):
        again = worth_again(rounds_s, predicted, noise)
        if n_rounds > LEAST_ROUNDS and len(again) == 1:
            break
        for key in again:
            rounds_s[key] += [turn(by_key[key])[2] for _ in range(n_rounds - len(rounds_s[key]))]
    true = {
        k: simulated.true_s(e.prompt) + e.generate_tokens * simulated.true_s(e.decode)
        for k, e in by_key.items()
    }
    return true[min(rounds_s, key=lambda key: middle(rounds_s[key]))] / min(true.values()) - 1.0, n_runs
