from __future__ import annotations

import itertools
from collections.abc import Sequence

from hypothesis import given
from hypothesis import strategies as st

from placement.llamacpp.allocator import CPU_BUFFER, CUDA_BUFFER, Allocator, Pool
from placement.llamacpp.graph.flat import NO_BUFFER, FlatGraph
from placement.llamacpp.graph.ops import Graph
from placement.llamacpp.graph.tensor import GraphTensor
from placement.llamacpp.scheduler import Backends, Scheduler

KIB = 1024
CPU_ALONE = Backends(names=("CPU",), is_cuda=(False,))


def reserved(graph: Graph, held: Sequence[GraphTensor] = ()) -> int:
    """Bytes that a graph takes on the CPU alone; `held` tensors are in memory already."""
    flat = FlatGraph(graph).placed(lambda leaf: 0 if leaf in held else NO_BUFFER)
    scheduler = Scheduler(flat, CPU_ALONE, {})
    scheduler.run()
    return Allocator(scheduler, [CPU_BUFFER]).sizes()[0]


def test_best_fit() -> None:
    """The smallest hole that is large enough is taken."""
    pool = Pool()
    offsets = [pool.take(size) for size in (64, 32, 256, 32, 128, 32)]
    for i, size in ((0, 64), (2, 256), (4, 128)):
        pool.give(offsets[i], size)
    assert pool.take(100) == offsets[4]


def test_equal_holes_last() -> None:
    """Of equal holes the last one is taken, as ggml-alloc does."""
    pool = Pool()
    offsets = [pool.take(size) for size in (64, 32, 64, 32)]
    pool.give(offsets[0], 64)
    pool.give(offsets[2], 64)
    assert pool.take(64) == offsets[2]


def test_neighbours_join() -> None:
    """Freed neighbours become one hole."""
    pool = Pool()
    offsets = [pool.take(64) for _ in range(4)]
    for i in (0, 2, 1):
        pool.give(offsets[i], 64)
    assert pool.take(192) == 0


@given(st.lists(st.tuples(st.booleans(), st.integers(1, 40), st.integers(0, 1000)), max_size=60))
def test_blocks_never_overlap(steps: list[tuple[bool, int, int]]) -> None:
    """Whatever is taken and given, live blocks are apart and below the highest end."""
    pool = Pool()
    live: list[tuple[int, int]] = []
    for is_take, size, pick in steps:
        if is_take or not live:
            live.append((pool.take(size * 32), size * 32))
        else:
            pool.give(*live.pop(pick % len(live)))
        spans = sorted(live)
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
        assert all(offset + n <= pool.max_bytes for offset, n in live)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.randoms(use_true_random=False))
def test_all_given_back(sizes: list[int], random: object) -> None:
    """When everything is given back, one endless hole remains."""
    pool = Pool()
    live = [(pool.take(32 * n), 32 * n) for n in sizes]
    random.shuffle(live)  # type: ignore[attr-defined]
    for block in live:
        pool.give(*block)
    assert pool.offsets == [0]


def test_in_place() -> None:
    """A chain of element-wise operations needs one tensor's memory."""
    graph = Graph()
    cur = graph.input("F32", 256)
    for _ in range(5):
        cur = graph.scale(cur)
    graph.expand(cur)
    assert reserved(graph) == KIB


def test_output_is_kept() -> None:
    """The memory of an output is never written over."""
    graph = Graph()
    first = graph.scale(graph.input("F32", 256))
    first.is_output = True
    graph.expand(graph.scale(first))
    assert reserved(graph) == 2 * KIB


def test_views_keep_memory() -> None:
    """A tensor lives as long as a view of it is read."""
    graph = Graph()
    source = graph.scale(graph.input("F32", 256))
    half = graph.view_1d(source, 128)
    longer = graph.concat(graph.concat(half, half, 0), half, 0)
    graph.expand(longer)
    assert reserved(graph) == KIB + KIB + 512 * 3


def test_two_readers() -> None:
    """A tensor that two nodes read is not written over by the first."""
    graph = Graph()
    source = graph.scale(graph.input("F32", 256))
    graph.expand(graph.mul(graph.unary(source, "silu"), source))
    assert reserved(graph) == 2 * KIB


def test_held_tensors_are_free() -> None:
    """Weights and caches take nothing of the buffer."""
    graph = Graph()
    weight = graph.new("F32", 256, 256)
    weight.weight = "w"
    graph.expand(graph.mul_mat(weight, graph.input("F32", 256, 4)))
    assert reserved(graph, [weight]) == 8 * KIB


def test_cuda_pads_rows() -> None:
    """CUDA pads quantised rows to 512 elements, and everything to 128 bytes."""
    assert CUDA_BUFFER.alloc_bytes(Graph().new("Q8_0", 256, 2)) == 2 * 272 + 272
    assert CPU_BUFFER.alloc_bytes(Graph().new("Q8_0", 256, 2)) == 2 * 272
    assert (CUDA_BUFFER.alignment, CPU_BUFFER.alignment) == (128, 32)


def test_flash_scratch() -> None:
    """CUDA's flash attention converts quantised K and V to f16 beside its result; V inside K only once."""
    graph = Graph()
    q, k, v = graph.new("F32", 128, 8, 4), graph.new("Q8_0", 128, 256, 4), graph.new("Q8_0", 128, 256, 4)
    apart = graph.flash_attn(q, k, v, None)
    shared = graph.flash_attn(q, k, graph.view(k, (64, *k.ne[1:]), k.nb[1:]), None)
    half = 2 * 128 * 256 * 4
    assert CUDA_BUFFER.alloc_bytes(apart) == apart.n_bytes + 2 * half
    assert CUDA_BUFFER.alloc_bytes(shared) == shared.n_bytes + half
