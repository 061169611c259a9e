"""What is asked (`Workload`, `Problem`) and what may be answered (`Assignment` with its `Settings`)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, get_args

from placement.inputs.machine import Machine
from placement.inputs.model import Model

CPU = "CPU"  # where a layer lives and a tensor lies that no card holds
HOST = "Host"  # its memory, as the engine's breakdown names it
# n_batch and n_ubatch of common_params (common/common.h).
DEFAULT_BATCH_TOKENS, DEFAULT_UBATCH_TOKENS = 2048, 512
Program = Literal["llama-server", "llama-bench", "llama-fit-params"]
PROGRAMS: tuple[Program, ...] = get_args(Program)


@dataclass(frozen=True, slots=True)
class Settings:
    """The engine arguments beside the placement itself, with llama.cpp's own defaults."""

    ctx_tokens: int = 4096  # -c: over all slots, before the engine's rounding; 0 = the trained context
    n_slots: int = 1  # -np
    is_kv_unified: bool = False  # -kvu
    kv_type_k: str = "f16"
    kv_type_v: str = "f16"
    batch_tokens: int = DEFAULT_BATCH_TOKENS  # -b
    ubatch_tokens: int = DEFAULT_UBATCH_TOKENS  # -ub
    flash_attention: str = "auto"  # on, off, auto
    is_kv_offloaded: bool = True  # False: -nkvo
    is_swa_full: bool = False
    is_op_offloaded: bool = True  # False: --no-op-offload
    load_mode: str = "auto"  # auto, none, mmap, mlock, mmap+mlock, dio
    split_mode: str = "layer"  # layer, none, row, tensor
    has_overrides: bool = False  # any -ot, --cpu-moe, --n-cpu-moe or --n-cpu-ffn was given, matching or not
    n_threads: int | None = None

    @property
    def kv_types(self) -> tuple[str, ...]:
        """The types of K and V; one where they are alike."""
        return tuple(dict.fromkeys((self.kv_type_k, self.kv_type_v)))


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where everything lives, in the engine's terms.

    `devices` are the GPUs the engine is given, in its order (CPU is implied). `homes[i]` is the device of layer
    i (its KV cache and state live there too); the last entry is the output layer's. `homes` has
    block_count + 1 entries. `moved` lists the tensors that an override puts elsewhere than their home, as
    (tensor name, device), in the model's tensor order; input tensors' home is the CPU.
    """

    devices: tuple[str, ...]
    homes: tuple[str, ...]
    moved: tuple[tuple[str, str], ...] = ()
    settings: Settings = field(default_factory=Settings)


@dataclass(frozen=True, slots=True)
class Workload:
    """A turn: `prompt_tokens` read and `generate_tokens` written with `depth_tokens` already in the context."""

    prompt_tokens: int = 2000
    generate_tokens: int = 500
    depth_tokens: int = 0


@dataclass(frozen=True)
class Problem:
    """A model, a machine, the engine settings that are fixed, and the turn to make fast."""

    model: Model
    machine: Machine
    settings: Settings
    workload: Workload
    program: str = "llama-server"
    reserve_mib: float = 0.0
