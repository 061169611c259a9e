"""What a graph is built for: sizes of the context's caches and of one batch, after the engine's rounding."""

from __future__ import annotations

from dataclasses import dataclass

from placement.inputs.problem import Settings
from placement.llamacpp.architecture.records import Architecture
from placement.llamacpp.context_rules import rounded_context, window_cells


@dataclass(frozen=True, slots=True)
class Context:
    """Sizes that hold for every batch of a context (llama_cparams); counts are tokens, cells or sequences."""

    n_ctx: int
    n_ctx_seq: int
    n_seq_max: int
    n_ubatch: int
    n_batch: int
    is_unified: bool
    type_k: str
    type_v: str
    is_flash: bool
    is_v_transposed: bool  # of the V cache, as it was created: before flash attention was ruled out
    is_kv_offloaded: bool
    is_swa_full: bool
    is_full_offload: bool  # the graph callback pins norms at any batch size
    unfused: frozenset[str] = frozenset()  # operations that a probe has ruled out

    @property
    def n_stream(self) -> int:
        """Streams of the KV cache: one when sequences share it."""
        return 1 if self.is_unified else self.n_seq_max

    def swa_cells(self, window_tokens: int) -> int:
        """Cells of a sliding-window cache (llama-kv-cache-iswa.cpp)."""
        if self.is_swa_full:
            return self.n_ctx_seq
        shared = self.n_seq_max if self.is_unified else 1
        return window_cells(self.n_ctx_seq, window_tokens, shared, self.n_ubatch)


@dataclass(frozen=True, slots=True)
class Batch:
    """One reserved batch: tokens, the sequences they belong to, and how many of them give logits."""

    n_tokens: int
    n_seqs: int
    n_outputs: int


def make_context(settings: Settings, facts: Architecture, is_full_offload: bool, is_flash: bool) -> Context:
    """The rounded settings of a context; `is_flash` is what -fa asks for."""
    size = rounded_context(settings, facts.n_ctx_train)
    has_own_streams = any(cache.is_per_sequence for layer in facts.layers for cache in layer.caches)
    return Context(
        n_ctx=size.cells * size.n_streams,
        n_ctx_seq=size.cells,
        n_seq_max=size.n_sequences,
        n_ubatch=size.ubatch_tokens,
        n_batch=size.batch_tokens,
        is_unified=settings.is_kv_unified and not has_own_streams,
        type_k=settings.kv_type_k.upper(),
        type_v=settings.kv_type_v.upper(),
        is_flash=is_flash,
        is_v_transposed=not is_flash,
        is_kv_offloaded=settings.is_kv_offloaded,
        is_swa_full=settings.is_swa_full,
        is_full_offload=is_full_offload,
    )
