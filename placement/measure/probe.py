"""A machine's first coefficients from llama.cpp itself: llama-bench on small models made here, two minutes in all.

The models are headers with holes for weights: they read as zeros, at the speed of any weights. Wide ones tell
bandwidth, link and matrix throughput, narrow ones what layers, splits and boundaries take. The timings go through
the same fit as runs do; what comes out is `detected`, and later runs start from it.
"""

from __future__ import annotations

import itertools
import json
import math
import signal
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from placement.engine.find import Engine
from placement.engine.run import run
from placement.errors import EngineError, EngineFailed, EngineOutputError
from placement.inputs.gguf_header.facts import TensorInfo
from placement.inputs.gguf_header.write import write_header
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.model_files.files import read_model
from placement.inputs.problem import (
    CPU,
    DEFAULT_BATCH_TOKENS,
    DEFAULT_UBATCH_TOKENS,
    Assignment,
    Problem,
    Settings,
    Workload,
)
from placement.llamacpp.compute import plan_compute
from placement.llamacpp.emit.arguments import emit_arguments
from placement.measure.calibrate.applied import Change, apply_fit
from placement.measure.calibrate.data import FitData
from placement.measure.calibrate.features import TimingRow, decode_row, prompt_row
from placement.measure.calibrate.fit import Calibration
from placement.measure.calibrate.whole import fit_both
from placement.measure.verify.times import usual_spread
from placement.predict.check import device_use
from placement.predict.cost import graph_counts

PROBE_PROGRAM = "llama-bench"
BUDGET_S = 120.0
CASE_TIMEOUT_S = 60.0
N_VOCAB = 1024
LEAST_PROBE_NOISE = 0.01
LEAST_UNCERTAINTY = 0.1  # of a value: zeros of one shape are not every model
NARROW_EMBD = 256
LEAST_DEPTH, NARROW_DEPTH, WIDE_DEPTH = 256, 2048, 4096
FAST_GB_PER_S = 200.0  # slower devices get smaller models: a probe is short
_DROPPED = {"-c": 1, "-np": 1, "-fit": 1, "-kvu": 0}
_RENAMED = {"--rpc": "-rpc", "--no-op-offload": "-nopo"}
_FLAGS = ("-nkvo", "-nopo")  # llama-bench wants a value
_LISTS = {"-ts": ("/", ","), "-dev": ("/", ","), "-ot": (";", ",")}


@dataclass(frozen=True, slots=True)
class ProbeShape:
    """A dense model: F is for its layers' feed-forward width."""

    name: str
    n_layer: int
    n_embd: int
    n_ff: int

    @property
    def kind(self) -> str:
        """What it is for: reading much, or doing many small things."""
        return "narrow" if self.n_embd <= NARROW_EMBD else "wide"


@dataclass(frozen=True)
class ProbeCase:
    """One placement of one shape, and what is asked of it; `target` is where the feed-forward tensors go."""

    name: str
    shape: ProbeShape
    devices: tuple[str, ...]
    target: str | None = None
    load_mode: str = "auto"
    ubatch_tokens: int = DEFAULT_UBATCH_TOKENS
    n_prompt: int = 0
    n_generate: int = 16
    depth: int = 0
    is_op_offloaded: bool = True


@dataclass(frozen=True)
class Probed:
    """The machine with what was detected, the timings by case, and the cases that gave none, with reasons."""

    machine: Machine
    changes: tuple[Change, ...]
    fits: tuple[Calibration, Calibration]
    rows: tuple[TimingRow, ...]
    failed: tuple[str, ...]
    wall_s: float


def cases(machine: Machine) -> Iterator[ProbeCase]:
    """What to run on a machine, the most informative first: a budget may cut the end."""
    for device in machine.devices:
        is_fast = device.bandwidth_gb_per_s >= FAST_GB_PER_S and not device.is_rpc
        wide, narrow = _shapes(device.usable_mib, is_fast)
        own = (device.name,)
        yield ProbeCase(f"{device.name} wide", wide, own, n_prompt=512)
        yield ProbeCase(f"{device.name} narrow", narrow, own, n_generate=64)
        yield ProbeCase(f"{device.name} narrow, FFN on the CPU", narrow, own, CPU, n_generate=64)
        yield ProbeCase(f"{device.name} wide, FFN on the CPU", wide, own, CPU, n_prompt=512)
        if device.is_cuda:
            yield ProbeCase(f"{device.name} wide, FFN pinned", wide, own, CPU, "none", n_prompt=512)
        yield _deep(device.name, wide if is_fast else narrow, own, device.usable_mib)
        yield ProbeCase(
            f"{device.name} wide, small ubatch", wide, own, ubatch_tokens=64, n_prompt=512, n_generate=0
        )
    wide, narrow = _shapes(machine.cpu.usable_mib, is_fast=False)
    yield ProbeCase("CPU wide", wide, (), n_prompt=64, is_op_offloaded=False)
    yield ProbeCase("CPU narrow", narrow, (), n_generate=64, is_op_offloaded=False)
    yield replace(_deep(CPU, narrow, (), machine.cpu.usable_mib), is_op_offloaded=False)
    for a, b in itertools.pairwise(device.name for device in machine.devices):
        narrow = _shapes(min(machine.device(each).usable_mib for each in (a, b)), is_fast=False)[1]
        yield ProbeCase(f"{a}+{b} narrow", narrow, (a, b), n_generate=64)
        yield ProbeCase(f"{a} narrow, FFN on {b}", narrow, (a, b), b, n_generate=64)


def _deep(name: str, shape: ProbeShape, devices: tuple[str, ...], usable_mib: float) -> ProbeCase:
    """A cache that takes a good part of a token's time: deep in a wide model, or most of a narrow one's bytes."""
    depth = WIDE_DEPTH if shape.kind == "wide" else NARROW_DEPTH
    while depth > LEAST_DEPTH and usable_mib / 4 < 2 * 2 * shape.n_layer * shape.n_embd * depth / 2**20:
        depth //= 2
    return ProbeCase(f"{name} {shape.kind}, deep", shape, devices, depth=depth)


def _shapes(usable_mib: float, is_fast: bool) -> tuple[ProbeShape, ProbeShape]:
    """(wide, narrow): the wide one takes at most about an eighth of the memory."""
    n_embd = 4096 if is_fast else 1024
    while n_embd > 256 and usable_mib / 8 < _wide_mib(n_embd):
        n_embd //= 2
    return ProbeShape(f"wide{n_embd}", 4, n_embd, 4 * n_embd), ProbeShape(
        "narrow", 24, NARROW_EMBD, 2 * NARROW_EMBD
    )


def _wide_mib(n_embd: int) -> float:
    return 4 * 16 * n_embd**2 * 34 / 32 / 2**20


def probe(
    machine: Machine,
    engine: Engine,
    date: str,
    budget_s: float = BUDGET_S,
    tell: Callable[[str], None] = lambda _text: None,
) -> Probed:
    """Measure what the budget allows, and seed the machine's coefficients; calibrated ones stay as they are.

    Raises:
        EngineError: the engine has no llama-bench, or every case failed.
    """
    engine.program(PROBE_PROGRAM)
    began_s, rows, failed = time.monotonic(), [], []
    base = _without_detected(machine)
    with tempfile.TemporaryDirectory(prefix="place-probe-") as folder:
        for case in cases(machine):
            left_s = budget_s - (time.monotonic() - began_s)
            if left_s < 1:
                failed.append(f"{case.name}: the budget of {budget_s:g} s was spent")
                continue
            try:
                found = run_case(case, base, engine, Path(folder), min(left_s, CASE_TIMEOUT_S))
            except EngineError as error:
                failed.append(f"{case.name}: {error}")
                tell(f"place: {failed[-1]}")
                continue
            rows += found
            tell(f"place: {case.name}: " + ", ".join(map(_words, found)))
    if not rows:
        raise EngineFailed(f"no probe ran: {failed[0] if failed else 'the machine has no device'}")
    fits = fit_both(base, FitData(rows=tuple(rows)), with_errors=False, is_trusted=True)
    changed, changes = _seeded(machine, base, fits, date)
    return Probed(changed, changes, fits, tuple(rows), tuple(failed), time.monotonic() - began_s)


def _words(row: TimingRow) -> str:
    return f"{row.kind} {(row.measured_s or 0.0) * 1e3:.2f} ms"


def _without_detected(machine: Machine) -> Machine:
    """The machine as it was believed before any probe or run."""
    kept = {name: each for name, each in machine.coefficients.items() if each.source == "default"}
    return replace(machine, coefficients=kept, history=())


def _seeded(
    machine: Machine, base: Machine, fits: tuple[Calibration, Calibration], date: str
) -> tuple[Machine, tuple[Change, ...]]:
    """The machine with the identified values as detected; what runs have calibrated is not overwritten."""
    probed, changes = apply_fit(base, fits, (), date)
    kept: list[Change] = []
    for each in changes:
        old = machine.coefficients.get(each.name)
        if old is not None and old.source == "calibrated":
            continue
        new = each.new
        if new.source == "calibrated":
            spread = math.hypot(new.uncertainty or 0.0, LEAST_UNCERTAINTY * new.value)
            new = replace(new, source="detected", uncertainty=float(f"{spread:.3g}"))
        kept.append(replace(each, old=old, new=new))
    names = {each.name for each in kept}
    past = tuple(
        replace(each, coefficient=machine.coefficients.get(each.name, each.coefficient))
        for each in probed.history
        if each.name in names
    )
    coefficients = {**machine.coefficients, **{each.name: each.new for each in kept}}
    return replace(machine, coefficients=coefficients, history=(*machine.history, *past)), tuple(kept)


def run_case(
    case: ProbeCase, machine: Machine, engine: Engine, folder: Path, timeout_s: float
) -> list[TimingRow]:
    """Run a case and return its token's and its prompt's time as rows.

    Raises:
        EngineError: it does not fit, llama-bench failed, hung, or printed something else.
    """
    path = folder / f"{case.shape.name}.gguf"
    if not path.exists():
        write_model(case.shape, path)
    model = read_model(path)
    problem, assignment = placed(case, model, machine)
    plan = plan_compute(model, machine, assignment, PROBE_PROGRAM)
    uses = device_use(problem, assignment, plan)
    if any(use.headroom_mib < 0 for use in uses.values()):
        raise EngineFailed("does not fit")
    arguments = bench_arguments(emit_arguments(model, machine, assignment, PROBE_PROGRAM))
    finished = run(
        [engine.program(PROBE_PROGRAM), "-m", path, *arguments, "-p", str(case.n_prompt), "-n", str(case.n_generate),
         "-d", str(case.depth), "-r", "3", "-o", "json"],
        timeout_s=timeout_s,
    )  # fmt: skip
    if finished.returncode != 0:
        said = (finished.stderr.strip().splitlines() or ["nothing was said"])[-1]
        raise EngineFailed(f"llama-bench {_end_of(finished.returncode)}: {said}")
    counts = graph_counts(plan)
    rows = []
    for test in read_bench(finished.stdout):
        n_prompt, n_generate = int(test["n_prompt"]), int(test["n_gen"])
        seconds, noise = middle_of(test)
        if n_generate:
            at = replace(problem, workload=Workload(1, 1, case.depth + n_generate // 2))
            token_s = seconds / n_generate
            rows.append(decode_row(at, assignment, counts, case.name, token_s, noise, case.name))
        elif n_prompt:
            at = replace(problem, workload=Workload(n_prompt, 1, case.depth))
            rows.append(prompt_row(at, assignment, counts, case.name, seconds, noise, case.name))
    return rows


def _end_of(status: int) -> str:
    """How a program ended, a signal by its name: SIGILL means a build for another processor."""
    known = {-number: number.name for number in signal.Signals}
    return f"was ended by {known[status]}" if status in known else f"ended with {status}"


def middle_of(test: dict[str, Any]) -> tuple[float, float]:
    """(median seconds of a test's repeats, what it is off by as a share): one disturbed repeat does not count."""
    times = [float(each) * 1e-9 for each in test.get("samples_ns") or [test["avg_ns"]]]
    middle_s = statistics.median(times)
    off = usual_spread(abs(each / middle_s - 1.0) for each in times)
    return middle_s, max(LEAST_PROBE_NOISE, off / math.sqrt(len(times)))


def placed(case: ProbeCase, model: Model, machine: Machine) -> tuple[Problem, Assignment]:
    """A case as a problem and its assignment: layers in equal parts over its devices, the last one's output."""
    n_all = case.shape.n_layer + 1
    homes = tuple(case.devices[i * len(case.devices) // n_all] if case.devices else CPU for i in range(n_all))
    moved = tuple(
        (tensor.name, case.target)
        for tensor in model.tensors
        if case.target is not None and ".ffn_" in tensor.name and "norm" not in tensor.name
        if homes[tensor.layer or 0] != case.target
    )
    settings = Settings(
        ctx_tokens=case.n_prompt + case.n_generate + case.depth,
        batch_tokens=max(DEFAULT_BATCH_TOKENS, case.ubatch_tokens),
        ubatch_tokens=case.ubatch_tokens,
        flash_attention="on",
        is_op_offloaded=case.is_op_offloaded,
        load_mode=case.load_mode,
        has_overrides=bool(moved),
    )
    workload = Workload(max(case.n_prompt, 1), 1, case.depth)
    assignment = Assignment(case.devices, homes, moved, settings)
    return Problem(model, machine, settings, workload, PROBE_PROGRAM), assignment


def bench_arguments(arguments: list[str]) -> list[str]:
    """llama-server's arguments as llama-bench takes them."""
    kept: list[str] = []
    rest = iter(arguments)
    for word in rest:
        name = _RENAMED.get(word, word)
        if name in _DROPPED:
            for _ in range(_DROPPED[name]):
                next(rest)
        elif name in _FLAGS:
            kept += [name, "1"]
        elif name in _LISTS:
            join, split = _LISTS[name]
            kept += [name, next(rest).replace(split, join)]
        else:
            kept.append(name)
    return kept


def read_bench(text: str) -> list[dict[str, Any]]:
    """The tests of a llama-bench's JSON.

    Raises:
        EngineOutputError: it is no list of tests.
    """
    begin, end = text.find("["), text.rfind("]")
    try:
        tests = json.loads(text[begin : end + 1])
        for test in tests:
            _ = int(test["n_prompt"]), int(test["n_gen"]), 1.0 / float(test["avg_ns"])
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        raise EngineOutputError("llama-bench printed no list of tests") from error
    return list(tests)


def write_model(shape: ProbeShape, path: Path) -> None:
    """Write a dense model's header with a hole for its weights: heads of 64, as many for K and V as for Q.

    Raises:
        InputError: the file cannot be written.
    """
    d, head = shape.n_embd, 64
    numbers = {
        "block_count": shape.n_layer,
        "context_length": 8192,
        "embedding_length": d,
        "feed_forward_length": shape.n_ff,
        "attention.head_count": d // head,
        "attention.head_count_kv": d // head,
        "rope.dimension_count": head,
        "vocab_size": N_VOCAB,
    }
    metadata: dict[str, Any] = {"general.architecture": "llama", "tokenizer.ggml.model": "none"}
    types = dict.fromkeys(metadata, "string") | {f"llama.{name}": "uint32" for name in numbers}
    metadata |= {f"llama.{name}": value for name, value in numbers.items()}
    metadata["llama.attention.layer_norm_rms_epsilon"] = 1e-5
    types["llama.attention.layer_norm_rms_epsilon"] = "float32"
    tensors = [
        ("token_embd.weight", (d, N_VOCAB)),
        ("output.weight", (d, N_VOCAB)),
        ("output_norm.weight", (d,)),
    ]
    for i in range(shape.n_layer):
        block = f"blk.{i}."
        tensors += [(f"{block}{name}_norm.weight", (d,)) for name in ("attn", "ffn")]
        tensors += [(f"{block}attn_{name}.weight", (d, d)) for name in ("q", "k", "v", "output")]
        tensors += [(f"{block}ffn_{name}.weight", (d, shape.n_ff)) for name in ("gate", "up")]
        tensors.append((f"{block}ffn_down.weight", (shape.n_ff, d)))
    infos = [TensorInfo(name, ne, "Q8_0" if len(ne) > 1 else "F32") for name, ne in tensors]
    write_header(path, metadata, types, infos)
