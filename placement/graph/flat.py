"""A finished graph as parallel lists of integers, which is what the scheduler and the allocator loop over."""

from __future__ import annotations

from collections.abc import Callable

from placement.graph.ops import Graph
from placement.graph.tensor import Tensor

VIEW_OPS = frozenset({"VIEW", "RESHAPE", "PERMUTE", "TRANSPOSE"})
NO_BUFFER = -1


class FlatGraph:
    """Tensors by index, leafs first, then nodes in order; copies made by the scheduler follow.

    `buffer` is the backend whose buffer holds the tensor already (weights, caches), else NO_BUFFER; `root`
    the tensor that a view shares memory with, else -1; `held` the buffer of the root or of the tensor itself.
    """

    def __init__(self, graph: Graph, place: Callable[[Tensor], int]) -> None:
        tensors = [*graph.leafs, *graph.nodes]
        for i, tensor in enumerate(tensors):
            tensor.index = i
        self.tensors = tensors
        self.n_leafs = len(graph.leafs)
        self.n_tensors = len(tensors)
        self.src = [[source.index for source in tensor.src] for tensor in tensors]
        self.root = [-1 if tensor.root is None else tensor.root.index for tensor in tensors]
        self.buffer = [place(leaf) for leaf in graph.leafs] + [NO_BUFFER] * len(graph.nodes)
        self.is_weight = [leaf.weight is not None for leaf in graph.leafs] + [False] * len(graph.nodes)
        buffer, root = self.buffer, self.root
        self.held = [buffer[r] if r >= 0 else buffer[i] for i, r in enumerate(root)]
        self.is_output = [tensor.is_output for tensor in tensors]
        self.is_view_op = [tensor.op in VIEW_OPS for tensor in tensors]
        n_uses = [0] * len(tensors)
        for sources in self.src:
            for source in sources:
                n_uses[source] += 1
        self.n_uses = n_uses
