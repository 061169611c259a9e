"""An assignment into compute-buffer bytes and graph splits, by running the engine's own planning on a graph.

Mirrors llama_context::sched_reserve: the graphs of a prompt batch and of a decode step are built, scheduled
(ggml-backend.cpp) and allocated (ggml-alloc.c) without any data.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from placement.allocator import Allocator
from placement.architecture import INPUT, OUTPUT, Architecture, describe
from placement.graph import cuda
from placement.graph.context import Batch, Context, make_context
from placement.graph.decoder import Decoder
from placement.graph.flat import NO_BUFFER, FlatGraph
from placement.graph.rows import ROWS, Row
from placement.graph.tensor import Tensor
from placement.machine import Machine
from placement.model import Model
from placement.problem import CPU, Assignment
from placement.quants import BLOCKS
from placement.scheduler import MAX_COPIES, Backends, Scheduler

HOST = "Host"
HOST_ALIGNMENT = 32
PIN_MAX_TOKENS = 32


@dataclass(frozen=True, slots=True)
class ComputePlan:
    """Compute-buffer bytes by device ("Host" included), splits and nodes of the prompt and decode graphs.

    `is_exact` is False where no rule covers the architecture and the figures are a coarse estimate.
    """

    compute_bytes: dict[str, int]
    splits_prompt: int
    splits_decode: int
    n_nodes_prompt: int
    n_nodes_decode: int
    n_copies: int
    is_exact: bool
    notes: tuple[str, ...]


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
    is_flash_at_home: bool


class _Planner:
    def __init__(self, model: Model, machine: Machine, assignment: Assignment, program: str) -> None:
        self.model, self.machine, self.assignment, self.program = model, machine, assignment, program
        self.facts: Architecture = describe(model)
        self.notes: list[str] = []
        row = ROWS.get(model.architecture)
        self.is_exact = row is not None
        self.row: Row = row or Row()
        self.settings = assignment.settings
        self.backends = self._backends()
        self.number = {name: i for i, name in enumerate(self.backends.names)}
        self.homes = [self.number[home] for home in assignment.homes]
        self.is_full_offload = CPU not in assignment.homes or not assignment.devices
        self.placed = self._place_weights()

    def plan(self) -> ComputePlan:
        """Reserve decode and prompt graphs, flash attention settled first."""
        asked = self.settings.flash_attention if self.row.has_flash else "off"
        is_quantised_v = BLOCKS[self.settings.kv_type_v.upper()][0] != 1
        is_auto = asked == "auto" and not is_quantised_v
        context = make_context(self.settings, self.facts, self.is_full_offload, asked != "off")
        n_seqs = context.n_seq_max
        decode_batch = Batch(n_seqs, n_seqs, n_seqs)
        decode = self._reserve(context, decode_batch, has_pins=True, needs_sizes=False)
        if is_auto and not decode.is_flash_at_home:
            context = dataclasses.replace(context, is_flash=False)
            decode = self._reserve(context, decode_batch, has_pins=True, needs_sizes=False)
        has_pins = self.program != "llama-fit-params"
        prompt = self._reserve(context, self._prompt_batch(context), has_pins=has_pins, needs_sizes=True)
        sizes = dict(zip((*self.assignment.devices, HOST), prompt.sizes, strict=True))
        return ComputePlan(
            compute_bytes=sizes,
            splits_prompt=prompt.n_splits,
            splits_decode=decode.n_splits,
            n_nodes_prompt=prompt.n_nodes,
            n_nodes_decode=decode.n_nodes,
            n_copies=self.backends.n_copies,
            is_exact=self.is_exact,
            notes=tuple(self.notes),
        )

    def _prompt_batch(self, context: Context) -> Batch:
        n_seqs = context.n_seq_max
        n_tokens = min(context.n_ctx, context.n_ubatch)
        n_outputs_max = n_seqs if self.program == "llama-server" else context.n_batch
        n_outputs = min(n_tokens, n_outputs_max)
        return Batch(-(-n_tokens // n_seqs) * n_seqs, n_seqs, n_outputs)

    def _backends(self) -> Backends:
        devices = self.assignment.devices
        settings = self.settings
        is_cuda = [not self.machine.device(name).is_rpc for name in devices]
        is_parallel = (
            len(devices) > 1
            and CPU not in self.assignment.homes
            and settings.split_mode == "layer"
            and settings.is_kv_offloaded
            and not settings.has_overrides
        )
        return Backends(
            names=(*devices, CPU),
            is_cuda=(*is_cuda, False),
            is_op_offloaded=settings.is_op_offloaded,
            is_host_memory_host=any(is_cuda),
            n_copies=MAX_COPIES if is_parallel else 1,
            has_alibi=self.row.has_alibi,
        )

    def _place_weights(self) -> dict[str, int]:
        """The backend whose buffer holds each weight, by leaf name."""
        cpu, homes, number = self.backends.cpu, self.homes, self.number
        moved = {name: number[device] for name, device in self.assignment.moved}
        placed: dict[str, int] = {}
        for each in self.facts.tensors:
            target = moved.get(each.tensor.name) if moved else None
            if target is None:
                if each.kind == INPUT:
                    target = cpu
                elif each.kind == OUTPUT:
                    target = homes[-1]
                else:
                    target = homes[each.layer or 0]
                if not each.has_cuda_kernel and self.backends.is_cuda[target]:
                    target = cpu
            placed[each.name] = target
        return placed

    def _place(self, leaf: Tensor) -> int:
        if leaf.cache_layer is not None:
            return self.homes[leaf.cache_layer] if self.settings.is_kv_offloaded else self.backends.cpu
        if leaf.weight is None:
            return NO_BUFFER
        found = self.placed.get(leaf.weight)
        if found is not None:
            return found
        return self.homes[leaf.layer] if leaf.layer is not None else self.homes[-1]

    def _reserve(self, context: Context, batch: Batch, *, has_pins: bool, needs_sizes: bool) -> _Reserved:
        graph = Decoder(self.model, self.facts, self.row, context, batch)
        graph.homes = self.homes
        graph.build(range(self.facts.n_layer))
        flat = FlatGraph(graph, self._place)
        scheduler = Scheduler(flat, self.backends, {})
        if has_pins:
            self._pin(scheduler, context, batch)
        scheduler.run()
        sizes: list[int] = []
        if needs_sizes:
            alignments = [
                HOST_ALIGNMENT if i == self.backends.cpu else cuda.ALIGNMENT for i in self.number.values()
            ]
            sizes = Allocator(scheduler, alignments, self._alloc_bytes).sizes()
        is_at_home = all(
            scheduler.assigned[node.index] == self.homes[node.layer or 0] for node in graph.flash_nodes
        )
        return _Reserved(sizes, len(scheduler.splits), len(graph.nodes), is_at_home)

    def _alloc_bytes(self, tensor: Tensor, backend: int) -> int:
        return tensor.n_bytes if backend == self.backends.cpu else cuda.alloc_bytes(tensor)

    def _pin(self, scheduler: Scheduler, context: Context, batch: Batch) -> None:
        """What llama.cpp's graph callback forces to a backend: norms to their layer's device."""
        flat, cpu = scheduler.flat, self.backends.cpu
        pins_norms = batch.n_tokens < PIN_MAX_TOKENS or context.is_full_offload
        for i in range(flat.n_leafs, flat.n_tensors):
            tensor = flat.tensors[i]
            if tensor.kind == "cpu":
                scheduler.assigned[i] = cpu
            elif tensor.pin is not None and pins_norms and scheduler.supports(i, self.homes[tensor.pin]):
                scheduler.assigned[i] = self.homes[tensor.pin]
