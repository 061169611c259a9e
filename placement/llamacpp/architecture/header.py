"""Reads a model's header as the engine does: heads, windows, caches and states of each layer.

Mirrors llama-hparams.cpp, load_hparams and create_memory of llama-model.cpp, and llama-kv-cache*.cpp.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from placement.inputs.model import Model
from placement.llamacpp.architecture.records import Cache, LayerFacts
from placement.llamacpp.architecture.rules import (
    GLM_5_2_FULL,
    GLM_5_2_N_CTX_TRAIN,
    GLM_5_2_PERIOD,
    Rule,
    Window,
)

_CSA_RATIO, _HCA_RATIO = 4, 128  # DeepSeek-V4's two compression ratios


class HeaderFacts:
    """The header's numbers as the engine reads them; `layer(i)` gives a layer's facts."""

    def __init__(self, model: Model, rule: Rule) -> None:
        self.model, self.rule = model, rule
        n_block = self.integer("block_count")
        n_nextn = min(self.integer("nextn_predict_layers"), n_block)
        if rule.memory == "dsv4" and f"blk.{n_block - n_nextn}.nextn.eh_proj.weight" not in model.by_name:
            n_nextn = 0
        n_loops = max(self.integer("num_loops", 1), 1) if rule.has_loops else 1
        self.n_block = n_block
        self.n_layer = n_block - n_nextn if n_loops == 1 else (n_block - n_nextn) * n_loops
        self.n_layer_all = self.n_layer + (1 if rule.has_router_layer else n_nextn if n_loops == 1 else 0)
        self.n_head = self.per_layer("attention.head_count", 0)
        self.n_head_kv = self.per_layer("attention.head_count_kv", None, self.n_head)
        if rule.has_router_layer:
            self.n_head[-1] = self.n_head_kv[-1] = 1
        self.n_ff = self.per_layer("feed_forward_length", 0)
        self.n_expert_used = self.per_layer("expert_used_count", 0)
        key_mla, value_mla = "attention.key_length_mla", "attention.value_length_mla"
        self.is_mla = rule.has_mla and bool(self.integer(key_mla)) and bool(self.integer(value_mla))
        self._head_sizes()
        self.is_recurrent = self._recurrent()
        self.window_tokens, self.is_windowed = self._windows()

    def integer(self, key: str, default: int = 0) -> int:
        """The key's value; the first one of an array."""
        value = self.model.get(key, default)
        if isinstance(value, (tuple, list)):
            value = value[0] if value else default
        return int(value)

    def per_layer(self, key: str, default: int | None, instead: list[int] | None = None) -> list[int]:
        """One number per layer from a scalar or an array; loops repeat the blocks' numbers."""
        value = self.model.get(key, default)
        if value is None:
            return list(instead or [0] * self.n_layer_all)
        if not isinstance(value, (tuple, list)):
            return [int(value)] * self.n_layer_all
        numbers = [int(item) for item in value][: self.n_layer_all]
        if self.rule.has_loops and numbers:
            return [numbers[i % self.n_block] for i in range(self.n_layer_all)]
        return numbers + [0] * (self.n_layer_all - len(numbers))

    def _head_sizes(self) -> None:
        n_head = self.n_head[0] if self.n_head else 0
        default = self.integer("embedding_length") // n_head if n_head else 0
        self.k_head = self.integer("attention.key_length", default) if n_head else 0
        self.v_head = self.integer("attention.value_length", default) if n_head else 0
        self.k_head_swa = self.integer("attention.key_length_swa", self.k_head)
        self.v_head_swa = self.integer("attention.value_length_swa", self.v_head)

    def _recurrent(self) -> list[bool]:
        rule, n_all = self.rule, self.n_layer_all
        if rule.memory in ("recurrent", "parallel"):
            return [True] * n_all
        if rule.memory != "hybrid":
            return [False] * n_all
        given = self.model.get("attention.recurrent_layers")
        if rule.recurrent_by == "interval" and given is not None:
            return [bool(flag) for flag in self.per_layer("attention.recurrent_layers", 0)]
        interval = self.integer("full_attention_interval", rule.interval)
        tests: dict[str | None, Callable[[int], bool]] = {
            "kv_heads": lambda i: self.n_head_kv[i] == 0,
            "kv_heads_and_ffn": lambda i: self.n_head_kv[i] == 0 and self.n_ff[i] == 0,
            "interval": lambda i: (i + 1) % interval != 0,
        }
        return [i < self.n_layer and tests[rule.recurrent_by](i) for i in range(n_all)]

    def _windows(self) -> tuple[int, list[bool]]:
        """The window in tokens (0 = the architecture has none here) and which layers have it."""
        window, n_all = self.rule.window, self.n_layer_all
        none: tuple[int, list[bool]] = (0, [False] * n_all)
        if window is None or window.only_n_layer not in (None, self.n_layer):
            return none
        given = self.model.get("attention.sliding_window")
        tokens = self.integer("attention.sliding_window", window.default_tokens or 0)
        # Llama 4 has windows unless the header says 0; the others have none unless it says more.
        is_off = given == 0 if window.kind == "chunked" else not window.is_always_on and tokens == 0
        if is_off:
            return none
        tokens = window.forced_tokens or tokens
        if window.is_all_attention:
            return tokens, [i < self.n_layer and not self.is_recurrent[i] for i in range(n_all)]
        pattern = self.model.get("attention.sliding_window_pattern", window.period)
        if isinstance(pattern, (tuple, list)):
            return tokens, [bool(flag) for flag in self.per_layer("attention.sliding_window_pattern", 0)]
        return tokens, [self._in_period(i, pattern, window) for i in range(n_all)]

    def _in_period(self, i: int, period: Any, window: Window) -> bool:
        if period is None:
            return False
        if period == 0:
            return i < self.n_layer or self.rule.memory == "dsv4"
        place = i % int(period)
        is_windowed = place != 0 if window.is_dense_first else place < int(period) - 1
        return i < self.n_layer and is_windowed

    def k_width(self, i: int) -> int:
        """n_embd_k_gqa."""
        return (self.k_head_swa if self.is_windowed[i] else self.k_head) * self.n_head_kv[i]

    def v_width(self, i: int) -> int:
        """n_embd_v_gqa."""
        return (self.v_head_swa if self.is_windowed[i] else self.v_head) * self.n_head_kv[i]

    def layer(self, i: int) -> LayerFacts:
        """The layer's facts."""
        caches = self._caches(i)
        state = self._state(i)
        return LayerFacts(
            index=i,
            is_loaded=i < self.n_layer,
            n_head=self.n_head[i],
            n_head_kv=self.n_head_kv[i],
            n_ff=self.n_ff[i],
            n_expert_used=self.n_expert_used[i],
            is_recurrent=self.is_recurrent[i],
            window_tokens=self.window_tokens if self.is_windowed[i] else None,
            caches=caches,
            cache_layer=i if caches else self._reused(i),
            state_r=state[0],
            state_s=state[1],
            state_extra=state[2],
            is_sparse=bool(caches) and self._is_sparse(i),
        )

    def _n_kv_from_start(self) -> int:
        rule = self.rule.n_kv_from_start
        if isinstance(rule, str):
            return self.n_layer_all - self.integer(f"attention.{rule}")
        return self.n_layer_all if rule is None else rule

    def _reused(self, i: int) -> int | None:
        """The layer whose cache a layer without one reads (gemma3n, gemma4)."""
        n = self._n_kv_from_start()
        if self.rule.n_kv_from_start is None or i < n or i >= self.n_layer:
            return None
        return n - (2 if self.is_windowed[i] else 1)

    def _has_cache(self, i: int) -> bool:
        memory = self.rule.memory
        is_in_trunk = i < self.n_layer or self.rule.has_router_layer or self.rule.is_nextn_cached
        if memory in ("none", "recurrent") or i >= self._n_kv_from_start():
            return False
        if memory in ("dsv4", "parallel"):
            return True
        if memory == "hybrid" and self.is_recurrent[i]:
            return False
        if self.rule.recurrent_by == "kv_heads_and_ffn" and self.n_ff[i] != 0:
            return False
        return is_in_trunk or self.n_layer == 0

    def _caches(self, i: int) -> tuple[Cache, ...]:
        if not self._has_cache(i):
            return ()
        window = self.window_tokens if self.is_windowed[i] else None
        k_head = self.k_head_swa if self.is_windowed[i] else self.k_head
        v_head = self.v_head_swa if self.is_windowed[i] else self.v_head
        if self.rule.memory == "dsv4":
            return self._compressed_caches(i, window, k_head)
        v_width = 0 if self.is_mla else self.v_width(i)
        attention = Cache(self.k_width(i), v_width, window, k_head=k_head, v_head=v_head)
        indexer = self._indexer(i, v_head)
        return (attention, indexer) if indexer else (attention,)

    def _compressed_caches(self, i: int, window: int | None, k_head: int) -> tuple[Cache, ...]:
        """llama_kv_cache_dsv4: a raw window, and a compressed cache with its indexer (ratio 4) or without."""
        caches = [Cache(self.k_width(i), 0, window, is_per_sequence=True, k_head=k_head)]
        ratio = self._compress_ratio(i)
        if ratio in (_CSA_RATIO, _HCA_RATIO):
            caches.append(Cache(self.k_width(i), 0, None, ratio, is_per_sequence=True, k_head=k_head))
        if ratio == _CSA_RATIO:
            width = self.integer("attention.indexer.key_length")
            caches.append(Cache(width, 0, None, ratio, is_indexer=True, is_per_sequence=True, k_head=width))
        return tuple(caches)

    def _compress_ratio(self, i: int) -> int:
        ratios = self.model.get("attention.compress_ratios", ())
        if not isinstance(ratios, (tuple, list)):
            return int(ratios)
        return int(ratios[i]) if i < len(ratios) else 0

    def _indexer(self, i: int, v_head: int) -> Cache | None:
        """The indexer's own cache: one key head, K only where attention is latent."""
        width = self.integer("attention.indexer.key_length")
        rule = self.rule.indexer
        if rule is None or width == 0 or not self._has_indexer(i, rule):
            return None
        if self.rule.indexer_pool_row > 1:
            width *= self.rule.indexer_pool_row if self._is_pooled() else 1
            return Cache(width, 0, is_indexer=True, k_head=width)
        return Cache(width, 0 if self.is_mla else v_head, is_indexer=True, k_head=width, v_head=v_head)

    def _is_sparse(self, i: int) -> bool:
        if self.rule.memory == "dsv4":
            return self._compress_ratio(i) == _CSA_RATIO
        if self.rule.indexer is None or self.is_windowed[i] or not self.integer("attention.indexer.top_k"):
            return False
        return self.rule.indexer != "sparse" or self._has_indexer(i, "sparse")

    def _is_pooled(self) -> bool:
        if self.integer("attention.indexer.kpool"):
            return True
        return any(self._compress_ratio(i) for i in range(self.n_layer_all))

    def _has_indexer(self, i: int, rule: str) -> bool:
        if rule == "sparse":
            return i >= self.integer("leading_dense_block_count")
        if i >= self.n_layer or self.integer("attention.indexer.top_k") == 0:
            return False
        if rule != "typed":
            return True
        types = self.model.get("attention.indexer.types")
        if types is not None:
            return bool(self.per_layer("attention.indexer.types", 0)[i])
        if self.model.architecture == "glm-dsa":
            if self.integer("context_length") < GLM_5_2_N_CTX_TRAIN:
                return True
            n_full = len(GLM_5_2_FULL)
            return i < n_full or (i - n_full) % GLM_5_2_PERIOD == 0
        return self.model.architecture == "glm5-next"

    def _state(self, i: int) -> tuple[int, int, int]:
        """F32 elements per sequence: r, s (n_embd_r, n_embd_s of llama-hparams.cpp) and the rest."""
        if self.rule.memory == "dsv4":
            return 0, 0, self._compressor_state(i)
        if not self.is_recurrent[i] or i >= self.n_layer:
            return 0, 0, 0
        n_embd, n_head = self.integer("embedding_length"), self.n_head[0]
        d_conv, d_inner = self.integer("ssm.conv_kernel"), self.integer("ssm.inner_size")
        d_state, n_group = self.integer("ssm.state_size"), self.integer("ssm.group_count")
        wkv, kda = self.integer("wkv.head_size"), self.integer("kda.head_dim")
        extra = self._ple_state(i)
        if wkv:
            return self.integer("token_shift_count", 2) * n_embd, n_embd * wkv, extra
        if self.integer("shortconv.l_cache"):
            return n_embd * (self.integer("shortconv.l_cache") - 1), 0, extra
        if kda:
            return 3 * (d_conv - 1 if d_conv else 3) * n_head * kda, kda * kda * n_head, extra
        r = max(d_conv - 1, 0) * (d_inner + 2 * n_group * d_state)
        if self.rule.has_linear_attention:
            return r, self.k_head * self.k_head * n_head, extra
        return r, d_state * d_inner, extra

    def _compressor_state(self, i: int) -> int:
        ratio, k_head = self._compress_ratio(i), self.k_head_swa
        if ratio == _CSA_RATIO:
            indexer = self.integer("attention.indexer.key_length")
            return 2 * (2 * _CSA_RATIO) * 2 * (k_head + indexer)
        return 2 * _HCA_RATIO * k_head if ratio == _HCA_RATIO else 0

    def _ple_state(self, i: int) -> int:
        """qwen4exp's convolution history of the per-layer embedding."""
        layers = self.model.get("ple.layers", ())
        if not isinstance(layers, (tuple, list)) or i not in layers:
            return 0
        n_rows = max(self.integer("ple.conv_kernel") - 1, 0) * self.integer("ple.ngram_size")
        return n_rows * self.integer("hyper_connection.count") * self.integer("embedding_length")
