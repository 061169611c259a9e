"""The cost coefficients that a machine file may hold, with what serves where it is silent."""

from __future__ import annotations

# name: (value, unit, meaning). `name.DEVICE` in a machine file overrides `name` for that device.
DEFAULTS: dict[str, tuple[float, str, str]] = {
    "read_efficiency": (0.90, "fraction", "share of a GPU's bandwidth that reading weights reaches"),
    "kv_read_efficiency": (0.70, "fraction", "share of a GPU's bandwidth that reading the KV cache reaches"),
    "cpu_read_efficiency": (0.55, "fraction", "share of the host's bandwidth that weights on the CPU reach"),
    "split_us": (45.0, "us", "time of one graph split while decoding"),
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

# What numbers are divided by may not be 0.
DIVISORS = frozenset(name for name in DEFAULTS if "efficiency" in name or "tflops" in name)
