"""What tells one machine from another: its devices in the engine's order, and its processor; never its name.

The one answer for machine files (`recognise`) and for run records (`verify`, `calibrate`, `tune`). It holds beside
small differences, so it is a comparison and no key to look things up by.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass

from placement.inputs.machine import Machine

SAME_MEMORY = 0.02  # a driver may count the same card's memory a little differently


@dataclass(frozen=True, slots=True)
class DeviceIdentity:
    """What a device is known by: its UUID, else its description and memory; a worker by its address as well."""

    name: str
    total_mib: float
    description: str = ""
    address: str | None = None
    uuid: str | None = None


@dataclass(frozen=True, slots=True)
class MachineIdentity:
    """What a machine is known by; a run record keeps it whole."""

    devices: tuple[DeviceIdentity, ...]
    cpu_threads: int
    cpu_description: str = ""

    def words(self) -> str:
        """As a line names it: the cards, or the processor where there is none."""
        cards = [device.description or device.name for device in self.devices]
        return " + ".join(cards) or self.cpu_description or f"{self.cpu_threads} threads"


# A record made before records kept the identity has "NAME/DIGEST": the name is not compared.
Known = MachineIdentity | str


def machine_identity(machine: Machine) -> MachineIdentity:
    """What tells this machine from others."""
    devices = tuple(
        DeviceIdentity(each.name, float(each.total_mib), each.description, each.address, each.uuid)
        for each in machine.devices
    )
    return MachineIdentity(devices, machine.cpu.threads, machine.cpu.description)


def is_same_machine(known: Known, result: Known) -> bool:
    """Whether both are one machine: every device in order, and the processor.

    Of an old record only a digest is known; it says nothing of addresses, and allows no small differences.
    """
    if isinstance(known, str) or isinstance(result, str):
        return _digest(known) == _digest(result)
    return (
        len(known.devices) == len(result.devices)
        and all(map(_is_same_device, known.devices, result.devices))
        and _is_same_cpu(known, result)
    )


def _is_same_device(a: DeviceIdentity, b: DeviceIdentity) -> bool:
    if (a.name, a.address) != (b.name, b.address):
        return False
    if a.uuid and b.uuid:
        return a.uuid == b.uuid
    memory_mib = max(a.total_mib, b.total_mib)
    is_alike = abs(a.total_mib - b.total_mib) <= SAME_MEMORY * memory_mib
    return is_alike and a.description == b.description


def _is_same_cpu(a: MachineIdentity, b: MachineIdentity) -> bool:
    if a.cpu_description and b.cpu_description:
        return a.cpu_description == b.cpu_description
    return a.cpu_threads == b.cpu_threads


def _digest(known: Known) -> str:
    """8 hex digits, as old records have them after the machine's name."""
    if isinstance(known, str):
        return known.rpartition("/")[2]
    facts = [[each.name, each.description, each.total_mib, each.uuid] for each in known.devices]
    return hashlib.sha256(json.dumps([facts, known.cpu_description]).encode()).hexdigest()[:8]
