"""Sparse attention over pools of cells: GLM 5 Next and Qwen 4 score pooled keys and read whole pools."""

from __future__ import annotations

from placement.graph.latent import LatentBuilder
from placement.graph.tensor import Tensor, row_size

POOL_PAD = 64


class PoolBuilder(LatentBuilder):
    """Adds pooled indexers; the cache's rows hold keys, gates where there are some, and pooled keys."""

    selection: Tensor | None = None  # what the last indexer left visible; layers without one use it again

    # --- inputs

    @property
    def _pool(self) -> int:
        """Cells of a pool."""
        by_key = self.integer("attention.indexer.kpool")
        ratios = self.model.get("attention.compress_ratios", 0)
        ratio = max(ratios) if isinstance(ratios, (tuple, list)) else int(ratios)
        return int(ratio) if self.facts.name == "qwen4exp" else by_key

    @property
    def _n_new(self) -> int:
        """Pools that are made anew: all, as far as reservations go."""
        return max(1, self.context.n_ctx_seq // self._pool * self.context.n_stream)

    @property
    def _n_pool(self) -> int:
        return max(POOL_PAD, -(-(self._n_new + 1) // POOL_PAD) * POOL_PAD)

    @property
    def _n_top(self) -> int:
        return min(self._n_pool, self.facts.indexer_top_k // self._pool)

    def pool_inputs(self) -> None:
        """The inputs that enter the graph before any layer (build_inp_kpool)."""
        for tensor in (self._pool_cells, self._pool_ids, self._pool_mask, self._tail_ids_of_pools):
            self.expand(tensor)
        if self.facts.name != "qwen4exp":
            self.expand(self._gather_mask)

    @property
    def _pool_cells(self) -> Tensor:
        return self.input_once("pool_cells", "I32", self._n_pool)

    @property
    def _pool_ids(self) -> Tensor:
        return self.input_once("pool_ids", "I32", self._pool, self._n_pool)

    @property
    def _pool_mask(self) -> Tensor:
        return self.input_once("pool_mask", "F16", self._n_pool, self.n_tokens)

    @property
    def _tail_ids_of_pools(self) -> Tensor:
        return self.input_once("tail_ids", "I32", self._pool - 1, self.n_tokens)

    @property
    def _gather_mask(self) -> Tensor:
        has_tail = bool(self.model.get("attention.indexer.kpool_select_tail", True))
        n = self._pool * self._n_top + (self._pool - 1 if has_tail else 0)
        return self.input_once("gather_mask", "F32", n, 1, 1, self.n_tokens)

    # --- the pooled keys

    def _stored_keys(self, il: int, parts: list[Tensor], size: int) -> tuple[Tensor, Tensor]:
        """Views of the cache after the batch's rows were written: what pools are made from, and pooled keys."""
        n = self.n_tokens
        zeros = self.like("FILL", self.new("F32", size, n))
        packed = parts[0]
        for part in (*parts[1:], zeros):
            packed = self.concat(packed, part, 0)
        width = packed.ne[0]
        cache = self.index_cache(il, width)
        packed = self.reshape(packed, width, 1, n)
        self.expand(self.store_k(cache, packed, self.input_once("k_ids.index", "I64", n)))
        n_cells = cache.ne[1] * cache.ne[2]
        kept = self.view_2d(cache, width - size, n_cells, cache.nb[1])
        offset = row_size(cache.type, width - size)
        return kept, self.view_2d(cache, size, n_cells, cache.nb[1], offset)

    def _pooled_keys(self, target: Tensor, pooled: Tensor, size: int) -> Tensor:
        """All pooled keys, the new ones written first."""
        ids = self.input_once("new_pool_rows", "I64", self._n_new)
        self.expand(self.set_rows(target, pooled, ids))
        return self.reshape(self.get_rows(target, self._pool_cells), size, 1, self._n_pool)

    def _members(self, kept: Tensor) -> Tensor:
        """The rows of the cells that make up the new pools."""
        pool, n = self._pool, self._n_new
        ids = self.reshape(self.input_once("new_pool_ids", "I32", pool, n), pool * n)
        return self.reshape(self.get_rows(kept, ids), kept.ne[0], pool, n)

    def _gated_pools(self, il: int, rows: Tensor, size: int) -> Tensor:
        """Pools as sums weighed by a gate and by place (GLM 5 Next)."""
        pool, n = self._pool, self._n_new
        keys = self.view_3d(rows, size, pool, n, rows.nb[1], rows.nb[2])
        gates = self.view_3d(rows, size, pool, n, rows.nb[1], rows.nb[2], row_size(rows.type, size))
        logits = self.add(gates, self.need(self.w(il, "indexer_compressor_ape")))
        logits = self.cont(self.permute(logits, 1, 0, 2, 3))
        shares = self.soft_max(self.reshape(logits, pool, size * n))
        shares = self.reshape(shares, pool, size, n)
        keys = self.cont(self.permute(keys, 1, 0, 2, 3))
        return self.reshape(self.sum_rows(self.mul(shares, keys)), size, n)

    # --- GLM 5 Next

    def pooled_latent_attention(self, il: int, cur: Tensor) -> Tensor:
        """Latent attention without rope over chosen pools (build_dsa_layer)."""
        narrow, q = self._latent_query(il, cur)
        n_head, n = self.layer(il).n_head, self.n_tokens
        q = self.reshape(q, q.ne[0] // n_head, n_head, n)
        compressed = self.mul_mat(self.need(self.w(il, "attn_kv_a_mqa")), cur)
        compressed = self.layer_norm(compressed, il, "attn_kv_a_norm")
        compressed = self.reshape(compressed, compressed.ne[0], 1, n)
        query = self.mul_mat(self.need(self.w(il, "attn_k_b")), self.permute(q, 0, 2, 1, 3))
        query = self.permute(query, 0, 2, 1, 3)
        if self.indexer_cache(il) is not None:
            self.selection = self._select_pools(il, cur, narrow)
        for tensor in (query, compressed):
            self.expand(tensor)
        cache = self.cache(il, "k", compressed.ne[0])
        self.expand(self.store_k(cache, compressed, self.k_ids(il)))
        mask = self.reshape(self.need(self.selection), *self.mask(il).ne)
        k = self.read_k(cache, compressed.ne[0], 1)
        v = self.view(k, k.ne, k.nb[1:])
        out = self.mha(il, query, k, v, mask, v_mla=self.w(il, "attn_v_b"))
        return self.mul_mat(self.need(self.w(il, "attn_output")), out)

    def _select_pools(self, il: int, cur: Tensor, narrow: Tensor) -> Tensor:
        """The mask that leaves the best pools (build_kpool_select)."""
        size, n_head = (
            self.integer("attention.indexer.key_length"),
            self.integer("attention.indexer.head_count"),
        )
        q = self.mul_mat(self.need(self.w(il, "indexer.attn_q_b")), narrow)
        q = self.reshape(q, size, n_head, self.n_tokens)
        key = self.mul_mat(self.need(self.w(il, "indexer.attn_k")), cur)
        key = self.layer_norm(key, il, "indexer.k_norm", "layer")
        gate = self.mul_mat(self.need(self.w(il, "indexer_compressor_gate")), cur)
        kept, target = self._stored_keys(il, [key, gate], size)
        keys = self._pooled_keys(target, self._gated_pools(il, self._members(kept), size), size)
        weights = self.scale(self.mul_mat(self.need(self.w(il, "indexer.proj")), cur))
        score = self._pool_scores(q, keys, weights)
        best = self._in_order(score, self.top_k_of(score, self._n_top))
        chosen = self._cells_of(best)
        if bool(self.model.get("attention.indexer.kpool_select_tail", True)):
            chosen = self.concat(chosen, self._tail_ids_of_pools, 0)
        self.expand(chosen)
        mask = self.mask(il)
        live = self.unary(self.reshape(self._gather_mask, chosen.ne[0], self.n_tokens), "exp")
        dump = self.op("ARANGE", "F32", (chosen.ne[0], 1, 1, 1))
        rows = self._unmasked(mask, chosen, live, dump)
        rows = self.view_2d(rows, mask.ne[0], self.n_tokens, rows.nb[2])
        return self.add(rows, self.reshape(mask, mask.ne[0], self.n_tokens))

    def _pool_scores(self, q: Tensor, keys: Tensor, weights: Tensor) -> Tensor:
        shape = (self._n_pool, self.n_tokens, 1, 1)
        return self.op("LIGHTNING_INDEXER", "F32", shape, q, keys, weights, self._pool_mask)

    def _in_order(self, score: Tensor, best: Tensor) -> Tensor:
        """The chosen pools, best first."""
        n, n_top = self.n_tokens, self._n_top
        scores = self.get_rows(self.reshape(score, 1, self._n_pool, n), best)
        order = self.argsort(self.reshape(scores, n_top, n))
        best = self.get_rows(self.reshape(self.cast(best, "F32"), 1, n_top, n), order)
        return self.cast(self.cont(self.reshape(best, n_top, n)), "I32")

    def _cells_of(self, pools: Tensor) -> Tensor:
        n, n_top = self.n_tokens, self._n_top
        cells = self.get_rows(self._pool_ids, self.reshape(pools, n_top * n))
        return self.reshape(cells, self._pool * n_top, n)

    def _unmasked(self, mask: Tensor, chosen: Tensor, live: Tensor, dump: Tensor) -> Tensor:
        """A mask of everything with the chosen cells visible; dead choices go to spare columns."""
        n, cells, n_sel = self.n_tokens, mask.ne[0], chosen.ne[0]
        everything = self.like("FILL", self.new(mask.type, cells + n_sel, 1, 1, 1))
        everything = self.repeat(everything, cells + n_sel, n, 1, 1)
        zeros = self.repeat(self.like("FILL", self.new(mask.type, n_sel, 1, 1, 1)), n_sel, n, 1, 1)
        rows, zeros = self.reshape(everything, 1, cells + n_sel, n), self.reshape(zeros, 1, n_sel, n)
        ids = self.cast(chosen, "F32")
        ids = self.add(self.mul(self.sub(ids, dump), live), dump)
        ids = self.cast(ids, "I32")
        return self.set_rows(rows, zeros, self.reshape(ids, n_sel, n, 1))
