"""The engine's device list for a machine and `--rpc`: its order, and the names in `-dev` and `-ot`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from placement.errors import InputError
from placement.inputs.machine import Device, Machine
from placement.inputs.problem import CPU


@dataclass(frozen=True, slots=True)
class NamedDevice:
    """A device of the machine as one engine run knows it.

    `dev_name` is what `-dev` takes: RPC devices are numbered over all servers in `--rpc` order. `buffer_name`
    is what `-ot` takes: "RPC0[host:port]", numbered within its server (ggml-rpc.cpp).
    """

    device: Device
    dev_name: str
    buffer_name: str


def engine_devices(machine: Machine, rpc: Sequence[str]) -> tuple[NamedDevice, ...]:
    """The devices that the engine finds, in its own order: those of the RPC servers, then the local ones.

    Raises:
        InputError: a server that the machine has no device for.
    """
    remote: list[NamedDevice] = []
    for server in dict.fromkeys(rpc):
        behind = [device for device in machine.devices if device.is_rpc and device.address == server]
        if not behind:
            known = ", ".join(rpc_servers(machine)) or "none"
            raise InputError("--rpc", f"must be a server of machine {machine.name} ({known})", value=server)
        for i, device in enumerate(behind):
            remote.append(NamedDevice(device, f"RPC{len(remote)}", f"RPC{i}[{server}]"))
    local = [NamedDevice(device, device.name, device.name) for device in machine.devices if not device.is_rpc]
    return (*remote, *local)


def rpc_servers(machine: Machine) -> tuple[str, ...]:
    """The addresses of the machine's RPC servers, first seen first."""
    return tuple(
        dict.fromkeys(device.address for device in machine.devices if device.is_rpc and device.address)
    )


def selected_devices(result: Sequence[NamedDevice], names: Sequence[str] | None) -> tuple[NamedDevice, ...]:
    """The devices of `-dev`, in its order and whatever their case; all that were found where it is not given.

    Raises:
        InputError: a name that the engine does not know, or one given twice.
    """
    if names is None:
        return tuple(result)
    by_name = {each.dev_name.lower(): each for each in result}
    picked: list[NamedDevice] = []
    for name in names:
        each = by_name.get(name.lower())
        if each is None:
            known = ", ".join(each.dev_name for each in result) or "none"
            raise InputError("-dev", f"must name devices of the machine ({known})", value=name)
        if each in picked:
            raise InputError("-dev", "must not name a device twice", value=name)
        picked.append(each)
    return tuple(picked)


def buffer_target(result: Sequence[NamedDevice], target: str) -> str:
    """The machine's name of the device that an `-ot` target means, or "CPU".

    Raises:
        InputError: the engine has no such buffer type.
    """
    if target == CPU:
        return CPU
    for each in result:
        if each.buffer_name == target:
            return each.device.name
    known = ", ".join([CPU, *(each.buffer_name for each in result)])
    raise InputError("-ot", f"must end in a buffer type of the machine ({known})", value=target)
