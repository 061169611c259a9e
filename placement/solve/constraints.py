"""What the user fixes (pins, -ngl, -ts, devices, arguments to keep) as limits of the search, each with its name.

A constraint is kept apart from the others so that a contradiction can be told as the smallest set that conflicts.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace

from placement.errors import InputError
from placement.inputs.groups import movable_groups
from placement.inputs.machine import Machine
from placement.inputs.model import Model
from placement.inputs.problem import CPU
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.arguments import Arguments
from placement.llamacpp.emit.devices import buffer_target, engine_devices, rpc_servers, selected_devices
from placement.llamacpp.emit.regex import compile_pattern
from placement.llamacpp.emit.resolve import layer_homes, model_devices
from placement.solve.frames.pieces import Pins
from placement.solve.request import Request
from placement.solve.search.configurations import SearchSpace


@dataclass(frozen=True)
class Constraint:
    """One thing that stays: how the user wrote it, and what it takes from the search space."""

    text: str
    limit: Callable[[SearchSpace], SearchSpace]


def constraints_of(model: Model, machine: Machine, request: Request) -> tuple[Constraint, ...]:
    """All that a request fixes of the placement, on this model and machine; what `keep` says comes last.

    Raises:
        InputError: a device or tensor that is not there, or too many layer counts.
    """
    return tuple(
        itertools.chain(
            _option_constraints(model, machine, request), kept_constraints(model, machine, request.kept)
        )
    )


def _option_constraints(model: Model, machine: Machine, request: Request) -> Iterator[Constraint]:
    if request.devices is not None:
        yield devices_constraint(machine, request.devices)
    if request.tensor_split is not None:
        yield ts_constraint(model, machine, request.tensor_split, request.devices, request.n_gpu_layers)
    if request.n_gpu_layers is not None:
        yield ngl_constraint(model, machine, request.n_gpu_layers)
    if request.max_cpu_layers is not None:
        yield max_cpu_layers_constraint(request.max_cpu_layers)
    for text in request.pins:
        yield pin_constraint(model, machine, text)


def apply_constraints(space: SearchSpace, constraints: Iterable[Constraint]) -> SearchSpace:
    """The search space that is left under these constraints."""
    for constraint in constraints:
        space = constraint.limit(space)
    return space


def smallest_conflict(
    constraints: Sequence[Constraint], is_possible: Callable[[Sequence[Constraint]], bool]
) -> list[Constraint]:
    """A set of constraints that cannot hold together, none of which can be left out; empty when nothing fits anyway."""
    if not is_possible(()):
        return []
    kept = list(constraints)
    for constraint in constraints:
        fewer = [each for each in kept if each is not constraint]
        if not is_possible(fewer):
            kept = fewer
    return kept


def pin_constraint(model: Model, machine: Machine, text: str) -> Constraint:
    """`REGEX=DEVICE`: every tensor that the pattern finds stays on that device.

    Raises:
        InputError: no "=", an unknown device, a bad pattern, or one that finds no tensor that can be placed.
    """
    pattern, equals, target = text.rpartition("=")
    if not equals or not pattern:
        raise InputError("--pin", "must be REGEX=DEVICE", value=text)
    try:
        device = buffer_target(engine_devices(machine, rpc_servers(machine)), target)
        return Constraint(f"--pin {text!r}", _pinned(model, pattern, device, "--pin", text))
    except InputError as exc:
        raise InputError("--pin", exc.rule, value=exc.value) from exc


def _pinned(
    model: Model, pattern: str, device: str, option: str, text: str
) -> Callable[[SearchSpace], SearchSpace]:
    results = [tensor.name for tensor in model.tensors if compile_pattern(pattern).search(tensor.name)]
    if not results:
        raise InputError(option, "matches no tensor of the model", value=text)
    homes, groups = _reach(model, set(results), device)
    if not homes and not groups and device != CPU:
        raise InputError(option, "matches only tensors that the engine keeps on the CPU", value=text)
    return lambda space: replace(space, pins=_merged(space.pins, homes, groups))


def _reach(
    model: Model, names: set[str], device: str
) -> tuple[dict[int, frozenset[str]], list[tuple[int, str, str]]]:
    """The homes and groups that putting these tensors on a device fixes; part of a group fixes all of it."""
    architecture = describe(model)
    n_layers = architecture.n_layer_all
    movable = {
        tensor.name: (layer, group.kind)
        for layer, row in enumerate(movable_groups(model, n_layers))
        for group in row
        for tensor in group.tensors
    }
    homes: dict[int, frozenset[str]] = {}
    groups: dict[tuple[int, str], str] = {}
    for placed in architecture.tensors:
        if placed.tensor.name not in names or placed.is_shared:
            continue
        if placed.tensor.name in movable:
            groups[movable[placed.tensor.name]] = device
        elif placed.layer is not None:
            homes[placed.layer] = frozenset({device})
    return homes, [(layer, kind, at) for (layer, kind), at in groups.items()]


def _merged(pins: Pins, homes: dict[int, frozenset[str]], groups: Iterable[tuple[int, str, str]]) -> Pins:
    """Pins with more homes and groups; what two of them say of one layer must both hold."""
    allowed = dict(pins.homes)
    for layer, names in homes.items():
        allowed[layer] = allowed[layer] & names if layer in allowed else names
    placed = {(layer, kind): device for layer, kind, device in pins.groups}
    for layer, kind, device in groups:
        if placed.setdefault((layer, kind), device) != device:
            allowed[layer] = frozenset()  # one group on two devices: no home can do that
    return Pins(
        tuple(sorted(allowed.items(), key=lambda item: item[0])),
        tuple((layer, kind, device) for (layer, kind), device in sorted(placed.items())),
    )


def _homes_constraint(text: str, homes: dict[int, frozenset[str]]) -> Constraint:
    return Constraint(text, lambda space: replace(space, pins=_merged(space.pins, homes, ())))


def ngl_constraint(model: Model, machine: Machine, n_gpu_layers: int) -> Constraint:
    """`-ngl N`: the first layers on the CPU, N (the output counts) on GPUs."""
    n_all = describe(model).n_layer_all + 1
    gpus = frozenset(device.name for device in machine.devices)
    first = max(0, n_all - n_gpu_layers)
    homes = {i: frozenset({CPU}) if i < first else gpus for i in range(n_all)}
    return _homes_constraint(f"--ngl {n_gpu_layers}", homes)


def ts_constraint(
    model: Model,
    machine: Machine,
    shares: Sequence[float],
    devices: Sequence[str] | None,
    n_gpu_layers: int | None,
) -> Constraint:
    """`-ts a,b`: the layers over the devices as the engine would cut them.

    Raises:
        InputError: more shares than devices.
    """
    result = selected_devices(engine_devices(machine, rpc_servers(machine)), devices)
    if len(shares) > len(result):
        raise InputError("--ts", f"must have at most {len(result)} numbers, one a device", value=shares)
    padded = (*shares, *[0.0] * (len(result) - len(shares)))
    homes = layer_homes(describe(model).n_layer_all, n_gpu_layers, padded, result)
    text = "--ts " + ",".join(f"{share:g}" for share in shares)
    return _homes_constraint(text, {i: frozenset({home}) for i, home in enumerate(homes)})


def devices_constraint(machine: Machine, names: Sequence[str]) -> Constraint:
    """`--devices A,B`: these cards in this order, each with at least one layer; "none" for the CPU alone.

    Raises:
        InputError: a name that the machine does not have, or one given twice.
    """
    text = "--devices " + ",".join(names)
    if [name.lower() for name in names] == ["none"]:
        return Constraint(text, lambda space: replace(space, orders=((),)))
    picked = selected_devices(engine_devices(machine, rpc_servers(machine)), names)
    order = tuple(each.device.name for each in picked)
    return Constraint(text, lambda space: replace(space, orders=(order,)))


def max_cpu_layers_constraint(most: int) -> Constraint:
    """`--max-cpu-layers N`: at most N layers live on the CPU or keep tensors there."""
    return Constraint(f"--max-cpu-layers {most}", lambda space: replace(space, max_host_layers=most))


def kept_constraints(model: Model, machine: Machine, arguments: Arguments) -> list[Constraint]:
    """The placement part of the arguments of `--keep` as constraints.

    Raises:
        InputError: a device that is not there, or too many layer counts.
    """
    constraints: list[Constraint] = []
    if arguments.devices is not None:
        constraints.append(devices_constraint(machine, arguments.devices or ("none",)))
    if arguments.split_mode == "none":
        picked = model_devices(engine_devices(machine, rpc_servers(machine)), arguments)
        constraints.append(devices_constraint(machine, [each.dev_name for each in picked] or ["none"]))
    if arguments.tensor_split is not None:
        constraints.append(
            ts_constraint(model, machine, arguments.tensor_split, arguments.devices, arguments.n_gpu_layers)
        )
    elif arguments.n_gpu_layers is not None and arguments.n_gpu_layers >= 0:
        constraints.append(ngl_constraint(model, machine, arguments.n_gpu_layers))
    taken: set[str] = set()
    for override in arguments.overrides:
        pattern = compile_pattern(override.pattern)
        names = {t.name for t in model.tensors if t.name not in taken and pattern.search(t.name)}
        taken |= names
        device = buffer_target(engine_devices(machine, rpc_servers(machine)), override.target)
        constraints.append(
            _override_constraint(
                model, f"{override.option} {override.pattern}={override.target}", names, device
            )
        )
    if arguments.ubatch_tokens is not None:
        constraints.append(
            _field_constraint(f"-ub {arguments.ubatch_tokens}", ubatches=(arguments.ubatch_tokens,))
        )
    if arguments.load_mode is not None:
        constraints.append(_field_constraint(f"-lm {arguments.load_mode}", load_modes=(arguments.load_mode,)))
    return constraints


def _override_constraint(model: Model, text: str, names: set[str], device: str) -> Constraint:
    homes, groups = _reach(model, names, device)
    return Constraint(text, lambda space: replace(space, pins=_merged(space.pins, homes, groups)))


def _field_constraint(text: str, **fields: object) -> Constraint:
    return Constraint(text, lambda space: replace(space, **fields))  # type: ignore[arg-type]
