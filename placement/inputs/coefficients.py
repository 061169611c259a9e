"""The cost coefficients that a machine file may hold: what serves where it is silent, and how sure that is.

What each coefficient multiplies stands in `terms`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# Whom a coefficient is of, and so how its full name ends: NAME.DEVICE of each device, of each and the CPU, of each
# CUDA device; NAME alone, of the machine, or of a machine with RPC workers.
Scope = Literal["device", "place", "cuda", "machine", "workers"]


@dataclass(frozen=True, slots=True)
class Default:
    """What is believed of a coefficient before a machine says otherwise; `NAME.DEVICE` in its file overrides `NAME`.

    `spread` is how far off that may well be (one standard deviation): a share of the value, or in `unit` where the
    value is 0, which may then be what runs find. None: no run can teach it. The others take its place: `cpu_spread`
    for the CPU's own, `rpc_spread` for a worker's or a machine with workers, `no_card_spread` on a machine without
    CUDA.
    """

    value: float
    unit: str
    meaning: str
    scope: Scope
    spread: float | None
    cpu_spread: float | None = None
    rpc_spread: float | None = None
    no_card_spread: float | None = None

    @property
    def may_be_zero(self) -> bool:
        """Whether runs may find that it is nothing."""
        return self.value == 0


_UNKNOWN_WORKER = 1.5  # nobody knows a worker, or the network, before they are measured
_NO_CARD = 1.0  # the defaults are of machines with NVIDIA cards and models larger than any cache
_SLOW_CPU = 1.0  # a processor's attention is seldom as fast as its memory

DEFAULTS: dict[str, Default] = {
    "read_efficiency": Default(
        0.90,
        "fraction",
        "share of a GPU's bandwidth that reading weights reaches",
        "device",
        0.2,
        rpc_spread=_UNKNOWN_WORKER,
    ),
    "kv_read_efficiency": Default(
        0.70,
        "fraction",
        "share of a GPU's bandwidth that reading the KV cache reaches; .CPU: of the host's [cpu_read_efficiency]",
        "place",
        0.4,
        cpu_spread=_SLOW_CPU,
        rpc_spread=_UNKNOWN_WORKER,
    ),
    "cpu_read_efficiency": Default(
        0.55,
        "fraction",
        "share of the host's bandwidth that weights on the CPU reach",
        "machine",
        0.35,
        no_card_spread=_NO_CARD,
    ),
    "cpu_thread_gb_per_s": Default(
        10.0,
        "GB/s",
        "weights that one CPU thread reads; together at most the host's share",
        "machine",
        None,  # runs have one number of threads
    ),
    "expert_read_share": Default(
        1.0, "fraction", "bandwidth that reading experts reaches, beside dense weights", "place", 0.2
    ),
    "float_read_share": Default(
        1.0, "fraction", "bandwidth that f16, bf16 and f32 weights reach, beside quantised", "place", 0.15
    ),
    "iq_read_share": Default(
        1.0, "fraction", "bandwidth that i-quants reach, beside other quantised weights", "place", 0.2
    ),
    "layer_us": Default(
        0.0,
        "us",
        "time of one layer while decoding, beside its bytes and nodes",
        "place",
        8.0,
        rpc_spread=60.0,
    ),
    "split_us": Default(
        45.0,
        "us",
        "time of one graph split while decoding, to or from the host",
        "machine",
        0.5,
        rpc_spread=_UNKNOWN_WORKER,
    ),
    "thread_us": Default(
        0.0,
        "us",
        "what each CPU thread adds to a split to or from the host",
        "machine",
        None,  # runs have one number of threads
    ),
    "boundary_us": Default(
        45.0,
        "us",
        "time of one graph split between two GPUs [split_us]",
        "machine",
        0.8,
        rpc_spread=_UNKNOWN_WORKER,
    ),
    "node_us": Default(
        1.3,
        "us",
        "time of one graph node (kernel launch) while decoding",
        "machine",
        0.4,
        no_card_spread=_NO_CARD,
    ),
    "token_us": Default(0.0, "us", "fixed time of a token outside the graph", "machine", 150.0),
    "rpc_split_us": Default(
        200.0,
        "us",
        "added time of a split that reaches an RPC worker",
        "workers",
        _UNKNOWN_WORKER,
        rpc_spread=_UNKNOWN_WORKER,
    ),
    "pinned_link_efficiency": Default(
        0.95, "fraction", "share of the link that pinned host memory streams at", "cuda", 0.3
    ),
    "pageable_link_efficiency": Default(
        0.45, "fraction", "share of the link that memory-mapped weights stream at", "cuda", 0.5
    ),
    "dense_compute_efficiency": Default(
        0.55,
        "fraction",
        "share of matrix throughput of dense layers in prompts",
        "device",
        0.5,
        rpc_spread=_UNKNOWN_WORKER,
    ),
    "expert_compute_efficiency": Default(
        0.25,
        "fraction",
        "share of matrix throughput of experts in prompts",
        "device",
        0.6,
        rpc_spread=_UNKNOWN_WORKER,
    ),
    "attention_compute_efficiency": Default(
        0.35,
        "fraction",
        "share of matrix throughput of attention in prompts",
        "device",
        0.7,
        rpc_spread=_UNKNOWN_WORKER,
    ),
    "compute_half_tokens": Default(
        96.0, "tokens", "ubatch at which matrix work reaches half of its throughput", "machine", 0.5
    ),
    "pipeline_overlap": Default(
        0.5, "fraction", "share of the ideal overlap that pipelined prompts reach", "machine", 0.4
    ),
    "cpu_tflops_per_thread": Default(
        0.06, "Tflop/s", "matrix throughput of one CPU thread in prompts", "machine", 0.6
    ),
    "tflops_per_gb_per_s": Default(
        0.12,
        "Tflop/GB",
        "matrix throughput of a GPU whose own is not in its file",
        "device",
        None,  # runs tell the product with the efficiencies alone
    ),
}
# What serves instead of `NAME` and its default where a machine file is silent about these.
SERVED_BY = {"boundary_us": "split_us", "kv_read_efficiency.CPU": "cpu_read_efficiency"}

# name: (unit, meaning). What runs measured of memory; `name.DEVICE` in a machine file, without a default.
MEMORY: dict[str, tuple[str, str]] = {
    "runtime_mib": ("MiB", "taken on a card beside the engine's own figures, once the server has started"),
    "growth_mib": ("MiB", "taken more while it works"),
    "margin_mib": ("MiB", "to keep free beside both, for the stated chance of running out"),
}

# What numbers are divided by may not be 0.
DIVISORS = frozenset(
    name for name in DEFAULTS if any(word in name for word in ("efficiency", "tflops", "share", "gb_per_s"))
)
