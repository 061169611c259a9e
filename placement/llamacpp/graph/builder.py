"""llm_graph_context and the model in Python: one graph in the making, which every block function takes.

Mirrors src/llama-graph.cpp (build_norm, build_lora_mm, the inputs) and src/llama-kv-cache.cpp (cpy_k, get_k, ...).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from placement.inputs.model import Model
from placement.llamacpp.architecture.records import Architecture, Cache, LayerFacts
from placement.llamacpp.graph.context import Batch, Context
from placement.llamacpp.graph.ops import Graph
from placement.llamacpp.graph.row import ArchitectureRow, NormKind, Switch
from placement.llamacpp.graph.tensor import GraphTensor, row_size


class UnknownGraph(Exception):
    """No rule says how the model's graph is built; what follows is an estimate."""


@dataclass(slots=True)
class SharedTensors:
    """What a block leaves for later blocks of the same graph; those without a default are set before any is read."""

    skip: GraphTensor = field(init=False)  # the embeddings
    layer_input: GraphTensor = field(init=False)  # what the layer's first norm reads
    states: tuple[GraphTensor, GraphTensor] = field(init=False)  # HRM's high and low state
    ngrams: GraphTensor = field(init=False)  # embeddings of the batch's n-grams (Qwen 4)
    token_input: GraphTensor | None = None  # input embeddings of which layers add parts (deepstack)
    router_logits: GraphTensor | None = None  # of a router that reads the layer's input
    top_k: GraphTensor | None = None  # what the last indexer chose; layers without one use it again
    selection: GraphTensor | None = None  # what the last pooled indexer left visible; used again likewise
    checkpoints: GraphTensor | None = None  # the stack of residuals (Kimi K3)
    per_layer: GraphTensor | None = None  # embeddings per layer, [width, tokens, layers] (Gemma)


class Builder(Graph):
    """A graph for one batch of one model: ggml's operations, the model's tensors, inputs and caches."""

    def __init__(
        self, model: Model, facts: Architecture, row: ArchitectureRow, context: Context, batch: Batch
    ) -> None:
        super().__init__()
        self.model, self.facts, self.row, self.context, self.batch = model, facts, row, context, batch
        self.n_embd = facts.n_embd
        self.n_tokens = batch.n_tokens
        self.weights: dict[str, GraphTensor] = {}
        self.inputs: dict[str, GraphTensor] = {}
        self.shared = SharedTensors()
        self.fused_nodes: list[tuple[str, GraphTensor, int]] = []  # operation, node, layer: what is probed
        self.homes: Sequence[int] = ()  # of layers, as far as leafs are shared between them
        self.rotation_sizes: dict[tuple[str, str], int] = {}  # of quantised caches, see `cache_rotation`
        self.slot = 0  # the layer that is being built
        self.layer_starts: list[int] = []  # where in `nodes` each layer begins, and the end after the last
        self.leaf_starts: list[int] = []  # and where in `leafs`

    # --- facts

    def layer(self, il: int) -> LayerFacts:
        """The facts of layer `il`."""
        return self.facts.layers[il]

    def number(self, key: str, default: float = 0.0) -> float:
        """A scalar of the architecture's metadata; the first of an array."""
        value: Any = self.model.get(key, default)
        if isinstance(value, (tuple, list)):
            value = value[0] if value else default
        return float(value)

    def integer(self, key: str, default: int = 0) -> int:
        """A whole number of the architecture's metadata; the first of an array."""
        return int(self.number(key, default))

    def is_on(self, feature: Switch | None, key: str) -> bool:
        """Whether a feature holds: "always", or "meta" and its metadata key is set."""
        return feature == "always" or (feature == "meta" and self.number(key) != 0.0)

    @property
    def n_seq_tokens(self) -> int:
        """Tokens of each sequence in the batch."""
        return self.n_tokens // self.batch.n_seqs

    @functools.cached_property
    def has_windows(self) -> bool:
        """Whether any layer's attention has a sliding window."""
        return any(layer.window_tokens is not None for layer in self.facts.layers)

    @functools.cached_property
    def is_hybrid_windowed(self) -> bool:
        """Whether windows and recurrent states are combined."""
        return self.has_windows and any(layer.is_recurrent for layer in self.facts.layers)

    def head_sizes(self, il: int) -> tuple[int, int]:
        """n_embd_head_k and n_embd_head_v of the layer."""
        owner = self.layer(il).cache_layer
        caches = self.layer(il if owner is None else owner).caches
        if caches:
            return caches[0].k_head, caches[0].v_head
        n_head = self.layer(il).n_head
        default = self.n_embd // n_head if n_head else 0
        return self.integer("attention.key_length", default), self.integer("attention.value_length", default)

    def block_of(self, il: int) -> int:
        """The block whose weights layer `il` uses: its own, unless layers share theirs.

        HRM's layers are passes over two stacks of blocks, the low one first; Nanbeige's over all blocks.
        """
        if self.row.structure == "loops":
            return il % self.integer("block_count")
        if self.row.structure != "cycles":
            return il
        n_layer, n_stacks = self.cycle
        is_high = il // n_layer % n_stacks == n_stacks - 1
        return il % n_layer + (n_layer if is_high else 0)

    @property
    def cycle(self) -> tuple[int, int]:
        """HRM's layers of a stack, and stacks of a cycle."""
        return self.integer("hrm.layers_per_stack", 1), self.integer("hrm.l_cycles") + 1

    # --- weights

    def weight(self, name: str, layer: int | None = None, key: str | None = None) -> GraphTensor | None:
        """The leaf of a model tensor, or None where the model has none of that name."""
        key = key or name
        leaf = self.weights.get(key)
        if leaf is None:
            tensor = self.model.by_name.get(name)
            if tensor is None:
                return None
            leaf = self.new(tensor.type, *tensor.shape)
            leaf.weight, leaf.layer = key, layer
            self.weights[key] = leaf
        return leaf

    def w(self, il: int, name: str) -> GraphTensor | None:
        """The weight `blk.<il>.<name>.weight`; a few files have it without the last part."""
        il = self.block_of(il)
        result = self.weight(f"blk.{il}.{name}.weight", il)
        return result if result is not None else self.weight(f"blk.{il}.{name}", il)

    def b(self, il: int, name: str) -> GraphTensor | None:
        """The bias `blk.<il>.<name>.bias`."""
        il = self.block_of(il)
        return self.weight(f"blk.{il}.{name}.bias", il)

    def bare(self, il: int, name: str) -> GraphTensor:
        """The tensor `blk.<il>.<name>`, which has no further part in its name."""
        return self.need(self.weight(f"blk.{il}.{name}", il))

    def need(self, tensor: GraphTensor | None) -> GraphTensor:
        """The tensor itself; a model without it would not load."""
        if tensor is None:
            raise UnknownGraph("a tensor that this architecture has elsewhere")
        return tensor

    def rope_factors(self, il: int) -> GraphTensor | None:
        """The layer's copy of the rope factors for the context in use (get_rope_factors)."""
        if not self.row.has_rope_factors or (
            self.row.is_window_unfactored and self.layer(il).window_tokens is not None
        ):
            return None
        il = self.block_of(il)
        home = self.homes[il] if self.homes else 0
        original = self.integer("rope.scaling.original_context_length", self.facts.n_ctx_train)
        kind = "long" if self.context.n_ctx_seq > original else "short"
        for name in ("rope_freqs.weight", f"rope_factors_{kind}.weight"):
            if (leaf := self.weight(name, il, key=f"{name}@{home}")) is not None:
                return leaf
        return None

    def output_weight(self) -> GraphTensor:
        """output.weight, or the copy of the token embedding in its place; BitNet has no copy."""
        own = self.weight("output.weight")
        if own is not None:
            return own
        key = "output.weight" if self.facts.is_output_tied else None
        return self.need(self.weight("token_embd.weight", key=key))

    # --- inputs

    def input_once(self, name: str, type: str, *ne: int) -> GraphTensor:
        """The graph input of that name, made at its first use."""
        if name not in self.inputs:
            self.inputs[name] = self.input(type, *ne)
        return self.inputs[name]

    @functools.cached_property
    def positions(self) -> GraphTensor:
        """inp_pos; four numbers a token where the architecture ropes in several dimensions."""
        n_per_token = self.row.n_pos_per_token
        if not n_per_token:
            sections = self.model.get("rope.dimension_sections", ())
            n_per_token = 4 if isinstance(sections, (tuple, list)) and any(sections[:2]) else 1
        return self.input_once("pos", "I32", self.n_tokens * n_per_token)

    def rows_out(self, *tensors: GraphTensor) -> list[GraphTensor]:
        """The rows of the tokens that give logits."""
        ids = self.input_once("out_ids", "I32", self.batch.n_outputs)
        return [self.get_rows(tensor, ids) for tensor in tensors]

    def cells(self, il: int) -> int:
        """Cells per stream of the cache that layer `il` reads."""
        window = self.layer(il).window_tokens
        return self.context.n_ctx_seq if window is None else self.context.swa_cells(window)

    def cache_group(self, il: int) -> str:
        """Which of the two caches of a sliding-window model the layer uses."""
        return "swa" if self.layer(il).window_tokens is not None else "full"

    def mask(self, il: int, name: str = "mask") -> GraphTensor:
        """The attention mask of the layer's cache: f16 for flash attention, else f32."""
        n_stream = self.context.n_stream
        type = "F16" if self.context.is_flash else "F32"
        shape = (self.cells(il), self.n_tokens // n_stream, 1, n_stream)
        return self.input_once(f"{name}.{self.cache_group(il)}", type, *shape)

    def k_ids(self, il: int) -> GraphTensor:
        """Where in the cache the batch's K rows go."""
        return self.input_once(f"k_ids.{self.cache_group(il)}", "I64", self.n_tokens)

    def v_ids(self, il: int) -> GraphTensor:
        """Where the batch's V rows go; one index per element of a transposed cache."""
        width = self.facts.v_width_max if self.context.is_v_transposed else 1
        return self.input_once(f"v_ids.{self.cache_group(il)}", "I64", self.n_tokens * width)

    # --- caches and states

    def cache(self, il: int, which: str, width: int, cells: int | None = None) -> GraphTensor:
        """The K or V cache of layer `il`: [width, cells, streams] on the layer's home."""
        key = f"cache_{which}.{il}"
        if key not in self.inputs:
            type = self.context.type_v if which == "v" else self.context.type_k
            leaf = self.new(type, width, cells or self.cells(il), self.context.n_stream)
            leaf.cache_layer = il
            self.inputs[key] = leaf
        return self.inputs[key]

    def indexer_cache(self, il: int) -> Cache | None:
        """The cache of the layer's indexer keys; None where it has no indexer."""
        return next((cache for cache in self.layer(il).caches if cache.is_indexer), None)

    def index_cache(self, il: int, width: int) -> GraphTensor:
        """The layer's indexer keys: [width, cells, streams]."""
        key = f"cache_index.{il}"
        if key not in self.inputs:
            leaf = self.new(self.context.type_k, width, self.cells(il), self.context.n_stream)
            leaf.cache_layer = il
            self.inputs[key] = leaf
        return self.inputs[key]

    def state(self, il: int, which: str) -> GraphTensor:
        """The r, s or (n-grams') p state of layer `il`: one row per sequence."""
        key = f"state_{which}.{il}"
        if key not in self.inputs:
            facts = self.layer(il)
            width = {"r": facts.state_r, "s": facts.state_s, "p": facts.state_extra}[which]
            leaf = self.new("F32", width, self.context.n_seq_max)
            leaf.cache_layer = il
            self.inputs[key] = leaf
        return self.inputs[key]

    def _all_streams(self, cache: GraphTensor) -> GraphTensor:
        if cache.ne[2] == 1:
            return cache
        return self.reshape(cache, cache.ne[0], cache.ne[1] * cache.ne[2])

    def store_k(self, cache: GraphTensor, k: GraphTensor, ids: GraphTensor) -> GraphTensor:
        """Write the batch's K rows into the cache (cpy_k)."""
        rows = self.view_2d(k, k.ne[0] * k.ne[1], k.ne[2], k.nb[2])
        return self.set_rows(self._all_streams(cache), rows, ids)

    def store_v(self, cache: GraphTensor, v: GraphTensor, ids: GraphTensor) -> GraphTensor:
        """Write the batch's V rows into the cache, element by element if it is transposed (cpy_v)."""
        width, n_tokens = v.ne[0] * v.ne[1], v.ne[2]
        if not self.context.is_v_transposed:
            rows = self.view_2d(v, width, n_tokens, v.nb[2])
            return self.set_rows(self._all_streams(cache), rows, ids)
        is_dense = row_size(v.type, width) == v.nb[2]
        rows = self.reshape(v, width, n_tokens) if is_dense else self.cont(v, width, n_tokens)
        if width < cache.ne[0]:
            rows = self.pad(rows, cache.ne[0] - width)
        target = self.reshape(cache, 1, cache.n_elements)
        return self.set_rows(target, self.reshape(rows, 1, rows.n_elements), ids)

    def read_k(self, cache: GraphTensor, head: int, n_head: int) -> GraphTensor:
        """The cache's K as [head size, heads, cells, streams] (get_k)."""
        row, cells = row_size(cache.type, cache.ne[0]), cache.ne[1]
        shape = (head, n_head, cells, cache.ne[2])
        return self.view(cache, shape, (row_size(cache.type, head), row, row * cells))

    def read_v(self, cache: GraphTensor, head: int, n_head: int) -> GraphTensor:
        """The cache's V, rows and columns swapped if it is transposed (get_v)."""
        width, cells, n_stream = cache.ne[0], cache.ne[1], cache.ne[2]
        if not self.context.is_v_transposed:
            return self.read_k(cache, head, n_head)
        strides = (
            row_size(cache.type, cells * head),
            row_size(cache.type, cells),
            row_size(cache.type, cells * width),
        )
        return self.view(cache, (cells, n_head, head, n_stream), strides)

    # --- norms and projections

    def lora_mm(
        self, weight: GraphTensor | None, cur: GraphTensor, *, is_scaled: bool = False
    ) -> GraphTensor:
        """A projection (build_lora_mm), times the tensor's own scale where the engine asks for it."""
        weight = self.need(weight)
        out = self.mul_mat(weight, cur)
        return self.scaled(out, weight) if is_scaled else out

    def scaled(self, out: GraphTensor, weight: GraphTensor) -> GraphTensor:
        """A result times the `.scale` tensor of its weight, where the file has one (NVFP4).

        Where blocks are shared, each layer has the scales of its own number.
        """
        name = weight.weight or ""
        if self.row.structure in ("cycles", "loops"):
            scale = self.weight(f"blk.{self.slot}.{name.split('.')[2]}.scale", self.slot)
        else:
            scale = self.weight(name.removesuffix("weight") + "scale", weight.layer)
        return self.mul(out, scale) if scale is not None else out

    def build_norm(
        self,
        cur: GraphTensor,
        weight: GraphTensor | None,
        bias: GraphTensor | None = None,
        kind: NormKind = "rms",
        il: int = -1,
    ) -> GraphTensor:
        """A norm and its scale; the callback pins it to the layer's device where it has either."""
        cur = self.like("RMS_NORM" if kind == "rms" else "NORM", cur)
        if (weight is not None or bias is not None) and il >= 0:
            cur.pin = il
        if weight is not None:
            cur = self.mul(cur, weight)
        return self.add(cur, bias) if bias is not None else cur

    def layer_norm(
        self, cur: GraphTensor, il: int, name: str, kind: NormKind = "rms", *, is_pinned: bool = True
    ) -> GraphTensor:
        """The norm `blk.<il>.<name>`."""
        return self.build_norm(cur, self.w(il, name), self.b(il, name), kind, il if is_pinned else -1)

    def soft_cap(self, cur: GraphTensor) -> GraphTensor:
        """cap * tanh(x / cap)."""
        return self.scale(self.unary(self.scale(cur), "tanh"))
