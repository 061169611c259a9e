"""Attention over the caches: masks, writes and reads, flash attention or plain products (build_attn*)."""

from __future__ import annotations

import functools

from placement.graph.builder import Builder
from placement.graph.tensor import Tensor, row_size
from placement.quants import BLOCKS


class AttentionBuilder(Builder):
    """Adds attention to the blocks of `Builder`; Q, K and V come as [head size, heads, tokens]."""

    @functools.cached_property
    def _rotations(self) -> dict[tuple[str, str], int]:
        return {}

    @functools.cached_property
    def _is_hybrid_windowed(self) -> bool:
        """Whether windows and recurrent states are combined: the engine makes no rotations for those."""
        layers = self.facts.layers
        return any(i.is_recurrent for i in layers) and any(i.window_tokens is not None for i in layers)

    # --- inputs

    def cells(self, il: int) -> int:
        """Cells per stream of the cache that layer `il` reads."""
        window = self.layer(il).window_tokens
        return self.context.n_ctx_seq if window is None else self.context.swa_cells(window)

    def _group(self, il: int) -> str:
        """Which of the two caches of a sliding-window model the layer uses."""
        return "swa" if self.layer(il).window_tokens is not None else "full"

    def mask(self, il: int, name: str = "mask") -> Tensor:
        """The attention mask of the layer's cache: f16 for flash attention, else f32."""
        n_stream = self.context.n_stream
        type = "F16" if self.context.is_flash else "F32"
        shape = (self.cells(il), self.n_tokens // n_stream, 1, n_stream)
        return self.input_once(f"{name}.{self._group(il)}", type, *shape)

    def k_ids(self, il: int) -> Tensor:
        """Where in the cache the batch's K rows go."""
        return self.input_once(f"k_ids.{self._group(il)}", "I64", self.n_tokens)

    def v_ids(self, il: int) -> Tensor:
        """Where the batch's V rows go; one index per element of a transposed cache."""
        width = self.facts.v_width_max if self.context.is_v_transposed else 1
        return self.input_once(f"v_ids.{self._group(il)}", "I64", self.n_tokens * width)

    def _rotation(self, il: int, which: str) -> Tensor | None:
        """The Hadamard matrix by which quantised caches are rotated, or None."""
        type = self.context.type_k if which == "k" else self.context.type_v
        if BLOCKS[type][0] == 1 or self._is_hybrid_windowed:
            return None
        group = self._group(il)
        if (which, group) not in self._rotations:
            self._rotations[which, group] = self._rotation_size(which, group)
        n = self._rotations[which, group]
        return self.input_once(f"{which}_rot.{group}", "F32", n, n) if n else None

    def _rotation_size(self, which: str, group: str) -> int:
        """Rows of the Hadamard matrix; 0 where head sizes vary or are no multiple of 64."""
        owners = [layer for layer in self.facts.layers if layer.caches]
        sizes = [
            (layer.window_tokens is not None, getattr(layer.caches[0], f"{which}_head")) for layer in owners
        ]
        heads = {head for is_windowed, head in sizes if is_windowed == (group == "swa")}
        if len(heads) != 1 or not sizes or sizes[0][1] % 64:
            return 0
        n, size = 64, heads.pop()
        while which == "k" and size % (2 * n) == 0:
            n *= 2
        return n

    def _rotate(self, cur: Tensor, matrix: Tensor) -> Tensor:
        n = matrix.ne[0]
        rows = cur.n_elements // n
        flat = self.reshape(cur, n, rows) if cur.is_contiguous else self.cont(cur, n, rows)
        product = self.mul_mat(matrix, flat)
        product.kind = "hadamard"
        return self.reshape(product, *cur.ne)

    # --- caches

    def cache(self, il: int, which: str, width: int, cells: int | None = None) -> Tensor:
        """The K or V cache of layer `il`: [width, cells, streams] on the layer's home."""
        key = f"cache_{which}.{il}"
        if key not in self.inputs:
            type = self.context.type_v if which == "v" else self.context.type_k
            leaf = self.new(type, width, cells or self.cells(il), self.context.n_stream)
            leaf.cache_layer = il
            self.inputs[key] = leaf
        return self.inputs[key]

    def _all_streams(self, cache: Tensor) -> Tensor:
        if cache.ne[2] == 1:
            return cache
        return self.reshape(cache, cache.ne[0], cache.ne[1] * cache.ne[2])

    def store_k(self, cache: Tensor, k: Tensor, ids: Tensor) -> Tensor:
        """Write the batch's K rows into the cache (cpy_k)."""
        rows = self.view_2d(k, k.ne[0] * k.ne[1], k.ne[2], k.nb[2])
        return self.set_rows(self._all_streams(cache), rows, ids)

    def store_v(self, cache: Tensor, v: Tensor, ids: Tensor) -> Tensor:
        """Write the batch's V rows into the cache, element by element if it is transposed (cpy_v)."""
        width, n_tokens = v.ne[0] * v.ne[1], v.ne[2]
        if not self.context.is_v_transposed:
            rows = self.view_2d(v, width, n_tokens, v.nb[2])
            return self.set_rows(self._all_streams(cache), rows, ids)
        is_dense = row_size(v.type, width) == v.nb[2]
        rows = self.reshape(v, width, n_tokens) if is_dense else self.cont(v, width, n_tokens)
        if width < cache.ne[0]:
            rows = self.pad(rows, cache.ne[0] - width)
        target = self.reshape(cache, 1, cache.n_elements)
        return self.set_rows(target, self.reshape(rows, 1, rows.n_elements), ids)

    def read_k(self, cache: Tensor, head: int, n_head: int) -> Tensor:
        """The cache's K as [head size, heads, cells, streams] (get_k)."""
        row, cells = row_size(cache.type, cache.ne[0]), cache.ne[1]
        shape = (head, n_head, cells, cache.ne[2])
        return self.view(cache, shape, (row_size(cache.type, head), row, row * cells))

    def read_v(self, cache: Tensor, head: int, n_head: int) -> Tensor:
        """The cache's V, rows and columns swapped if it is transposed (get_v)."""
        width, cells, n_stream = cache.ne[0], cache.ne[1], cache.ne[2]
        if not self.context.is_v_transposed:
            return self.read_k(cache, head, n_head)
        strides = (
            row_size(cache.type, cells * head),
            row_size(cache.type, cells),
            row_size(cache.type, cells * width),
        )
        return self.view(cache, (cells, n_head, head, n_stream), strides)

    # --- attention

    def attention(
        self,
        il: int,
        q: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        *,
        wo: str | None = "attn_output",
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        mask: Tensor | None = None,
        is_windowed: bool = False,
        is_capped: bool = False,
    ) -> Tensor:
        """Attention through K and V caches and the output projection (build_attn with kv input)."""
        k_rot, v_rot = self._rotation(il, "k"), self._rotation(il, "v")
        if k_rot is not None:
            q = self._rotate(q, k_rot)
            k = self._rotate(k, k_rot) if k is not None else None
        if v_rot is not None and v is not None:
            v = self._rotate(v, v_rot)
        for tensor in (q, k, v) if is_windowed else (q, v, k):
            if tensor is not None:
                self.expand(tensor)
        k_read, v_read = self._through_cache(il, k, v)
        mask = self.mask(il) if mask is None else mask
        cur = self.mha(il, q, k_read, v_read, mask, sinks=sinks, bias=bias, is_capped=is_capped)
        if v_rot is not None:
            cur = self._rotate(cur, v_rot)
        return self.project_out(cur, il, wo)

    def _through_cache(self, il: int, k: Tensor | None, v: Tensor | None) -> tuple[Tensor, Tensor]:
        owner = self.layer(il).cache_layer
        facts = self.layer(il if owner is None else owner)
        cache = facts.caches[0]
        v_width = self.facts.v_width_max if self.context.is_v_transposed else cache.v_width
        k_cache = self.cache(facts.index, "k", cache.k_width)
        v_cache = self.cache(facts.index, "v", v_width)
        if k is not None:
            self.expand(self.store_k(k_cache, k, self.k_ids(il)))
        if v is not None:
            self.expand(self.store_v(v_cache, v, self.v_ids(il)))
        n_head_kv = self.layer(il).n_head_kv
        return self.read_k(k_cache, cache.k_head, n_head_kv), self.read_v(v_cache, cache.v_head, n_head_kv)

    def attention_latent(
        self,
        il: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        wv_b: Tensor | None,
        *,
        wo: str | None = "attn_output",
        mask: Tensor | None = None,
    ) -> Tensor:
        """Attention over a cache that holds K only, V being its first part (build_attn with k input)."""
        for tensor in (q, v, k):
            self.expand(tensor)
        facts = self.layer(il).caches[0]
        cache = self.cache(il, "k", facts.k_width)
        self.expand(self.store_k(cache, k, self.k_ids(il)))
        k_read = self.read_k(cache, facts.k_head, self.layer(il).n_head_kv)
        v_read = self.view(k_read, (v.ne[0], *k_read.ne[1:]), k_read.nb[1:])
        mask = self.mask(il) if mask is None else mask
        cur = self.mha(il, q, k_read, v_read, mask, sinks=self.w(il, "attn_sinks"), v_mla=wv_b)
        return self.project_out(cur, il, wo)

    def attention_no_cache(
        self,
        il: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        wo: str | None = "attn_output",
        bias: Tensor | None = None,
    ) -> Tensor:
        """Attention within the batch (build_attn with no_cache input)."""
        for tensor in (q, k, v):
            self.expand(tensor)
        type = "F16" if self.context.is_flash else "F32"
        mask = self.input_once(f"mask.{self._group(il)}", type, self.n_tokens, self.n_tokens)
        return self.project_out(self.mha(il, q, k, v, mask, bias=bias), il, wo)

    def project_out(self, cur: Tensor, il: int, wo: str | None) -> Tensor:
        """The output projection `blk.<il>.<wo>`, if any; BitNet norms before it."""
        if wo is None:
            return cur
        if self.w(il, "attn_sub_norm") is not None:
            cur = self.layer_norm(cur, il, "attn_sub_norm")
        if (weight := self.w(il, wo)) is not None:
            cur = self.lora_mm(weight, cur, is_scaled=True)
        bias = self.b(il, wo) if "o" not in self.unread else None
        return self.add(cur, bias) if bias is not None else cur

    def mha(
        self,
        il: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        *,
        sinks: Tensor | None = None,
        bias: Tensor | None = None,
        v_mla: Tensor | None = None,
        is_capped: bool = False,
    ) -> Tensor:
        """The attention product itself, streams split and merged again (build_attn_mha)."""
        v_trans = v.nb[1] > v.nb[2]
        n_stream = k.ne[3]
        per_stream = q.ne[2] // n_stream
        q = self.view(q, (q.ne[0], q.ne[1], per_stream, n_stream), (q.nb[1], q.nb[2], q.nb[2] * per_stream))
        q, k, v = (self.permute(tensor, 0, 2, 1, 3) for tensor in (q, k, v))
        if self.context.is_flash and bias is None:
            cur = self._flash(il, q, k, v, mask, sinks, v_mla, v_trans)
        else:
            cur = self._plain(q, k, v, mask, sinks, bias, v_mla, v_trans, is_capped)
        self.expand(cur)
        return cur

    def _flash(
        self,
        il: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        v_mla: Tensor | None,
        v_trans: bool,
    ) -> Tensor:
        if v_trans:
            v = self.transpose(v)
        k = self.cast(k, "F16") if k.type == "F32" else k
        v = self.cast(v, "F16") if v.type == "F32" else v
        cur = self.flash_attn(q, k, v, mask, sinks)
        self.fused_nodes.append((cur.op, cur, il))
        if v_mla is not None:
            cur = self.mul_mat(v_mla, self.permute(cur, 0, 2, 1, 3))
            cur = self.cont(self.permute(cur, 0, 2, 1, 3))
        ne = cur.ne
        return self.reshape(cur, ne[0] * ne[1], ne[2] * ne[3])

    def _plain(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        sinks: Tensor | None,
        bias: Tensor | None,
        v_mla: Tensor | None,
        v_trans: bool,
        is_capped: bool,
    ) -> Tensor:
        kq = self.mul_mat(k, q)
        if self.facts.name == "grok":
            kq = self.scale(self.unary(self.scale(kq), "tanh"))
        if is_capped:
            kq = self.soft_cap(kq)
        if bias is not None:
            kq = self.add(kq, bias)
        kq = self.soft_max(kq, mask, sinks)
        if not v_trans:
            v = self.cont(self.transpose(v))
        kqv = self.mul_mat(v, kq)
        if v_mla is not None:
            kqv = self.mul_mat(v_mla, kqv)
        cur = self.permute(kqv, 0, 2, 1, 3)
        ne = cur.ne
        cur = self.cont(cur, ne[0] * ne[1], ne[2] * ne[3])
        if not self.context.is_kv_offloaded:
            cur.kind = "cpu"
        return cur
