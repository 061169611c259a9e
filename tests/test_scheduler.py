from __future__ import annotations

from collections.abc import Sequence

import pytest

from placement.llamacpp.graph.flat import NO_BUFFER, FlatGraph
from placement.llamacpp.graph.ops import Graph
from placement.llamacpp.graph.tensor import GraphTensor
from placement.llamacpp.scheduler import Backends, Scheduler

GPU, OTHER, CPU = 0, 1, 2
THREE = Backends(names=("CUDA0", "CUDA1", "CPU"), is_cuda=(True, True, False))


class Weighted(Graph):
    """A graph whose weights lie where they are made."""

    def __init__(self) -> None:
        super().__init__()
        self.places: dict[GraphTensor, int] = {}

    def weight(self, place: int, n: int = 256, type: str = "F32") -> GraphTensor:
        """A square weight in a backend's buffer."""
        leaf = self.new(type, n, n)
        leaf.weight = f"w{len(self.places)}"
        self.places[leaf] = place
        return leaf

    def schedule(self, backends: Backends = THREE, pins: dict[GraphTensor, int] | None = None) -> Scheduler:
        """All passes over the graph."""
        flat = FlatGraph(self).placed(lambda leaf: self.places.get(leaf, NO_BUFFER))
        scheduler = Scheduler(flat, backends, {node.index: b for node, b in (pins or {}).items()})
        scheduler.run()
        return scheduler


def chain(places: Sequence[int], n_tokens: int = 1, type: str = "F32") -> Weighted:
    """Matrix products with weights at these places, an activation after each."""
    graph = Weighted()
    cur = graph.input("F32", 256, n_tokens)
    for place in places:
        cur = graph.unary(graph.mul_mat(graph.weight(place, type=type), cur), "silu")
    graph.expand(cur)
    return graph


def backends_of(scheduler: Scheduler) -> list[int]:
    """The backend of each split."""
    return [split.backend for split in scheduler.splits]


@pytest.mark.parametrize(
    ("places", "splits"),
    [
        ([GPU], [GPU]),
        ([GPU, GPU, OTHER], [GPU, OTHER]),
        ([GPU, CPU, GPU], [GPU, CPU, GPU]),
        ([CPU, CPU], [CPU]),
        ([CPU, OTHER, GPU], [CPU, OTHER, GPU]),
    ],
)
def test_splits_follow_weights(places: list[int], splits: list[int]) -> None:
    """A new split begins where the weights are on another backend."""
    assert backends_of(chain(places).schedule()) == splits


@pytest.mark.parametrize(("n_tokens", "splits"), [(31, [GPU, CPU, GPU]), (32, [GPU, GPU]), (512, [GPU, GPU])])
def test_large_batches_are_offloaded(n_tokens: int, splits: list[int]) -> None:
    """From 32 tokens on the first CUDA device takes over products with host weights, as a split of its own."""
    scheduler = chain([GPU, CPU, GPU], n_tokens).schedule()
    assert [split.backend for split in scheduler.splits][: len(splits)] == splits


def test_no_offload_without_leave() -> None:
    """Host weights stay on the host where offloading is off, or the host's memory is not pinned for CUDA."""
    for extra in ({"is_op_offloaded": False}, {"is_host_memory_host": False}):
        backends = Backends(THREE.names, THREE.is_cuda, **extra)
        assert backends_of(chain([CPU, CPU], 512).schedule(backends)) == [CPU]


def test_host_weight_makes_new_split() -> None:
    """Every offloaded host weight starts a split, so that earlier copies can go."""
    scheduler = chain([CPU, CPU, CPU], 512).schedule()
    assert backends_of(scheduler) == [GPU, GPU, GPU]
    assert [len(split.inputs) for split in scheduler.splits] == [2, 1, 1]


def test_unsupported_types_stay_on_the_cpu() -> None:
    """A product that CUDA has no kernel for runs where it can."""
    assert backends_of(chain([GPU, CPU, GPU], 512, type="TQ1_0").schedule())[1:2] == [CPU]


def test_pin_wins() -> None:
    """A node that the callback pinned stays there; its neighbours without weights follow it."""
    graph = Weighted()
    product = graph.mul_mat(graph.weight(GPU), graph.input("F32", 256, 1))
    norm = graph.rms_norm(product)
    graph.expand(graph.mul_mat(graph.weight(OTHER), graph.scale(norm)))
    assert backends_of(graph.schedule()) == [GPU, OTHER]
    scheduler = graph.schedule(pins={norm: OTHER})
    assert scheduler.assigned[norm.index] == OTHER


def test_copies_are_made_once() -> None:
    """A tensor that a backend reads twice is copied to it once."""
    graph = Weighted()
    source = graph.mul_mat(graph.weight(GPU), graph.input("F32", 256, 1))
    a, b = (graph.mul_mat(graph.weight(OTHER), source) for _ in range(2))
    graph.expand(graph.add(a, b))
    scheduler = graph.schedule()
    assert scheduler.splits[1].inputs == [source.index]


def test_pipeline_copies() -> None:
    """With several batches in flight each input of a split and each graph input exists once per copy."""
    backends = Backends(THREE.names, THREE.is_cuda, n_copies=4)
    graph = chain([GPU, OTHER])
    scheduler = graph.schedule(backends)
    n_leafs = scheduler.flat.n_leafs
    assert len(scheduler.leafs()) == n_leafs + 4 + 2 * 4
    assert len(chain([GPU, OTHER]).schedule().leafs()) == n_leafs


def test_views_follow_their_memory() -> None:
    """A view is on the backend of what it views."""
    graph = Weighted()
    product = graph.mul_mat(graph.weight(OTHER), graph.input("F32", 256, 1))
    view = graph.reshape(product, 16, 16)
    graph.expand(graph.mul_mat(graph.weight(GPU, 16), view))
    scheduler = graph.schedule()
    assert scheduler.assigned[view.index] == OTHER
