"""Advice on caches and attention: types, flash attention, and where the cache is kept."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from placement.inputs.problem import CPU
from placement.inputs.quants import block
from placement.llamacpp.architecture.records import LayerFacts
from placement.llamacpp.backend_rules import CUDA_FLASH_TYPES, has_vector_kernel
from placement.llamacpp.memory import (
    context_size,
    has_one_kv_type,
    kv_bytes_read,
    layer_context_bytes,
    undivided_heads,
)
from placement.predict.advice.case import Advice, Case, count, layer_list
from placement.units import MIB, format_bytes

_CUDA_PAIRS = {("q4_0", "q4_0"), ("q8_0", "q8_0"), ("f16", "f16"), ("bf16", "bf16")}  # GGML_CUDA_FA_QUANTS
F16_BYTES = 2


def kv_on_host(case: Case) -> Iterator[Advice]:
    """`-nkvo` with flash attention: the cards still compute attention, so the cache crosses the link."""
    settings = case.assignment.settings
    remote = [i for i, home in enumerate(case.assignment.homes[:-1]) if home != CPU]
    if settings.is_kv_offloaded or settings.flash_attention == "off" or not remote:
        return
    depth = context_size(case.model, settings).cells - 1
    read = kv_bytes_read(case.model, settings, depth)
    n_bytes = sum(read[i] for i in remote if i < len(read))
    link = case.machine.device(case.assignment.homes[remote[0]]).link_gb_per_s
    yield Advice(
        "nkvo-flash-attention",
        f"-nkvo with flash attention copies {format_bytes(n_bytes)} of KV to the cards for every token "
        f"at full "
        f"context ({1e3 * n_bytes / (link * 1e9):.1f} ms over a link of {link:g} GB/s); keep KV on the "
        f"cards, or "
        "add -fa off to compute attention on the CPU",
    )


def kv_types_without_kernel(case: Case) -> Iterator[Advice]:
    """K and V types that default CUDA builds have no decode kernel for."""
    settings = case.assignment.settings
    pair = (settings.kv_type_k, settings.kv_type_v)
    if has_one_kv_type(case.architecture) and pair[0] != pair[1]:
        yield Advice(
            "kv-types-mixed",
            f"-ctk {pair[0]} and -ctv {pair[1]} differ: with latent attention the engine does not start; "
            f"its one "
            f"cache of {format_bytes(sum(layer_context_bytes(case.model, settings)))} is K, so use the "
            f"same type",
        )
        return
    if not case.is_on_cuda or pair in _CUDA_PAIRS or settings.flash_attention == "off":
        return
    cells = context_size(case.model, settings).cells
    layers = [layer for layer in case.architecture.layers if layer.is_loaded and _has_vector_heads(layer)]
    if not layers:
        return
    code = "kv-types-mixed" if pair[0] != pair[1] else "kv-type-without-kernel"
    if not CUDA_FLASH_TYPES.issuperset(type_name.upper() for type_name in pair):
        yield Advice(
            code, f"no CUDA flash attention for {'/'.join(pair)}: {count(len(layers), 'layer')} on the CPU"
        )
        return
    n_bytes = sum(F16_BYTES * cells * (layer.k_width + layer.v_width) for layer in layers)
    yield Advice(
        code,
        f"no CUDA flash-attention kernel for K {pair[0]} with V {pair[1]} in default builds: "
        f"{format_bytes(n_bytes)} "
        "of f16 copies are written for every token at full context; use the same f16, bf16, q8_0 or q4_0 "
        "for both",
    )


def _has_vector_heads(layer: LayerFacts) -> bool:
    """Whether single tokens take the kernel that reads quantised caches as they are."""
    heads = [cache.k_head for cache in layer.caches if not cache.is_indexer]
    return any(map(has_vector_kernel, heads))


def quantised_v_without_flash(case: Case) -> Iterator[Advice]:
    """A quantised V cache needs flash attention: the engine does not start."""
    settings = case.assignment.settings
    if settings.flash_attention != "off" or block(settings.kv_type_v.upper())[0] == 1:
        return
    f16 = sum(layer_context_bytes(case.model, replace(settings, kv_type_v="f16")))
    extra = f16 - sum(layer_context_bytes(case.model, settings))
    yield Advice(
        "quantised-v-without-flash-attention",
        f"-ctv {settings.kv_type_v} with -fa off: the engine does not start; use -fa on, or -ctv f16 for "
        f"{format_bytes(max(extra, 0))} more",
    )


def kv_type_and_head_size(case: Case) -> Iterator[Advice]:
    """A block of a quantised cache must divide the heads: the engine does not start."""
    settings = case.assignment.settings
    if settings.flash_attention == "off":
        return
    for name, type_name in (("k", settings.kv_type_k), ("v", settings.kv_type_v)):
        bad = undivided_heads(case.architecture, type_name, is_k=name == "k")
        if bad:
            yield Advice(
                "kv-type-head-size",
                f"-ct{name} {type_name} has blocks of {block(type_name.upper())[0]}, which do not divide "
                f"heads of {bad[0]}: the engine does not start",
            )


def flash_attention_turned_off(case: Case) -> Iterator[Advice]:
    """`-fa auto` gives up where a layer's attention sinks are on another card than its cache."""
    settings = case.assignment.settings
    if settings.flash_attention != "auto" or block(settings.kv_type_v.upper())[0] > 1:
        return
    homes, gpus = case.assignment.homes, set(case.assignment.devices)
    layers = [
        tensor.layer
        for name, device in case.assignment.moved
        if ".attn_sinks" in name
        and (tensor := case.model.by_name[name]).layer is not None
        and device in gpus
        and homes[tensor.layer] in gpus
    ]
    if not layers:
        return
    cost = ""
    if case.planner is not None:
        off = case.planner(replace(case.assignment, settings=replace(settings, flash_attention="off")))
        on = case.planner(replace(case.assignment, settings=replace(settings, flash_attention="on")))
        extra = sum(off.compute_bytes.values()) - sum(on.compute_bytes.values())
        cost = f", {format_bytes(extra)} more of compute buffers"
    results = [layer for layer in layers if layer is not None]
    yield Advice(
        "flash-attention-auto-off",
        f"-fa auto turns flash attention off: {count(len(results), 'layer')} ({layer_list(results)}) have "
        f"attention "
        f"weights and KV on different cards{cost}; say -fa on, or move layers with -ts",
    )


def slots_by_default(case: Case) -> Iterator[Advice]:
    """llama-server's four automatic slots, where they cost memory."""
    if case.program != "llama-server" or case.arguments.n_slots is not None:
        return
    settings = case.assignment.settings
    one = sum(layer_context_bytes(case.model, replace(settings, n_slots=1)))
    extra = sum(layer_context_bytes(case.model, settings)) - one
    if extra >= 16 * MIB:
        yield Advice(
            "slots-auto",
            f"without -np llama-server opens {settings.n_slots} slots, whose states and windows take "
            f"{format_bytes(extra)} more than one; use -np 1 for one user",
        )


def full_window_cache(case: Case) -> Iterator[Advice]:
    """`--swa-full`: windows kept at full length."""
    settings = case.assignment.settings
    if not settings.is_swa_full:
        return
    full = sum(layer_context_bytes(case.model, settings))
    extra = full - sum(layer_context_bytes(case.model, replace(settings, is_swa_full=False)))
    if extra > 0:
        yield Advice("swa-full", f"--swa-full takes {format_bytes(extra)} more KV than the windows need")
