"""Groups of tensors that move as one, and how much of each a token uses.

A layer's experts are two groups: gate and up together (a layer's gate and up on different devices cost extra
splits), and down. A dense feed-forward network is one group. Everything else of a layer stays at its home.
"""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass

from placement.inputs.model import Model, Tensor

EXPERTS_UP = "gate_up"
EXPERTS_DOWN = "down"
DENSE_FFN = "ffn"

_MOVABLE = (
    (EXPERTS_UP, re.compile(r"blk\.\d+\.ffn_(?:gate|up|gate_up)_(?:ch)?exps\.")),
    (EXPERTS_DOWN, re.compile(r"blk\.\d+\.ffn_down_(?:ch)?exps\.")),
    (DENSE_FFN, re.compile(r"blk\.\d+\.ffn_(?:gate|up|down)\.")),
)


@dataclass(frozen=True, slots=True)
class Group:
    """Tensors of one layer that live on one device; `kind` is gate_up, down or ffn."""

    layer: int
    kind: str
    tensors: tuple[Tensor, ...]


@functools.lru_cache(maxsize=8)
def _groups_of(tensors: tuple[Tensor, ...], n_layers: int) -> tuple[tuple[Group, ...], ...]:
    results: list[dict[str, list[Tensor]]] = [{} for _ in range(n_layers)]
    for tensor in tensors:
        layer = tensor.layer
        if layer is None or layer >= n_layers:
            continue
        for kind, pattern in _MOVABLE:
            if pattern.match(tensor.name):
                results[layer].setdefault(kind, []).append(tensor)
                break
    return tuple(
        tuple(
            Group(layer, kind, tuple(members))
            for kind, members in kinds.items()
            # a layer with experts keeps its few dense feed-forward tensors (a shared path) at home
            if not (kind == DENSE_FFN and EXPERTS_DOWN in kinds)
        )
        for layer, kinds in enumerate(results)
    )


def movable_groups(model: Model, n_layers: int) -> tuple[tuple[Group, ...], ...]:
    """Per layer (block_count entries), the groups that an override may move off their layer's home."""
    return _groups_of(model.tensors, n_layers)


def is_expert_stack(tensor: Tensor) -> bool:
    """Whether the tensor stacks one slice per routed expert."""
    return "_exps." in tensor.name or "_chexps." in tensor.name


def used_fraction(tensor: Tensor, n_experts: int, n_experts_used: int, n_tokens: int = 1) -> float:
    """Share of the tensor's bytes that `n_tokens` read: expected distinct experts for stacks, else all."""
    if not is_expert_stack(tensor) or n_experts <= 0:
        return 1.0
    if n_tokens == 1:
        return n_experts_used / n_experts
    return 1.0 - (1.0 - n_experts_used / n_experts) ** n_tokens
