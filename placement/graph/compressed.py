"""DeepSeek 4's attention: a window of raw keys beside keys compressed by 4 (with an indexer) or by 128."""

from __future__ import annotations

from placement.architecture import Cache
from placement.context_rules import compressed_cells
from placement.graph.gated_hyper import GatedHyperBuilder
from placement.graph.tensor import Tensor

OVERLAPPED = 4  # the ratio whose blocks overlap and have an indexer


class CompressedBuilder(GatedHyperBuilder):
    """Adds attention over raw and compressed keys; keys are values too."""

    def compressed_attention(self, il: int, cur: Tensor) -> Tensor:
        """One layer's attention with the grouped output projection (build_attention_impl)."""
        size, n_head, n = self.layer(il).caches[0].k_head, self.layer(il).n_head, self.n_tokens
        narrow = self.layer_norm(self.lora_mm(self.w(il, "attn_q_a"), cur), il, "attn_q_a_norm")
        q = self.reshape(self.lora_mm(self.w(il, "attn_q_b"), narrow), size, n_head, n)
        q = self.rope(self.rms_norm(q), self.positions)
        kv = self.layer_norm(self.lora_mm(self.w(il, "attn_kv"), cur), il, "attn_kv_a_norm")
        kv = self.rope(self.reshape(kv, size, 1, n), self.positions)
        kept = next((c for c in self.layer(il).caches if c.ratio > 1 and not c.is_indexer), None)
        index = self.indexer_cache(il)
        if kept is not None:
            self._compress(il, cur, "attn", "main", kept)
        if index is not None:
            self._compress(il, cur, "indexer", "index", index)
        chosen = None if index is None else self._chosen_blocks(il, narrow, cur, index)
        out = self._attend_all(il, q, kv, kept, chosen)
        return self._grouped_output(il, out, size)

    def _grouped_output(self, il: int, out: Tensor, size: int) -> Tensor:
        n, n_head, groups = self.n_tokens, self.layer(il).n_head, self.integer("attention.output_group_count")
        out = self.reshape(out, size, n_head, n)
        out = self.like("ROPE_BACK", out, self.positions)
        out = self.permute(self.reshape(out, size * n_head // groups, groups, n), 0, 2, 1, 3)
        out = self.mul_mat(self.need(self.w(il, "attn_output_a")), out)
        width = self.integer("attention.output_lora_rank") * groups
        return self.lora_mm(self.w(il, "attn_output_b"), self.cont(self.permute(out, 0, 2, 1, 3), width, n))

    def _attend_all(
        self, il: int, q: Tensor, kv: Tensor, kept: Cache | None, chosen: Tensor | None
    ) -> Tensor:
        rotation = self._rotation(il, "k")
        if rotation is not None:
            q, kv = self._rotate(q, rotation), self._rotate(kv, rotation)
        self.expand(q)
        self.expand(kv)
        cache = self.cache(il, "k", kv.ne[0])
        self.expand(self.store_k(cache, kv, self.k_ids(il)))
        k, mask = self.read_k(cache, kv.ne[0], 1), self.mask(il)
        if kept is not None:
            compressed = self._read_compressed(il, "main", kept)
            more = self._compressed_mask(kept)
            k = self.concat(k, compressed, 2)
            mask = self.concat(mask, more if chosen is None else self.sparse_mask(more, chosen), 0)
        out = self.mha(il, q, k, k, mask, sinks=self.w(il, "attn_sinks"))
        return self._rotate(out, rotation) if rotation is not None else out

    # --- compressed caches

    def _n_compressed(self, cache: Cache) -> int:
        return compressed_cells(self.context.n_ctx_seq, cache.ratio)

    def _compressed_cache(self, il: int, which: str, cache: Cache) -> Tensor:
        key = f"cache_{which}.{il}"
        if key not in self.inputs:
            n_stream = self.context.n_stream
            leaf = self.new(self.context.type_k, cache.k_width, self._n_compressed(cache), n_stream)
            leaf.cache_layer = il
            self.inputs[key] = leaf
        return self.inputs[key]

    def _read_compressed(self, il: int, which: str, cache: Cache) -> Tensor:
        k = self.read_k(self._compressed_cache(il, which, cache), cache.k_head, 1)
        return self.view(k, k.ne, k.nb[1:])

    def _compressed_mask(self, cache: Cache, name: str = "main") -> Tensor:
        n_stream = self.context.n_stream
        type = "F16" if self.context.is_flash or name == "index" else "F32"
        shape = (self._n_compressed(cache), self.n_tokens // n_stream, 1, n_stream)
        return self.input_once(f"mask.{name}.{cache.ratio}", type, *shape)

    def _plan(self, name: str, type: str, n: int, cache: Cache, which: str) -> Tensor:
        return self.input_once(f"{name}.{which}.{cache.ratio}", type, n)

    def _compress(self, il: int, cur: Tensor, prefix: str, which: str, cache: Cache) -> None:
        """Rows for the batch's blocks, made from the kept state and the batch, and the new state."""
        ratio, n = cache.ratio, self.n_tokens
        is_overlapped = ratio == OVERLAPPED
        kv = self.lora_mm(self.w(il, f"{prefix}_compressor_kv"), cur)
        score = self.lora_mm(self.w(il, f"{prefix}_compressor_gate"), cur)
        ape = self.need(self.w(il, f"{prefix}_compressor_ape"))
        score = self.add(score, self.get_rows(ape, self._plan("state_pos", "I32", n, cache, which)))
        n_rows = (2 * ratio if is_overlapped else ratio) * self.context.n_seq_max
        states = [self._state_rows(il, which, part, kv.ne[0], n_rows) for part in ("kv", "score")]
        sources = []
        for state, new in zip(states, (kv, score), strict=True):
            base = self.view_2d(state, state.ne[0], n_rows, state.nb[1])
            sources.append(self.concat(base, new, 1))
        blocks = self._blocks(il, sources, f"{prefix}_compressor_norm", cache, which)
        rotation = self._compressed_rotation(which, cache)
        if rotation is not None:
            blocks = self._rotate(blocks, rotation)
        ids = self._plan("write_rows", "I64", self._n_blocks(ratio), cache, which)
        self.expand(self.store_k(self._compressed_cache(il, which, cache), blocks, ids))
        n_kept = min(n, n_rows)
        source = self._plan("persist_src", "I32", n_kept, cache, which)
        target = self._plan("persist_dst", "I32", n_kept, cache, which)
        kept = [self.get_rows(new, source) for new in (kv, score)]
        for part, rows in zip(("kv", "score"), kept, strict=True):
            self.expand(self.set_rows(self._state_rows(il, which, part, rows.ne[0], n_rows), rows, target))

    def _compressed_rotation(self, which: str, cache: Cache) -> Tensor | None:
        is_plain = self.context.type_k in ("F16", "BF16", "F32")
        if which != "index" and (is_plain or cache.k_head % 64):
            return None
        n = 64
        while cache.k_head % (2 * n) == 0:
            n *= 2
        return self._plan_matrix(n, cache, which)

    def _plan_matrix(self, n: int, cache: Cache, which: str) -> Tensor:
        return self.input_once(f"k_rot.{which}.{cache.ratio}", "F32", n, n)

    def _n_blocks(self, ratio: int) -> int:
        return self.n_tokens // ratio + max(1, self.batch.n_seqs)

    def _state_rows(self, il: int, which: str, part: str, width: int, n_rows: int) -> Tensor:
        key = f"compressor_{which}_{part}.{il}"
        if key not in self.inputs:
            leaf = self.new("F32", width, n_rows // self.context.n_seq_max, self.context.n_seq_max)
            leaf.cache_layer = il
            self.inputs[key] = leaf
        state = self.inputs[key]
        return self.view_2d(state, width, n_rows, state.nb[1])

    def _blocks(self, il: int, sources: list[Tensor], norm: str, cache: Cache, which: str) -> Tensor:
        """The compressed rows of the batch's blocks: values weighed by scores, normed and roped."""
        ratio, size = cache.ratio, cache.k_head
        n_blocks, is_overlapped = self._n_blocks(ratio), ratio == OVERLAPPED
        if is_overlapped:
            sources = [self._with_zero_row(source) for source in sources]
        n_read = ratio * n_blocks
        ids = self._plan("read_rows", "I32", n_read * (2 if is_overlapped else 1), cache, which)
        rows = [self.get_rows(source, ids) for source in sources]
        if is_overlapped:
            parts = [self._overlapped(tensor, size, ratio, n_blocks) for tensor in rows]
        else:
            parts = [self.reshape(tensor, size, ratio, n_blocks) for tensor in rows]
        values, scores = (self.cont(self.permute(tensor, 1, 0, 2, 3)) for tensor in parts)
        out = self.sum_rows(self.mul(values, self.soft_max(scores)))
        out = self.layer_norm(self.cont(self.permute(out, 1, 0, 2, 3)), il, norm)
        return self.rope(out, self._plan("write_pos", "I32", n_blocks, cache, which))

    def _with_zero_row(self, source: Tensor) -> Tensor:
        row = self.scale(self.view_1d(source, source.ne[0]))
        return self.concat(source, self.reshape(row, source.ne[0], 1), 1)

    def _overlapped(self, rows: Tensor, size: int, ratio: int, n_blocks: int) -> Tensor:
        """The first half of the block before, and the second half of the block itself."""
        n_read = ratio * n_blocks
        before = self.cont(self.view_2d(rows, size, n_read, rows.nb[1]))
        own = self.cont(self.view_2d(rows, size, n_read, rows.nb[1], n_read * rows.nb[1] + 4 * size))
        before, own = (self.reshape(part, size, ratio, n_blocks) for part in (before, own))
        return self.concat(before, own, 1)

    # --- the indexer

    def _chosen_blocks(self, il: int, narrow: Tensor, cur: Tensor, cache: Cache) -> Tensor:
        """The compressed rows that the indexer chooses (build_lid_top_k)."""
        weight, size = self.need(self.w(il, "indexer.attn_q_b")), cache.k_head
        q = self.reshape(self.lora_mm(weight, narrow), size, weight.ne[1] // size, self.n_tokens)
        q = self.rope(q, self.positions)
        q = self._rotate(q, self.need(self._compressed_rotation("index", cache)))
        weights = self.scale(self.lora_mm(self.w(il, "indexer.proj"), cur))
        k = self._read_compressed(il, "index", cache)
        n_stream, nb = k.ne[3], weights.nb
        q = self.view(q, (*q.ne[:2], q.ne[2] // n_stream, n_stream), (q.nb[1], q.nb[2], q.nb[3] // n_stream))
        shape = (weights.ne[0], weights.ne[1] // n_stream, weights.ne[2], n_stream)
        weights = self.view(weights, shape, (nb[1], nb[2] // n_stream, nb[3] // n_stream))
        mask = self._compressed_mask(cache, "index")
        score = self.op("LIGHTNING_INDEXER", "F32", (k.ne[2], q.ne[2], 1, n_stream), q, k, weights, mask)
        return self.cont(self.top_k_of(score, min(score.ne[0], self.facts.indexer_top_k)))
