"""An assignment → which of its decode graph's splits lie between GPUs, and how often a worker is called."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

from placement.inputs.problem import CPU, Assignment, Problem

# Tensors that a layer uses after its feed-forward network: it then ends at home, wherever the network is.
AFTER_FFN = ("_shexp", "post_ffw", "ffn_post", "layer_out", "ffn_norm_exps")


@dataclass(frozen=True, slots=True)
class Crossings:
    """Of a decode graph: splits between two GPUs, and round trips to RPC workers."""

    n_between: float
    n_rpc: int


def count_crossings(problem: Problem, assignment: Assignment, splits_decode: int) -> Crossings:
    """Tell the splits between GPUs from those to or from the host, by where things live.

    A graph has a split for the host's embedding, one per device, and more (usually two) per layer with moved
    tensors. A boundary is hidden where the layer before it ends on the host.
    """
    machine, homes = problem.machine, assignment.homes
    moved: dict[int, dict[str, str]] = {}
    for name, where in assignment.moved:
        if name.startswith("blk."):
            moved.setdefault(int(name.split(".")[1]), {})[name] = where
    on_gpus = {layer for layer, names in moved.items() if homes[layer] != CPU and CPU not in names.values()}
    gpu_homes = [home for home in homes if home != CPU]
    n_boundaries = sum(a != b for a, b in itertools.pairwise(gpu_homes))
    n_hidden = sum(
        CPU not in (a, b) and a != b and _ends_on_host(problem, layer, moved.get(layer, {}))
        for layer, (a, b) in enumerate(itertools.pairwise(homes))
    )
    n_more = max(0, splits_decode - (2 + n_boundaries - n_hidden)) if gpu_homes else 0
    share = len(on_gpus) / len(moved) if moved else 0.0
    n_rpc = sum(machine.device(name).is_rpc for name in assignment.devices)
    n_rpc += sum(
        any(where != CPU and machine.device(where).is_rpc for where in (homes[layer], *names.values()))
        for layer, names in moved.items()
    )
    return Crossings(n_boundaries - n_hidden + n_more * share, n_rpc)


def _ends_on_host(problem: Problem, layer: int, moved: dict[str, str]) -> bool:
    """Whether a layer's last work is done on the host."""
    is_last_there = any("ffn_down" in name and where == CPU for name, where in moved.items())
    if not is_last_there:
        return False
    head = f"blk.{layer}."
    return not any(
        name.startswith(head) and any(mark in name for mark in AFTER_FFN) for name in problem.model.by_name
    )
