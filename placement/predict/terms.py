"""The speed model's terms, each once: what it multiplies, by which coefficients, while decoding or in a prompt.

A term's seconds are an amount, over what the place's hardware does in a second, times coefficients to a power. The
time of a token is the sum of all `DECODE` terms over all places; of a prompt the sum of all `PROMPT` terms, less
what `OVERLAP` hides. `cost`, the solver's tables and the fits read this table: a term is added by a row here. The
coefficients themselves (default, unit, spread) are in `coefficients`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from placement.inputs.coefficients import DEFAULTS, SERVED_BY
from placement.inputs.machine import Machine

Phase = Literal["decode", "prompt"]
DECODE: Phase = "decode"
PROMPT: Phase = "prompt"

GRAPH = ""  # the place of what no device does: splits, launches, the token itself
OVERLAP = (
    "pipeline_overlap"  # in no product: what stages that work at once take off their sum (cost.pipelined_s)
)

# A place is a device (`unrated`: its file does not say its matrix throughput), the host (`few_threads`: so few that
# they and not its memory limit its reading) or the graph. A device that computes for the host is beside that of the
# kind of memory that its link streams from.
Kind = Literal["device", "unrated", "host", "few_threads", "graph", "pinned", "pageable"]

# What a place's hardware does in a second.
Capacity = Literal[
    "bytes",  # of its memory
    "link_bytes",  # from the host
    "tflop",  # of its matrix units, in operations per second
    "tflop_of_bandwidth",  # were they one Tflop for each GB of its bandwidth
    "thread_gb",  # were it one GB, or one Tflop, by each of the host's threads
    "thread_tflop",
    "us",  # 1e6
    "thread_us",  # 1e6, shared by the host's threads
]

# Coefficients, each to the power 1 or -1: by their plain names in the table, by their full ones in a `Product`.
Powers = tuple[tuple[str, int], ...]


@dataclass(frozen=True, slots=True)
class Rate:
    """What a unit takes on one kind of place: the coefficients over the capacity, in seconds."""

    kind: Kind
    capacity: Capacity
    powers: Powers


@dataclass(frozen=True, slots=True)
class Term:
    """One row of the speed model.

    `quantity` is a field of `loads.Load`. The first of `rates` that a place is of the kind of counts, and on other
    places there is no such term; `powers` go with each of them.
    """

    name: str
    phase: Phase
    quantity: str
    rates: tuple[Rate, ...]
    powers: Powers = ()


def _per(*names: str) -> Powers:
    return tuple((name, -1) for name in names)


def _times(*names: str) -> Powers:
    return tuple((name, 1) for name in names)


def _computing(efficiency: str) -> tuple[Rate, ...]:
    return (
        Rate("unrated", "tflop_of_bandwidth", _per("tflops_per_gb_per_s", efficiency)),
        Rate("device", "tflop", _per(efficiency)),
        Rate("host", "thread_tflop", _per("cpu_tflops_per_thread")),
    )


def _graph(name: str, capacity: Capacity = "us") -> tuple[Rate, ...]:
    return (Rate("graph", capacity, _times(name)),)


_READING = (
    Rate("few_threads", "thread_gb", _per("cpu_thread_gb_per_s")),
    Rate("host", "bytes", _per("cpu_read_efficiency")),
    Rate("device", "bytes", _per("read_efficiency")),
)
_CACHE = tuple(Rate(kind, "bytes", _per("kv_read_efficiency")) for kind in ("device", "host"))
_LAYER = tuple(Rate(kind, "us", _times("layer_us")) for kind in ("device", "host"))
_STREAMING = (
    Rate("pinned", "link_bytes", _per("pinned_link_efficiency")),
    Rate("pageable", "link_bytes", _per("pageable_link_efficiency")),
)
_DENSE = _computing("dense_compute_efficiency")
_EXPERT = _computing("expert_compute_efficiency")
_ATTENTION = _computing("attention_compute_efficiency")
# Small ubatches use the matrix units badly: each costs as much as so many more tokens.
_HALF = _times("compute_half_tokens")

TERMS: tuple[Term, ...] = (
    # What bandwidth a read reaches depends on what is read: experts are scattered slices, i-quants need tables.
    Term("dense weights", DECODE, "dense_quant_bytes", _READING),
    Term("dense floats", DECODE, "dense_float_bytes", _READING, _per("float_read_share")),
    Term("dense i-quants", DECODE, "dense_iq_bytes", _READING, _per("iq_read_share")),
    Term("experts", DECODE, "expert_quant_bytes", _READING, _per("expert_read_share")),
    Term(
        "expert floats", DECODE, "expert_float_bytes", _READING, _per("expert_read_share", "float_read_share")
    ),
    Term("expert i-quants", DECODE, "expert_iq_bytes", _READING, _per("expert_read_share", "iq_read_share")),
    Term("cache", DECODE, "kv_bytes", _CACHE),
    Term("layers", DECODE, "n_layers", _LAYER),
    Term("splits", DECODE, "n_splits", _graph("split_us")),
    Term("splits, by threads", DECODE, "n_splits", _graph("thread_us", "thread_us")),
    Term("boundaries", DECODE, "n_boundaries", _graph("boundary_us")),
    Term("nodes", DECODE, "n_nodes", _graph("node_us")),
    Term("token", DECODE, "n_graphs", _graph("token_us")),
    Term("calls to workers", DECODE, "n_rpc_calls", _graph("rpc_split_us")),
    Term("streamed weights", PROMPT, "prompt_bytes", _STREAMING),
    Term("streamed cache", PROMPT, "prompt_kv_bytes", _STREAMING),
    Term("weights", PROMPT, "prompt_bytes", _READING),
    Term("dense work", PROMPT, "dense_flops", _DENSE),
    Term("dense work, by ubatches", PROMPT, "dense_flops_per_token", _DENSE, _HALF),
    Term("expert work", PROMPT, "expert_flops", _EXPERT),
    Term("expert work, by ubatches", PROMPT, "expert_flops_per_token", _EXPERT, _HALF),
    Term("attention", PROMPT, "attention_flops", _ATTENTION),
    Term("nodes", PROMPT, "n_nodes", _graph("node_us")),
    Term("splits", PROMPT, "n_splits", _graph("split_us")),
    Term("splits, by threads", PROMPT, "n_splits", _graph("thread_us", "thread_us")),
    Term("calls to workers", PROMPT, "n_rpc_calls", _graph("rpc_split_us")),
)


@dataclass(frozen=True, slots=True)
class Place:
    """Where work is done: whose coefficients count, of which kinds it is, and what its hardware does in a second."""

    name: str
    kinds: tuple[Kind, ...]
    per_second: Mapping[Capacity, float]


@dataclass(frozen=True, slots=True)
class Product:
    """A term at a place: seconds = amount of `quantity` / per_second · Π coefficient^power, by full names."""

    quantity: str
    per_second: float
    powers: Powers

    def unit_s(self, machine: Machine) -> float:
        """Seconds of one unit of the quantity."""
        numerator, denominator = 1.0, self.per_second
        for name, power in self.powers:
            if power > 0:
                numerator *= coefficient(machine, name)
            else:
                denominator *= coefficient(machine, name)
        return numerator / denominator


def products(phase: Phase, place: Place) -> Iterator[Product]:
    """The phase's terms that a place has."""
    for term in TERMS:
        if term.phase != phase:
            continue
        rate = next((rate for rate in term.rates if rate.kind in place.kinds), None)
        if rate is not None:
            powers = tuple((full_name(name, place.name), power) for name, power in rate.powers + term.powers)
            yield Product(term.quantity, place.per_second[rate.capacity], powers)


def full_name(name: str, where: str) -> str:
    """The coefficient's name as that of a place."""
    return name if DEFAULTS[name].scope in ("machine", "workers") else f"{name}.{where}"


def coefficient(machine: Machine, name: str) -> float:
    """The machine's value of a coefficient by its full name: its own, or what serves instead, or the default."""
    kept = machine.coefficients.get(name)
    if kept is not None:
        return kept.value
    if name in SERVED_BY:
        return coefficient(machine, SERVED_BY[name])
    plain, _, where = name.partition(".")
    return coefficient(machine, plain) if where else DEFAULTS[plain].value


def coefficients_of(phase: Phase) -> frozenset[str]:
    """Plain names of all coefficients that a phase's time depends on."""
    powers = [
        power
        for term in TERMS
        if term.phase == phase
        for power in (*term.powers, *(each for rate in term.rates for each in rate.powers))
    ]
    return frozenset(name for name, _ in powers) | ({OVERLAP} if phase == PROMPT else frozenset())


def fitted_in(phase: Phase) -> tuple[str, ...]:
    """Plain names of the coefficients that a phase's runs teach: what decoding depends on, prompts do not teach."""
    mine = coefficients_of(phase) - (coefficients_of(DECODE) if phase == PROMPT else frozenset())
    return tuple(name for name, default in DEFAULTS.items() if name in mine and default.spread is not None)
