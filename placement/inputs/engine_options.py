"""llama.cpp's options that concern placement: the one table of their names, variables, values and roles.

What common/arg.cpp registers (`add_opt`), with the options of older builds. `arguments` reads values by it,
`profiles` and `engine` tell by it which words of a command line are whose; it holds facts, no parser.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from placement.inputs.quants import KV_CACHE_TYPES

Value = Literal[
    "flag", "number", "word", "gpu_layers", "shares", "devices", "servers", "overrides",
    "first_layers", "slots", "switch", "flash", "sizes", "text",
]  # fmt: skip
Role = Literal["place", "workers", "context", "threads", "fit", "model"]

LOAD_MODES = ("auto", "none", "mmap", "mlock", "mmap+mlock", "dio")
SPLIT_MODES = ("none", "layer", "row", "tensor")
EXPERTS_PATTERN = r"\.ffn_(up|down|gate|gate_up)_(ch|)exps"  # common.h LLM_FFN_EXPS_REGEX
DENSE_FFN_PATTERN = r"\.ffn_(up|down|gate)\."  # common.h LLM_FFN_DENSE_REGEX

# What an option that is on, off or automatic takes (is_truthy, is_falsey and is_autoy of common/arg.cpp).
TRUE_WORDS = ("on", "enabled", "true", "1")
FALSE_WORDS = ("off", "disabled", "false", "0")
AUTO_WORDS = ("auto", "-1")
FLASH_WORDS = (*TRUE_WORDS, *FALSE_WORDS, *AUTO_WORDS)

VARIABLE_PREFIX = "LLAMA_ARG_"
_NEGATIVE = re.compile(r"-\.?\d")

# Flags of older builds by the load mode that each meant: mapping was on unless switched off.
OLDER_LOAD_FLAGS = {
    "--mmap": "mmap",
    "--no-mmap": "none",
    "--mlock": "mmap+mlock",
    "-dio": "dio",
    "--direct-io": "dio",
}
# And the flags that say a mode there; direct I/O came too late to be known everywhere.
LOAD_MODE_AS_OLDER_FLAGS = {
    "auto": (),
    "mmap": (),
    "none": ("--no-mmap",),
    "mlock": ("--no-mmap", "--mlock"),
    "mmap+mlock": ("--mlock",),
}


@dataclass(frozen=True, slots=True)
class EngineOption:
    """One option; `name`, the first of `names`, is how it is written here.

    `field` is its field of `Arguments`. `role` is what it says: where layers and tensors go ("place"), which
    RPC workers take part, the context with its caches, batches and attention, CPU threads, what `--fit` may
    do, or the model. `variable` stands without `VARIABLE_PREFIX`. `off_names` are flags for the opposite.
    """

    names: tuple[str, ...]
    field: str
    value: Value
    role: Role
    variable: str | None = None
    off_names: tuple[str, ...] = ()
    least: int | None = None  # of a number; None: any
    allowed: tuple[str, ...] = ()  # of a word
    pattern: str = ""  # of the tensors that it moves to the CPU

    @property
    def name(self) -> str:
        """The name that we write it with."""
        return self.names[0]

    @property
    def has_value(self) -> bool:
        """Whether a value follows it."""
        return self.value != "flag"

    @property
    def is_placement(self) -> bool:
        """Whether a placement says it: threads and the model's file stay the user's own."""
        return self.role not in ("threads", "model")


_Option = EngineOption  # rows stay short
OPTIONS = (
    _Option(("-ngl", "--gpu-layers", "--n-gpu-layers"), "n_gpu_layers", "gpu_layers", "place", "N_GPU_LAYERS"),
    _Option(("-ts", "--tensor-split"), "tensor_split", "shares", "place", "TENSOR_SPLIT"),
    _Option(("-sm", "--split-mode"), "split_mode", "word", "place", "SPLIT_MODE", allowed=SPLIT_MODES),
    _Option(("-mg", "--main-gpu"), "main_gpu", "number", "place", "MAIN_GPU"),
    _Option(("-dev", "--device"), "devices", "devices", "place", "DEVICE"),
    _Option(("--rpc",), "rpc", "servers", "workers", "RPC"),
    _Option(("-ot", "--override-tensor"), "overrides", "overrides", "place", "OVERRIDE_TENSOR"),
    _Option(("-cmoe", "--cpu-moe"), "overrides", "flag", "place", "CPU_MOE", pattern=EXPERTS_PATTERN),
    _Option(
        ("-ncmoe", "--n-cpu-moe"), "overrides", "first_layers", "place", "N_CPU_MOE", pattern=EXPERTS_PATTERN
    ),
    _Option(
        ("-ncffn", "--n-cpu-ffn"), "overrides", "first_layers", "place", "N_CPU_FFN", pattern=DENSE_FFN_PATTERN
    ),
    _Option(
        ("-kvo", "--kv-offload"), "is_kv_offloaded", "flag", "context", "KV_OFFLOAD",
        off_names=("-nkvo", "--no-kv-offload"),
    ),
    _Option(("-c", "--ctx-size"), "ctx_tokens", "number", "context", "CTX_SIZE", least=0),
    _Option(
        ("--kv-unified-per-slot",), "ctx_per_slot_tokens", "number", "context", "KV_UNIFIED_PER_SLOT", least=0
    ),
    _Option(("-b", "--batch-size"), "batch_tokens", "number", "context", "BATCH", least=1),
    _Option(("-ub", "--ubatch-size"), "ubatch_tokens", "number", "context", "UBATCH", least=0),
    _Option(("-np", "--parallel"), "n_slots", "slots", "context", "N_PARALLEL"),
    _Option(
        ("-kvu", "--kv-unified"), "is_kv_unified", "flag", "context", "KV_UNIFIED",
        off_names=("-no-kvu", "--no-kv-unified"),
    ),
    _Option(
        ("-ctk", "--cache-type-k"), "kv_type_k", "word", "context", "CACHE_TYPE_K", allowed=KV_CACHE_TYPES
    ),
    _Option(
        ("-ctv", "--cache-type-v"), "kv_type_v", "word", "context", "CACHE_TYPE_V", allowed=KV_CACHE_TYPES
    ),
    _Option(("-fa", "--flash-attn"), "flash_attention", "flash", "context", "FLASH_ATTN"),
    _Option(("--swa-full",), "is_swa_full", "flag", "context", "SWA_FULL"),
    _Option(("--op-offload",), "is_op_offloaded", "flag", "context", off_names=("--no-op-offload",)),
    _Option(("-lm", "--load-mode"), "load_mode", "word", "context", "LOAD_MODE", allowed=LOAD_MODES),
    _Option(("-t", "--threads"), "n_threads", "number", "threads", "THREADS"),
    _Option(("-tb", "--threads-batch"), "n_threads_batch", "number", "threads"),
    _Option(("-fit", "--fit"), "is_fit", "switch", "fit", "FIT"),
    _Option(("-fitt", "--fit-target"), "fit_target_mib", "sizes", "fit", "FIT_TARGET"),
    _Option(("-fitc", "--fit-ctx"), "fit_ctx_tokens", "number", "fit", "FIT_CTX"),
    _Option(("-m", "--model"), "model_path", "text", "model", "MODEL"),
)  # fmt: skip
OPTION_BY_NAME = {name: option for option in OPTIONS for name in (*option.names, *option.off_names)}


def names_of(*names: str) -> tuple[str, ...]:
    """Every name of these options, flags for the opposite left out.

    Raises:
        KeyError: llama.cpp has no option of that name, or it does not concern placement.
    """
    return tuple(each for name in names for each in OPTION_BY_NAME[name].names)


def option_name(word: str) -> str:
    """A word of a command line as an option's name: long ones may have underscores (common_params_parse_ex)."""
    return word.replace("_", "-") if word.startswith("--") else word


def is_option(word: str) -> bool:
    """Whether a word begins an option; a negative number and a lone dash are values."""
    return word.startswith("-") and len(word) > 1 and not _NEGATIVE.match(word)
