"""The facts about an architecture that placement computes with: layers, their caches and states, tensors."""

from __future__ import annotations

from dataclasses import dataclass

from placement.inputs.model import Tensor
from placement.llamacpp.architecture.rules import Rule


@dataclass(frozen=True, slots=True)
class Cache:
    """One cache of one layer: elements per cell of K and V (0 = none).

    `window_tokens` None: as many cells as the context; otherwise that window's. `ratio` tokens share a cell.
    `is_indexer`: keys that a sparse-attention indexer scans. `is_per_sequence`: never unified.
    """

    k_width: int
    v_width: int
    window_tokens: int | None = None
    ratio: int = 1
    is_indexer: bool = False
    is_per_sequence: bool = False
    k_head: int = 0  # elements per head, for kernels and quantised caches
    v_head: int = 0


@dataclass(frozen=True, slots=True)
class LayerFacts:
    """One layer: heads, caches of its own, and F32 state elements per sequence (`state_r`, `state_s`).

    `cache_layer` is the layer whose cache it reads: itself, an earlier one, or None without attention memory.
    `state_extra` is state beyond r and s (compressors). `is_sparse`: attention reads only the cells that an
    indexer, its own or an earlier layer's, has selected.
    """

    index: int
    is_loaded: bool
    n_head: int
    n_head_kv: int
    n_ff: int
    n_expert_used: int
    is_recurrent: bool
    window_tokens: int | None
    caches: tuple[Cache, ...]
    cache_layer: int | None
    state_r: int = 0
    state_s: int = 0
    state_extra: int = 0
    is_sparse: bool = False

    @property
    def k_width(self) -> int:
        """Elements of K per cell in the attention cache; 0 without one."""
        return next((cache.k_width for cache in self.caches if not cache.is_indexer), 0)

    @property
    def v_width(self) -> int:
        """Elements of V per cell in the attention cache; 0 without one, and with latent attention."""
        return next((cache.v_width for cache in self.caches if not cache.is_indexer), 0)

    @property
    def indexer_k_width(self) -> int:
        """Elements per cell in the indexer's cache; 0 without one."""
        return sum(cache.k_width for cache in self.caches if cache.is_indexer)


@dataclass(frozen=True, slots=True)
class PlacedTensor:
    """A tensor that the engine allocates: its class, and the layer whose device is its home.

    `layer` is None for input tensors and `n_layer_all` for output tensors. `is_copy` marks the second copy of
    a tied token embedding (named `TIED_OUTPUT`). `is_shared`: one copy on each device with layers.
    `has_cuda_kernel` False: unless an override says otherwise, the engine keeps it on the CPU.
    `is_lazy`: rows are read from the file on demand; it counts as host memory in the engine's figures, is not
    resident, and no override moves it.
    """

    name: str
    tensor: Tensor
    kind: str
    layer: int | None
    is_copy: bool = False
    is_shared: bool = False
    has_cuda_kernel: bool = True
    is_lazy: bool = False


@dataclass(frozen=True)
class Architecture:
    """What an architecture needs; `homes` of an assignment has `n_layer_all + 1` entries.

    `n_layer_all` counts NextN (MTP) layers, which are not loaded, and the layers that an architecture adds to
    its blocks; `n_layer` is the trunk. `v_width_max` is what V is padded to without flash attention.
    `indexer_top_k` is what the header says, in cells or blocks; `sparse_tokens` the cells that sparse
    attention reads. `is_known` False: no rule for this name, everything is derived from the header alone.
    """

    name: str
    is_known: bool
    rule: Rule
    n_layer_all: int
    n_layer: int
    n_embd: int
    n_vocab: int
    n_ctx_train: int
    n_expert: int
    n_expert_used: int
    is_mla: bool
    v_width_max: int
    indexer_top_k: int
    sparse_tokens: int
    layers: tuple[LayerFacts, ...]
    tensors: tuple[PlacedTensor, ...]
    skipped: tuple[Tensor, ...]

    @property
    def has_memory(self) -> bool:
        """Whether a context keeps anything between batches (False for encoders and diffusion models)."""
        return self.rule.memory != "none"

    @property
    def is_output_tied(self) -> bool:
        """Whether the token embedding is loaded a second time as the output matrix."""
        return any(tensor.is_copy for tensor in self.tensors)
