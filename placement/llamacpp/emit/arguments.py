"""An `Assignment` into the exact engine arguments that reproduce it; checked against every tensor name."""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Sequence

from placement.errors import InputError
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import CPU, Assignment, Settings
from placement.llamacpp.context_rules import SERVER_SLOTS
from placement.llamacpp.emit.devices import NamedDevice, engine_devices, rpc_servers
from placement.llamacpp.emit.regex import compile_pattern, patterns_for

NO_TENSOR = "^$"  # an override that matches no tensor


def emit_arguments(
    model: Model, machine: Machine, assignment: Assignment, program: str = "llama-server"
) -> list[str]:
    """The argument tokens that make the engine place a model so, without the model path.

    One card is selected with `-dev`: unlike `-sm none -mg N` it does not count RPC devices, and the engine puts
    an image projector on the same card. llama-server and llama-fit-params both take the result; `-kvu` is
    left out for the latter, which plans the shared cache as one sequence.

    Raises:
        InputError: the assignment cannot be said in arguments (devices out of order, a CPU layer after a GPU
            layer, a tensor on a device that is not given).
    """
    servers = rpc_servers(machine) if any(_is_remote(machine, name) for name in assignment.devices) else ()
    result = engine_devices(machine, servers)
    by_name = {each.device.name: each for each in result}
    for name in (*assignment.devices, *(device for _, device in assignment.moved)):
        if name != CPU and name not in by_name:
            raise InputError("assignment", f"must use devices of machine {machine.name}", value=name)
    devices = [by_name[name] for name in assignment.devices]
    return [
        *(["--rpc", ",".join(servers)] if servers else []),
        *_layer_tokens(assignment, result, devices),
        *_override_tokens(model, assignment, by_name),
        *_setting_tokens(assignment.settings, program),
    ]


def shell_command(program: str, model_path: str, args: Sequence[str], extra_args: Sequence[str] = ()) -> str:
    """One POSIX shell line that runs the program on the model with these arguments."""
    return shlex.join([program, "-m", model_path, *args, *extra_args])


def _is_remote(machine: Machine, name: str) -> bool:
    return any(device.name == name and device.is_rpc for device in machine.devices)


def _layer_tokens(
    assignment: Assignment, result: Sequence[NamedDevice], devices: Sequence[NamedDevice]
) -> list[str]:
    homes = assignment.homes
    n_gpu = sum(home != CPU for home in homes)
    counts = [homes.count(name) for name in assignment.devices]
    blocks = [CPU] * (len(homes) - n_gpu)
    blocks += itertools.chain.from_iterable(
        [name] * count for name, count in zip(assignment.devices, counts, strict=True)
    )
    if blocks != list(homes):
        raise InputError("assignment", "must have CPU layers first, then each device's in device order")
    tokens = ["-ngl", str(n_gpu)]
    if n_gpu and len(devices) > 1:
        tokens += ["-ts", ",".join(map(str, counts))]
    if list(devices) != list(result):
        tokens += ["-dev", ",".join(each.dev_name for each in devices) or "none"]
    if assignment.settings.split_mode != "layer":
        tokens += ["-sm", assignment.settings.split_mode]
    return tokens


def _override_tokens(model: Model, assignment: Assignment, by_name: dict[str, NamedDevice]) -> list[str]:
    """One `-ot` with a few patterns for each target, the map they make equal to `moved`."""
    targets = dict.fromkeys(device for _, device in assignment.moved)
    names = [tensor.name for tensor in model.tensors]
    pairs = [
        (pattern, target)
        for target in targets
        for pattern in patterns_for([name for name, device in assignment.moved if device == target], names)
    ]
    _check_map(pairs, names, dict(assignment.moved))
    if not pairs and assignment.settings.has_overrides:
        pairs = [(NO_TENSOR, CPU)]
    written = [
        f"{pattern}={CPU if target == CPU else by_name[target].buffer_name}" for pattern, target in pairs
    ]
    return ["-ot", ",".join(written)] if written else []


def _check_map(pairs: Sequence[tuple[str, str]], names: Sequence[str], meant: dict[str, str]) -> None:
    """Match every tensor name as the engine will, and insist on the map that was meant."""
    searches = [(compile_pattern(pattern).search, target) for pattern, target in pairs]
    made = {
        name: next(target for search, target in searches if search(name))
        for name in names
        if any(search(name) for search, _ in searches)
    }
    if made != meant:
        wrong = sorted(made.items() ^ meant.items())[:3]
        raise InputError("assignment", "must move only tensors of the model", value=wrong)


def _setting_tokens(settings: Settings, program: str) -> list[str]:
    tokens = ["-c", str(settings.ctx_tokens), "-b", str(settings.batch_tokens)]
    tokens += ["-ub", str(settings.ubatch_tokens), *_slot_tokens(settings, program)]
    tokens += ["-ctk", settings.kv_type_k, "-ctv", settings.kv_type_v, "-fa", settings.flash_attention]
    tokens += ["-fit", "off"]
    if settings.load_mode != "auto":
        tokens += ["-lm", settings.load_mode]
    tokens += [] if settings.is_kv_offloaded else ["-nkvo"]
    tokens += [] if settings.is_op_offloaded else ["--no-op-offload"]
    tokens += ["--swa-full"] if settings.is_swa_full else []
    return tokens + (["-t", str(settings.n_threads)] if settings.n_threads is not None else [])


def _slot_tokens(settings: Settings, program: str) -> list[str]:
    """`-np` and `-kvu`; neither for llama-server's own choice of slots on one cache: both programs take that."""
    if not settings.is_kv_unified or settings.n_slots == 1:
        return ["-np", str(settings.n_slots)]
    if program == "llama-fit-params":
        return ["-np", "1"]
    return [] if settings.n_slots == SERVER_SLOTS else ["-np", str(settings.n_slots), "-kvu"]
