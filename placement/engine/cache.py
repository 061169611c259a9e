"""Remembers plans on disk by all that they depend on; an entry that does not prove itself is no entry."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import math
import os
import tempfile
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from placement.engine.find import Engine, list_devices
from placement.engine.logs import EngineMemory, PlanReading
from placement.engine.rpc import endpoints_of, exclusive
from placement.errors import EngineError
from placement.inputs.engine_options import names_of
from placement.inputs.model import Model

_FORMAT = 1  # raise it when PlanReading or the key changes
_VARIABLES = (
    "CUDA_VISIBLE_DEVICES",
    "CUDA_DEVICE_ORDER",
    "VGPU",
    "LD_PRELOAD",
    "LD_LIBRARY_PATH",
    "HIP_VISIBLE_DEVICES",
)
_DEVICES_S = 30.0
_ASKING = threading.Lock()  # plans side by side ask once
_COUNTS = ("splits_prompt", "splits_decode", "nodes_prompt", "nodes_decode", "n_copies")


def default_folder() -> Path:
    """Return the folder of the plans, in the user's cache directory."""
    import platformdirs

    return Path(platformdirs.user_cache_dir("place")) / "plans"


@dataclass(frozen=True)
class PlanCache:
    """Plans of one engine, by build, device set, model, program and arguments; one JSON file each."""

    engine: Engine
    folder: Path = dataclasses.field(default_factory=default_folder)

    def get(self, model: Model | Path | str, program: str, arguments: Sequence[str]) -> PlanReading | None:
        """Return the plan made before of exactly this; None if there is none that can be trusted."""
        key = self._key(model, program, arguments)
        if key is None:
            return None
        try:
            entry = json.loads(self._path(key).read_text(encoding="utf-8"))
            return _reading(_field(entry, "reading")) if _field(entry, "key") == key else None
        except (OSError, ValueError):
            return None

    def put(
        self, model: Model | Path | str, program: str, arguments: Sequence[str], reading: PlanReading
    ) -> None:
        """Remember a plan; a disk that refuses is no error."""
        key = self._key(model, program, arguments)
        if key is None:
            return
        text = json.dumps({"key": key, "reading": dataclasses.asdict(reading)})
        with contextlib.suppress(OSError):
            self.folder.mkdir(parents=True, exist_ok=True)
            handle, name = tempfile.mkstemp(dir=self.folder, suffix=".tmp")
            with os.fdopen(handle, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(name, self._path(key))

    def _path(self, key: dict[str, Any]) -> Path:
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return self.folder / f"{digest[:32]}.json"

    def _key(
        self, model: Model | Path | str, program: str, arguments: Sequence[str]
    ) -> dict[str, Any] | None:
        """What the plan depends on, as JSON has it; None where that cannot be known."""
        try:
            devices = self._devices(endpoints_of(arguments))
            model_key = _model_key(model)
        except (EngineError, OSError):
            return None
        has_split = any(flag in arguments for flag in names_of("-ts"))
        n_known = 4 if not has_split and len(devices) > 1 else 3  # layers follow free memory unless -ts says
        return {
            "format": _FORMAT,
            "engine": self._fingerprint,
            "variables": {name: os.environ.get(name) for name in _VARIABLES},
            "devices": [list(device[:n_known]) for device in devices],
            "model": model_key,
            "program": program,
            "arguments": list(arguments),
        }

    @functools.cached_property
    def _fingerprint(self) -> str:
        return self.engine.fingerprint()

    @functools.cached_property
    def _known_devices(self) -> dict[tuple[str, ...], tuple[tuple[str, str, float, float], ...]]:
        return {}

    def warm(self, endpoints: tuple[str, ...] = ()) -> None:
        """Ask the engine for its devices now, so that a later look-up need not wait; failures show there."""
        with contextlib.suppress(EngineError, OSError):
            self._devices(endpoints)

    def _devices(self, endpoints: tuple[str, ...]) -> tuple[tuple[str, str, float, float], ...]:
        with _ASKING:
            return self._asked_devices(endpoints)

    def _asked_devices(self, endpoints: tuple[str, ...]) -> tuple[tuple[str, str, float, float], ...]:
        if endpoints not in self._known_devices:
            with exclusive(endpoints, _DEVICES_S):
                rows = list_devices(self.engine, endpoints, timeout_s=_DEVICES_S)
            listed = tuple((row.name, row.description, row.total_mib, row.free_mib) for row in rows)
            self._known_devices[endpoints] = listed
        return self._known_devices[endpoints]


def _model_key(model: Model | Path | str) -> str:
    if isinstance(model, Model):
        return f"model {model.digest}"
    status = Path(model).stat()
    return f"file {Path(model).resolve()} {status.st_size} {status.st_mtime_ns}"


def _reading(row: Any) -> PlanReading:
    """Rebuild a reading, refusing what is not one.

    Raises:
        ValueError: it is not.
    """
    counts = {name: _field(row, name) for name in _COUNTS}
    if not all(value is None or type(value) is int for value in counts.values()):
        raise ValueError("a count is not an integer")
    is_enabled = _field(row, "fa_enabled")
    if is_enabled not in (None, True, False):
        raise ValueError("fa_enabled is not a truth value")
    devices = _memories(_field(row, "devices"))
    if not devices:
        raise ValueError("no devices")
    return PlanReading(
        devices=devices,
        extra_buffers=_memories(_field(row, "extra_buffers")),
        fa_enabled=is_enabled,
        kv_mib=tuple(map(_number, _list(_field(row, "kv_mib")))),
        rs_mib=tuple(map(_number, _list(_field(row, "rs_mib")))),
        config_files=tuple(map(str, _list(_field(row, "config_files")))),
        **counts,
    )


def _memories(rows: Any) -> dict[str, EngineMemory]:
    if not isinstance(rows, dict):
        raise ValueError("no table of devices")
    return {name: _memory(row) for name, row in rows.items()}


def _memory(row: Any) -> EngineMemory:
    values = [
        _number(_field(row, name)) for name in ("weights_mib", "context_mib", "compute_mib", "total_mib")
    ]
    if not all(0 <= value < math.inf for value in values):
        raise ValueError("a size is not a number of MiB")
    return EngineMemory(*values)


def _field(row: Any, name: str) -> Any:
    if not isinstance(row, dict) or name not in row:
        raise ValueError(f"no {name}")
    return row[name]


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError("no list")
    return value


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError("no number")
    return float(value)
