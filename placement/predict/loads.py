"""A model's pieces → what each asks of whatever holds it, under one workload and one ubatch: a `Load`.

No machine has a part in it: what a load takes there is `cost`'s.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable
from dataclasses import dataclass, fields
from operator import attrgetter

from placement.inputs.groups import is_expert_stack, used_fraction
from placement.inputs.problem import Problem, Settings, Workload
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.architecture.records import Architecture, LayerFacts, PlacedTensor
from placement.llamacpp.backend_rules import MIN_OFFLOAD_TOKENS
from placement.llamacpp.memory import context_size, kv_bytes_read


@dataclass(frozen=True, slots=True)
class Load:
    """Amounts of all quantities that the speed model's terms multiply; a prompt's are of all its ubatches together."""

    dense_quant_bytes: float = 0.0  # of weights that are read per generated token, by class
    dense_float_bytes: float = 0.0
    dense_iq_bytes: float = 0.0
    expert_quant_bytes: float = 0.0
    expert_float_bytes: float = 0.0
    expert_iq_bytes: float = 0.0
    kv_bytes: float = 0.0  # of cache and state, read per generated token
    n_layers: float = 0.0
    prompt_bytes: float = 0.0  # of weights, read once per ubatch
    prompt_kv_bytes: float = 0.0  # copied per ubatch when the layer lives on the CPU
    dense_flops: float = 0.0
    dense_flops_per_token: float = 0.0  # of one token in each ubatch
    expert_flops: float = 0.0
    expert_flops_per_token: float = 0.0
    attention_flops: float = 0.0
    n_splits: float = 0.0  # of the graphs: to or from the host while decoding, all in a prompt
    n_boundaries: float = 0.0  # splits between two GPUs while decoding
    n_nodes: float = 0.0
    n_graphs: float = 0.0  # one for a token, one for each ubatch of a prompt
    n_rpc_calls: float = 0.0  # there and back are two

    @property
    def amounts(self) -> tuple[float, ...]:
        """In the order of QUANTITIES."""
        result: tuple[float, ...] = _AMOUNTS(self)
        return result


QUANTITIES = tuple(field.name for field in fields(Load))
_AMOUNTS = attrgetter(*QUANTITIES)


def total(loads: Iterable[Load]) -> Load:
    """The loads as one."""
    return Load(*map(sum, zip(*map(_AMOUNTS, loads), strict=True)))


def family(ggml_type: str) -> str:
    """The quantisation family of a ggml type: what its dequantisation costs is alike."""
    if ggml_type in ("F32", "F16", "BF16", "F64"):
        return "float"
    return "iq" if ggml_type.startswith(("IQ", "TQ")) else "quant"


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


class Work:
    """The loads of a problem's model; of the settings neither the load mode nor the threads matter."""

    def __init__(self, problem: Problem, settings: Settings) -> None:
        self.problem, self.settings = problem, settings
        self.architecture: Architecture = describe(problem.model)
        size = context_size(problem.model, settings)
        self.ubatches = ubatch_sizes(problem.workload, settings, size.batch_tokens, size.ubatch_tokens)
        self._by_fraction: dict[float, float] = {}

    @property
    def is_offloaded(self) -> bool:
        """Whether an ubatch is large enough for the engine to compute on a GPU what the host holds."""
        return max(self.ubatches, default=0) >= MIN_OFFLOAD_TOKENS

    @functools.cached_property
    def _n_tokens(self) -> float:
        return float(sum(self.ubatches))

    @functools.cached_property
    def _kv_read(self) -> tuple[int, ...]:
        return kv_bytes_read(self.problem.model, self.settings, self.problem.workload.depth_tokens)

    def tensor(self, placed: PlacedTensor) -> Load:
        """The load of one tensor; a looked-up embedding reads next to nothing."""
        tensor = placed.tensor
        if placed.kind == "input":
            return Load()
        arch, layer = self.architecture, placed.layer
        is_in_layer = layer is not None and layer < len(arch.layers)
        n_used = arch.layers[layer].n_expert_used if is_in_layer and layer is not None else 0
        fraction = used_fraction(tensor, arch.n_expert, n_used or arch.n_expert_used)
        part = "expert" if is_expert_stack(tensor) else "dense"
        amounts = {f"{part}_{family(tensor.type)}_bytes": tensor.n_bytes * fraction}
        if placed.kind == "output" and len(tensor.shape) > 1:
            # only the last token's logits are computed
            return Load(**amounts, prompt_bytes=tensor.n_bytes)
        if len(tensor.shape) > 1:
            flops = 2.0 * math.prod(tensor.shape) * fraction
            amounts[f"{part}_flops"] = flops * self._n_tokens
            amounts[f"{part}_flops_per_token"] = flops * len(self.ubatches)
        return Load(**amounts, prompt_bytes=tensor.n_bytes * self._coverage(fraction))

    def _coverage(self, fraction: float) -> float:
        """Σ over the prompt's ubatches of the share of a stack that their tokens reach."""
        if fraction >= 1.0:
            return float(len(self.ubatches))
        if fraction not in self._by_fraction:
            self._by_fraction[fraction] = sum(1.0 - (1.0 - fraction) ** tokens for tokens in self.ubatches)
        return self._by_fraction[fraction]

    def context(self, layer: LayerFacts) -> Load:
        """The load of a layer's attention over its cache, or of its recurrent state."""
        kv_bytes = float(self._kv_read[layer.index])
        depth = self.problem.workload.depth_tokens
        done, flops = 0, 0.0
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
            done += tokens
        copied = kv_bytes * len(self.ubatches)
        return Load(kv_bytes=kv_bytes, n_layers=1.0, prompt_kv_bytes=copied, attention_flops=flops)
