"""Block-sparse attention (MiniMax M3): an indexer chooses blocks of positions for each of its heads."""

from __future__ import annotations

from placement.context_rules import CELL_PADDING
from placement.graph.sparse import SparseBuilder
from placement.graph.tensor import Tensor

EMPTY_CACHE_POSITIONS = CELL_PADDING  # what an empty cache counts as used: reservations are made with one


class BlockSparseBuilder(SparseBuilder):
    """Adds attention over chosen blocks."""

    def has_blocks(self, il: int) -> bool:
        """Whether the layer attends to chosen blocks: flash attention, and sequences with own streams."""
        context = self.context
        is_split = context.n_seq_max == 1 or not context.is_unified
        return context.is_flash and is_split and self.layer(il).is_sparse

    def block_attention(self, il: int, cur: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of one layer up to, and with, the output projection."""
        iq, index = self._block_index(il, cur)
        k_rot, v_rot = self._rotation(il, "k"), self._rotation(il, "v")
        if k_rot is not None:
            q, k = self._rotate(q, k_rot), self._rotate(k, k_rot)
        if v_rot is not None:
            v = self._rotate(v, v_rot)
        for tensor in (q, k, v):
            self.expand(tensor)
        k, v = self._through_cache(il, k, v)
        is_single = self.n_tokens == self.context.n_stream
        out = self._decoded(q, iq, index, k, v) if is_single else self._by_stream(il, q, iq, index, k, v)
        if v_rot is not None:
            out = self._rotate(out, v_rot)
        return self.lora_mm(self.w(il, "attn_output"), out, is_scaled=True)

    def _block_index(self, il: int, cur: Tensor) -> tuple[Tensor, Tensor]:
        """The indexer's queries, and its keys of the whole cache."""
        size, n_head = (
            self.integer("attention.indexer.key_length"),
            self.integer("attention.indexer.head_count"),
        )
        n = self.n_tokens
        iq = self.reshape(self.lora_mm(self.w(il, "indexer.q_proj"), cur), size, n_head, n)
        ik = self.reshape(self.lora_mm(self.w(il, "indexer.k_proj"), cur), size, 1, n)
        iq = self.rope(self.layer_norm(iq, il, "indexer.q_norm"), self.positions)
        ik = self.rope(self.layer_norm(ik, il, "indexer.k_norm"), self.positions)
        cache = self.index_cache(il, size)
        self.expand(self.store_k(cache, ik, self.input_once("k_ids.index", "I64", n)))
        return iq, self.read_k(cache, size, 1)

    # --- inputs

    @property
    def _block(self) -> int:
        return self.integer("attention.indexer.block_size", 1)

    @property
    def _n_positions(self) -> int:
        return -(-EMPTY_CACHE_POSITIONS // self._block) * self._block

    @property
    def _bias(self) -> Tensor:
        return self.input_once("block_bias", "F32", self._n_positions // self._block, self.n_tokens)

    @property
    def _position_mask(self) -> Tensor:
        return self.input_once("position_mask", "F32", self._n_positions, self.n_tokens)

    def _slots(self, type: str) -> Tensor:
        return self.input_once(f"slots.{type}", type, self._n_positions, self.context.n_stream)

    def _n_chosen(self) -> int:
        return min(self.facts.indexer_top_k, self._n_positions // self._block)

    def _mask_f32(self, il: int) -> Tensor:
        if "mask_f32" not in self.inputs:
            self.inputs["mask_f32"] = self.cast(self.mask(il), "F32")
        return self.inputs["mask_f32"]

    # --- products

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, group: int) -> Tensor:
        size, n_head, n = q.ne[:3]
        n_chunks = k.ne[3]
        q = self.reshape(q, size, group, n_chunks, n_head * n // (group * n_chunks))
        out = self.flash_attn(self.permute(q, 0, 2, 3, 1), k, v, mask)
        out = self.permute(out, 0, 1, 3, 2)
        out = out if out.is_contiguous else self.cont(out)
        return self.reshape(out, size * n_head, n)

    def _pooled(self, score: Tensor) -> Tensor:
        return self.op("POOL_2D", "F32", (score.ne[0] // self._block, *score.ne[1:]), score)

    def _by_stream(self, il: int, q: Tensor, iq: Tensor, ik: Tensor, k: Tensor, v: Tensor) -> Tensor:
        outs = [self._stream(il, i, q, iq, ik, k, v) for i in range(self.context.n_stream)]
        total = outs[0]
        for out in outs[1:]:
            total = self.concat(total, out, 1)
        return total

    def _stream(self, il: int, st: int, q: Tensor, iq: Tensor, ik: Tensor, k: Tensor, v: Tensor) -> Tensor:
        n, cells = self.n_tokens // self.context.n_stream, k.ne[2]
        iq = self.view_3d(iq, *iq.ne[:2], n, iq.nb[1], iq.nb[2], st * n * iq.nb[2])
        ik = self.view_2d(ik, ik.ne[0], cells, ik.nb[2], st * ik.nb[3])
        mask = self._block_mask(il, st, n, iq, ik, cells)
        head, n_head = q.ne[:2]
        q = self.view_3d(q, head, n_head, n, q.nb[1], q.nb[2], st * n * q.nb[2])
        k, v = (self.view(t, (*t.ne[:3], 1), t.nb[1:], st * t.nb[3]) for t in (k, v))
        group = n_head // k.ne[1]
        return self._attend(q, self.permute(k, 0, 3, 1, 2), self.permute(v, 0, 3, 1, 2), mask, group)

    def _block_mask(self, il: int, st: int, n: int, iq: Tensor, ik: Tensor, cells: int) -> Tensor:
        """The mask of one stream, by indexer head, that leaves only the chosen blocks."""
        n_head, positions, n_chosen = iq.ne[1], self._n_positions, self._n_chosen()
        n_blocks = positions // self._block
        slots, bias, hidden = self._slots("I32"), self._bias, self._position_mask
        of_cell = self.input_once("cell_block", "I32", cells, self.context.n_stream)
        keys = self.get_rows(ik, self.view_1d(slots, positions, st * slots.nb[1]))
        score = self.mul_mat(keys, self.reshape(iq, iq.ne[0], n_head * n))
        score = self.reshape(score, positions, n_head, n)
        hidden = self.view_3d(hidden, positions, 1, n, hidden.nb[1], hidden.nb[1], st * n * hidden.nb[1])
        pooled = self._pooled(self.in_place("ADD", score, score, hidden))
        bias = self.view_3d(bias, n_blocks, 1, n, bias.nb[1], bias.nb[1], st * n * bias.nb[1])
        chosen = self.top_k_of(self.add(pooled, bias), n_chosen)
        nothing = self.repeat(self.cast(self.scale(bias), "F16"), n_blocks, n_head, n, 1)
        zero = self.scale(self.cast(chosen, "F32"))
        rows = n_head * n
        kept = self.set_rows(
            self.reshape(nothing, 1, n_blocks, rows),
            self.reshape(zero, 1, n_chosen, rows),
            self.reshape(chosen, n_chosen, rows),
        )
        kept = self.cont(self.permute(self.reshape(kept, n_blocks, n_head, n), 0, 2, 1, 3))
        kept = self.cont(self.transpose(self.reshape(kept, n_blocks, rows)))
        by_cell = self.get_rows(kept, self.view_1d(of_cell, cells, st * of_cell.nb[1]))
        by_cell = self.reshape(self.cont(self.transpose(by_cell)), cells, n, n_head)
        mask = self._mask_f32(il)
        mask = self.view_3d(mask, cells, n, 1, mask.nb[1], mask.nb[3], st * mask.nb[3])
        mask = self.in_place("ADD", by_cell, by_cell, mask)
        return self.cast(self.reshape(mask, cells, n, 1, n_head), "F16")

    def _decoded(self, q: Tensor, iq: Tensor, ik: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One token per stream: the chosen blocks' rows are gathered."""
        ns, block, n_chosen = self.context.n_stream, self._block, self._n_chosen()
        size, n_head, positions = iq.ne[0], iq.ne[1], self._n_positions
        head, n_kv_head, cells = k.ne[:3]
        ids = self._slots("I32")
        keys = self.get_rows(self.view_3d(ik, size, cells, ns, ik.nb[2], ik.nb[3]), ids)
        score = self.mul_mat(
            self.reshape(keys, size, positions, 1, ns), self.reshape(iq, size, n_head, 1, ns)
        )
        hidden = self.reshape(self._position_mask, positions, 1, 1, ns)
        pooled = self._pooled(self.in_place("ADD", score, score, hidden))
        bias = self.reshape(self._bias, positions // block, 1, 1, ns)
        chosen = self.top_k_of(self.add(pooled, bias), n_chosen)
        first = self.reshape(self.scale(self.cast(chosen, "F32")), 1, n_chosen, n_head, ns)
        steps = self.reshape(self.op("ARANGE", "F32", (block, 1, 1, 1)), block, 1, 1)
        spread = self.add(self.repeat(first, block, n_chosen, n_head, ns), steps)
        n_rows = block * n_chosen * n_head
        token_ids = self.cast(self.reshape(spread, n_rows, ns), "I32")
        rows = self.get_rows(self.reshape(self._slots("F32"), 1, positions, ns), token_ids)
        rows = self.reshape(rows, block, n_chosen, n_head, ns)
        steps = self.reshape(self.op("ARANGE", "F32", (n_kv_head, 1, 1, 1)), 1, 1, n_head)
        rows = self.cast(self.reshape(self.add(self.scale(rows), steps), n_rows, ns), "I32")
        gathered = []
        for tensor in (k, v):
            flat = self.view_3d(tensor, head, n_kv_head * cells, ns, tensor.nb[1], tensor.nb[3])
            gathered.append(self.get_rows(flat, rows))
        hidden = self.get_rows(self.reshape(self._position_mask, 1, positions, ns), token_ids)
        parts = [self.reshape(t, head, block * n_chosen, 1, n_head * ns) for t in gathered]
        types = [t.type if t.type in ("F16", "F32", "BF16") else "F16" for t in (k, v)]
        kk, vv = (p if p.type == t else self.cast(p, t) for p, t in zip(parts, types, strict=True))
        mask = self.cast(self.reshape(hidden, block * n_chosen, 1, 1, n_head * ns), "F16")
        return self._attend(q, kk, vv, mask, q.ne[1] // n_kv_head)
