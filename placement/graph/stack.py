"""Residuals that are more than one sum: a stack of checkpoints (Kimi K3), and two states in cycles (HRM)."""

from __future__ import annotations

from placement.graph.hyper import MIX, HyperBuilder
from placement.graph.tensor import Tensor


class StackBuilder(HyperBuilder):
    """Adds the stack of residual checkpoints, and what cycles keep."""

    checkpoints: Tensor | None = None
    states: tuple[Tensor, Tensor]  # HRM's high and low state
    slot = 0  # the layer that is being built

    @property
    def checkpoint_step(self) -> int:
        """Layers between two checkpoints; 0 without any."""
        return self.integer("attn_res.block_size") if self.row.structure == "stack" else 0

    def is_checkpoint(self, il: int) -> bool:
        """Whether the layer's input is kept as a checkpoint instead of being summed further."""
        return self.checkpoint_step > 0 and il % self.checkpoint_step == 0

    def keep_checkpoint(self, cur: Tensor) -> None:
        """Push the residual onto the stack."""
        cur = self.reshape(cur, self.n_embd, 1, self.n_tokens)
        self.checkpoints = cur if self.checkpoints is None else self.concat(self.checkpoints, cur, 1)

    def stack_mixed(self, cur: Tensor, scores: Tensor | None) -> Tensor:
        """The residual and its checkpoints, weighed by how well they score."""
        stack = self.checkpoints
        if stack is None or self.checkpoint_step == 0:
            return cur
        n, n_tokens, weight = stack.ne[1], self.n_tokens, self.need(scores)
        kept = self.sum_rows(self.mul(self.rms_norm(stack), weight))
        kept = self.reshape(kept, n, n_tokens)
        own = self.sum_rows(self.mul(self.rms_norm(cur), weight))
        shares = self.soft_max(self.concat(kept, own, 0))
        of_stack = self.cont(self.view_2d(shares, n, n_tokens, shares.nb[1]))
        of_own = self.cont(self.view_2d(shares, 1, n_tokens, shares.nb[1], 4 * n))
        mixed = self.op(MIX, "F32", (self.n_embd, n_tokens, 1, 1), stack, of_stack)
        return self.add(mixed, self.mul(cur, of_own))

    # --- cycles

    @property
    def _cycle(self) -> tuple[int, int]:
        """Layers of a stack, and stacks of a cycle."""
        return self.integer("hrm.layers_per_stack", 1), self.integer("hrm.l_cycles") + 1

    def block_of(self, il: int) -> int:
        """HRM's layers are passes over two stacks of blocks, the low one first; Nanbeige's over all blocks."""
        if self.row.structure == "loops":
            return il % self.integer("block_count")
        if self.row.structure != "cycles":
            return il
        n_layer, n_stacks = self._cycle
        is_high = il // n_layer % n_stacks == n_stacks - 1
        return il % n_layer + (n_layer if is_high else 0)

    def scaled(self, out: Tensor, weight: Tensor) -> Tensor:
        """As `Builder.scaled`; where blocks are shared, each layer has the scales of its own number."""
        if self.row.structure not in ("cycles", "loops"):
            return super().scaled(out, weight)
        name = (weight.weight or "").split(".")[2]
        scale = self.weight(f"blk.{self.slot}.{name}.scale", self.slot)
        return self.mul(out, scale) if scale is not None else out

    def cycle_begun(self, il: int, cur: Tensor) -> Tensor:
        """The input of a layer: the sum of both states where a stack begins."""
        n_layer, _ = self._cycle
        if il == 0:
            self.states = (cur, self.need(self.weight("hrm.z_l_init")))
        return self.add(*self.states) if il % n_layer == 0 else cur

    def cycle_ended(self, il: int, cur: Tensor) -> Tensor:
        """The result of a layer; where a stack ends it is normed and becomes one of the states."""
        n_layer, n_stacks = self._cycle
        if (il + 1) % n_layer:
            return cur
        cur = self.rms_norm(cur)
        high, low = self.states
        is_high = il // n_layer % n_stacks == n_stacks - 1
        self.states = (cur, low) if is_high else (high, cur)
        return cur

    def loop_ended(self, il: int, cur: Tensor, *, is_last: bool) -> Tensor:
        """The result of a layer; normed where a pass over all blocks ends and another follows."""
        is_end = (il + 1) % self.integer("block_count") == 0
        if is_last or not is_end or bool(self.model.get("skip_loop_final_norm", False)):
            return cur
        return self.build_norm(cur, self.weight("output_norm.weight"), None, "rms", il)
