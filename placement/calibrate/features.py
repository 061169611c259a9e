"""A timing of a placement → what each coefficient costs in it, as terms that sum to `cost.evaluate`.

A term is an amount times a product of coefficients, each to the power 1 or -1: bytes by device and class, KV
bytes, layers, nodes and splits by kind for decode; bytes, flops and streamed bytes by stage for prompts.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from placement.backend_rules import PINNED_LOAD_MODES
from placement.calibrate.parameters import CPU_KV, DECODE, PROMPT
from placement.cost import (
    READ_CLASSES,
    CostModel,
    GraphCounts,
    Load,
    are_threads_few,
    boundary_us,
    coefficient,
    cpu_kv_efficiency,
    cpu_threads,
    device_tflops,
    pipelined_s,
    total,
)
from placement.crossings import count_crossings
from placement.machine import Machine
from placement.memory import placed_tensors
from placement.problem import CPU, Assignment, Problem

Powers = tuple[tuple[str, int], ...]  # (coefficient, 1 or -1)
FIXED = ""  # the stage of what no device does


@dataclass(frozen=True, slots=True)
class Term:
    """Seconds = amount · Π coefficient^power, spent in one stage (a device, "CPU", or FIXED)."""

    amount: float
    powers: Powers
    stage: str = FIXED


@dataclass(frozen=True)
class Row:
    """One measured time and its terms. `run` is what is left out together; `noise` is a share.

    `measured_s` None: a placement that was not run. Prompts of `n_copies` > 1 overlap over `n_ubatches`.
    `doubt`: why the run itself says that it was disturbed; empty if it does not.
    """

    run: str
    kind: str
    terms: tuple[Term, ...]
    measured_s: float | None = None
    noise: float = 0.0
    n_ubatches: int = 1
    n_copies: int = 1
    label: str = ""
    doubt: str = ""


def decode_row(
    problem: Problem,
    assignment: Assignment,
    counts: GraphCounts,
    run: str = "",
    measured_s: float | None = None,
    noise: float = 0.0,
    label: str = "",
    doubt: str = "",
) -> Row:
    """A token's time at the problem's depth."""
    loads, contexts = _loads(problem, assignment)
    crossings = count_crossings(problem, assignment, counts.splits_decode)
    threads = cpu_threads(problem.machine, assignment.settings)
    n_host = counts.splits_decode - crossings.n_between
    terms = [
        term
        for where in loads
        for term in _decode_terms(problem.machine, where, loads[where] + contexts[where][0], threads)
    ]
    terms += [
        Term(1e-6 * n_host, (("split_us", 1),)),
        Term(1e-6 * n_host * threads, (("thread_us", 1),)),
        Term(1e-6 * crossings.n_between, (("boundary_us", 1),)),
        Term(1e-6 * counts.n_nodes_decode, (("node_us", 1),)),
        Term(1e-6, (("token_us", 1),)),
        Term(2e-6 * crossings.n_rpc, (("rpc_split_us", 1),)),
    ]
    kept = tuple(term for term in terms if term.amount)
    return Row(run, DECODE, kept, measured_s, noise, label=label, doubt=doubt)


def prompt_row(
    problem: Problem,
    assignment: Assignment,
    counts: GraphCounts,
    run: str = "",
    measured_s: float | None = None,
    noise: float = 0.0,
    label: str = "",
    doubt: str = "",
) -> Row:
    """The time of the problem's whole prompt."""
    model = CostModel(problem, assignment.settings, assignment.devices)
    loads, contexts = _loads(problem, assignment, model)
    crossings = count_crossings(problem, assignment, counts.splits_decode)
    n = len(model.ubatches)
    terms: list[Term] = []
    for where in loads:
        terms += _prompt_terms(problem, assignment, model, where, loads[where] + contexts[where][1])
    terms += [
        Term(1e-6 * counts.n_nodes_prompt * n, (("node_us", 1),)),
        Term(1e-6 * counts.splits_prompt * n, (("split_us", 1),)),
        Term(
            1e-6 * counts.splits_prompt * n * cpu_threads(problem.machine, assignment.settings),
            (("thread_us", 1),),
        ),
        Term(2e-6 * crossings.n_rpc * n, (("rpc_split_us", 1),)),
    ]
    kept = tuple(term for term in terms if term.amount)
    return Row(run, PROMPT, kept, measured_s, noise, n, counts.n_copies, label, doubt)


def _loads(
    problem: Problem, assignment: Assignment, model: CostModel | None = None
) -> tuple[dict[str, Load], dict[str, tuple[Load, Load]]]:
    """The weights' load of every location, and the context's: where decode reads it, where prompts compute."""
    settings = assignment.settings
    model = model or CostModel(problem, settings, assignment.devices)
    names = (*assignment.devices, CPU)
    parts: dict[str, list[Load]] = {name: [] for name in names}
    for placed, where in placed_tensors(problem.model, problem.machine, assignment):
        parts[where].append(model.tensor_load(placed))
    decode: dict[str, list[Load]] = {name: [] for name in names}
    prompt: dict[str, list[Load]] = {name: [] for name in names}
    for layer, home in zip(model.architecture.layers, assignment.homes, strict=False):
        load = model.context_load(layer)
        decode[home if settings.is_kv_offloaded else CPU].append(load)
        prompt[home].append(load)
    contexts = {name: (total(decode[name]), total(prompt[name])) for name in names}
    return {name: total(parts[name]) for name in names}, contexts


def reading(machine: Machine, where: str, threads: int) -> tuple[float, Powers]:
    """(bytes per second, powers of the coefficients) at which a location reads plain weights."""
    if where == CPU and are_threads_few(machine, threads):
        return threads * 1e9, (("cpu_thread_gb_per_s", -1),)
    if where == CPU:
        return machine.cpu.bandwidth_gb_per_s * 1e9, (("cpu_read_efficiency", -1),)
    return machine.device(where).bandwidth_gb_per_s * 1e9, ((f"read_efficiency.{where}", -1),)


def _decode_terms(machine: Machine, where: str, load: Load, threads: int) -> Iterator[Term]:
    speed, powers = reading(machine, where, threads)
    bandwidth = machine.cpu.bandwidth_gb_per_s * 1e9 if where == CPU else speed
    for n_bytes, (is_expert, family) in zip(load.reads, READ_CLASSES, strict=True):
        shares: Powers = ((f"expert_read_share.{where}", -1),) if is_expert else ()
        if family != "quant":
            shares = (*shares, (f"{family}_read_share.{where}", -1))
        yield Term(n_bytes / speed, (*powers, *shares))
    yield Term(load.decode_kv_bytes / bandwidth, ((f"kv_read_efficiency.{where}", -1),))
    yield Term(1e-6 * load.n_layers, ((f"layer_us.{where}", 1),))


def _prompt_terms(
    problem: Problem, assignment: Assignment, model: CostModel, where: str, load: Load
) -> Iterator[Term]:
    """As `CostModel.prompt_s`; matrix work is split into that of the tokens and that of each ubatch."""
    rates, machine = model.rates, problem.machine
    at = where
    if where == CPU and rates.stream_s_per_byte is not None and rates.stream_device is not None:
        at = rates.stream_device
        kind = "pinned" if assignment.settings.load_mode in PINNED_LOAD_MODES else "pageable"
        link = machine.device(at).link_gb_per_s * 1e9
        amount = (load.prompt_bytes + load.prompt_kv_bytes) / link
        yield Term(amount, ((f"{kind}_link_efficiency.{at}", -1),), where)
    threads = cpu_threads(machine, assignment.settings)
    speed, powers = reading(machine, at, threads)
    yield Term(load.prompt_bytes / speed, powers, where)
    n_tokens = float(sum(model.ubatches))
    for flops, what in (
        (load.dense_flops, "dense"),
        (load.expert_flops, "expert"),
        (load.attention_flops, "attention"),
    ):
        amount, efficiency = _computing(machine, assignment, at, flops, what)
        if what == "attention":
            yield Term(amount, efficiency, where)
            continue
        per_token = amount / model.work_tokens if model.work_tokens else 0.0
        yield Term(per_token * n_tokens, efficiency, where)
        yield Term(per_token * len(model.ubatches), (*efficiency, ("compute_half_tokens", 1)), where)


def _computing(
    machine: Machine, assignment: Assignment, at: str, flops: float, what: str
) -> tuple[float, Powers]:
    if at == CPU:
        threads = cpu_threads(machine, assignment.settings)
        return flops / (threads * 1e12), (("cpu_tflops_per_thread", -1),)
    return flops / (device_tflops(machine, machine.device(at)) * 1e12), (
        (f"{what}_compute_efficiency.{at}", -1),
    )


def predict_s(row: Row, machine: Machine) -> float:
    """The seconds of a row on a machine; what `cost.evaluate` says of the same placement."""
    stages: dict[str, float] = {}
    for term in row.terms:
        seconds = term.amount
        for name, power in term.powers:
            seconds *= coefficient_value(machine, name) ** power
        stages[term.stage] = stages.get(term.stage, 0.0) + seconds
    fixed = stages.pop(FIXED, 0.0)
    overlap = coefficient(machine, "pipeline_overlap")
    return fixed + pipelined_s(stages.values(), row.n_ubatches, row.n_copies, overlap)


def coefficient_value(machine: Machine, name: str) -> float:
    """A coefficient by its full name, as the speed model reads it."""
    base, _, where = name.partition(".")
    if base == "boundary_us":
        return boundary_us(machine)
    if name == CPU_KV:
        return cpu_kv_efficiency(machine)
    return coefficient(machine, base, where or None)
