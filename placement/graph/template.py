"""Graphs kept by what their layers are made of, so that another placement need not build them again."""

from __future__ import annotations

from collections.abc import Hashable, Sequence

from placement.architecture import Architecture
from placement.graph.context import Batch, Context
from placement.graph.decoder import Decoder
from placement.graph.flat import FlatGraph
from placement.graph.row import Row
from placement.graph.tensor import Tensor
from placement.model import Model

MAX_KEPT = 24


class Template:
    """One built graph; other layers of the same make may take the places of `layers`."""

    def __init__(self, graph: Decoder, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.layer_starts, self.leaf_starts = graph.layer_starts, graph.leaf_starts
        self.leafs: list[Tensor] = graph.leafs
        self.n_nodes = len(graph.nodes)
        self.flat = FlatGraph(graph)
        self.fused_nodes = [(op, node.index, il) for op, node, il in graph.fused_nodes]
        self.cpu_nodes = [node.index for node in graph.nodes if node.kind == "cpu"]
        self.pins = [(node.index, node.pin) for node in graph.nodes if node.pin is not None]


class Templates:
    """The graphs of one model that were asked for lately."""

    def __init__(self, model: Model, facts: Architecture, row: Row) -> None:
        self.model, self.facts, self.row = model, facts, row
        self.kept: dict[Hashable, Template] = {}

    def decoder(self, context: Context, batch: Batch) -> Decoder:
        """A builder for one batch."""
        return Decoder(self.model, self.facts, self.row, context, batch)

    def get(
        self,
        context: Context,
        batch: Batch,
        layers: Sequence[int],
        makes: Sequence[Hashable],
        homes: Sequence[int],
    ) -> Template:
        """The graph of those layers; `makes` says of each what it is made of, `homes` where it is."""
        shared = self._sharing(layers, homes) if self.row.has_rope_factors else ()
        key = (context, batch, tuple(makes), shared)
        found = self.kept.pop(key, None)
        if found is None:
            graph = self.decoder(context, batch)
            graph.homes = homes
            graph.build(layers)
            found = Template(graph, layers)
            if len(self.kept) >= MAX_KEPT:
                del self.kept[next(iter(self.kept))]
        self.kept[key] = found
        return found

    def _sharing(self, layers: Sequence[int], homes: Sequence[int]) -> tuple[int, ...]:
        """Which layers are on the same device, whichever it is."""
        numbers: dict[int, int] = {}
        return tuple(numbers.setdefault(homes[il], len(numbers)) for il in layers)


def templates(model: Model, facts: Architecture, row: Row) -> Templates:
    """The kept graphs of a model; they live as long as the model object."""
    kept: Templates | None = model.__dict__.get("_templates")
    if kept is None:
        kept = model.__dict__["_templates"] = Templates(model, facts, row)
    return kept
