"""Tells which tensors of a file the engine allocates, in which layer's memory, and which it leaves alone.

Mirrors LLM_TENSOR_INFOS of llama-arch.cpp, create_tensor of llama-model-loader.cpp, and ggml-cuda's kernels.
"""

from __future__ import annotations

import math
import re

from placement.inputs.model import Model, Tensor
from placement.llamacpp.architecture.header import HeaderFacts
from placement.llamacpp.architecture.records import PlacedTensor
from placement.llamacpp.architecture.rules import (
    CONV_TENSORS,
    FIRST_LAYER_TENSORS,
    INPUT_TENSORS,
    LAZY_ARCHITECTURES,
    LAZY_MIN_BYTES,
    LAZY_TENSORS,
    PLAIN,
    ROPE_TENSORS,
    SCAN_ARCHITECTURES,
    UNUSED_TENSORS,
    Rule,
)
from placement.llamacpp.backend_rules import NO_CUDA_TYPES, has_conv_kernel, has_scan_kernel

INPUT, REPEATING, OUTPUT = "input", "repeating", "output"
TIED_OUTPUT = "output.weight"  # the name that the second copy of a tied token embedding goes by

_BLOCK = re.compile(r"(?:(?:enc|dec)\.)?(?:blk|convnext|posnet)\.(\d+)\.")


def tensor_class(name: str, rule: Rule = PLAIN) -> str:
    """ "input", "repeating" or "output": the list of devices that the tensor is loaded to by default."""
    base = _base(name)
    if base in INPUT_TENSORS:
        return INPUT
    if base == "token_embd_norm" and rule.has_token_norm_as_output:
        return OUTPUT
    if _BLOCK.match(name) or base in FIRST_LAYER_TENSORS or base in ROPE_TENSORS:
        return REPEATING
    return OUTPUT


def tensor_layer(name: str) -> int | None:
    """The N of `blk.N.`, `dec.blk.N.`, `convnext.N.` and the like; None without one."""
    match = _BLOCK.match(name)
    return int(match.group(1)) if match else None


def _base(name: str) -> str:
    """The name without its ".weight", ".bias" or ".scale"."""
    stem, _, suffix = name.rpartition(".")
    return stem if suffix in ("weight", "bias", "scale", "input_scale") else name


def place_tensors(model: Model, header: HeaderFacts) -> tuple[tuple[PlacedTensor, ...], tuple[Tensor, ...]]:
    """The tensors that the engine allocates, in file order, and those that it leaves in the file."""
    placed: list[PlacedTensor] = []
    skipped: list[Tensor] = []
    for tensor in model.tensors:
        if _is_skipped(tensor, header):
            skipped.append(tensor)
            continue
        kind = tensor_class(tensor.name, header.rule)
        number = tensor_layer(tensor.name) or 0
        layer = {INPUT: None, OUTPUT: header.n_layer_all, REPEATING: number}[kind]
        is_shared = _base(tensor.name) in ROPE_TENSORS
        has_kernel = _has_cuda_kernel(tensor, header)
        is_lazy = _is_lazy(tensor, model)
        placed.append(PlacedTensor(tensor.name, tensor, kind, layer, False, is_shared, has_kernel, is_lazy))
    embedding = model.by_name.get("token_embd.weight")
    if embedding is not None and header.rule.is_output_tied and TIED_OUTPUT not in model.by_name:
        has_kernel = _has_cuda_kernel(embedding, header)
        placed.append(
            PlacedTensor(TIED_OUTPUT, embedding, OUTPUT, header.n_layer_all, True, False, has_kernel)
        )
    return tuple(placed), tuple(skipped)


def _is_skipped(tensor: Tensor, header: HeaderFacts) -> bool:
    base = _base(tensor.name)
    layer = tensor_layer(tensor.name)
    if layer is not None and layer >= header.n_layer and not header.rule.has_router_layer:
        return base.partition(".")[2].partition(".")[2] not in header.rule.nextn_loaded
    return base.rpartition(".")[2] in UNUSED_TENSORS or base in UNUSED_TENSORS


def _is_lazy(tensor: Tensor, model: Model) -> bool:
    """Whether the default lazy mode applies (lazy_read::add of llama-model-loader.cpp)."""
    is_candidate = _base(tensor.name) in LAZY_TENSORS and model.architecture in LAZY_ARCHITECTURES
    return is_candidate and tensor.n_bytes > LAZY_MIN_BYTES


def _has_cuda_kernel(tensor: Tensor, header: HeaderFacts) -> bool:
    """Whether ggml-cuda supports the operation that the engine tries the weight with."""
    name = _base(tensor.name)
    name = name.partition(".")[2].partition(".")[2] if _BLOCK.match(name) else name
    if tensor.type in NO_CUDA_TYPES:
        return False
    if tensor.type == "BF16" and (name.endswith("norm") or tensor.name.endswith(".bias")):
        return False
    if name in CONV_TENSORS and tensor.name.endswith(".weight"):
        return has_conv_kernel(math.prod(tensor.shape[1:2]))
    if name == "ssm_a" and header.model.architecture in SCAN_ARCHITECTURES:
        return _has_scan_kernel(tensor, header)
    return True


def _has_scan_kernel(tensor: Tensor, header: HeaderFacts) -> bool:
    d_inner = header.integer("ssm.inner_size")
    n_head = tensor.shape[1] if len(tensor.shape) > 1 else 1
    head_size = d_inner // max(n_head, 1)
    n_rows = tensor.shape[0]
    d_state = header.integer("ssm.state_size") if n_rows == 1 else n_rows
    return has_scan_kernel(n_rows, d_state, head_size, n_head, header.integer("ssm.group_count"))
