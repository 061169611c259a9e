"""The coefficients that runs can teach a machine, and what is believed of each before any run.

A prior is the machine's newest value that did not come from runs recorded here: a default, a detected one, or
what the machine file shipped with. Fits always start from it, so fitting the same runs twice changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.coefficients import DEFAULTS
from placement.machine import Coefficient, Device, Machine
from placement.problem import CPU

DECODE, PROMPT = "decode", "prompt"

# How far off a prior may well be (one standard deviation): as a share of the value, or in its unit where the
# prior is zero.
SPREADS = {
    "read_efficiency": 0.2,
    "kv_read_efficiency": 0.4,
    "expert_read_share": 0.2,
    "float_read_share": 0.15,
    "iq_read_share": 0.2,
    "cpu_read_efficiency": 0.35,
    "layer_us": 8.0,
    "split_us": 0.5,
    "boundary_us": 0.8,
    "node_us": 0.4,
    "token_us": 150.0,
    "rpc_split_us": 0.9,
    "pinned_link_efficiency": 0.3,
    "pageable_link_efficiency": 0.5,
    "dense_compute_efficiency": 0.5,
    "expert_compute_efficiency": 0.6,
    "attention_compute_efficiency": 0.7,
    "compute_half_tokens": 0.5,
    "pipeline_overlap": 0.4,
    "cpu_tflops_per_thread": 0.6,
}
CPU_KV = f"kv_read_efficiency.{CPU}"
CPU_KV_SPREAD = 1.0  # a processor's attention is seldom as fast as its memory
NEVER_FITTED = frozenset({"thread_us", "cpu_thread_gb_per_s"})  # runs have one number of threads
MAY_BE_ZERO = ("layer_us", "token_us")
RPC_SPREAD = 1.5  # nobody knows a worker, or the network, before they are measured
RPC_LAYER_US = 60.0
NO_CARD_SPREAD = 1.0  # the defaults are of machines with NVIDIA cards and models larger than any cache
_OF_CARDS = ("node_us", "cpu_read_efficiency")
ALIKE = 0.5  # correlation between the devices of one machine: they share a build and a driver
LEAST_SPREAD = 0.05

_DECODE_EACH = (
    "read_efficiency",
    "kv_read_efficiency",
    "expert_read_share",
    "float_read_share",
    "iq_read_share",
    "layer_us",
)
_DECODE_CPU = ("kv_read_efficiency", "expert_read_share", "float_read_share", "iq_read_share", "layer_us")
_DECODE_ONCE = ("cpu_read_efficiency", "split_us", "boundary_us", "node_us", "token_us", "rpc_split_us")
_PROMPT_EACH = ("dense_compute_efficiency", "expert_compute_efficiency", "attention_compute_efficiency")
_PROMPT_CUDA = ("pinned_link_efficiency", "pageable_link_efficiency")
_PROMPT_ONCE = ("compute_half_tokens", "pipeline_overlap", "cpu_tflops_per_thread")
_RPC_RATES = ("read_efficiency", "kv_read_efficiency", *_PROMPT_EACH)
_RPC_WAITS = ("split_us", "boundary_us", "rpc_split_us")


@dataclass(frozen=True, slots=True)
class Parameter:
    """One coefficient to fit: its name in the machine file, its prior, and the prior's spread.

    `is_log`: the spread is a share, and the value stays positive; else both are in the unit, and it may be zero.
    """

    name: str
    prior: float
    spread: float
    is_log: bool
    unit: str

    @property
    def base(self) -> str:
        """The name without its device."""
        return self.name.partition(".")[0]


def parameters(machine: Machine, kind: str) -> tuple[Parameter, ...]:
    """The coefficients of decode or of prompts that this machine has, in a fixed order."""
    each, once = (_DECODE_EACH, _DECODE_ONCE) if kind == DECODE else (_PROMPT_EACH, _PROMPT_ONCE)
    names: list[tuple[str, Device | None]] = []
    for base in each:
        names += [(f"{base}.{device.name}", device) for device in machine.devices]
    if kind == DECODE:
        names += [(f"{base}.{CPU}", None) for base in _DECODE_CPU]
    else:
        cuda = [device for device in machine.devices if device.is_cuda]
        names += [(f"{base}.{device.name}", device) for base in _PROMPT_CUDA for device in cuda]
    has_rpc = any(device.is_rpc for device in machine.devices)
    names += [(base, None) for base in once if base != "rpc_split_us" or has_rpc]
    return tuple(_parameter(machine, name, device) for name, device in names)


def _parameter(machine: Machine, name: str, device: Device | None) -> Parameter:
    base = name.partition(".")[0]
    prior = prior_of(machine, name)
    is_log = prior.value > 0 and base not in MAY_BE_ZERO
    spread = SPREADS[base]
    if not is_log and base not in MAY_BE_ZERO:
        spread *= DEFAULTS[base][0]  # a file says that it is nothing
    has_rpc = any(each.is_rpc for each in machine.devices)
    is_rpc_rate = device is not None and device.is_rpc and base in _RPC_RATES
    if is_rpc_rate or (has_rpc and base in _RPC_WAITS):
        spread = RPC_SPREAD
    if device is not None and device.is_rpc and base == "layer_us":
        spread = RPC_LAYER_US
    if base in _OF_CARDS and is_log and not any(each.is_cuda for each in machine.devices):
        spread = NO_CARD_SPREAD
    if name == CPU_KV:
        spread = CPU_KV_SPREAD
    is_own = name in machine.coefficients or any(each.name == name for each in machine.history)
    if is_own and prior.source == "detected" and prior.uncertainty is not None:
        spread = max(prior.uncertainty / prior.value, LEAST_SPREAD) if is_log else max(prior.uncertainty, 1.0)
    return Parameter(name, prior.value, spread, is_log, DEFAULTS[base][1])


def prior_of(machine: Machine, name: str) -> Coefficient:
    """What is believed of a coefficient without the runs recorded here."""
    past = [each.coefficient for each in machine.history if each.name == name]
    kept = machine.coefficients.get(name)
    values = [*past, *([kept] if kept is not None else [])]
    believed = [each for each in values if each.source != "calibrated"]
    if believed:
        return believed[-1]
    if values:
        return values[0]  # came with the file
    base, _, where = name.partition(".")
    if name == CPU_KV:
        return prior_of(machine, "cpu_read_efficiency")
    if where:
        return prior_of(machine, base)
    if base == "boundary_us":
        return prior_of(machine, "split_us")
    value, unit, _ = DEFAULTS[base]
    return Coefficient(value, unit)
