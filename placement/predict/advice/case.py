"""What advice is given on: arguments, the assignment they came to, and plans of it and of better ones."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from placement.inputs.machine import Device, Machine
from placement.inputs.model import Model, Tensor
from placement.inputs.problem import Assignment
from placement.llamacpp.architecture.describe import describe
from placement.llamacpp.architecture.records import Architecture
from placement.llamacpp.arguments import Arguments
from placement.llamacpp.emit.resolve import tensor_home
from placement.llamacpp.memory import DeviceMemory, static_memory


class Plan(Protocol):
    """Compute buffers by device (and "Host"), splits of the two graphs, and copies of the inputs."""

    @property
    def compute_bytes(self) -> Mapping[str, int]: ...
    @property
    def splits_prompt(self) -> int: ...
    @property
    def splits_decode(self) -> int: ...
    @property
    def n_copies(self) -> int: ...


@dataclass(frozen=True, slots=True)
class Advice:
    """One piece of advice: a slug that does not change between versions, and a line with its number."""

    code: str
    message: str


@dataclass(frozen=True)
class Case:
    """One command line to advise on; `planner` None means that nothing can plan compute buffers and "
    "splits."""

    model: Model
    machine: Machine
    arguments: Arguments
    assignment: Assignment
    program: str = "llama-server"
    planner: Callable[[Assignment], Plan] | None = None

    @functools.cached_property
    def architecture(self) -> Architecture:
        """The model's layers and caches."""
        return describe(self.model)

    @functools.cached_property
    def tensor_devices(self) -> dict[str, str]:
        """Every tensor of the file with the device it ends on."""
        moved, homes = dict(self.assignment.moved), self.assignment.homes
        return {
            tensor.name: moved.get(tensor.name) or tensor_home(self.model, tensor.name, homes)
            for tensor in self.model.tensors
        }

    @functools.cached_property
    def layers(self) -> dict[int, list[Tensor]]:
        """The tensors of each layer that the engine loads."""
        loaded: dict[int, list[Tensor]] = {}
        for tensor in self.model.tensors:
            if tensor.layer is not None and tensor.layer < self.architecture.n_layer:
                loaded.setdefault(tensor.layer, []).append(tensor)
        return loaded

    @functools.cached_property
    def memory(self) -> dict[str, DeviceMemory]:
        """Weights and context by device and "Host"."""
        return static_memory(self.model, self.machine, self.assignment)

    @functools.cached_property
    def plan(self) -> Plan | None:
        """The plan of the assignment itself."""
        return self.planner(self.assignment) if self.planner else None

    @property
    def gpus(self) -> list[Device]:
        """The devices that the model is given."""
        return [self.machine.device(name) for name in self.assignment.devices]

    @property
    def is_on_cuda(self) -> bool:
        """Whether any CUDA card takes part."""
        return any(device.is_cuda for device in self.gpus)

    def splits_saved(self, better: Assignment, estimate: str) -> str:
        """The splits that `better` saves, planned where something plans, else the estimate by rule."""
        if self.planner is None or self.plan is None:
            return estimate
        now, then = self.plan, self.planner(better)
        decode = f"{now.splits_decode - then.splits_decode:+} splits a token"
        prompt = f"{now.splits_prompt - then.splits_prompt:+} a prompt batch"
        return (
            f"{decode} ({now.splits_decode} instead of {then.splits_decode}), "
            f"{prompt} ({now.splits_prompt} instead of {then.splits_prompt})"
        )

    def without(self, names: set[str]) -> Assignment:
        """The assignment with these tensors at home."""
        kept = tuple((name, device) for name, device in self.assignment.moved if name not in names)
        return replace(self.assignment, moved=kept)


def is_ffn(tensor: Tensor) -> bool:
    """Whether a layer's tensor belongs to its feed-forward part: dense, experts, router or shared experts."""
    part = tensor.name.split(".", 2)[-1]
    return "ffn_" in part or "exp" in part


def is_router(tensor: Tensor) -> bool:
    """Whether a tensor chooses the experts."""
    return ".ffn_gate_inp." in tensor.name or ".exp_probs_b" in tensor.name


def is_norm(tensor: Tensor) -> bool:
    """Whether a tensor scales or shifts a norm."""
    return "norm" in tensor.name


def is_shared_expert(tensor: Tensor) -> bool:
    """Whether a tensor is of experts that every token uses."""
    return "_shexp" in tensor.name


def layers_named(layers: list[int]) -> str:
    """ "layer 3" or "layers 0-3,7"."""
    return f"layer{'' if len(layers) == 1 else 's'} {layer_list(layers)}"


def count(n: int, word: str) -> str:
    """ "1 layer", "2 layers"."""
    return f"{n} {word}" if n == 1 else f"{n} {word}s"


def layer_list(layers: list[int]) -> str:
    """Layer numbers as runs: "0-3,7"."""
    runs: list[list[int]] = []
    for layer in sorted(layers):
        if runs and layer == runs[-1][-1] + 1:
            runs[-1].append(layer)
        else:
            runs.append([layer])
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


__all__ = [
    "Advice",
    "Case",
    "Plan",
    "count",
    "is_ffn",
    "is_norm",
    "is_router",
    "is_shared_expert",
    "layer_list",
    "layers_named",
]
