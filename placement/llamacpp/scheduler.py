"""Assigns every node of a graph to a backend and cuts the graph into splits, as the engine does.

A port of ggml_backend_sched_split_graph (ggml-backend.cpp, passes 1 to 6). Backends are numbered in the order
of the devices; the last one is the CPU. `Schedule.steps` afterwards is the engine's graph copy: what is
allocated, in order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from placement.llamacpp.backend_rules import MIN_OFFLOAD_TOKENS
from placement.llamacpp.graph import cuda
from placement.llamacpp.graph.flat import NO_BUFFER, FlatGraph
from placement.llamacpp.graph.fusion import Dependencies, keep_for_fusion

MAX_COPIES = 4


@dataclass(frozen=True, slots=True)
class Backends:
    """The backends of a plan: which devices are CUDA's, and what they are asked to do."""

    names: tuple[str, ...]  # the CPU last
    is_cuda: tuple[bool, ...]
    is_op_offloaded: bool = True
    is_host_memory_host: bool = True  # False: host weights are repacked and cannot be offloaded
    n_copies: int = 1
    has_alibi: bool = False

    @property
    def cpu(self) -> int:
        """The number of the CPU backend."""
        return len(self.names) - 1


@dataclass(slots=True)
class Split:
    """A run of nodes on one backend: node positions [start, end) and the tensors copied in before it."""

    backend: int
    start: int
    end: int = 0
    inputs: list[int] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Steps:
    """The nodes that are allocated, as parallel lists: a tensor, its backend, and what must live until then.

    Tensor -1 is a dependency: it only keeps the tensors of `kept` alive; those of a node are its sources.
    """

    tensors: list[int] = field(default_factory=list)
    backends: list[int] = field(default_factory=list)
    kept: list[Sequence[int]] = field(default_factory=list)

    def add(self, tensor: int, backend: int, kept: Sequence[int] = ()) -> None:
        """Put a node, or a dependency, at the end."""
        self.tensors.append(tensor)
        self.backends.append(backend)
        self.kept.append(kept)

    def __iter__(self) -> Iterator[tuple[int, int, Sequence[int]]]:
        return zip(self.tensors, self.backends, self.kept, strict=True)


class Scheduler:
    """One scheduling run; `pins` maps a tensor to the backend that the engine's callback chose for it."""

    def __init__(self, flat: FlatGraph, backends: Backends, pins: dict[int, int]) -> None:
        self.flat, self.backends = flat, backends
        self.cpu = backends.cpu
        self.n_backends = len(backends.names)
        self.assigned = [-1] * flat.n_tensors
        for index, backend in pins.items():
            self.assigned[index] = backend
        self.src = list(flat.src)  # a row is the graph's own until a copy stands in it
        self.splits: list[Split] = []
        self.copies: dict[tuple[int, int], list[int]] = {}
        self.copy_of: list[int] = []  # of the tensors after flat.n_tensors: what they copy
        self.copy_backend: list[int] = []
        self.graph_inputs: list[int] = []

    def run(self) -> None:
        """All passes, in the engine's order."""
        self._assign_from_buffers()
        self._spread()
        self._assign_rest()
        self._inherit()
        self._split()
        self._collect_graph_inputs()

    # --- what backends can do

    def supports(self, index: int, backend: int) -> bool:
        """Whether the backend can run the node where its weights and caches lie."""
        if not self.backends.is_cuda[backend]:
            return True
        known = self.flat.cuda_support[index]
        if known is None:
            known = cuda.supports(self.flat.tensors[index], self.backends.has_alibi)
            self.flat.cuda_support[index] = known
        if not known:
            return False
        buffer, is_cuda = self.flat.buffer, self.backends.is_cuda
        for source in self.flat.src[index]:
            place = buffer[source]
            if place >= 0 and place != backend and is_cuda[place]:
                return False
        return True

    # --- passes 1 to 4: backends

    def _assign_from_buffers(self) -> None:
        flat, assigned = self.flat, self.assigned
        for i in range(flat.n_tensors):
            if assigned[i] < 0:
                assigned[i] = self._from_current(i)

    def _from_current(self, i: int) -> int:
        flat = self.flat
        held = flat.held[i]
        if held != NO_BUFFER:
            return held if i < flat.n_leafs or self.supports(i, held) else self.cpu
        tensor = flat.tensors[i]
        if tensor.is_input:
            return self.cpu
        if tensor.op in ("ROPE", "FLASH_ATTN_EXT"):
            return -1
        is_weight = flat.is_weight
        for source in flat.src[i]:
            if is_weight[source]:
                return self._from_weight(i, flat.buffer[source])
        return -1

    def _from_weight(self, i: int, place: int) -> int:
        result = place if self.supports(i, place) else -1
        backends = self.backends
        if backends.is_op_offloaded and result == self.cpu and backends.is_host_memory_host:
            batch = cuda.offload_batch(self.flat.tensors[i])
            if batch >= MIN_OFFLOAD_TOKENS:
                for b in range(self.cpu):
                    if backends.is_cuda[b] and self.supports(i, b):
                        return b
        return result

    def _spread(self) -> None:
        """Pass 2: neighbours take over the backend, GPUs first."""
        flat = self.flat
        nodes = flat.real_nodes
        backwards = nodes[::-1]
        self._spread_over(nodes, skips_cpu=True)
        self._spread_over(backwards, skips_cpu=True)
        self._spread_over(nodes, skips_cpu=False)
        self._spread_over(backwards, skips_cpu=False)

    def _spread_over(self, nodes: Sequence[int], *, skips_cpu: bool) -> None:
        assigned, supports = self.assigned, self.supports
        ignored = self.cpu if skips_cpu else -2
        current = -1
        for i in nodes:
            own = assigned[i]
            if own >= 0:
                current = -1 if own == ignored else own
            elif current >= 0 and supports(i, current):
                assigned[i] = current

    def _is_readable(self, i: int, backend: int) -> bool:
        """ggml_backend_sched_buffer_supported."""
        flat = self.flat
        held = flat.held[i] if i < flat.n_tensors else NO_BUFFER
        if held != NO_BUFFER:
            return held == backend
        own = self.assigned[i]
        if own < 0 and flat.root[i] >= 0:
            own = self.assigned[flat.root[i]]
        return own == backend

    def _assign_rest(self) -> None:
        """Pass 3: what is still free goes to the backend that can read most of its sources."""
        flat, assigned = self.flat, self.assigned
        for i in flat.real_nodes:
            if assigned[i] >= 0:
                continue
            best = -1
            for b in range(self.n_backends):
                if not self.supports(i, b):
                    continue
                n = sum(1 for source in flat.src[i] if self._is_readable(source, b))
                if n > best:
                    best, assigned[i] = n, b

    def _inherit(self) -> None:
        """Pass 4: views follow their memory, sources their users."""
        flat, assigned = self.flat, self.assigned
        root, src = flat.root, flat.src
        for i in range(flat.n_leafs, flat.n_tensors):
            if assigned[i] < 0 and root[i] >= 0:
                assigned[i] = assigned[root[i]]
            for source in src[i]:
                if assigned[source] < 0:
                    assigned[source] = assigned[root[source]] if root[source] >= 0 else assigned[i]
            if assigned[i] < 0:
                assigned[i] = next(b for b in range(self.n_backends) if self.supports(i, b))

    # --- passes 5 and 6: splits and copies

    def _split(self) -> None:
        flat, assigned = self.flat, self.assigned
        nodes = flat.real_nodes
        first = assigned[nodes[0]]
        split = Split(first, flat.n_leafs)
        self.splits.append(split)
        current = first
        held, src = flat.held, self.src
        for i in nodes:
            own = assigned[i]
            if own != current or (split.inputs and self._needs_new_split(i, current)):
                split.end = i
                split = Split(own, i)
                self.splits.append(split)
                current = own
            sources = src[i]
            for j, source in enumerate(sources):
                place = held[source]
                if place == current or (place == NO_BUFFER and assigned[source] == current):
                    continue
                if assigned[source] != current and not self._is_readable(source, current):
                    row = src[i]
                    src[i] = (*row[:j], self._copy(source, current, split), *row[j + 1 :])
        split.end = flat.n_tensors

    def _needs_new_split(self, i: int, current: int) -> bool:
        """Whether the node uses a weight from elsewhere: a new split lets earlier copies go."""
        flat = self.flat
        for source in flat.src[i]:
            if flat.is_weight[source] and flat.buffer[source] != current and self.assigned[source] != current:
                return True
        return False

    def _copy(self, source: int, backend: int, split: Split) -> int:
        key = (source, backend)
        if key not in self.copies:
            self.copies[key] = [self._new_copy(source, backend) for _ in range(self.backends.n_copies)]
            split.inputs.append(source)
        return self.copies[key][0]

    def _new_copy(self, source: int, backend: int) -> int:
        self.copy_of.append(source)
        self.copy_backend.append(backend)
        return self.flat.n_tensors + len(self.copy_of) - 1

    def _collect_graph_inputs(self) -> None:
        """Pass 6: with several copies in flight, every graph input exists once per copy."""
        if self.backends.n_copies == 1:
            return
        flat = self.flat
        for i in range(flat.n_leafs):
            if not flat.tensors[i].is_input:
                continue
            self.graph_inputs.append(i)
            key = (i, self.assigned[i])
            rest = [self._new_copy(i, self.assigned[i]) for _ in range(self.backends.n_copies - 1)]
            self.copies[key] = [i, *rest]

    # --- the graph that is allocated

    def leafs(self) -> list[tuple[int, int]]:
        """(tensor, backend) of the graph copy's leafs: all copies first, then the graph's own."""
        flat, out = self.flat, []
        if self.backends.n_copies > 1:
            for i in self.graph_inputs:
                out += [(copy, self.assigned[i]) for copy in self.copies[i, self.assigned[i]]]
            for split in self.splits:
                for i in split.inputs:
                    out += [(copy, split.backend) for copy in self.copies[i, split.backend]]
        return out + [(i, self.assigned[i]) for i in range(flat.n_leafs)]

    def steps(self) -> Steps:
        """The graph copy's nodes in order."""
        steps = Steps()
        assigned = self.assigned
        for split in self.splits:
            for i in split.inputs:
                steps.add(-1, split.backend, (i,))
                steps.add(self.copies[i, split.backend][0], split.backend)
            order: Sequence[int] = range(split.start, split.end)
            kept: Dependencies = {}
            if self.backends.is_cuda[split.backend]:
                order, kept = keep_for_fusion(self.flat, self.src, split.start, split.end)
            for i in order:
                steps.add(i, assigned[i])
                for group in kept.get(i, ()):
                    steps.add(-1, split.backend, group)
        return steps
