"""`Solution` and `SolutionSet`: what a solve found, with predictions and proof; to TOML and JSON."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from placement.inputs.machine import Machine
from placement.inputs.problem import CPU, HOST, Assignment, Problem, Settings, Workload
from placement.llamacpp.plan import ComputePlan
from placement.predict.cost import Speed

ESTIMATED, PLANNED, MEASURED = "estimated", "planned", "measured"


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """MiB on one device: the engine's own figures, the runtime beside them, and the cap for both together."""

    weights_mib: float
    context_mib: float
    compute_mib: float
    runtime_mib: float
    cap_mib: float
    total_mib: float
    planned_total_mib: float | None = None  # the engine's own sum, rounded up; its parts are rounded down

    @property
    def self_mib(self) -> float:
        """The engine's own figure: weights, context and compute buffers."""
        if self.planned_total_mib is not None:
            return self.planned_total_mib
        return self.weights_mib + self.context_mib + self.compute_mib

    @property
    def used_mib(self) -> float:
        """All that the card shows as taken: the engine's own and its runtime."""
        return self.self_mib + self.runtime_mib

    @property
    def headroom_mib(self) -> float:
        """What is left under the cap; negative when it does not fit."""
        return self.cap_mib - self.used_mib


def backend_notes(machine: Machine, assignment: Assignment) -> tuple[str, ...]:
    """A line for each backend in use whose rules are not mirrored: what we compute there is not exact."""
    names: dict[str, list[str]] = {}
    for device in map(machine.device, assignment.devices):
        if not device.is_mirrored:
            names.setdefault(device.backend, []).append(device.name)
    return tuple(
        f"{', '.join(devices)}: llama.cpp's {backend} backend is not mirrored here: memory and splits are coarse"
        " estimates; plan with --engine"
        for backend, devices in names.items()
    )


def label_words(label: str, *, is_exact: bool) -> str:
    """The label as people read it: an estimate that is not exact says so."""
    return label if is_exact else f"{label} (coarse)"


@dataclass(frozen=True, slots=True)
class Solution:
    """One placement with its predictions. `bound_s` is the proven least turn time of its search; `gap` is
    (turn − bound) / turn, None where this placement was not searched for by turn time."""

    name: str
    label: str
    assignment: Assignment
    args: tuple[str, ...]
    devices: dict[str, DeviceUse]  # GPUs in the engine's order, then "Host"
    splits_prompt: int
    splits_decode: int
    speed: Speed
    status: str
    gap: float | None
    is_exact: bool = True
    notes: tuple[str, ...] = ()
    differences: tuple[str, ...] = ()  # planned against estimated, where they are not equal

    @property
    def headroom_mib(self) -> float:
        """The smallest headroom of the GPUs (of the host where no GPU is used)."""
        gpus = [use.headroom_mib for name, use in self.devices.items() if name != HOST]
        return min(gpus) if gpus else self.devices[HOST].headroom_mib

    def n_host_layers(self) -> int:
        """Layers that live on the CPU or keep tensors there."""
        layers = {i for i, home in enumerate(self.assignment.homes[:-1]) if home == CPU}
        layers |= {
            int(name.split(".")[1]) for name, at in self.assignment.moved if at == CPU and name[:4] == "blk."
        }
        return len(layers)


@dataclass(frozen=True, slots=True)
class SolutionSet:
    """All solutions of one solve, the recommended one first."""

    model: str
    model_digest: str
    machine: str
    workload: Workload
    status: str
    solutions: tuple[Solution, ...]
    extra_args: tuple[str, ...] = ()
    message: str = ""
    warnings: tuple[str, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class PlannedPlacement:
    """What the engine plans for an assignment: for the search, and its own figures by device."""

    plan: ComputePlan
    devices: dict[str, DeviceUse]


EnginePlanner = Callable[[Problem, list[Assignment]], list[PlannedPlacement]]


def device_row(use: DeviceUse) -> dict[str, float]:
    """A device's memory with the contract's keys."""
    return {
        "weights_mib": round(use.weights_mib, 2),
        "context_mib": round(use.context_mib, 2),
        "compute_mib": round(use.compute_mib, 2),
        "cap_mib": round(use.cap_mib - use.runtime_mib, 2),  # for the three above together
        "runtime_mib": round(use.runtime_mib, 2),
    }


def solution_row(solution: Solution, command: str, extra_args: tuple[str, ...]) -> dict[str, Any]:
    """A solution with the contract's keys."""
    speed = solution.speed
    prompt_tps = speed.prompt_tps
    return {
        "name": solution.name,
        "label": solution.label,
        "args": list(solution.args),
        "extra_args": list(extra_args),
        "command": command,
        "devices": {name: device_row(use) for name, use in solution.devices.items()},
        "splits": {"prompt": solution.splits_prompt, "decode": solution.splits_decode},
        "speed": {
            "prompt_tps": None if prompt_tps is None else round(prompt_tps, 2),
            "decode_tps": round(speed.decode_tps, 3),
            "turn_s": round(speed.turn_s, 4),
        },
        "headroom_mib": round(solution.headroom_mib, 1),
        "status": solution.status,
        "gap": None if solution.gap is None else round(solution.gap, 6),
        "ubatch": solution.assignment.settings.ubatch_tokens,
        "load_mode": solution.assignment.settings.load_mode,
        "n_host_layers": solution.n_host_layers(),
        "layers": _layer_counts(solution.assignment),
        "is_exact": solution.is_exact,
        "notes": list(solution.notes),
        "differences": list(solution.differences),
    }


def _layer_counts(assignment: Assignment) -> dict[str, int]:
    counts = {name: assignment.homes.count(name) for name in assignment.devices}
    on_cpu = assignment.homes.count(CPU)
    return {**({CPU: on_cpu} if on_cpu else {}), **counts}


def workload_row(workload: Workload, settings: Settings) -> dict[str, Any]:
    """The workload with units in its keys; `kv_type` is "K/V" where these differ."""
    return {
        "ctx_tokens": settings.ctx_tokens,
        "n_slots": settings.n_slots,
        "kv_type": "/".join(settings.kv_types),
        "prompt_tokens": workload.prompt_tokens,
        "generate_tokens": workload.generate_tokens,
        "depth_tokens": workload.depth_tokens,
    }


AGGRESSIVE, MODERATE = "aggressive", "moderate"


MODERATE_RESERVE = 0.05  # of each card's total
