"""Sparse attention: an indexer scores all cells, and the mask leaves only the best (DeepSeek V3.2)."""

from __future__ import annotations

from placement.architecture import Cache
from placement.graph.linear import LinearBuilder
from placement.graph.row import Row
from placement.graph.tensor import Tensor

HADAMARD_INDEXERS = frozenset({"deepseek32", "deepseek4", "glm-dsa", "dots3note"})


class SparseBuilder(LinearBuilder):
    """Adds the lightning indexer and masks that keep only what it chose."""

    row: Row
    top_k: Tensor | None = None  # what the last indexer chose; layers without one use it again

    def indexer_cache(self, il: int) -> Cache | None:
        """The cache of the layer's indexer keys; None where it has no indexer."""
        return next((cache for cache in self.layer(il).caches if cache.is_indexer), None)

    def choose_cells(self, il: int, cur: Tensor, compressed_q: Tensor) -> Tensor | None:
        """The cells that the layer's attention reads: its own indexer's choice, else the last one."""
        facts = self.indexer_cache(il)
        if facts is not None:
            self.top_k = self._indexed(il, cur, compressed_q, facts)
        return self.top_k if self.layer(il).is_sparse else None

    def _indexed(self, il: int, cur: Tensor, compressed_q: Tensor, facts: Cache) -> Tensor:
        n, size = self.n_tokens, facts.k_head
        weight = self.need(self.w(il, "indexer.attn_q_b"))
        q = self.reshape(self.mul_mat(weight, compressed_q), size, weight.ne[1] // size, n)
        q = self.rope(q, self.positions)
        k = self.mul_mat(self.need(self.w(il, "indexer.attn_k")), cur)
        k = self.reshape(self.layer_norm(k, il, "indexer.k_norm", "layer"), size, 1, n)
        k = self.rope(k, self.positions)
        if self.facts.name in HADAMARD_INDEXERS:
            q, k = (self.mul_mat(self._index_rotation(size), tensor) for tensor in (q, k))
        cache = self.index_cache(il, size)
        self.expand(self.store_k(cache, k, self.input_once("k_ids.index", "I64", n)))
        weights = self.mul_mat(self.need(self.w(il, "indexer.proj")), cur)
        k = self.read_k(cache, size, 1)
        score = self.scored(q, k, weights)
        return self.cont(self.top_k_of(score, min(score.ne[0], self.facts.indexer_top_k)))

    def index_cache(self, il: int, width: int) -> Tensor:
        """The layer's indexer keys: [width, cells, streams]."""
        key = f"cache_index.{il}"
        if key not in self.inputs:
            leaf = self.new(self.context.type_k, width, self.cells(il), self.context.n_stream)
            leaf.cache_layer = il
            self.inputs[key] = leaf
        return self.inputs[key]

    def _index_rotation(self, size: int) -> Tensor:
        n = 64
        while size % (2 * n) == 0:
            n *= 2
        return self.input_once("k_rot.index", "F32", n, n)

    def scored(self, q: Tensor, k: Tensor, weights: Tensor) -> Tensor:
        """Scores of all cells per token, [cells, tokens of a stream, 1, streams]."""
        n_stream = k.ne[3]
        q = self.view(q, (*q.ne[:2], q.ne[2] // n_stream, n_stream), (q.nb[1], q.nb[2], q.nb[3] // n_stream))
        ne, nb = weights.ne, weights.nb
        shape = (ne[0], ne[1] // n_stream, ne[2], n_stream)
        weights = self.scale(self.view(weights, shape, (nb[1], nb[2] // n_stream, nb[3] // n_stream)))
        mask = self.input_once("mask.index", "F16", k.ne[2], q.ne[2], 1, n_stream)
        return self.op("LIGHTNING_INDEXER", "F32", (k.ne[2], q.ne[2], 1, n_stream), q, k, weights, mask)

    def sparse_mask(self, mask: Tensor, top_k: Tensor) -> Tensor:
        """The mask with every cell hidden that was not chosen."""
        everything = self.like("FILL", mask)
        nb = everything.nb
        rows = self.view(everything, (1, mask.ne[0], mask.ne[1], mask.ne[3]), nb[:3])
        ne, nb = top_k.ne, top_k.nb
        ids = self.view(top_k, (ne[0], ne[1], ne[3], 1), (nb[1], nb[2], ne[3] * nb[3]))
        type = mask.type if self.row.attention == "compressed" else "F32"
        zeros = self.like("FILL", self.new(type, 1, *ids.ne[:3]))
        kept = self.set_rows(rows, zeros, ids)
        ne, nb = kept.ne, kept.nb
        kept = self.view(kept, (ne[1], ne[2], 1, ne[3]), (nb[2], nb[3], nb[3]))
        return self.add(kept, mask)
