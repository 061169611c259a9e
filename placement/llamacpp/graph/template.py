"""Graphs kept by what their layers are made of, so that another placement need not build them again."""

from __future__ import annotations

import functools
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

from placement.inputs.model import Model
from placement.llamacpp.architecture.records import Architecture
from placement.llamacpp.graph.builder import Builder
from placement.llamacpp.graph.context import Batch, Context
from placement.llamacpp.graph.decoder import build, layer_traits
from placement.llamacpp.graph.flat import FlatGraph
from placement.llamacpp.graph.row import ArchitectureRow
from placement.llamacpp.graph.runs import layer_shapes
from placement.llamacpp.graph.tensor import GraphTensor

MAX_KEPT_GRAPHS = 24  # of a model
MAX_KEPT_MODELS = 8


class Template:
    """One built graph; other layers of the same make may take the places of `layers`."""

    def __init__(self, graph: Builder, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        self.layer_starts, self.leaf_starts = graph.layer_starts, graph.leaf_starts
        self.leafs: list[GraphTensor] = graph.leafs
        self.n_nodes = len(graph.nodes)
        self.flat = FlatGraph(graph)
        self.fused_nodes = [(op, node.index, il) for op, node, il in graph.fused_nodes]
        self.cpu_nodes = [node.index for node in graph.nodes if node.kind == "cpu"]
        self.pins = [(node.index, node.pin) for node in graph.nodes if node.pin is not None]


class ModelGraphs:
    """The graphs of one model that were asked for lately."""

    def __init__(self, model: Model, facts: Architecture, row: ArchitectureRow) -> None:
        self.model, self.facts, self.row = model, facts, row
        self.shapes = layer_shapes(facts)
        self.kept: dict[Hashable, Template] = {}

    def _builder(self, context: Context, batch: Batch) -> Builder:
        return Builder(self.model, self.facts, self.row, context, batch)

    def makes(self, context: Context, batch: Batch) -> list[Hashable]:
        """What decides each layer's part of the graph of one batch."""
        builder, last = self._builder(context, batch), self.facts.n_layer - 1
        return [(shape, layer_traits(builder, il), il == last) for il, shape in enumerate(self.shapes)]

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
        result = self.kept.pop(key, None)
        if result is None:
            builder = self._builder(context, batch)
            builder.homes = homes
            build(builder, layers)
            result = Template(builder, layers)
            if len(self.kept) >= MAX_KEPT_GRAPHS:
                del self.kept[next(iter(self.kept))]
        self.kept[key] = result
        return result

    def _sharing(self, layers: Sequence[int], homes: Sequence[int]) -> tuple[int, ...]:
        """Which layers are on the same device, whichever it is."""
        numbers: dict[int, int] = {}
        return tuple(numbers.setdefault(homes[il], len(numbers)) for il in layers)


@dataclass(frozen=True, slots=True)
class _ModelKey:
    """A model by what its graphs depend on."""

    digest: str
    row: ArchitectureRow
    model: Model = field(compare=False)
    facts: Architecture = field(compare=False)


def model_graphs(model: Model, facts: Architecture, row: ArchitectureRow) -> ModelGraphs:
    """The kept graphs of a model; those of the models that were asked for last are kept."""
    return _model_graphs(_ModelKey(model.digest, row, model, facts))


@functools.lru_cache(maxsize=MAX_KEPT_MODELS)
def _model_graphs(key: _ModelKey) -> ModelGraphs:
    return ModelGraphs(key.model, key.facts, key.row)
