"""The speed model: bytes read, bytes streamed, splits and kernel launches → seconds per token and per prompt.

Decode is a sum, because the engine's devices work one after the other: active weight bytes (by tensor
class and quantisation family) and KV bytes over each device's effective bandwidth, plus a time per layer, per
graph split (one to or from the host, or one between GPUs) and per graph node. A prompt is, per ubatch, matrix
work and one pass over the weights on each device, plus host-held weights streamed over the first CUDA device's
link. Every coefficient comes from the machine file; `DEFAULTS` serve where it is silent. All results
are estimates.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass, replace

from placement.architecture import Architecture, LayerFacts, PlacedTensor, describe
from placement.backend_rules import MIN_OFFLOAD_TOKENS, PINNED_LOAD_MODES
from placement.coefficients import DEFAULTS
from placement.compute import ComputePlan
from placement.crossings import count_crossings
from placement.groups import is_expert_stack, used_fraction
from placement.machine import Device, Machine
from placement.memory import context_size, kv_bytes_read
from placement.problem import CPU, Assignment, Problem, Settings, Workload

# What bandwidth a read reaches depends on what is read: experts are scattered slices, i-quants need tables.
FAMILIES = ("quant", "float", "iq")
READ_CLASSES = tuple((is_expert, family) for is_expert in (False, True) for family in FAMILIES)
NO_READS = (0.0,) * len(READ_CLASSES)


@dataclass(frozen=True, slots=True)
class Rates:
    """Seconds per byte, flop, split and node of every location; keys are device names and "CPU"."""

    read_s_per_byte: dict[str, float]  # of dense quantised weights
    class_s_per_byte: dict[str, tuple[float, ...]]  # in the order of READ_CLASSES
    layer_s: dict[str, float]
    kv_s_per_byte: dict[str, float]
    dense_s_per_flop: dict[str, float]
    expert_s_per_flop: dict[str, float]
    attention_s_per_flop: dict[str, float]
    stream_s_per_byte: float | None  # host weights to the first CUDA device; None: the CPU computes
    stream_device: str | None
    split_s: float
    boundary_s: float  # a split between two GPUs
    rpc_split_s: float
    node_s: float
    token_s: float


@dataclass(frozen=True, slots=True)
class Load:
    """What a piece of the model asks of whatever device holds it."""

    reads: tuple[float, ...] = NO_READS  # weight bytes read per generated token, in the order of READ_CLASSES
    decode_kv_bytes: float = 0.0
    prompt_bytes: float = 0.0  # weights read over the whole prompt, once per ubatch
    dense_flops: float = 0.0  # over the whole prompt
    expert_flops: float = 0.0
    attention_flops: float = 0.0
    prompt_kv_bytes: float = 0.0  # KV that is copied per ubatch when the layer lives on the CPU
    n_layers: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(
            tuple(a + b for a, b in zip(self.reads, other.reads, strict=True)),
            self.decode_kv_bytes + other.decode_kv_bytes,
            self.prompt_bytes + other.prompt_bytes,
            self.dense_flops + other.dense_flops,
            self.expert_flops + other.expert_flops,
            self.attention_flops + other.attention_flops,
            self.prompt_kv_bytes + other.prompt_kv_bytes,
            self.n_layers + other.n_layers,
        )

    @property
    def decode_features(self) -> tuple[float, ...]:
        """What `decode_rates` are taken by."""
        return (*self.reads, self.decode_kv_bytes, self.n_layers)

    @property
    def prompt_features(self) -> tuple[float, ...]:
        """What `prompt_rates` are taken by."""
        return (
            self.prompt_bytes,
            self.dense_flops,
            self.expert_flops,
            self.attention_flops,
            self.prompt_kv_bytes,
        )


@dataclass(frozen=True, slots=True)
class Speed:
    """Predicted seconds of a token and of a turn's parts."""

    decode_s: float
    prompt_s: float
    generate_tokens: int
    prompt_tokens: int

    @property
    def turn_s(self) -> float:
        """Seconds to read the prompt and generate the answer."""
        return self.prompt_s + self.generate_tokens * self.decode_s

    @property
    def decode_tps(self) -> float:
        """Generated tokens per second."""
        return 1.0 / self.decode_s

    @property
    def prompt_tps(self) -> float | None:
        """Prompt tokens per second; None for a workload without a prompt."""
        return self.prompt_tokens / self.prompt_s if self.prompt_tokens and self.prompt_s else None


def coefficient(machine: Machine, name: str, device: str | None = None) -> float:
    """The machine's value of a coefficient (its device's own first), or the default."""
    for key in (f"{name}.{device}", name) if device else (name,):
        if key in machine.coefficients:
            return machine.coefficients[key].value
    return DEFAULTS[name][0]


def family(ggml_type: str) -> str:
    """The quantisation family of a ggml type: what its dequantisation costs is alike."""
    if ggml_type in ("F32", "F16", "BF16", "F64"):
        return "float"
    return "iq" if ggml_type.startswith(("IQ", "TQ")) else "quant"


def class_shares(machine: Machine, where: str) -> tuple[float, ...]:
    """Share of a location's plain bandwidth that each class of READ_CLASSES reaches."""
    experts = coefficient(machine, "expert_read_share", where)
    by_family = {
        "quant": 1.0,
        "float": coefficient(machine, "float_read_share", where),
        "iq": coefficient(machine, "iq_read_share", where),
    }
    return tuple((experts if is_expert else 1.0) * by_family[kind] for is_expert, kind in READ_CLASSES)


def boundary_us(machine: Machine) -> float:
    """Time of a split between two GPUs; where the machine does not say, that of any split."""
    kept = machine.coefficients.get("boundary_us")
    return kept.value if kept is not None else coefficient(machine, "split_us")


def cpu_kv_efficiency(machine: Machine) -> float:
    """Share of the host's bandwidth that a cache there is read at; where the machine does not say, as weights."""
    kept = machine.coefficients.get(f"kv_read_efficiency.{CPU}")
    return kept.value if kept is not None else coefficient(machine, "cpu_read_efficiency")


def cpu_threads(machine: Machine, settings: Settings) -> int:
    """The threads that the engine works with: its own choice is one a core."""
    return settings.n_threads or machine.cpu.threads


def are_threads_few(machine: Machine, threads: int) -> bool:
    """Whether fewer threads than cores read weights more slowly than the host's memory gives them."""
    together = threads * coefficient(machine, "cpu_thread_gb_per_s")
    at_most = machine.cpu.bandwidth_gb_per_s * coefficient(machine, "cpu_read_efficiency")
    return threads < machine.cpu.threads and together < at_most


def device_tflops(machine: Machine, device: Device) -> float:
    """The device's matrix throughput in 1e12 operations per second, guessed from its bandwidth if unknown."""
    return device.tflops or device.bandwidth_gb_per_s * coefficient(
        machine, "tflops_per_gb_per_s", device.name
    )


def rates(machine: Machine, devices: tuple[str, ...], settings: Settings) -> Rates:
    """Seconds per unit for the devices that the engine is given, in its order."""
    tables: list[dict[str, float]] = [{} for _ in range(5)]
    read, kv, dense, expert, attention = tables
    cpu_bandwidth = machine.cpu.bandwidth_gb_per_s * 1e9
    threads = cpu_threads(machine, settings)
    cpu_flops = threads * coefficient(machine, "cpu_tflops_per_thread") * 1e12
    read[CPU] = 1.0 / (cpu_bandwidth * coefficient(machine, "cpu_read_efficiency"))
    if are_threads_few(machine, threads):
        read[CPU] = 1.0 / (threads * coefficient(machine, "cpu_thread_gb_per_s") * 1e9)
    kv[CPU] = 1.0 / (cpu_bandwidth * cpu_kv_efficiency(machine))
    dense[CPU] = expert[CPU] = attention[CPU] = 1.0 / cpu_flops
    stream_device = None
    for name in devices:
        device = machine.device(name)
        bandwidth = device.bandwidth_gb_per_s * 1e9
        flops = device_tflops(machine, device) * 1e12
        read[name] = 1.0 / (bandwidth * coefficient(machine, "read_efficiency", name))
        kv[name] = 1.0 / (bandwidth * coefficient(machine, "kv_read_efficiency", name))
        dense[name] = 1.0 / (flops * coefficient(machine, "dense_compute_efficiency", name))
        expert[name] = 1.0 / (flops * coefficient(machine, "expert_compute_efficiency", name))
        attention[name] = 1.0 / (flops * coefficient(machine, "attention_compute_efficiency", name))
        if stream_device is None and device.is_cuda and settings.is_op_offloaded:
            stream_device = name
    stream = None
    if stream_device is not None:
        kind = "pinned" if settings.load_mode in PINNED_LOAD_MODES else "pageable"
        link = machine.device(stream_device).link_gb_per_s * 1e9
        stream = 1.0 / (link * coefficient(machine, f"{kind}_link_efficiency", stream_device))
    return Rates(
        read,
        {name: tuple(read[name] / share for share in class_shares(machine, name)) for name in read},
        {name: coefficient(machine, "layer_us", name) * 1e-6 for name in read},
        kv, dense, expert, attention, stream, stream_device,
        split_s=(coefficient(machine, "split_us") + threads * coefficient(machine, "thread_us")) * 1e-6,
        boundary_s=boundary_us(machine) * 1e-6,
        rpc_split_s=coefficient(machine, "rpc_split_us") * 1e-6,
        node_s=coefficient(machine, "node_us") * 1e-6,
        token_s=coefficient(machine, "token_us") * 1e-6,
    )  # fmt: skip


def decode_rates(rates: Rates, where: str) -> tuple[float, ...]:
    """Seconds per unit of a load's `decode_features` at a location."""
    return (*rates.class_s_per_byte[where], rates.kv_s_per_byte[where], rates.layer_s[where])


def prompt_rates(rates: Rates, where: str) -> tuple[float, ...]:
    """Seconds per unit of a load's `prompt_features`; what the host holds is streamed where the engine offloads."""
    stream_s = rates.stream_s_per_byte if where == CPU else None
    at = rates.stream_device if stream_s is not None and rates.stream_device else where
    return (
        rates.read_s_per_byte[at] + (stream_s or 0.0),
        rates.dense_s_per_flop[at],
        rates.expert_s_per_flop[at],
        rates.attention_s_per_flop[at],
        stream_s or 0.0,
    )


def ubatch_sizes(workload: Workload, settings: Settings, batch_tokens: int, ubatch_tokens: int) -> list[int]:
    """Tokens of each ubatch that the prompt is cut into: batches first, then ubatches of each."""
    sizes: list[int] = []
    left = workload.prompt_tokens
    while left > 0:
        batch = min(left, batch_tokens)
        left -= batch
        sizes += [ubatch_tokens] * (batch // ubatch_tokens)
        if batch % ubatch_tokens:
            sizes.append(batch % ubatch_tokens)
    return sizes


class CostModel:
    """The loads of a model's pieces under one workload and one ubatch, and what they take on a machine."""

    def __init__(self, problem: Problem, settings: Settings, devices: tuple[str, ...]) -> None:
        self.architecture: Architecture = describe(problem.model)
        self.workload = problem.workload
        size = context_size(problem.model, settings)
        self.ubatches = ubatch_sizes(problem.workload, settings, size.batch_tokens, size.ubatch_tokens)
        self.rates = rates(problem.machine, devices, settings)
        if max(self.ubatches, default=0) < MIN_OFFLOAD_TOKENS:
            self.rates = replace(self.rates, stream_s_per_byte=None, stream_device=None)
        half = coefficient(problem.machine, "compute_half_tokens")
        # small ubatches use the matrix units badly: each costs as much as `half` more tokens
        self.work_tokens = sum(tokens + half for tokens in self.ubatches)
        self.overlap = coefficient(problem.machine, "pipeline_overlap")
        self._problem, self._settings = problem, settings
        self._by_fraction: dict[float, float] = {}

    @functools.cached_property
    def _kv_read(self) -> tuple[int, ...]:
        return kv_bytes_read(self._problem.model, self._settings, self.workload.depth_tokens)

    def tensor_load(self, placed: PlacedTensor) -> Load:
        """The load of one tensor; a looked-up embedding reads next to nothing."""
        tensor = placed.tensor
        if placed.kind == "input":
            return Load()
        arch = self.architecture
        layer = placed.layer
        is_in_layer = layer is not None and layer < len(arch.layers)
        n_used = arch.layers[layer].n_expert_used if is_in_layer and layer is not None else 0
        fraction = used_fraction(tensor, arch.n_expert, n_used or arch.n_expert_used)
        n_elements = 1
        for extent in tensor.shape:
            n_elements *= extent
        is_expert = is_expert_stack(tensor)
        reads = _reads(tensor.n_bytes * fraction, is_expert, tensor.type)
        if placed.kind == "output" and len(tensor.shape) > 1:
            # only the last token's logits are computed
            return Load(reads, prompt_bytes=tensor.n_bytes)
        flops = 2.0 * n_elements * fraction * self.work_tokens if len(tensor.shape) > 1 else 0.0
        return Load(
            reads=reads,
            prompt_bytes=tensor.n_bytes * self._coverage(fraction),
            dense_flops=0.0 if is_expert else flops,
            expert_flops=flops if is_expert else 0.0,
        )

    def _coverage(self, fraction: float) -> float:
        """Σ over the prompt's ubatches of the share of a stack that their tokens reach."""
        if fraction >= 1.0:
            return float(len(self.ubatches))
        if fraction not in self._by_fraction:
            self._by_fraction[fraction] = sum(1.0 - (1.0 - fraction) ** tokens for tokens in self.ubatches)
        return self._by_fraction[fraction]

    def context_load(self, layer: LayerFacts) -> Load:
        """The load of a layer's attention over its cache, or of its recurrent state."""
        kv_bytes = float(self._kv_read[layer.index])
        depth = self.workload.depth_tokens
        done, flops, copied = 0, 0.0, 0.0
        owner = self.architecture.layers[layer.cache_layer] if layer.cache_layer is not None else layer
        heads = sum(
            layer.n_head * 2.0 * ((c.k_head or c.k_width) + (c.v_head or c.v_width or c.k_width))
            for c in owner.caches[:1]
        )
        for tokens in self.ubatches:
            n_kv = depth + done + tokens / 2
            if layer.window_tokens:
                n_kv = min(n_kv, layer.window_tokens)
            flops += heads * tokens * n_kv
            copied += kv_bytes
            done += tokens
        return Load(decode_kv_bytes=kv_bytes, attention_flops=flops, prompt_kv_bytes=copied, n_layers=1.0)

    def decode_s(self, load: Load, where: str) -> float:
        """Seconds per generated token of a load held by a device or the CPU."""
        return _product(load.decode_features, decode_rates(self.rates, where))

    def prompt_s(self, load: Load, where: str) -> float:
        """Seconds of a load over the whole prompt; host-held weights stream where the engine offloads."""
        return _product(load.prompt_features, prompt_rates(self.rates, where))

    def fixed_s(self, n_nodes_decode: int, n_nodes_prompt: int) -> tuple[float, float]:
        """(decode, prompt) seconds that every placement takes: launches, and the token's fixed time."""
        launches = self.rates.node_s * n_nodes_prompt * len(self.ubatches)
        return self.rates.node_s * n_nodes_decode + self.rates.token_s, launches

    def splits_s(self, n_decode: float, n_prompt: float, n_between: float = 0.0) -> tuple[float, float]:
        """(decode, prompt) seconds of that many splits per graph, `n_between` of decode's between GPUs."""
        r = self.rates
        decode_s = r.split_s * (n_decode - n_between) + r.boundary_s * n_between
        return decode_s, r.split_s * n_prompt * len(self.ubatches)

    def rpc_s(self, n_crossings: float) -> tuple[float, float]:
        """(decode, prompt) seconds of going to a worker and back that many times per graph."""
        seconds = 2 * n_crossings * self.rates.rpc_split_s
        return seconds, seconds * len(self.ubatches)


def _product(features: tuple[float, ...], rates: tuple[float, ...]) -> float:
    return sum(amount * rate for amount, rate in zip(features, rates, strict=True))


def _reads(n_bytes: float, is_expert: bool, ggml_type: str) -> tuple[float, ...]:
    at = READ_CLASSES.index((is_expert, family(ggml_type)))
    return (*NO_READS[:at], n_bytes, *NO_READS[at + 1 :])


def total(loads: Iterable[Load]) -> Load:
    """The loads as one."""
    result = Load()
    for load in loads:
        result = result + load
    return result


@dataclass(frozen=True, slots=True)
class GraphCounts:
    """Splits and nodes of the prompt's and the decode's graph, from the simulated or the engine's plan."""

    splits_prompt: int
    splits_decode: int
    n_nodes_prompt: int
    n_nodes_decode: int
    n_copies: int = 1


def graph_counts(plan: ComputePlan) -> GraphCounts:
    """What the speed model needs of a plan."""
    return GraphCounts(
        plan.splits_prompt, plan.splits_decode, plan.n_nodes_prompt, plan.n_nodes_decode, plan.n_copies
    )


def evaluate(problem: Problem, assignment: Assignment, counts: GraphCounts) -> Speed:
    """Predicted speed of any assignment, whoever wrote it."""
    from placement.memory import placed_tensors

    settings, workload = assignment.settings, problem.workload
    model = CostModel(problem, settings, assignment.devices)
    stages = dict.fromkeys((*assignment.devices, CPU), 0.0)
    decode_s, _ = model.fixed_s(counts.n_nodes_decode, 0)
    _, prompt_fixed_s = model.fixed_s(0, counts.n_nodes_prompt)
    for placed, where in placed_tensors(problem.model, problem.machine, assignment):
        load = model.tensor_load(placed)
        decode_s += model.decode_s(load, where)
        stages[where] += model.prompt_s(load, where)
    for layer, home in zip(model.architecture.layers, assignment.homes, strict=False):
        load = model.context_load(layer)
        decode_s += model.decode_s(load, home if settings.is_kv_offloaded else CPU)
        stages[home] += model.prompt_s(load, home)
    crossings = count_crossings(problem, assignment, counts.splits_decode)
    splits_decode_s, splits_prompt_s = model.splits_s(
        counts.splits_decode, counts.splits_prompt, crossings.n_between
    )
    rpc_decode_s, rpc_prompt_s = model.rpc_s(crossings.n_rpc)
    prompt_s = (
        prompt_fixed_s
        + splits_prompt_s
        + rpc_prompt_s
        + pipelined_s(stages.values(), len(model.ubatches), counts.n_copies, model.overlap)
    )
    return Speed(
        decode_s + splits_decode_s + rpc_decode_s, prompt_s, workload.generate_tokens, workload.prompt_tokens
    )


def pipelined_s(stages: Iterable[float], n_ubatches: int, n_copies: int, overlap: float) -> float:
    """Prompt seconds of stages in series, or overlapped where the engine keeps several ubatches in flight."""
    times = list(stages)
    serial = sum(times)
    if n_copies <= 1 or n_ubatches <= 1:
        return serial
    ideal = (serial + (n_ubatches - 1) * max(times)) / n_ubatches
    return serial + overlap * (ideal - serial)
