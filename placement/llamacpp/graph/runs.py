"""Which layers stand for all: long runs of alike layers are cut to a few repetitions that extrapolate."""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

from placement.llamacpp.architecture.records import Architecture
from placement.llamacpp.architecture.tensors import REPEATING

MAX_PERIOD = 8
KEPT_REPETITIONS = 3


@dataclass(frozen=True, slots=True)
class LayerRun:
    """A shortened run: where its inner repetitions begin in the kept layers, and how many more were left out.

    `period` layers make one repetition.
    """

    at: int
    period: int
    n_left_out: int


def shorten(keys: Sequence[Hashable]) -> tuple[list[int], list[LayerRun]]:
    """The layers to keep, and the runs that lost repetitions; equal keys mean layers that behave alike."""
    kept: list[int] = []
    runs: list[LayerRun] = []
    i = 0
    while i < len(keys):
        period, n = _best_period(keys, i)
        if n <= KEPT_REPETITIONS + 1:
            kept.append(i)
            i += 1
            continue
        # best-fit packing may alternate between two patterns: the number left out stays even
        n_kept = KEPT_REPETITIONS + (n - KEPT_REPETITIONS) % 2
        n_before = (n_kept - 1) * period
        end = i + n * period
        runs.append(LayerRun(len(kept) + n_before - period, period, n - n_kept))
        kept += range(i, i + n_before)
        kept += range(end - period, end)
        i = end
    return kept, runs


def _best_period(keys: Sequence[Hashable], start: int) -> tuple[int, int]:
    """The period at `start` by which most layers can be left out, and its number of repetitions."""
    best, best_n, best_saved = 1, 1, 0
    for period in range(1, MAX_PERIOD + 1):
        end = start + period
        while end < len(keys) and keys[end] == keys[end - period]:
            end += 1
        n = (end - start) // period
        saved = (n - KEPT_REPETITIONS) * period
        if saved > best_saved:
            best, best_n, best_saved = period, n, saved
    return best, best_n


def layer_shapes(facts: Architecture) -> list[Hashable]:
    """What each layer of the trunk is made of, itself left out: equal numbers mean layers made alike."""
    tensors: list[list[Hashable]] = [[] for _ in facts.layers]
    for each in facts.tensors:
        if each.kind == REPEATING and each.layer is not None and each.layer < len(tensors):
            name = each.tensor.name.split(".", 2)[-1]
            tensors[each.layer].append((name, each.tensor.type, each.tensor.shape, each.has_cuda_kernel))
    numbers: dict[Hashable, int] = {}
    shapes: list[Hashable] = []
    for layer in facts.layers[: facts.n_layer]:
        owner = None if layer.cache_layer == layer.index else layer.cache_layer
        key = (
            dataclasses.replace(layer, index=0, cache_layer=owner),
            tuple(sorted(tensors[layer.index], key=str)),
        )
        shapes.append(numbers.setdefault(key, len(numbers)))
    return shapes
