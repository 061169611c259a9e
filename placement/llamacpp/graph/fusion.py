"""Which tensors CUDA keeps alive, and which nodes it moves, so that it can fuse them later.

Mirrors ggml_backend_cuda_graph_optimize: shared expert beside the routed ones, expert routing, and the
weighted sum of experts. It changes lifetimes and hence compute buffers, never splits.
"""

from __future__ import annotations

from collections.abc import Sequence

from placement.inputs.quants import BLOCKS
from placement.llamacpp.graph.flat import FlatGraph
from placement.llamacpp.graph.tensor import GraphTensor

MAX_SOURCES = 10  # GGML_MAX_SRC
MAX_SUMMED_EXPERTS = 15
_FUSED_GLU = frozenset({"swiglu", "geglu", "swiglu_oai", "swiglu_clamp"})
_NORM_OPS = ("RESHAPE", "SUM_ROWS", "CLAMP", "DIV", "RESHAPE")

Dependencies = dict[int, list[tuple[int, ...]]]


def keep_for_fusion(
    flat: FlatGraph, src: Sequence[tuple[int, ...]], start: int, end: int
) -> tuple[list[int], Dependencies]:
    """The split's node order, and what must stay alive until after which node."""
    matcher = _Matcher(flat, src, start, end)
    matcher.run()
    groups = {
        until: [tuple(kept[k : k + MAX_SOURCES]) for k in range(0, len(kept), MAX_SOURCES)]
        for until, kept in matcher.kept.items()
    }
    return matcher.order, groups


class _Matcher:
    def __init__(self, flat: FlatGraph, src: Sequence[tuple[int, ...]], start: int, end: int) -> None:
        self.flat, self.src = flat, src
        self.order = list(range(start, end))
        self.ops = [flat.tensors[i].op for i in self.order]
        self.kept: dict[int, list[int]] = {}

    def run(self) -> None:
        ops = self.ops
        if "MUL_MAT_ID" not in ops and "ARGSORT" not in ops:
            return
        self._group_shared_experts()
        i = 0
        n = len(ops)
        while i < n:
            if ops[i] == "MUL":
                i += self._keep_weighted_sum(i)
            if ops[i] in ("UNARY", "SOFT_MAX"):
                i += self._keep_routing(i)
            i += 1

    def _keep(self, index: int, until: int) -> None:
        kept = self.kept.setdefault(until, [])
        if index not in kept:
            kept.append(index)

    def _tensor(self, position: int) -> GraphTensor:
        return self.flat.tensors[self.order[position]]

    def _sources(self, position: int) -> tuple[int, ...]:
        return self.src[self.order[position]]

    def _can_fuse(self, positions: Sequence[int], outputs: Sequence[int]) -> bool:
        """ggml_can_fuse_subgraph_ext: all but the outputs are used inside only."""
        members = [self.order[p] for p in positions]
        inside = set(members)
        flat = self.flat
        for k, index in enumerate(members):
            if positions[k] in outputs:
                continue
            if flat.is_output[index]:
                return False
            uses = sum(self.src[other].count(index) for other in members[k + 1 :])
            if uses != flat.n_uses[index]:
                return False
            root = flat.root[index]
            if root >= 0 and root not in inside and not flat.is_weight[root]:
                return False
        return True

    # --- shared expert

    def _group_shared_experts(self) -> None:
        ops, n = self.ops, len(self.ops)
        i = 0
        while i + 5 < n:
            if ops[i] != "MUL_MAT_ID":
                i += 1
                continue
            for j in range(i + 3, n - 2):
                if ops[j] == "MUL_MAT_ID" and ops[j + 1] == "MUL_MAT_ID":
                    break
                if ops[j] == "MUL_MAT" and self._is_shared_pair(i, j):
                    self._rotate(i + 3, j)
                    up = self._sources(i + 2)[1]
                    for source in self.src[up][1:3]:
                        self._keep(source, self.order[i + 5])
                    i += 5
                    break
            i += 1

    def _rotate(self, to: int, at: int) -> None:
        order, ops = self.order, self.ops
        nodes, names = order[at : at + 3], ops[at : at + 3]
        del order[at : at + 3], ops[at : at + 3]
        order[to:to] = nodes
        ops[to:to] = names

    def _is_shared_pair(self, routed: int, shared: int) -> bool:
        ops = self.ops
        if ops[routed : routed + 3] != ["MUL_MAT_ID", "MUL_MAT_ID", "GLU"]:
            return False
        if ops[shared : shared + 3] != ["MUL_MAT", "MUL_MAT", "GLU"]:
            return False
        positions = [*range(routed, routed + 3), *range(shared, shared + 3)]
        if not self._can_fuse(positions, (routed + 2, shared + 2)):
            return False
        routed_up, shared_up = self._gate_pair(routed), self._gate_pair(shared)
        if routed_up is None or shared_up is None:
            return False
        if self._tensor(routed + 2).kind != self._tensor(shared + 2).kind:
            return False
        return self._are_alike(routed_up, shared_up)

    def _gate_pair(self, at: int) -> int | None:
        """The up projection of a gated pair that CUDA can fuse, or None."""
        gate, up = self._sources(at + 2)[:2]
        pair = [self.order[at], self.order[at + 1]]
        if sorted((gate, up)) != sorted(pair) or self._tensor(at + 2).kind not in _FUSED_GLU:
            return None
        gate_src, up_src = self.src[gate], self.src[up]
        if gate_src[1:] != up_src[1:]:
            return None
        a, b = self._leaf(gate_src[0]), self._leaf(up_src[0])
        if a is None or b is None or a.type != b.type or a.ne != b.ne or a.nb != b.nb:
            return None
        return up

    def _leaf(self, index: int) -> GraphTensor | None:
        """A weight that lies in the backend's own buffer; None for a copy."""
        flat = self.flat
        return flat.tensors[index] if index < flat.n_leafs and flat.is_weight[index] else None

    def _are_alike(self, routed_up: int, shared_up: int) -> bool:
        weight, shared = self._leaf(self.src[routed_up][0]), self._leaf(self.src[shared_up][0])
        if weight is None or shared is None or BLOCKS[weight.type][0] == 1:
            return False
        source, shared_input = self.src[routed_up][1], self.src[shared_up][1]
        if source >= self.flat.n_tensors or shared_input >= self.flat.n_tensors:
            return False
        tensor = self.flat.tensors[source]
        if tensor.op != "RESHAPE" or self.src[source][0] != shared_input:
            return False
        if tensor.ne[1] != 1 or tensor.ne[3] != 1 or not tensor.is_contiguous:
            return False
        return (
            weight.type == shared.type
            and weight.ne[:2] == shared.ne[:2]
            and weight.nb[1] == shared.nb[1]
            and shared.ne[2] == shared.ne[3] == 1
        )

    # --- weighted sum

    def _keep_weighted_sum(self, i: int) -> int:
        """Nodes to skip if a weighted sum of experts starts at position i."""
        ops, n = self.ops, len(self.ops)
        experts, weights, scale, n_mul = self._weighted(i)
        if experts is None or weights is None:
            return 0
        last_mul = i + n_mul - 1
        n_used = self._tensor(last_mul).ne[1]
        n_nodes = 2 * n_used + n_mul - 1
        if not 2 <= n_used <= MAX_SUMMED_EXPERTS or i + n_nodes > n:
            return 0
        tail = ops[last_mul + 1 : i + n_nodes]
        if tail.count("VIEW") != n_used or tail.count("ADD") != n_used - 1:
            return 0
        weighted = self.order[last_mul]
        views = [p for p in range(last_mul + 1, i + n_nodes) if ops[p] == "VIEW"]
        if any(self._sources(p)[0] != weighted for p in views):
            return 0
        end = i + n_nodes - 1
        if ops[end] != "ADD" or not self._can_fuse(range(i, i + n_nodes), (end,)):
            return 0
        for kept in (experts, weights, scale):
            if kept is not None:
                self._keep(kept, self.order[end])
        return n_nodes - 1

    def _weighted(self, i: int) -> tuple[int | None, int | None, int | None, int]:
        """(experts, weights, scale, multiplications) of the product at position i."""
        first = self._split_mul(i)
        if i + 1 < len(self.ops) and self.ops[i + 1] == "MUL" and first is not None:
            second = self._split_mul(i + 1)
            if second is not None and second[0] == self.order[i]:
                return first[0], second[1], first[1], 2
        if first is None:
            return None, None, None, 1
        return first[0], first[1], None, 1

    def _split_mul(self, i: int) -> tuple[int, int] | None:
        node = self._tensor(i)
        a, b = node.src[0], node.src[1]
        left, right = self._sources(i)[:2]
        rest = (1, *node.ne[1:])
        if not node.is_contiguous:
            return None
        for full, broadcast, pair in ((a, b, (left, right)), (b, a, (right, left))):
            if full.ne == node.ne and broadcast.ne == rest and full.is_contiguous and broadcast.is_contiguous:
                return pair
        return None

    # --- routing

    def _keep_routing(self, i: int) -> int:
        """Nodes to skip if the fused choice of experts starts at position i."""
        expected = self._routing_ops(i)
        if expected is None:
            return 0
        n_ops, ids_at = expected
        if i + n_ops >= len(self.ops):
            return 0
        ids = self._tensor(ids_at)
        n_expert = ids.nb[1] // ids.nb[0]
        is_power = n_expert & (n_expert - 1) == 0 and n_expert <= 512
        if not is_power and n_expert not in (288, 576):
            return 0
        gating = self._tensor(i)
        if gating.op == "SOFT_MAX" and len(gating.src) > 1:
            return 0
        if not self._can_fuse(range(i, i + n_ops), (ids_at, i + n_ops - 1)):
            return 0
        until = self.order[i + n_ops]
        for p in range(i, i + n_ops):
            self._keep(self.order[p], until)
            for source in self._sources(p):
                self._keep(source, until)
        return n_ops - 1

    def _routing_ops(self, i: int) -> tuple[int, int] | None:
        """(number of nodes, position of the selected ids) of the fusable sequence at i."""
        ops = self.ops
        p = i
        if ops[i] == "UNARY":
            kind = self._tensor(i).kind
            if kind == "softplus" and ops[i + 1 : i + 2] == ["SQRT"]:
                p = i + 1
            elif kind != "sigmoid":
                return None
        if ops[p + 1 : p + 2] != ["RESHAPE"] or self._sources(p + 1)[0] != self.order[p]:
            return None
        probs, reshaped = self.order[p], self.order[p + 1]
        p += 2
        scored = probs
        if ops[p : p + 1] == ["ADD"] and self._sources(p)[0] == probs:
            scored = self.order[p]
            p += 1
        if ops[p : p + 3] != ["ARGSORT", "VIEW", "GET_ROWS"] or self._sources(p)[0] != scored:
            return None
        ids_at = p + 1
        if self._sources(p + 2)[:2] != (reshaped, self.order[ids_at]):
            return None
        p += 3
        if tuple(ops[p : p + 5]) == _NORM_OPS:
            p += 5
        if ops[p : p + 1] == ["SCALE"] and self._sources(p)[0] == self.order[p - 1]:
            p += 1
        return p - i, ids_at
