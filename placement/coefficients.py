"""The cost coefficients that a machine file may hold, with what serves where it is silent."""

from __future__ import annotations

# name: (value, unit, meaning). `name.DEVICE` in a machine file overrides `name` for that device.
DEFAULTS: dict[str, tuple[float, str, str]] = {
    "read_efficiency": (0.90, "fraction", "share of a GPU's bandwidth that reading weights reaches"),
    "kv_read_efficiency": (
        0.70,
        "fraction",
        "share of a GPU's bandwidth that reading the KV cache reaches; .CPU: of the host's [cpu_read_efficiency]",
    ),
    "cpu_read_efficiency": (0.55, "fraction", "share of the host's bandwidth that weights on the CPU reach"),
    "cpu_thread_gb_per_s": (
        10.0,
        "GB/s",
        "weights that one CPU thread reads; together at most the host's share",
    ),
    "expert_read_share": (1.0, "fraction", "bandwidth that reading experts reaches, beside dense weights"),
    "float_read_share": (1.0, "fraction", "bandwidth that f16, bf16 and f32 weights reach, beside quantised"),
    "iq_read_share": (1.0, "fraction", "bandwidth that i-quants reach, beside other quantised weights"),
    "layer_us": (0.0, "us", "time of one layer while decoding, beside its bytes and nodes"),
    "split_us": (45.0, "us", "time of one graph split while decoding, to or from the host"),
    "thread_us": (0.0, "us", "what each CPU thread adds to a split to or from the host"),
    "boundary_us": (45.0, "us", "time of one graph split between two GPUs [split_us]"),
    "node_us": (1.3, "us", "time of one graph node (kernel launch) while decoding"),
    "token_us": (0.0, "us", "fixed time of a token outside the graph"),
    "rpc_split_us": (200.0, "us", "added time of a split that reaches an RPC worker"),
    "pinned_link_efficiency": (0.95, "fraction", "share of the link that pinned host memory streams at"),
    "pageable_link_efficiency": (0.45, "fraction", "share of the link that memory-mapped weights stream at"),
    "dense_compute_efficiency": (0.55, "fraction", "share of matrix throughput of dense layers in prompts"),
    "expert_compute_efficiency": (0.25, "fraction", "share of matrix throughput of experts in prompts"),
    "attention_compute_efficiency": (0.35, "fraction", "share of matrix throughput of attention in prompts"),
    "compute_half_tokens": (96.0, "tokens", "ubatch at which matrix work reaches half of its throughput"),
    "pipeline_overlap": (0.5, "fraction", "share of the ideal overlap that pipelined prompts reach"),
    "cpu_tflops_per_thread": (0.06, "Tflop/s", "matrix throughput of one CPU thread in prompts"),
    "tflops_per_gb_per_s": (0.12, "Tflop/GB", "matrix throughput of a GPU whose own is not in its file"),
}
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
