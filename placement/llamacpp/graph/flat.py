"""A finished graph as parallel lists of integers, which is what the scheduler and the allocator loop over."""

from __future__ import annotations

import copy
from collections.abc import Callable

from placement.llamacpp.graph.ops import Graph
from placement.llamacpp.graph.tensor import GraphTensor

VIEW_OPS = frozenset({"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
NO_BUFFER = -1


class FlatGraph:
    """Tensors by index, leafs first, then nodes in order; copies made by the scheduler follow.

    `buffer` is the backend whose buffer holds the tensor already (weights, caches), else NO_BUFFER; `root`
    the tensor that a view shares memory with, else -1; `held` the buffer of the root or of the tensor itself.
    `cuda_support` and `n_bytes` are filled as they become known and shared by all placements of a graph.
    """

    def __init__(self, graph: Graph) -> None:
        tensors = [*graph.leafs, *graph.nodes]
        for i, tensor in enumerate(tensors):
            tensor.index = i
        n = len(tensors)
        self.tensors = tensors
        self.n_leafs = len(graph.leafs)
        self.n_tensors = n
        self.src = [tuple([source.index for source in tensor.src]) for tensor in tensors]
        self.root = [-1 if tensor.root is None else tensor.root.index for tensor in tensors]
        self.buffer = [NO_BUFFER] * n
        self.held = self.buffer
        self.is_weight = [leaf.weight is not None for leaf in graph.leafs] + [False] * len(graph.nodes)
        self.is_output = [tensor.is_output for tensor in tensors]
        self.real_nodes = [i for i in range(self.n_leafs, n) if tensors[i].op not in VIEW_OPS]
        self.cuda_support: list[bool | None] = [None] * n
        self.n_bytes: dict[tuple[int, str], int] = {}  # by tensor and buffer type
        n_uses = [0] * n
        for sources in self.src:
            for source in sources:
                n_uses[source] += 1
        self.n_uses = n_uses

    def placed(self, place: Callable[[GraphTensor], int]) -> FlatGraph:
        """The same graph with each leaf where `place` says."""
        placed = copy.copy(self)
        leafs = self.tensors[: self.n_leafs]
        buffer = [place(leaf) for leaf in leafs] + [NO_BUFFER] * (self.n_tensors - self.n_leafs)
        placed.buffer = buffer
        placed.held = [buffer[r] if r >= 0 else buffer[i] for i, r in enumerate(self.root)]
        return placed
