"""Qwen 4's blocks: hyper-connections with low-rank gates, embeddings of n-grams, attention over chosen pools."""

from __future__ import annotations

from placement.graph.hyper import MIX, SPREAD
from placement.graph.stack import StackBuilder
from placement.graph.tensor import Tensor


class GatedHyperBuilder(StackBuilder):
    """Adds what Qwen 4 has beside its pooled indexer and gated delta nets."""

    ngrams: Tensor  # embeddings of the batch's n-grams

    def gated_widened(self, cur: Tensor) -> Tensor:
        """The embeddings once per stream; pools and n-grams enter the graph between (graph::graph)."""
        self.expand(cur)
        self.pool_inputs()
        table = self.weight("per_layer_token_embd.weight")
        if table is not None:
            n = self.integer("ple.heads_per_ngram") * (self.integer("ple.ngram_size") - 1)
            rows = self.get_rows(table, self.input_once("ngram_rows", "I32", n * self.n_tokens))
            self.ngrams = self.reshape(rows, rows.ne[0] * n, self.n_tokens)
            self.expand(self.ngrams)
        wide = self.widened(cur)
        self.expand(wide)
        return wide

    def gated_layer(self, il: int, wide: Tensor, *, is_last: bool) -> Tensor:
        """A layer, its n-gram block and both residual spreads included."""
        if self.w(il, "ple_key") is not None:
            wide = self.ngram_block(il, wide)
        cur, inject = self._gated_mix(wide, f"blk.{il}.hc_attn", il)
        self.expand(cur)
        cur = self.mix(il, cur)
        if is_last:
            wide = self.reshape(wide, self.n_embd * self.n_wide, wide.ne[2])
            cur, inject, wide = self.rows_out(cur, self.need(inject), wide)
            wide = self.reshape(wide, self.n_embd, self.n_wide, wide.ne[1])
        wide = self._gated_spread(il, cur, wide, self.need(inject))
        cur, inject = self._gated_mix(wide, f"blk.{il}.hc_ffn", il)
        return self._gated_spread(il, self.feed(il, cur), wide, self.need(inject))

    def gated_head(self, wide: Tensor) -> Tensor:
        """The streams mixed for the output."""
        return self._gated_mix(wide, "output_hc", None)[0]

    def mix(self, il: int, cur: Tensor) -> Tensor:
        """The layer's attention or recurrent block."""
        raise NotImplementedError

    def _gated_mix(self, wide: Tensor, name: str, il: int | None) -> tuple[Tensor, Tensor | None]:
        """A block's input, and how its result is spread (build_hc_mix)."""
        n, hc = wide.ne[2], self.n_wide
        weights = {
            part: self.weight(f"{name}_{part}.weight", il) for part in ("norm", "down", "up", "inject")
        }
        normed = self.mul(self.rms_norm(wide), self.need(weights["norm"]))
        normed = self.reshape(normed, hc * self.n_embd, n)
        low = self.unary(self.scale(self.lora_mm(weights["down"], normed)), "silu")
        gate = self.lora_mm(weights["up"], low)
        shape = (self.n_embd, hc, n)
        if il is None or MIX in self.context.unfused:
            mixed = self._gated_sum(self.reshape(self.mul(normed, self.unary(gate, "sigmoid")), *shape))
        else:
            parts = (self.reshape(normed, *shape), self.reshape(gate, *shape))
            mixed = self.op(MIX, "F32", (self.n_embd, n, 1, 1), *parts)
            self.fused_nodes.append((MIX, mixed, il))
        inject = None if weights["inject"] is None else self.lora_mm(weights["inject"], normed)
        return mixed, inject

    def _gated_sum(self, gated: Tensor) -> Tensor:
        row, n = 4 * self.n_embd, gated.ne[2]
        stride = row * gated.ne[1]
        total = self.cont(self.view_2d(gated, self.n_embd, n, stride))
        for i in range(1, gated.ne[1]):
            total = self.add(total, self.view_2d(gated, self.n_embd, n, stride, i * row))
        return self.scale(total)

    def _gated_spread(self, il: int, cur: Tensor, wide: Tensor, inject: Tensor) -> Tensor:
        """The residual after a block (build_hc_combine)."""
        weights = self.scale(self.unary(self.scale(inject), "sigmoid"))
        if SPREAD not in self.context.unfused:
            out = self.op(SPREAD, "F32", wide.ne, cur, wide, weights)
            self.fused_nodes.append((SPREAD, out, il))
            return out
        hc, n = wide.ne[1], wide.ne[2]
        weights = self.reshape(weights, 1, hc, n)
        repeated = self.repeat(self.reshape(cur, self.n_embd, 1, n), self.n_embd, hc, n, 1)
        return self.add(wide, self.mul(repeated, weights))

    # --- n-grams

    def ngram_block(self, il: int, wide: Tensor) -> Tensor:
        """The residual plus what the n-grams say, gated and convolved (build_ple)."""
        hc, n = self.n_wide, self.n_tokens
        key = self.lora_mm(self.w(il, "ple_key"), self.ngrams)
        value = self.lora_mm(self.w(il, "ple_value"), self.ngrams)
        key = self._grouped_norm(il, key, "ple_norm_key")
        query = self._grouped_norm(il, wide, "ple_norm_query")
        score = self.scale(self.sum_rows(self.mul(key, query)))
        size = self.like("SQRT", self.clamp(self.unary(score, "abs")))
        gate = self.unary(self.mul(self.unary(score, "sgn"), size), "sigmoid")
        spread = self.repeat(self.reshape(value, self.n_embd, 1, n), self.n_embd, hc, n, 1)
        gated = self.mul(spread, gate)
        normed = self._grouped_norm(il, self.reshape(gated, hc * self.n_embd, n), "ple_norm_conv")
        out = self.unary(self._ngram_conv(il, self.reshape(normed, hc * self.n_embd, n)), "silu")
        out = self.reshape(self.cont(out), self.n_embd, hc, n)
        return self.add(wide, self.add(gated, out))

    def _grouped_norm(self, il: int, cur: Tensor, name: str) -> Tensor:
        cur = self.reshape(cur, self.n_embd, self.n_wide, self.n_tokens)
        return self.mul(self.rms_norm(cur), self.need(self.w(il, name)))

    def _ngram_conv(self, il: int, cur: Tensor) -> Tensor:
        """A dilated convolution over the batch and the state before it."""
        taps, step = self.integer("ple.conv_kernel"), self.integer("ple.ngram_size")
        past, width, n_seqs = (taps - 1) * step, cur.ne[0], self.batch.n_seqs
        cur = self.reshape(cur, width, self.n_seq_tokens, n_seqs)
        joined = self.joined_state(self.state(il, "p"), self.layer(il).state_extra, cur, past, width)
        kernel = self.need(self.w(il, "ple_conv1d"))
        total: Tensor | None = None
        for i in range(taps):
            shape = (self.n_seq_tokens, width, n_seqs)
            part = self.view_3d(joined, *shape, joined.nb[1], joined.nb[2], 4 * i * step)
            weight = self.cont(self.view_2d(kernel, 1, width, kernel.nb[1], i * kernel.nb[0]))
            weight = self.reshape(weight, width)
            weight = weight if weight.type == "F32" else self.cast(weight, "F32")
            term = self.mul(self.cont(self.transpose(part)), weight)
            total = term if total is None else self.add(total, term)
        return self.need(total)

    # --- pooled attention

    def pool_mask_of(self, il: int, cur: Tensor) -> Tensor:
        """The mask that leaves the best pools (build_qsa_sel)."""
        size, n_head = (
            self.integer("attention.indexer.key_length"),
            self.integer("attention.indexer.head_count"),
        )
        n, mask = self.n_tokens, self.mask(il)
        kept, target = self._stored_keys(il, [self.lora_mm(self.w(il, "indexer.k_proj"), cur)], size)
        pooled = self._mean_pools(il, self._members(kept), size)
        keys = self._pooled_keys(target, pooled, size)
        q = self.reshape(self.lora_mm(self.w(il, "indexer.q_proj"), cur), size, n_head, n)
        q = self.rope(self.layer_norm(q, il, "indexer.q_norm"), self.positions)
        weights = self.like("FILL", self.new("F32", n_head, n))
        score = self._pool_scores(q, keys, weights)
        best = self.top_k_of(score, self._n_top)
        chosen = self.concat(self._cells_of(best), self._tail_ids_of_pools, 0)
        self.expand(chosen)
        live = self._live(score, best)
        dump = self.scale(self.op("CUMSUM", "F32", live.ne, self.like("FILL", live)))
        rows = self._unmasked(mask, chosen, live, dump)
        row, per_stream = rows.nb[2], mask.ne[1]
        strides = (row, row * per_stream, row * per_stream * mask.ne[2])
        return self.add(self.view(rows, mask.ne, strides), mask)

    def _mean_pools(self, il: int, rows: Tensor, size: int) -> Tensor:
        n = self._n_new
        total: Tensor | None = None
        for i in range(self._pool):
            part = self.view_2d(rows, size, n, rows.nb[2], i * rows.nb[1])
            total = self.cont(part) if total is None else self.add(total, part)
        pooled = self.layer_norm(self.scale(self.need(total)), il, "indexer.k_norm")
        positions = self.input_once("new_pool_pos", "I32", 4 * n)
        return self.reshape(self.rope(self.reshape(pooled, size, 1, n), positions), size, n)

    def _live(self, score: Tensor, best: Tensor) -> Tensor:
        """Which choices are real: pools with a score, and tail cells that exist."""
        n, pool, n_top = self.n_tokens, self._pool, self._n_top
        scores = self.get_rows(self.reshape(score, 1, self._n_pool, n), best)
        pools = self.repeat(self.clamp(self.scale(scores)), pool, n_top, n, 1)
        pools = self.reshape(pools, pool * n_top, n)
        tail = self.clamp(self.scale(self.cast(self._tail_ids_of_pools, "F32")))
        return self.concat(pools, tail, 0)
