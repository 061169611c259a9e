"""The machine found here → what a file of the same machine has learned; and what was learned → that file.

A machine is known by what `identity` compares, never by its name. What holds afterwards: speeds, runtimes and
coefficients are the file's, for they belong together; no device may be filled beyond what the file allows, or
beyond what is free now.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from placement.errors import InputError
from placement.files import PACKAGE_DATA
from placement.inputs.identity import is_same_machine, machine_identity
from placement.inputs.machine import Machine
from placement.inputs.machine_files import machine_folders, own_machine_path, read_machine, save_machine

LEARNED_SOURCES = ("detected", "calibrated")
TOLD_CAP = 0.95  # of what is free: a file that allows less is told


def learned_file(result: Machine, tell: Callable[[str], None]) -> tuple[Path, Machine] | None:
    """The user's file of this machine that has learned something: of the nearest folder, the newest there.

    What is shipped is no machine of the user's. A file that cannot be read is told and passed over.
    """
    for folder in machine_folders():
        if folder == PACKAGE_DATA / "machines":
            continue
        known = [each for each in _readable(folder, tell) if _is_same(each[1], result) and _dates(each[1])]
        if known:
            return max(known, key=lambda each: max(_dates(each[1])))
    return None


def _is_same(known: Machine, result: Machine) -> bool:
    return is_same_machine(machine_identity(known), machine_identity(result))


def _readable(folder: Path, tell: Callable[[str], None]) -> Iterator[tuple[Path, Machine]]:
    for path in sorted(folder.glob("*.toml")):
        try:
            yield path, read_machine(path)
        except InputError as error:
            tell(f"place: not considered: {error}")


def _dates(machine: Machine) -> list[str]:
    """When each value was learned; empty for a machine that has learned nothing."""
    return [each.date or "" for each in machine.coefficients.values() if each.source in LEARNED_SOURCES]


def with_learned(result: Machine, tell: Callable[[str], None]) -> Machine:
    """The machine found here as its own file knows it, and one line that names the file; else as it is."""
    learned = learned_file(result, tell)
    if learned is None:
        return result
    path, known = learned
    free = {device.name: device.usable_mib for device in result.devices}
    capped = [
        f"{each.name} at {each.usable_mib:,.0f} of {free[each.name]:,.0f} MiB free"
        for each in known.devices
        if each.usable_mib < TOLD_CAP * free[each.name]
    ]
    limits = f", which caps {', '.join(capped)}" if capped else ""
    tell(f"place: using {path}: what was learned of this machine, {len(_dates(known))} values{limits}")
    devices = tuple(replace(each, usable_mib=min(each.usable_mib, free[each.name])) for each in known.devices)
    return replace(known, devices=devices)


def learned_path(name: str | None, machine: Machine) -> Path:
    """Where what is learned of a machine belongs: the file that was named, or the one that knows it already.

    Raises:
        InputError: the file of that name in the user's folder is another machine's.
    """
    if name is not None:
        return own_machine_path(name, machine)
    learned = learned_file(machine, lambda _text: None)
    if learned is not None:
        return learned[0]
    return _free_path(own_machine_path(None, machine), machine)


def _free_path(path: Path, machine: Machine) -> Path:
    """The path, or the next of its kind that no other machine's file has."""
    number, tried = 2, path
    while tried.is_file() and not _is_same(read_machine(tried), machine):
        number, tried = number + 1, path.with_name(f"{path.stem}-{number}{path.suffix}")
    return tried


def save_learned(machine: Machine, path: Path) -> None:
    """Put coefficients, history and runtimes into the machine's file; all else there stays as its owner wrote it.

    Raises:
        InputError: the file cannot be read or written.
    """
    if path.is_file():
        if not path.stat().st_mode & 0o222:
            raise InputError(path, "is read-only: nothing is written")
        kept = read_machine(path)
        runtimes = {device.name: device.runtime_mib for device in machine.devices}
        devices = tuple(
            replace(device, runtime_mib=runtimes.get(device.name, device.runtime_mib))
            for device in kept.devices
        )
        machine = replace(kept, devices=devices, coefficients=machine.coefficients, history=machine.history)
    save_machine(machine, path)
