"""Machine files: TOML text to `Machine` and back, and the search for a machine by name.

Reading validates every field by hand (pydantic would double the start-up time of `place solve`): what comes out
has positive capacities, unique device names and known coefficients.
"""

from __future__ import annotations

import dataclasses
import difflib
import os
import re
import tomllib
from pathlib import Path
from typing import Any

from placement.errors import InputError
from placement.files import PACKAGE_DATA, search_folders, user_config_folder, write_atomically
from placement.inputs.coefficients import DEFAULTS, DIVISORS, MEMORY
from placement.inputs.machine import (
    DEFAULT_LINK_GB_PER_S,
    DEFAULT_RUNTIME_MIB,
    RPC,
    UNNUMBERED_DEVICES,
    Coefficient,
    Cpu,
    Device,
    Machine,
    Past,
    backend_of,
)

REFERENCE_MACHINE = "rtx4090-rtx5070ti"

_UNSAFE = re.compile(r"[^\w.+-]+")
_DEVICE_NAME = re.compile(r"[A-Za-z]+\d+")
_ADDRESS = re.compile(r"[A-Za-z0-9_.:\[\]-]+:\d{1,5}")
_DEVICE_NUMBERS = ("total_mib", "usable_mib", "runtime_mib", "bandwidth_gb_per_s", "link_gb_per_s", "tflops")
_DEVICE_TEXTS = ("name", "description", "address", "uuid", "compute_capability")
_CPU_NUMBERS = ("usable_mib", "bandwidth_gb_per_s", "threads")
DEFAULT_RPC_BANDWIDTH_GB_PER_S = 50.0


def machine_folders() -> list[Path]:
    """Folders searched for NAME.toml, nearest first."""
    return search_folders("machines")


def resolve_machine(name: str) -> Machine:
    """Read the machine file of that path, or of that name in the search folders.

    Raises:
        InputError: nothing has that name (the nearest names are suggested), or the file breaks a rule.
    """
    path = Path(name)
    if path.suffix == ".toml" or os.path.isfile(
        name
    ):  # unlike Path.is_file, False for names no file can have
        return read_machine(path)
    known: dict[str, Path] = {}
    for folder in reversed(machine_folders()):
        known.update({file.stem: file for file in folder.glob("*.toml")})
    if name in known:
        return read_machine(known[name])
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or sorted(known)
    raise InputError("--machine", f"no machine of that name; known: {', '.join(near)}", value=name[:100])


def own_machine_path(name: str | None, machine: Machine) -> Path:
    """Where a machine's own file is or belongs: the file that `name` means, else the user's folder.

    What is shipped is never written to: a file of the user's stands before it in the search.
    """
    path = Path(name) if name is not None else None
    if path is not None and (path.suffix == ".toml" or os.path.isfile(path)):
        if PACKAGE_DATA not in path.resolve().parents:
            return path
        name = path.stem
    stem = _UNSAFE.sub("-", name or machine.name)
    for folder in machine_folders():
        if (folder / f"{stem}.toml").is_file() and PACKAGE_DATA not in folder.parents:
            return folder / f"{stem}.toml"
    return user_config_folder() / "machines" / f"{stem}.toml"


def read_machine(path: Path) -> Machine:
    """Parse and validate a machine file.

    Raises:
        InputError: the file cannot be read, is not TOML, or a field breaks its rule.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as exc:
        reason = exc.strerror if isinstance(exc, OSError) else "is not UTF-8 text"
        raise InputError(path, f"cannot be read: {reason}") from exc
    except (tomllib.TOMLDecodeError, RecursionError) as exc:
        raise InputError(path, f"is not TOML: {exc}") from exc
    return _machine(table, path)


def _machine(table: dict[str, Any], path: Path) -> Machine:
    _known_keys(table, {"name", "devices", "cpu", "coefficients", "history"}, path, "")
    rows = table.get("devices", [])
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(path, "must be a list of [[devices]] tables", field="devices")
    devices = tuple(_device(row, f"devices[{i}]", path) for i, row in enumerate(rows))
    names = [device.name for device in devices]
    for name in names:
        if names.count(name) > 1:
            raise InputError(path, "two devices have this name", field="devices.name", value=name)
    coefficients = table.get("coefficients", {})
    if not isinstance(coefficients, dict):
        raise InputError(path, "must be a table", field="coefficients")
    return Machine(
        name=_text(table, "name", path, default=path.stem),
        devices=devices,
        cpu=_cpu(table.get("cpu"), path),
        coefficients={name: _coefficient(name, row, path) for name, row in coefficients.items()},
        history=_history(table.get("history", []), path),
    )


def _history(rows: Any, path: Path) -> tuple[Past, ...]:
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise InputError(path, "must be a list of [[history]] tables", field="history")
    return tuple(_past(row, f"history[{i}]", path) for i, row in enumerate(rows))


def _past(row: dict[str, Any], where: str, path: Path) -> Past:
    name, until = _text(row, "name", path, where), _text(row, "until", path, where)
    values = {key: value for key, value in row.items() if key not in ("name", "until")}
    return Past(name, _coefficient(name, values, path), until)


def _device(row: dict[str, Any], where: str, path: Path) -> Device:
    _known_keys(row, {*_DEVICE_NUMBERS, *_DEVICE_TEXTS}, path, where)
    name = _text(row, "name", path, where)
    if not _DEVICE_NAME.fullmatch(name) and name not in UNNUMBERED_DEVICES:
        raise InputError(path, 'must be letters and a number, as "CUDA0"', field=f"{where}.name", value=name)
    address = row.get("address")
    is_rpc = backend_of(name) == RPC
    if is_rpc and not _is_address(address):
        raise InputError(path, 'an RPC worker needs "host:port"', field=f"{where}.address", value=address)
    if not is_rpc and address is not None:
        raise InputError(path, "only an RPC worker has an address", field=f"{where}.address", value=address)
    total = _number(row, "total_mib", path, where)
    usable = _number(row, "usable_mib", path, where, total)
    if usable > total:
        raise InputError(
            path, f"must be at most total_mib = {total:g}", field=f"{where}.usable_mib", value=usable
        )
    return Device(
        name=name,
        total_mib=total,
        usable_mib=usable,
        runtime_mib=_number(
            row, "runtime_mib", path, where, 0.0 if is_rpc else DEFAULT_RUNTIME_MIB, least=0.0
        ),
        bandwidth_gb_per_s=_number(
            row, "bandwidth_gb_per_s", path, where, DEFAULT_RPC_BANDWIDTH_GB_PER_S if is_rpc else None
        ),
        link_gb_per_s=_number(row, "link_gb_per_s", path, where, 1.0 if is_rpc else DEFAULT_LINK_GB_PER_S),
        description=_text(row, "description", path, where, ""),
        address=address,
        uuid=_text(row, "uuid", path, where) if "uuid" in row else None,
        compute_capability=_text(row, "compute_capability", path, where)
        if "compute_capability" in row
        else None,
        tflops=_number(row, "tflops", path, where) if "tflops" in row else None,
    )


def _cpu(row: Any, path: Path) -> Cpu:
    if not isinstance(row, dict):
        raise InputError(path, "the table is missing", field="cpu")
    _known_keys(row, {*_CPU_NUMBERS, "description"}, path, "cpu")
    return Cpu(
        usable_mib=_number(row, "usable_mib", path, "cpu"),
        bandwidth_gb_per_s=_number(row, "bandwidth_gb_per_s", path, "cpu"),
        threads=_whole(row, "threads", path, "cpu", least=1),
        description=_text(row, "description", path, "cpu", ""),
    )


def _is_address(value: Any) -> bool:
    return (
        isinstance(value, str) and bool(_ADDRESS.fullmatch(value)) and int(value.rpartition(":")[2]) <= 65535
    )


def _coefficient(name: str, row: Any, path: Path) -> Coefficient:
    where = f"coefficients.{name}"
    plain = name.partition(".")[0]
    if plain not in DEFAULTS and plain not in MEMORY:
        near = difflib.get_close_matches(plain, (*DEFAULTS, *MEMORY), n=1)
        raise InputError(
            path, "unknown coefficient" + (f"; did you mean {near[0]}?" if near else ""), field=where
        )
    if not isinstance(row, dict):
        raise InputError(path, "must be a table with value and unit", field=where, value=row)
    _known_keys(row, {field.name for field in dataclasses.fields(Coefficient)}, path, where)
    source = _text(row, "source", path, where, "default")
    if source not in ("default", "detected", "calibrated"):
        raise InputError(
            path, "must be default, detected or calibrated", field=f"{where}.source", value=source
        )
    value = _number(row, "value", path, where, least=None if plain in DIVISORS else 0.0)
    if plain == "pipeline_overlap" and value > 1.0:
        raise InputError(path, "must be at most 1", field=f"{where}.value", value=value)
    return Coefficient(
        value=value,
        unit=_text(row, "unit", path, where),
        source=source,
        date=str(row["date"]) if "date" in row else None,
        n_samples=_whole(row, "n_samples", path, where, least=0) if "n_samples" in row else None,
        uncertainty=_number(row, "uncertainty", path, where, least=0.0) if "uncertainty" in row else None,
    )


def _known_keys(row: dict[str, Any], known: set[str], path: Path, where: str) -> None:
    for key in row:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise InputError(path, f"unknown field{hint}", field=".".join(filter(None, (where, key))))


def _number(
    row: dict[str, Any],
    key: str,
    path: Path,
    where: str = "",
    default: float | None = None,
    least: float | None = None,
) -> float:
    value = row.get(key, default)
    field = ".".join(filter(None, (where, key)))
    if value is None:
        raise InputError(path, "is missing", field=field)
    if isinstance(value, bool) or not isinstance(value, int | float) or value != value or value > 1e12:
        raise InputError(path, "must be a number", field=field, value=value)
    if (value < least) if least is not None else (value <= 0):
        rule = f"must be at least {least:g}" if least is not None else "must be positive"
        raise InputError(path, rule, field=field, value=value)
    return float(value)


def _whole(row: dict[str, Any], key: str, path: Path, where: str, least: int) -> int:
    value = _number(row, key, path, where, least=least)
    if value != int(value):
        raise InputError(path, "must be a whole number", field=f"{where}.{key}", value=value)
    return int(value)


def _text(row: dict[str, Any], key: str, path: Path, where: str = "", default: str | None = None) -> str:
    value = row.get(key, default)
    if not isinstance(value, str):
        field = ".".join(filter(None, (where, key)))
        raise InputError(path, "must be text" if key in row else "is missing", field=field, value=value)
    return value


def machine_toml(machine: Machine) -> str:
    """The machine file's text; `read_machine` of it gives the same machine."""
    import tomli_w

    def row(record: Any) -> dict[str, Any]:
        values = dataclasses.asdict(record)
        return {key: value for key, value in values.items() if value is not None and value != ""}

    table: dict[str, Any] = {"name": machine.name, "devices": [row(device) for device in machine.devices]}
    table["cpu"] = row(machine.cpu)
    if machine.coefficients:
        table["coefficients"] = {name: row(value) for name, value in machine.coefficients.items()}
    if machine.history:
        table["history"] = [
            {"name": past.name, "until": past.until, **row(past.coefficient)} for past in machine.history
        ]
    return tomli_w.dumps(table)


def save_machine(machine: Machine, path: Path) -> None:
    """Write the machine file atomically, keeping the old one as a backup beside it."""
    write_atomically(path, machine_toml(machine))
