"""What the engine makes of a context's settings: rounded sizes, cells of its caches, slots, pipelining.

Every rule that more than one module needs stands here alone, with the llama.cpp file and function it mirrors.
"""

from __future__ import annotations

from dataclasses import dataclass

from placement.inputs.problem import Settings
from placement.units import pad

# llama_context's constructor pads n_ctx so; get_n_kv (llama-kv-cache.cpp) reads caches in such blocks.
CELL_PADDING = 256
MAX_SLOTS = 256  # LLAMA_MAX_SEQ (src/llama-cparams.h)
SERVER_SLOTS = 4  # n_parallel that llama-server takes for "auto", on one shared cache (server.cpp)


@dataclass(frozen=True, slots=True)
class ContextSize:
    """What llama-context.cpp makes of the settings: cells per stream, streams, and the real batches."""

    cells: int
    n_streams: int
    n_sequences: int
    batch_tokens: int
    ubatch_tokens: int


def rounded_context(settings: Settings, n_ctx_train: int) -> ContextSize:
    """The context after the engine's rounding (llama_context::llama_context); 0 asks for the trained one."""
    n_ctx = settings.ctx_tokens or n_ctx_train
    n_slots = max(settings.n_slots, 1)
    batch = min(n_ctx, settings.batch_tokens)
    ubatch = min(batch, settings.ubatch_tokens or settings.batch_tokens)
    cells = padded_cells(n_ctx)
    if settings.is_kv_unified:
        return ContextSize(cells, 1, n_slots, batch, ubatch)
    return ContextSize(padded_cells(cells // n_slots), n_slots, n_slots, batch, ubatch)


def padded_cells(n_cells: int) -> int:
    """Cells in whole blocks (GGML_PAD of n_ctx in llama-context.cpp, and of cells used in get_n_kv)."""
    return pad(n_cells, CELL_PADDING)


def window_cells(cells: int, window_tokens: int, n_windows: int, ubatch_tokens: int) -> int:
    """Cells per stream of a sliding-window cache that `n_windows` sequences share (llama-kv-cache-iswa.cpp)."""
    return padded_cells(min(cells, window_tokens * n_windows + ubatch_tokens))


def compressed_cells(cells: int, ratio: int) -> int:
    """Cells per stream of a cache that keeps one key for `ratio` of the context's (llama-kv-cache-dsv4.cpp)."""
    return padded_cells(max(1, -(-cells // ratio)))


def can_pipeline(settings: Settings, n_devices: int) -> bool:
    """Whether prompts overlap over the devices, given that all layers are on them (llama_context's constructor)."""
    is_whole = settings.is_kv_offloaded and not settings.has_overrides
    return n_devices > 1 and settings.split_mode == "layer" and is_whole
