"""Turns an assignment into exact bytes per device: weights, KV caches and recurrent state.

Mirrors the buffers of llama-model-loader.cpp and ggml-backend.cpp, and llama-kv-cache*.cpp and
llama-memory-*.cpp. Compute buffers are not here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from placement.inputs.machine import Device, Machine
from placement.inputs.model import Model, Tensor
from placement.inputs.problem import CPU, HOST, Assignment, Settings
from placement.inputs.quants import block, row_bytes
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.architecture.records import Architecture, Cache, LayerFacts, PlacedTensor
from placement.llamacpp.backend_rules import CPU_ALIGNMENT_BYTES, CUDA_ALIGNMENT_BYTES, cuda_padding_bytes
from placement.llamacpp.context_rules import (
    ContextSize,
    compressed_cells,
    padded_cells,
    rounded_context,
    window_cells,
)
from placement.units import pad

STATE_BYTES = 4  # states are always F32


@dataclass(frozen=True, slots=True)
class DeviceMemory:
    """Bytes on one device: weights, and the context (KV caches plus recurrent state)."""

    weights_bytes: int
    context_bytes: int


def context_size(model: Model, settings: Settings) -> ContextSize:
    """The model's context after the engine's rounding."""
    return rounded_context(settings, describe(model).n_ctx_train)


def weight_bytes(tensor: Tensor, device: Device | None) -> int:
    """Bytes that a tensor takes in a weight buffer; `device` None is host memory, which RPC workers pad like."""
    if device is None or not device.is_cuda:
        return pad(tensor.n_bytes, CPU_ALIGNMENT_BYTES)
    is_quantised = block(tensor.type)[0] > 1
    padding = cuda_padding_bytes(tensor.type, tensor.shape[0]) if is_quantised else 0
    return pad(tensor.n_bytes + padding, CUDA_ALIGNMENT_BYTES)


def tensor_devices(model: Model, machine: Machine, assignment: Assignment) -> dict[str, str]:
    """Every loaded tensor's device name, or "CPU".

    The second copy of a tied embedding appears as "output.weight", unless the embedding's own device already
    serves as the output's. Tensors shared by all layers appear with their first layer's device.
    """
    return {
        placed.name: device
        for placed, device in placed_tensors(model, machine, assignment)
        if not (placed.is_shared and device != assignment.homes[0])
    }


def placed_tensors(model: Model, machine: Machine, assignment: Assignment) -> list[tuple[PlacedTensor, str]]:
    """Every allocation of a tensor with its device: tied and shared tensors may have several."""
    moved = dict(assignment.moved)
    homes = assignment.homes
    architecture = describe(model)
    cuda = {device.name for device in machine.devices if device.is_cuda}
    results: list[tuple[PlacedTensor, str]] = []
    for placed in architecture.tensors:
        override = moved.get(placed.tensor.name) if moved and not placed.is_lazy else None
        if override is not None:
            targets = [override]
        elif placed.is_shared:
            targets = list(dict.fromkeys(homes[:-1]))
        else:
            targets = [CPU if placed.layer is None else homes[placed.layer]]
        for device in targets:
            is_kept = override is None and device in cuda and not placed.has_cuda_kernel
            results.append((placed, CPU if is_kept else device))
    return results if architecture.rule.is_tied_copy_separate else _merge_tied(results)


def _merge_tied(result: list[tuple[PlacedTensor, str]]) -> list[tuple[PlacedTensor, str]]:
    """Drop the copy of a tied embedding where the first one is on the same device."""
    taken = {(placed.tensor.name, device) for placed, device in result if not placed.is_copy}
    return [pair for pair in result if not (pair[0].is_copy and (pair[0].tensor.name, pair[1]) in taken)]


def has_one_kv_type(architecture: Architecture) -> bool:
    """Whether the engine refuses a V type that is not K's (llama_init_from_model of llama-context.cpp)."""
    return architecture.is_mla or architecture.rule.memory == "dsv4"


def undivided_heads(architecture: Architecture, kv_type: str, *, is_k: bool) -> list[int]:
    """Head sizes of K or V that blocks of the type do not divide, smallest first.

    With any, the engine starts with that type only without flash attention (llama-context.cpp).
    """
    caches = (cache for layer in architecture.layers for cache in layer.caches if not cache.is_indexer)
    sizes = {cache.k_head if is_k else cache.v_head for cache in caches}
    return sorted(size for size in sizes if size % block(kv_type.upper())[0])


def startable(model: Model, settings: Settings) -> Settings | None:
    """The settings with what the engine demands of their cache types; None where it starts with neither.

    One type where it knows only one cache (V's counts for nothing there), flash attention for a quantised V
    (llama_init_from_model of llama-context.cpp).
    """
    architecture = describe(model)
    if has_one_kv_type(architecture):
        settings = replace(settings, kv_type_v=settings.kv_type_k)
    if block(settings.kv_type_v.upper())[0] > 1 and settings.flash_attention == "off":
        settings = replace(settings, flash_attention="on")
    if settings.flash_attention == "off":
        return settings
    kinds = ((settings.kv_type_k, True), (settings.kv_type_v, False))
    is_cut = any(undivided_heads(architecture, kv_type, is_k=is_k) for kv_type, is_k in kinds)
    return None if is_cut else settings


def layer_context_bytes(model: Model, settings: Settings) -> tuple[int, ...]:
    """KV cache plus recurrent state of each layer at its home, in bytes; `n_layer_all` entries."""
    architecture = describe(model)
    size = context_size(model, settings)
    return tuple(
        _cache_bytes(architecture, layer, settings, size) + _state_bytes(architecture, layer, size)
        for layer in architecture.layers
    )


def layer_kv_bytes(model: Model, settings: Settings) -> tuple[int, ...]:
    """KV caches alone of each layer, indexer keys included, in bytes."""
    architecture = describe(model)
    size = context_size(model, settings)
    return tuple(_cache_bytes(architecture, layer, settings, size) for layer in architecture.layers)


def cache_cells(cache: Cache, settings: Settings, size: ContextSize) -> int:
    """Cells per stream of one cache (llama-kv-cache-iswa.cpp, llama-kv-cache-dsv4.cpp)."""
    if cache.ratio > 1:
        return compressed_cells(size.cells, cache.ratio)
    if cache.window_tokens is None or settings.is_swa_full:
        return size.cells
    n_windows = 1 if cache.is_per_sequence or not settings.is_kv_unified else size.n_sequences
    return window_cells(size.cells, cache.window_tokens, n_windows, size.ubatch_tokens)


def _row_bytes(architecture: Architecture, cache: Cache, settings: Settings) -> int:
    """Bytes of one cell: a row of K and one of V."""
    v_width = cache.v_width
    has_flash = settings.flash_attention != "off" and architecture.rule.has_flash_attention
    if v_width and not has_flash and not cache.is_indexer:
        v_width = architecture.v_width_max
    k_bytes = row_bytes(settings.kv_type_k.upper(), cache.k_width) if cache.k_width else 0
    return k_bytes + (row_bytes(settings.kv_type_v.upper(), v_width) if v_width else 0)


def _cache_bytes(architecture: Architecture, layer: LayerFacts, settings: Settings, size: ContextSize) -> int:
    total = 0
    for cache in layer.caches:
        n_streams = size.n_sequences if cache.is_per_sequence else size.n_streams
        cells = cache_cells(cache, settings, size)
        total += _row_bytes(architecture, cache, settings) * cells * n_streams
    return total


def _state_bytes(architecture: Architecture, layer: LayerFacts, size: ContextSize) -> int:
    elements = layer.state_r + layer.state_s + layer.state_extra
    return STATE_BYTES * elements * size.n_sequences if architecture.has_memory else 0


def kv_bytes_read(model: Model, settings: Settings, depth_tokens: int) -> tuple[int, ...]:
    """Bytes of context memory that one decoded token moves in each layer, `depth_tokens` already there.

    Attention reads whole blocks of 256 cells, at most the cache; sparse attention reads its indexer's keys
    and the cells selected; state is read and written. A layer that reuses another's cache is counted itself.
    """
    architecture = describe(model)
    size = context_size(model, settings)
    totals = []
    for layer in architecture.layers:
        owner = architecture.layers[layer.cache_layer] if layer.cache_layer is not None else layer
        total = 0
        for cache in owner.caches:
            cells = _cells_read(cache, settings, size, depth_tokens)
            if layer.is_sparse and not cache.is_indexer and cache.window_tokens is None:
                cells = min(cells, architecture.sparse_tokens)
            total += cells * _row_bytes(architecture, cache, settings)
        totals.append(total + 2 * STATE_BYTES * (layer.state_r + layer.state_s))
    return tuple(totals)


def _cells_read(cache: Cache, settings: Settings, size: ContextSize, depth_tokens: int) -> int:
    filled = max(-(-(depth_tokens + 1) // cache.ratio), 1)
    return min(cache_cells(cache, settings, size), padded_cells(filled))


def static_memory(model: Model, machine: Machine, assignment: Assignment) -> dict[str, DeviceMemory]:
    """Weights and context bytes of every device of the assignment and of "Host", without compute buffers.

    Raises:
        KeyError: the assignment names a device that the machine does not have.
    """
    devices = {name: machine.device(name) for name in assignment.devices}
    weights = dict.fromkeys((*assignment.devices, HOST), 0)
    context = dict.fromkeys(weights, 0)
    for placed, name in placed_tensors(model, machine, assignment):
        weights[HOST if name == CPU else name] += weight_bytes(placed.tensor, devices.get(name))
    per_layer = layer_context_bytes(model, assignment.settings)
    for name, n_bytes in zip(assignment.homes, per_layer, strict=False):
        is_host = name == CPU or not assignment.settings.is_kv_offloaded
        context[HOST if is_host else name] += n_bytes
    return {name: DeviceMemory(weights[name], context[name]) for name in weights}
