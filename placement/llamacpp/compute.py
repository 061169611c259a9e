"""An assignment into compute-buffer bytes and graph splits, by running the engine's own planning on a graph.

Mirrors llama_context::sched_reserve: the graphs of a prompt batch and of a decode step are built, scheduled
(ggml-backend.cpp) and allocated (ggml-alloc.c) without any data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import CPU, HOST, Assignment
from placement.inputs.quants import BLOCKS
from placement.llamacpp import coarse
from placement.llamacpp.allocator import CPU_BUFFER, CUDA_BUFFER, Allocator, BufferType
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.architecture.records import Architecture
from placement.llamacpp.architecture.tensors import INPUT, OUTPUT, REPEATING
from placement.llamacpp.context_rules import can_pipeline
from placement.llamacpp.graph.builder import UnknownGraph
from placement.llamacpp.graph.context import Batch, Context, make_context
from placement.llamacpp.graph.flat import NO_BUFFER
from placement.llamacpp.graph.hyper import FUSED_HYPER
from placement.llamacpp.graph.row import ArchitectureRow
from placement.llamacpp.graph.rows import ROWS
from placement.llamacpp.graph.runs import LayerRun, shorten
from placement.llamacpp.graph.template import Template, model_graphs
from placement.llamacpp.graph.tensor import GraphTensor
from placement.llamacpp.plan import ComputePlan
from placement.llamacpp.scheduler import MAX_COPIES, Backends, Scheduler

FLASH = "FLASH_ATTN_EXT"
PIN_MAX_TOKENS = 32


def plan_compute(model: Model, machine: Machine, assignment: Assignment, program: str) -> ComputePlan:
    """Plan the compute buffers and splits that the engine would reserve for an assignment.

    `program` decides how many logits are sized: llama-server's for its slots, the others' for a whole ubatch.
    """
    return _Planner(model, machine, assignment, program).plan()


@dataclass(frozen=True, slots=True)
class _Reserved:
    """What one reservation gives."""

    sizes: list[int]
    n_splits: int
    n_nodes: int
    astray: frozenset[str]  # fused operations of which one is not at its layer's home


class _Planner:
    def __init__(self, model: Model, machine: Machine, assignment: Assignment, program: str) -> None:
        self.model, self.machine, self.assignment, self.program = model, machine, assignment, program
        self.facts: Architecture = describe(model)
        row = ROWS.get(model.architecture)
        self.is_exact = row is not None
        self.row = row or ArchitectureRow()
        self.graphs = model_graphs(model, self.facts, self.row)
        self.settings = assignment.settings
        self.backends = self._backends()
        number = {name: i for i, name in enumerate(self.backends.names)}
        self.homes = [number[home] for home in assignment.homes]
        self.moved = {name: number[device] for name, device in assignment.moved}
        self.is_full_offload = CPU not in assignment.homes or not assignment.devices
        self.moved_of_layer: dict[int, frozenset[tuple[str, int]]] = {}
        self.placed = self._place_weights()

    def plan(self) -> ComputePlan:
        """Simulate the engine; where the graph is unknown, estimate."""
        try:
            self._refuse_undescribed()
            return self._simulated()
        except UnknownGraph:
            return self._estimated()

    def _refuse_undescribed(self) -> None:
        """Of an architecture without a row the attention can be guessed, a recurrent block cannot; of no other
        can what the header does not say.

        Raises:
            UnknownGraph: that is so.
        """
        facts = self.facts
        trunk = facts.layers[: facts.n_layer]
        if not self.is_exact and any(layer.is_recurrent for layer in trunk):
            raise UnknownGraph("recurrent layers of an architecture without a row")
        if any(layer.caches and not layer.caches[0].k_head for layer in trunk):
            raise UnknownGraph("attention without the size of its heads")
        if facts.n_expert and not facts.n_expert_used:
            raise UnknownGraph("experts, and not how many a token uses")
        if not facts.layers:
            raise UnknownGraph("no layers")

    def _simulated(self) -> ComputePlan:
        """Reserve decode and prompt graphs, flash attention decided first."""
        context = self._context()
        decode_batch = self._decode_batch(context)
        decode = self._reserve(context, decode_batch, has_pins=True, needs_sizes=False)
        is_quantised_v = BLOCKS[self.settings.kv_type_v.upper()][0] != 1
        if self._flash_asked == "auto" and not is_quantised_v and FLASH in decode.astray:
            context = dataclasses.replace(context, is_flash=False)
            decode = self._reserve(context, decode_batch, has_pins=True, needs_sizes=False)
        for op in FUSED_HYPER:
            if op in decode.astray:
                context = dataclasses.replace(context, unfused=context.unfused | {op})
                decode = self._reserve(context, decode_batch, has_pins=True, needs_sizes=False)
        # The engine's own plan (llama-fit-params, and llama-server's fit pass) measures prompts with
        # ggml_backend_sched_reserve_size, which forgets the pins; a loaded server's buffers may be up to some
        # tens of MiB smaller or larger for it.
        prompt = self._reserve(context, self._prompt_batch(context), has_pins=False, needs_sizes=True)
        return ComputePlan(
            compute_bytes=dict(zip((*self.assignment.devices, HOST), prompt.sizes, strict=True)),
            splits_prompt=prompt.n_splits,
            splits_decode=decode.n_splits,
            n_nodes_prompt=prompt.n_nodes,
            n_nodes_decode=decode.n_nodes,
            n_copies=self.backends.n_copies,
            is_exact=self.is_exact,
            notes=() if self.is_exact else (f"{self.model.architecture}: simulated as the likeliest graph",),
        )

    def _estimated(self) -> ComputePlan:
        """What sizes alone tell."""
        context = self._context()
        found = coarse.estimate(self.facts, self.assignment, context, self._prompt_batch(context))
        return ComputePlan(
            compute_bytes={**found.device_bytes, HOST: found.host_bytes},
            splits_prompt=found.n_splits,
            splits_decode=found.n_splits,
            n_nodes_prompt=found.n_nodes,
            n_nodes_decode=found.n_nodes,
            n_copies=self.backends.n_copies,
            is_exact=False,
            notes=(f"{self.model.architecture}: no graph rule, compute buffers and splits are estimates",),
        )

    @property
    def _flash_asked(self) -> str:
        return self.settings.flash_attention if self.facts.rule.has_flash_attention else "off"

    def _context(self) -> Context:
        return make_context(self.settings, self.facts, self.is_full_offload, self._flash_asked != "off")

    def _decode_batch(self, context: Context) -> Batch:
        n_seqs = context.n_seq_max
        return Batch(n_seqs, n_seqs, n_seqs)

    def _prompt_batch(self, context: Context) -> Batch:
        n_seqs = context.n_seq_max
        n_tokens = min(context.n_ctx, context.n_ubatch)
        n_outputs_max = n_seqs if self.program == "llama-server" else context.n_batch
        n_outputs = min(n_tokens, n_outputs_max)
        return Batch(-(-n_tokens // n_seqs) * n_seqs, n_seqs, n_outputs)

    # --- where everything is

    def _backends(self) -> Backends:
        devices = self.assignment.devices
        settings = self.settings
        is_cuda = [not self.machine.device(name).is_rpc for name in devices]
        is_parallel = CPU not in self.assignment.homes and can_pipeline(settings, len(devices))
        return Backends(
            names=(*devices, CPU),
            is_cuda=(*is_cuda, False),
            is_op_offloaded=settings.is_op_offloaded,
            is_host_memory_host=any(is_cuda),
            n_copies=MAX_COPIES if is_parallel else 1,
            has_alibi=self.row.has_alibi,
        )

    def _place_weights(self) -> dict[str, int]:
        """The backend whose buffer holds each weight that is not at its layer's home, by leaf name."""
        cpu, homes = self.backends.cpu, self.homes
        moved, is_cuda = self.moved, self.backends.is_cuda
        placed: dict[str, int] = {}
        for each in self.facts.tensors:
            target = moved.get(each.tensor.name) if moved else None
            if target is not None and each.kind == REPEATING and each.layer is not None:
                known = self.moved_of_layer.get(each.layer, frozenset())
                self.moved_of_layer[each.layer] = known | {(each.name.split(".", 2)[-1], target)}
            if target is None:
                if each.kind == INPUT:
                    target = cpu
                elif each.kind == OUTPUT:
                    target = homes[-1]
                elif each.has_cuda_kernel and each.name.startswith("blk."):
                    continue
                else:
                    target = homes[each.layer or 0]
                    if is_cuda[target] and not each.has_cuda_kernel:
                        target = cpu
            placed[each.name] = target
        return placed

    def _place(self, leaf: GraphTensor, layers: dict[int, int]) -> int:
        """The backend whose buffer holds a leaf; `layers` are those that take the places of the graph's."""
        if leaf.cache_layer is not None:
            owner = layers.get(leaf.cache_layer, leaf.cache_layer)
            return self.homes[owner] if self.settings.is_kv_offloaded else self.backends.cpu
        name, layer = leaf.weight, leaf.layer
        if name is None:
            return NO_BUFFER
        if layer is None:
            return self.placed.get(name, self.homes[-1])
        actual = layers[layer]
        if actual != layer and self.placed and name.startswith("blk."):
            name = f"blk.{actual}.{name.split('.', 2)[2]}"
        return self.placed.get(name, self.homes[actual])

    # --- reservations

    def _reserve(self, context: Context, batch: Batch, *, has_pins: bool, needs_sizes: bool) -> _Reserved:
        """Plan one batch's graph, long runs of alike layers cut short; uncut where that cannot be right."""
        makes = self.graphs.makes(context, batch)
        moved = self.moved_of_layer
        kept, runs = shorten([(make, self.homes[il], moved.get(il)) for il, make in enumerate(makes)])
        template, layers = self._template(context, batch, makes, kept)
        scheduler = self._schedule(context, batch, template, layers, has_pins=has_pins)
        left_out = self._left_out(template, scheduler, runs)
        if left_out is None:
            template, layers = self._template(context, batch, makes, range(len(makes)))
            scheduler = self._schedule(context, batch, template, layers, has_pins=has_pins)
            left_out = (0, 0)
        sizes: list[int] = []
        if needs_sizes:
            devices = [self._buffer_type(name) for name in self.assignment.devices]
            sizes = Allocator(scheduler, [*devices, CPU_BUFFER]).sizes()
        astray = frozenset(
            op for op, node, il in template.fused_nodes if scheduler.assigned[node] != self.homes[layers[il]]
        )
        n_splits, n_nodes = len(scheduler.splits) + left_out[0], template.n_nodes + left_out[1]
        return _Reserved(sizes, n_splits, n_nodes, astray)

    def _buffer_type(self, name: str) -> BufferType:
        """A remote worker's sizes are asked of it: a GPU's, which are never less, unless it is known as a CPU."""
        device = self.machine.device(name)
        return CPU_BUFFER if device.is_rpc and CPU in device.description else CUDA_BUFFER

    def _template(
        self, context: Context, batch: Batch, makes: Sequence[Hashable], layers: Sequence[int]
    ) -> tuple[Template, dict[int, int]]:
        """The graph of some layers, and which layer takes which one's place in it."""
        template = self.graphs.get(context, batch, layers, [makes[il] for il in layers], self.homes)
        return template, dict(zip(template.layers, layers, strict=True))

    def _schedule(
        self, context: Context, batch: Batch, template: Template, layers: dict[int, int], *, has_pins: bool
    ) -> Scheduler:
        flat = template.flat.placed(lambda leaf: self._place(leaf, layers))
        scheduler = Scheduler(flat, self.backends, {})
        if has_pins:
            self._pin(scheduler, template, layers, batch.n_tokens < PIN_MAX_TOKENS or context.is_full_offload)
        scheduler.run()
        return scheduler

    def _pin(
        self, scheduler: Scheduler, template: Template, layers: dict[int, int], pins_norms: bool
    ) -> None:
        """What llama.cpp's graph callback forces to a backend: norms to their layer's device."""
        for i in template.cpu_nodes:
            scheduler.assigned[i] = self.backends.cpu
        if not pins_norms:
            return
        for i, il in template.pins:
            home = self.homes[layers[il]]
            if scheduler.supports(i, home):
                scheduler.assigned[i] = home

    def _left_out(
        self, template: Template, scheduler: Scheduler, runs: Sequence[LayerRun]
    ) -> tuple[int, int] | None:
        """Splits and nodes of the layers left out; None if those layers would take memory of their own."""
        n_leafs, n_splits, n_nodes = scheduler.flat.n_leafs, 0, 0
        for run in runs:
            begin, end = (template.layer_starts[at] + n_leafs for at in (run.at, run.at + run.period))
            leafs = range(template.leaf_starts[run.at], template.leaf_starts[run.at + run.period])
            if any(scheduler.flat.buffer[leaf] == NO_BUFFER for leaf in leafs):
                return None
            count = sum(begin <= split.start < end for split in scheduler.splits)
            if count and self.backends.n_copies > 1:
                return None
            n_splits += count * run.n_left_out
            n_nodes += (end - begin) * run.n_left_out
        return n_splits, n_nodes
