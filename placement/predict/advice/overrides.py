"""Advice on `-ot` and its kin: what they match without meaning to, and what they leave behind."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

from placement.inputs.model import Tensor
from placement.inputs.problem import CPU, Assignment
from placement.llamacpp.arguments import Override
from placement.llamacpp.emit.regex import compile_pattern
from placement.llamacpp.memory import layer_context_bytes
from placement.predict.advice.case import (
    Advice,
    Case,
    count,
    is_ffn,
    is_norm,
    is_router,
    is_shared_expert,
    layers_named,
)
from placement.units import format_bytes

SPLITS_PER_STRANDED_LAYER = 10  # whole layer moved, its KV at home; measured on build b11434
SPLITS_PER_MOVED_PART = 2
F32_BYTES = 4


def kv_left_behind(case: Case) -> Iterator[Advice]:
    """Layers whose attention was moved by override while their cache stays at home."""
    stranded = [layer for layer in case.layers if _is_stranded(case, layer)]
    if not stranded:
        return
    per_layer = layer_context_bytes(case.model, case.assignment.settings)
    n_bytes = sum(per_layer[layer] for layer in stranded)
    homes = ", ".join(sorted({case.assignment.homes[layer] for layer in stranded}))
    better = _follow_layers(case)
    saved = case.splits_saved(better, f"about +{SPLITS_PER_STRANDED_LAYER * len(stranded)} splits a token")
    whose = "1 layer's" if len(stranded) == 1 else f"{len(stranded)} layers'"
    yield Advice(
        "kv-left-behind",
        f"{whose} KV stays on {homes} ({format_bytes(n_bytes)}, {layers_named(stranded)}) while -ot "
        f"moves the "
        f"attention: {saved}; {_instead(case.assignment, better)}",
    )


def _is_stranded(case: Case, layer: int) -> bool:
    facts = case.architecture.layers[layer]
    if not (facts.caches or facts.cache_layer is not None or facts.state_s or facts.state_r):
        return False
    parts = [tensor for tensor in case.layers[layer] if not is_ffn(tensor)]
    home = case.assignment.homes[layer]
    away = sum(tensor.n_bytes for tensor in parts if case.tensor_devices[tensor.name] != home)
    return 2 * away > sum(tensor.n_bytes for tensor in parts)


def _follow_layers(case: Case) -> Assignment:
    """The assignment in device order whose homes hold the most of the bytes that the arguments put there."""
    order = (CPU, *case.assignment.devices)
    rows = [_bytes_by_device(case, layer) for layer in range(case.architecture.n_layer_all)]
    best: list[tuple[int, tuple[str, ...]]] = [(0, ())] * len(order)
    for row in rows:
        reach = list(itertools.accumulate(best, max))
        best = [
            (score + row.get(device, 0), (*homes, device))
            for device, (score, homes) in zip(order, reach, strict=True)
        ]
    homes = max(best)[1]
    last = case.assignment.homes[-1]
    after = order[order.index(homes[-1]) :] if homes else order
    homes = (*homes, last if last in after else after[-1])
    at_home = {
        t.name: homes[t.layer] for t in case.model.tensors if t.layer is not None and t.layer < len(homes)
    }
    moved = tuple(
        (tensor.name, device)
        for tensor in case.model.tensors
        if is_ffn(tensor) and (device := case.tensor_devices[tensor.name]) != at_home.get(tensor.name, device)
    )
    return replace(case.assignment, homes=homes, moved=moved)


def _bytes_by_device(case: Case, layer: int) -> dict[str, int]:
    results: dict[str, int] = {}
    for tensor in case.layers.get(layer, []):
        device = case.tensor_devices[tensor.name]
        if device != CPU or not is_ffn(tensor):
            results[device] = results.get(device, 0) + tensor.n_bytes
    return results


def _instead(given: Assignment, better: Assignment) -> str:
    """What to write so that layers live where `better` has them."""
    only_ffn = "move only expert or FFN tensors with -ot"
    counts = [better.homes.count(name) for name in better.devices]
    if given.homes == better.homes or not any(counts):
        return only_ffn
    tokens = [] if sum(counts) == len(better.homes) else [f"-ngl {sum(counts)}"]
    tokens += [f"-ts {','.join(map(str, counts))}"] if len(counts) > 1 else []
    rest = f"and {only_ffn}" if better.moved else "instead of -ot"
    return f"use {' '.join(tokens) or '-ngl all'} {rest}"


def attention_output_matched(case: Case) -> Iterator[Advice]:
    """Patterns for `output.weight` that also take every layer's `attn_output.weight`."""
    for override, tensors in _takes(case):
        hit = [t for t in tensors if ".attn_output." in t.name]
        if not hit or not any(t.name.startswith("output.") for t in tensors) or override.option != "-ot":
            continue
        moved = {t.name for t in hit} & {name for name, _ in case.assignment.moved}
        estimate = f"about +{SPLITS_PER_MOVED_PART * len(moved)} splits a token"
        saved = case.splits_saved(case.without(moved), estimate)
        yield Advice(
            "override-attn-output",
            f"-ot {override.pattern!r} also matches attn_output of {count(len(hit), 'layer')}: {saved}; "
            r"write ^output\.weight",
        )


def router_moved(case: Case) -> Iterator[Advice]:
    """Routers taken along with the experts."""
    yield from _riders(case, "override-router", "the router", is_router)


def shared_experts_moved(case: Case) -> Iterator[Advice]:
    """Shared experts, which every token uses, taken along with the routed ones."""
    yield from _riders(case, "override-shared-experts", "shared experts", is_shared_expert)


def norms_moved(case: Case) -> Iterator[Advice]:
    """Norms taken along by patterns such as `ffn_.*`."""
    yield from _riders(case, "override-norm", "norms", is_norm)


def _riders(case: Case, code: str, what: str, is_rider: Callable[[Tensor], bool]) -> Iterator[Advice]:
    """Parts that belong at home, moved in layers whose attention stays there."""
    homes, devices = case.assignment.homes, case.tensor_devices
    hit = [
        tensor
        for layer, tensors in case.layers.items()
        if not _is_stranded(case, layer)
        for tensor in tensors
        if is_rider(tensor) and devices[tensor.name] != homes[layer]
    ]
    if hit:
        layers = sorted({tensor.layer for tensor in hit if tensor.layer is not None})
        estimate = f"up to +{SPLITS_PER_MOVED_PART * len(layers)} splits a token"
        # one kind alone would leave the splits of the others
        riders = {t.name for t in case.model.tensors if is_router(t) or is_shared_expert(t) or is_norm(t)}
        saved = case.splits_saved(case.without(riders), estimate)
        parts = "ffn_(up|down|gate)" + ("_exps" if case.architecture.n_expert else r"\.")
        n_bytes = sum(t.n_bytes for t in hit)
        yield Advice(
            code,
            f"-ot moves {what} of {count(len(layers), 'layer')} ({format_bytes(n_bytes)}, "
            f"{layers_named(layers)}): "
            f"{saved}; write {parts} to leave them at home",
        )


def gate_and_up_apart(case: Case) -> Iterator[Advice]:
    """A layer's gate and up projections on different devices."""
    apart: list[int] = []
    n_bytes = 0
    for layer, tensors in case.layers.items():
        by_part = {tensor.name.split(".", 2)[-1]: tensor for tensor in tensors}
        for kind in ("_exps", ""):
            gate, up = (by_part.get(f"ffn_{part}{kind}.weight") for part in ("gate", "up"))
            if gate and up and case.tensor_devices[gate.name] != case.tensor_devices[up.name]:
                n_used = case.architecture.layers[layer].n_expert_used if kind else 1
                apart.append(layer)
                n_bytes += F32_BYTES * up.shape[1] * max(n_used, 1)
    if apart:
        yield Advice(
            "gate-up-apart",
            f"gate and up of {count(len(apart), 'layer')} are on different devices ({layers_named(apart)}): "
            f"{format_bytes(n_bytes)} of activations cross for every token and no kernel can fuse the "
            f"two; move "
            "both or neither",
        )


def override_without_effect(case: Case) -> Iterator[Advice]:
    """Overrides that match no tensor, or only tensors that an earlier one already took."""
    names = [tensor.name for tensor in case.model.tensors]
    silent = [override for override, tensors in _takes(case) if not tensors]
    for override in [o for o in silent if o.option == "-ot"]:
        n_matched = sum(compile_pattern(override.pattern).search(name) is not None for name in names)
        if n_matched:
            yield Advice(
                "override-shadowed",
                f"-ot {override.pattern!r} does nothing: earlier patterns take all {n_matched} tensors "
                f"it matches",
            )
        else:
            yield Advice(
                "override-unmatched", f"-ot {override.pattern!r} matches none of the {len(names)} tensors"
            )
    for option, group in itertools.groupby(case.arguments.overrides, key=lambda o: o.option):
        if option != "-ot" and all(o in silent for o in group):
            yield Advice("override-unmatched", f"{option} matches none of the {len(names)} tensors")


def _takes(case: Case) -> list[tuple[Override, list[Tensor]]]:
    """Each override with the tensors that it is the first to match."""
    searches = [(override, compile_pattern(override.pattern).search) for override in case.arguments.overrides]
    taken: list[list[Tensor]] = [[] for _ in searches]
    for tensor in case.model.tensors:
        for i, (_, search) in enumerate(searches):
            if search(tensor.name):
                taken[i].append(tensor)
                break
    return [(override, tensors) for (override, _), tensors in zip(searches, taken, strict=True)]
