"""Compute buffers and splits of an architecture that no graph rule covers: an estimate from sizes alone.

It leans to more memory: an engine that runs out of it fails, one that has some left is only a little slower.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.inputs.problem import CPU, Assignment
from placement.inputs.quants import BLOCKS
from placement.llamacpp.architecture.records import Architecture
from placement.llamacpp.architecture.tensors import OUTPUT
from placement.llamacpp.graph.context import Batch, Context

LIVE_ROWS = 8  # activations as wide as the model that are alive at once
LIVE_FF_ROWS = 3  # and as wide as its feed-forward block
NODES_PER_LAYER = 40
MASK_BYTES = 6  # per cell and token: an f32 mask and its f16 copy


@dataclass(frozen=True, slots=True)
class Coarse:
    """Estimated bytes by device ("Host" is not among them), host bytes, splits and nodes."""

    device_bytes: dict[str, int]
    host_bytes: int
    n_splits: int
    n_nodes: int


def estimate(facts: Architecture, assignment: Assignment, context: Context, batch: Batch) -> Coarse:
    """Estimate the reservation of one batch."""
    layer_bytes = _layer_bytes(facts, context, batch)
    logits = 4 * facts.n_vocab * batch.n_outputs
    device_bytes = {}
    for device in assignment.devices:
        is_used = device in assignment.homes[:-1] or any(device == moved for _, moved in assignment.moved)
        total = layer_bytes if is_used else 0
        device_bytes[device] = total + (logits if assignment.homes[-1] == device else 0)
    is_cpu_used = CPU in assignment.homes[:-1] or any(device == CPU for _, device in assignment.moved)
    host = batch.n_tokens * (8 * facts.n_embd + MASK_BYTES * context.n_ctx)
    host += (layer_bytes if is_cpu_used else 0) + (logits if assignment.homes[-1] == CPU else 0)
    return Coarse(device_bytes, host, _splits(facts, assignment), NODES_PER_LAYER * facts.n_layer)


def _layer_bytes(facts: Architecture, context: Context, batch: Batch) -> int:
    n_ff = max((layer.n_ff for layer in facts.layers), default=0) * max(1, facts.n_expert_used)
    total = 4 * batch.n_tokens * (LIVE_ROWS * facts.n_embd + LIVE_FF_ROWS * n_ff)
    total += MASK_BYTES * batch.n_tokens * context.n_ctx
    width = max((layer.k_width + layer.v_width for layer in facts.layers), default=0)
    if any(BLOCKS[type][0] != 1 for type in (context.type_k, context.type_v)):
        total += 2 * width * context.n_ctx
    if not context.is_flash:
        heads = max((layer.n_head for layer in facts.layers), default=0)
        total += 8 * heads * batch.n_tokens * context.n_ctx_seq
    return total


def _splits(facts: Architecture, assignment: Assignment) -> int:
    """A split for the embedding, one per change of device, two around each layer's moved tensors."""
    homes = assignment.homes
    is_moved = dict(assignment.moved)
    split_layers = {
        each.layer
        for each in facts.tensors
        if each.kind != OUTPUT
        and each.layer is not None
        and is_moved.get(each.tensor.name, homes[each.layer]) != homes[each.layer]
    }
    changes = sum(a != b for a, b in zip((CPU, *homes[:-1]), homes, strict=True))
    return 1 + changes + 2 * len(split_layers)
