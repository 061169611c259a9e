"""How large each backend's compute buffer becomes: a port of ggml-alloc's graph allocator (ggml-alloc.c).

Best fit, freed at the last use, results written over a parent that nobody else needs. Offsets are never kept:
only the highest end of each buffer matters.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from placement.inputs.problem import CPU
from placement.llamacpp.backend_rules import CPU_ALIGNMENT_BYTES, CUDA_ALIGNMENT_BYTES
from placement.llamacpp.graph import cuda
from placement.llamacpp.graph.tensor import GraphTensor
from placement.llamacpp.scheduler import Scheduler, Steps

ENDLESS = 1 << 62
_IN_PLACE = """FILL SCALE DIAG_MASK_ZERO DIAG_MASK_INF ADD ADD_ID ADD1 SUB MUL DIV SQR SQRT LOG UNARY ROPE ROPE_BACK
RMS_NORM CLAMP SOFT_MAX"""
IN_PLACE = frozenset(_IN_PLACE.split())  # ggml_op_can_inplace


@dataclass(frozen=True, slots=True)
class BufferType:
    """Alignment in bytes, and the bytes that a tensor takes before it."""

    name: str
    alignment: int
    alloc_bytes: Callable[[GraphTensor], int]


CPU_BUFFER = BufferType(CPU, CPU_ALIGNMENT_BYTES, lambda tensor: tensor.n_bytes)  # of pinned memory too
CUDA_BUFFER = BufferType("CUDA", CUDA_ALIGNMENT_BYTES, cuda.alloc_bytes)


class Pool:
    """One buffer: free blocks by address, and the highest end that was ever used."""

    def __init__(self) -> None:
        self.offsets = [0]
        self.sizes = [ENDLESS]
        self.max_bytes = 0

    def take(self, size: int) -> int:
        """The offset of a new block: the best fitting hole, else the endless last one."""
        sizes = self.sizes
        best, best_size = -1, ENDLESS
        for i in range(len(sizes) - 1):
            if size <= sizes[i] <= best_size:
                best, best_size = i, sizes[i]
        offset = self.offsets[best]
        self.offsets[best] = offset + size
        sizes[best] -= size
        if sizes[best] == 0:
            del sizes[best], self.offsets[best]
        self.max_bytes = max(self.max_bytes, offset + size)
        return offset

    def give(self, offset: int, size: int) -> None:
        """Free a block and join it with its neighbours."""
        offsets, sizes = self.offsets, self.sizes
        end = offset + size
        for i, start in enumerate(offsets):
            if start + sizes[i] == offset:
                sizes[i] += size
                if i + 1 < len(offsets) and start + sizes[i] == offsets[i + 1]:
                    sizes[i] += sizes.pop(i + 1)
                    del offsets[i + 1]
                return
            if end == start:
                offsets[i] = offset
                sizes[i] += size
                if i > 0 and offsets[i - 1] + sizes[i - 1] == offset:
                    sizes[i - 1] += sizes.pop(i)
                    del offsets[i]
                return
        at = next((i for i, start in enumerate(offsets) if start >= offset), len(offsets))
        offsets.insert(at, offset)
        sizes.insert(at, size)


class Allocator:
    """One reservation of a scheduled graph; `sizes()` gives bytes per backend."""

    def __init__(self, scheduler: Scheduler, buffers: Sequence[BufferType]) -> None:
        self.scheduler, self.flat = scheduler, scheduler.flat
        flat = scheduler.flat
        self.buffers = buffers
        self.pools = [Pool() for _ in buffers]
        n = flat.n_tensors + len(scheduler.copy_of)
        n_extra = n - flat.n_tensors
        is_kept = scheduler.backends.n_copies > 1
        self.is_output = flat.is_output + [is_kept] * n_extra
        self.root = flat.root + [-1] * n_extra
        self.is_external = [buffer >= 0 for buffer in flat.buffer] + [False] * n_extra
        if is_kept:
            for i in scheduler.graph_inputs:
                self.is_output[i] = True
        self.n_children = [0] * n
        self.n_views = [0] * n
        self.is_owned = [False] * n
        self.offset = [0] * n
        self.pool = [0] * n
        self.own_bytes: dict[tuple[int, str], int] = {}  # where copies decide, not the graph alone

    def sizes(self) -> list[int]:
        """Reserve the graph and return the bytes of every backend's buffer."""
        steps = self.scheduler.steps()
        for tensor, backend in self.scheduler.leafs():
            self._allocate(tensor, backend)
        self._count(steps)
        src = self.scheduler.src
        n_tensors = self.flat.n_tensors
        for tensor, backend, kept in steps:
            sources: Sequence[int] = kept if tensor < 0 else src[tensor] if tensor < n_tensors else ()
            for source in sources:
                if not self.is_owned[source]:
                    self._allocate(source, backend)
            if tensor >= 0:
                self._allocate(tensor, backend)
            for source in sources:
                self._release(source)
        return [pool.max_bytes for pool in self.pools]

    def _count(self, steps: Steps) -> None:
        """Children and views of every tensor; inputs are allocated at their first mention."""
        flat, src = self.flat, self.scheduler.src
        n_children, n_views, root = self.n_children, self.n_views, self.root
        n_tensors = flat.n_tensors
        for tensor, backend, kept in steps:
            if tensor < 0:
                sources: Sequence[int] = kept
            elif tensor < n_tensors:
                if root[tensor] >= 0:
                    n_views[root[tensor]] += 1
                sources = src[tensor]
            else:
                continue
            for source in sources:
                n_children[source] += 1
                if source < flat.n_leafs and flat.tensors[source].is_input:
                    self._allocate(source, backend)

    def _tensor(self, i: int) -> GraphTensor:
        n = self.flat.n_tensors
        return self.flat.tensors[i if i < n else self.scheduler.copy_of[i - n]]

    def _bytes(self, i: int, backend: int) -> int:
        """Allocated bytes of a tensor on a backend, aligned; a copy is as large as its source, no more."""
        buffer = self.buffers[backend]
        key = (i, buffer.name)
        size = self.flat.n_bytes.get(key)
        if size is None:
            size = self.own_bytes.get(key)
        if size is not None:
            return size
        tensor, known = self._tensor(i), self.flat.n_bytes
        if i >= self.flat.n_tensors:
            tensor, known = GraphTensor("NONE", tensor.type, tensor.ne, tensor.nb, []), self.own_bytes
        elif tensor.op == "FLASH_ATTN_EXT":
            tensor, known = self._with_scheduled_sources(i, tensor), self.own_bytes
        size = known[key] = -(-buffer.alloc_bytes(tensor) // buffer.alignment) * buffer.alignment
        return size

    def _with_scheduled_sources(self, i: int, node: GraphTensor) -> GraphTensor:
        """The node reading the copies made for it: copies of K and V no longer share memory."""
        src = self.scheduler.src[i]
        if all(source < self.flat.n_tensors for source in src):
            return node
        sources = []
        for source in src:
            tensor = self._tensor(source)
            is_copy = source >= self.flat.n_tensors
            sources.append(GraphTensor("NONE", tensor.type, tensor.ne, tensor.nb, []) if is_copy else tensor)
        return GraphTensor(node.op, node.type, node.ne, node.nb, sources)

    def _allocate(self, i: int, backend: int) -> None:
        if self.is_owned[i] or self.is_external[i] or self.root[i] >= 0:
            return
        self.is_owned[i] = True
        if i < self.flat.n_tensors and self.flat.tensors[i].op in IN_PLACE and self._reuse_parent(i):
            return
        self.pool[i] = backend
        self.offset[i] = self.pools[backend].take(self._bytes(i, backend))

    def _reuse_parent(self, i: int) -> bool:
        """Write the node over a source that has no other use and the same layout."""
        node = self.flat.tensors[i]
        for parent in self.scheduler.src[i]:
            if not self.is_owned[parent] or self.is_output[parent]:
                continue
            if self.n_children[parent] != 1 or self.n_views[parent] != 0:
                continue
            other = self._tensor(parent)
            if other.type != node.type or other.ne != node.ne or other.nb != node.nb:
                continue
            pool = self.pool[i] = self.pool[parent]
            offset = self.offset[i] = self.offset[parent]
            self.is_owned[parent] = False
            own, old = self._bytes(i, pool), self._bytes(parent, pool)
            if old > own:
                self.pools[pool].give(offset + own, old - own)
            return True
        return False

    def _release(self, source: int) -> None:
        self.n_children[source] -= 1
        if self.n_children[source] or self.n_views[source]:
            return
        root = self.root[source]
        if root >= 0:
            self.n_views[root] -= 1
            if self.n_views[root] == 0 and self.n_children[root] == 0 and self.is_owned[root]:
                self._free(root)
        elif self.is_owned[source]:
            self._free(source)

    def _free(self, i: int) -> None:
        if self.is_output[i]:
            return
        pool = self.pool[i]
        self.pools[pool].give(self.offset[i], self._bytes(i, pool))
        self.is_owned[i] = False
