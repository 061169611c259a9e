"""Engine arguments into an `Assignment`: the rules of llama-model.cpp and llama-model-loader.cpp (b11434)."""

from __future__ import annotations

import itertools
import struct
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

from placement.errors import InputError
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import CPU, Assignment, Settings
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.architecture.tensors import INPUT, OUTPUT, tensor_class, tensor_layer
from placement.llamacpp.arguments import Arguments
from placement.llamacpp.context_rules import SERVER_SLOTS
from placement.llamacpp.emit.devices import NamedDevice, buffer_target, engine_devices, selected_devices
from placement.llamacpp.emit.regex import compile_pattern


def resolve(
    model: Model, machine: Machine, arguments: Arguments, program: str = "llama-server"
) -> Assignment:
    """Where the engine puts everything under these arguments, without its `--fit`.

    Without `-ts` the engine splits by free memory; here that is each device's `usable_mib`, so a layer at a
    boundary may differ from a run. Tensors read lazily are placed as if they were not. Where the output uses
    the token embedding, an override that matches it moves both copies and stands in `moved` even when it
    names the CPU. Mirrors `load_tensors` and `buft_for_tensor`.

    Raises:
        InputError: a device, target, pattern or index that the engine refuses, or `-sm tensor`, which has no
            placement by device.
    """
    result = engine_devices(machine, arguments.rpc)
    devices = model_devices(result, arguments)
    homes = layer_homes(
        describe(model).n_layer_all, arguments.n_gpu_layers, _shares(devices, arguments), devices
    )
    return Assignment(
        devices=tuple(each.device.name for each in devices),
        homes=homes,
        moved=_moved(model, homes, arguments, result, devices),
        settings=_settings(model, machine, arguments, program),
    )


def tensor_home(model: Model, name: str, homes: Sequence[str]) -> str:
    """The device that a tensor is on without overrides; the first layer's where each has a copy."""
    kind = tensor_class(name, describe(model).rule)
    if kind == INPUT:
        return CPU
    return homes[-1] if kind == OUTPUT else homes[tensor_layer(name) or 0]


def layer_homes(
    n_layers: int, n_gpu_layers: int | None, shares: Sequence[float], devices: Sequence[NamedDevice]
) -> tuple[str, ...]:
    """The device of each layer and of the output, in the engine's float32 arithmetic."""
    n_all = n_layers + 1
    n_gpu = n_all if n_gpu_layers is None or n_gpu_layers < 0 else n_gpu_layers
    first, n_active = max(n_all - n_gpu, 0), min(n_gpu, n_all) if devices else 0
    sums = list(itertools.accumulate(map(_float32, shares), lambda a, b: _float32(a + b)))
    points = [_float32(point / sums[-1]) for point in sums]
    homes = [CPU] * n_all
    for i in range(n_active):
        homes[first + i] = devices[bisect_right(points, _float32(i / n_active))].device.name
    return tuple(homes)


def _float32(value: float) -> float:
    """The nearest float32; one operation on two of them, done in double and rounded so, is exact."""
    return float(struct.unpack("f", struct.pack("f", value))[0])


def model_devices(result: Sequence[NamedDevice], arguments: Arguments) -> tuple[NamedDevice, ...]:
    """The devices given to the model, after `-dev`, `-sm none` and `-mg` (llama_prepare_model_devices)."""
    if arguments.split_mode == "tensor":
        raise InputError("-sm", "must not be tensor here: it has no placement by device", value="tensor")
    devices = selected_devices(result, arguments.devices)
    if arguments.split_mode != "none" or not devices:
        return devices
    index = arguments.main_gpu or 0
    if index >= len(devices):
        raise InputError("-mg", f"must be below {len(devices)}, the number of devices", value=index)
    return () if index < 0 else (devices[index],)


def _shares(devices: Sequence[NamedDevice], arguments: Arguments) -> tuple[float, ...]:
    """`-ts` over the devices, zeros added; usable memory where none of them is above zero."""
    given = (*(arguments.tensor_split or ()), *[0.0] * len(devices))[: len(devices)]
    return given if any(given) else tuple(each.device.usable_mib for each in devices)


def _moved(
    model: Model,
    homes: Sequence[str],
    arguments: Arguments,
    result: Sequence[NamedDevice],
    devices: Sequence[NamedDevice],
) -> tuple[tuple[str, str], ...]:
    """The tensors that overrides put elsewhere than home; the first pattern that matches wins."""
    usable = {CPU, *(each.device.name for each in devices)}
    overrides = [
        (compile_pattern(o.pattern), buffer_target(result, o.target), o.target) for o in arguments.overrides
    ]
    copied = (
        {each.tensor.name for each in describe(model).tensors if each.is_copy} if homes[-1] != CPU else ()
    )
    moved = []
    for tensor in model.tensors:
        for pattern, device, target in overrides:
            if pattern.search(tensor.name) is None:
                continue
            if device not in usable:
                raise InputError("-ot", "must name a device that the model is given", value=target)
            if device != tensor_home(model, tensor.name, homes) or tensor.name in copied:
                moved.append((tensor.name, device))
            break
    return tuple(moved)


def _settings(model: Model, machine: Machine, arguments: Arguments, program: str) -> Settings:
    """The settings that arguments and the program's own defaults come to."""
    given: dict[str, Any] = {
        name: getattr(arguments, name)
        for name in (
            "batch_tokens",
            "flash_attention",
            "is_kv_offloaded",
            "is_op_offloaded",
            "is_swa_full",
            "kv_type_k",
            "kv_type_v",
            "load_mode",
            "split_mode",
        )
        if getattr(arguments, name) is not None
    }
    if arguments.ubatch_tokens is not None:  # 0 means the whole batch (llama-context.cpp)
        given["ubatch_tokens"] = arguments.ubatch_tokens or arguments.batch_tokens or Settings().batch_tokens
    n_slots, is_unified = _slots(arguments, program)
    n_threads = arguments.n_threads
    return Settings(
        ctx_tokens=_ctx_tokens(model, arguments, n_slots, program),
        n_slots=n_slots,
        is_kv_unified=is_unified,
        has_overrides=bool(arguments.overrides),
        n_threads=machine.cpu.threads if n_threads is not None and n_threads <= 0 else n_threads,
        **given,
    )


def _slots(arguments: Arguments, program: str) -> tuple[int, bool]:
    """Sequences and whether they share one cache; llama-server's automatic choice is several that do."""
    given = arguments.n_slots
    if program == "llama-server" and (given is None or given < 0):
        return SERVER_SLOTS, True
    if given is not None and given < 1:
        raise InputError("-np", f"must be 1 or more for {program}", value=given)
    return given or 1, bool(arguments.is_kv_unified)


def _ctx_tokens(model: Model, arguments: Arguments, n_slots: int, program: str) -> int:
    """The context over all slots; 0 stays 0 only where the header does not say what was trained."""
    if arguments.ctx_tokens is None and arguments.ctx_per_slot_tokens and program == "llama-server":
        return n_slots * arguments.ctx_per_slot_tokens
    return arguments.ctx_tokens or describe(model).n_ctx_train
