"""ggml's operations as constructors of `GraphTensor`: the shapes, strides and source order of ggml.c, no data.

`Graph.expand` adds a tensor after its sources, as ggml_build_forward_expand does, so that nodes end up in the
order in which the engine plans them.
"""

from __future__ import annotations

from placement.llamacpp.graph.tensor import GraphTensor, TensorShape, contiguous_strides


class Graph:
    """Leafs and nodes in the engine's order, with one method per ggml operation."""

    def __init__(self) -> None:
        self.leafs: list[GraphTensor] = []
        self.nodes: list[GraphTensor] = []

    # --- order

    def expand(self, tensor: GraphTensor) -> None:
        """Add a tensor and whatever it needs, sources first (ggml_build_forward_expand)."""
        if tensor.index >= 0:
            return
        tensor.index = 0
        for source in tensor.src:
            if source.index < 0:
                self.expand(source)
        if tensor.op == "NONE":
            self.leafs.append(tensor)
        else:
            self.nodes.append(tensor)

    # --- leafs

    def new(self, type: str, *ne: int) -> GraphTensor:
        """A leaf without data; missing dimensions are 1."""
        shape: TensorShape = (*ne, *(1,) * (4 - len(ne)))  # type: ignore[assignment]
        return GraphTensor("NONE", type, shape, contiguous_strides(type, shape), [])

    def input(self, type: str, *ne: int) -> GraphTensor:
        """A graph input: filled from the host before every run."""
        leaf = self.new(type, *ne)
        leaf.is_input = True
        return leaf

    # --- new memory

    def op(self, op: str, type: str, ne: TensorShape, *src: GraphTensor | None) -> GraphTensor:
        """A node with memory of its own, contiguous."""
        return GraphTensor(op, type, ne, contiguous_strides(type, ne), [s for s in src if s is not None])

    def like(self, op: str, a: GraphTensor, *src: GraphTensor | None, kind: str = "") -> GraphTensor:
        """A node of the shape and type of `a`, which is its first source."""
        node = GraphTensor(
            op, a.type, a.ne, contiguous_strides(a.type, a.ne), [a, *(s for s in src if s is not None)]
        )
        node.kind = kind
        return node

    def mul_mat(self, a: GraphTensor, b: GraphTensor) -> GraphTensor:
        """ggml_mul_mat: rows of `a` times rows of `b`, in f32: (a rows, b rows, b's batches)."""
        ne = (a.ne[1], b.ne[1], b.ne[2], b.ne[3])
        return GraphTensor("MUL_MAT", "F32", ne, contiguous_strides("F32", ne), [a, b])

    def mul_mat_id(self, a: GraphTensor, b: GraphTensor, ids: GraphTensor) -> GraphTensor:
        """ggml_mul_mat_id: for every token the experts that `ids` names, from the stack `a`."""
        return self.op("MUL_MAT_ID", "F32", (a.ne[1], ids.ne[0], b.ne[2], 1), a, b, ids)

    def add(self, a: GraphTensor, b: GraphTensor) -> GraphTensor:
        """ggml_add: `a` and a broadcast `b`, shaped as `a`."""
        return GraphTensor("ADD", a.type, a.ne, contiguous_strides(a.type, a.ne), [a, b])

    def sub(self, a: GraphTensor, b: GraphTensor) -> GraphTensor:
        """ggml_sub, shaped as `a`."""
        return self.like("SUB", a, b)

    def mul(self, a: GraphTensor, b: GraphTensor) -> GraphTensor:
        """ggml_mul: element by element, `b` broadcast, shaped as `a`."""
        return GraphTensor("MUL", a.type, a.ne, contiguous_strides(a.type, a.ne), [a, b])

    def div(self, a: GraphTensor, b: GraphTensor) -> GraphTensor:
        """ggml_div, shaped as `a`."""
        return self.like("DIV", a, b)

    def add_id(self, a: GraphTensor, b: GraphTensor, ids: GraphTensor) -> GraphTensor:
        """ggml_add_id: each expert's bias, by `ids`, added to its row."""
        return self.like("ADD_ID", a, b, ids)

    def unary(self, a: GraphTensor, kind: str) -> GraphTensor:
        """ggml_unary of a kind ("silu", "gelu", …), shaped as `a`."""
        return self.like("UNARY", a, kind=kind)

    def glu(self, a: GraphTensor, b: GraphTensor | None, kind: str) -> GraphTensor:
        """ggml_glu of a kind: `a` gates `b`; without `b`, halves of `a`'s rows."""
        ne = a.ne if b is not None else (a.ne[0] // 2, *a.ne[1:])
        node = self.op("GLU", a.type, ne, a, b)
        node.kind = kind
        return node

    def scale(self, a: GraphTensor) -> GraphTensor:
        """ggml_scale, shaped as `a`."""
        return self.like("SCALE", a)

    def rms_norm(self, a: GraphTensor) -> GraphTensor:
        """ggml_rms_norm over rows, without weights."""
        return self.like("RMS_NORM", a)

    def norm(self, a: GraphTensor) -> GraphTensor:
        """ggml_norm over rows, without weights."""
        return self.like("NORM", a)

    def rope(self, a: GraphTensor, pos: GraphTensor, factors: GraphTensor | None = None) -> GraphTensor:
        """ggml_rope_ext at the positions `pos`, with frequency factors where given."""
        return self.like("ROPE", a, pos, factors)

    def soft_max(
        self, a: GraphTensor, mask: GraphTensor | None = None, sinks: GraphTensor | None = None
    ) -> GraphTensor:
        """ggml_soft_max_ext over rows, masked, with sinks where given."""
        return self.like("SOFT_MAX", a, mask, sinks)

    def clamp(self, a: GraphTensor) -> GraphTensor:
        """ggml_clamp, shaped as `a`."""
        return self.like("CLAMP", a)

    def get_rows(self, a: GraphTensor, ids: GraphTensor) -> GraphTensor:
        """ggml_get_rows: the rows of `a` that `ids` names; f32 unless `a` holds i32."""
        type = "I32" if a.type == "I32" else "F32"
        return self.op("GET_ROWS", type, (a.ne[0], ids.ne[0], ids.ne[1], ids.ne[2]), a, ids)

    def argsort(self, a: GraphTensor) -> GraphTensor:
        """ggml_argsort over rows: i32, shaped as `a`."""
        return self.op("ARGSORT", "I32", a.ne, a)

    def argsort_top_k(self, a: GraphTensor, k: int) -> GraphTensor:
        """ggml_argsort_top_k: a view of the first `k` of every sorted row."""
        order = self.argsort(a)
        return self.view(order, (k, *order.ne[1:]), order.nb[1:])

    def top_k_of(self, a: GraphTensor, k: int) -> GraphTensor:
        """ggml_top_k: i32 indices of the `k` largest of every row, unsorted."""
        return self.op("TOP_K", "I32", (k, *a.ne[1:]), a)

    def sum_rows(self, a: GraphTensor) -> GraphTensor:
        """ggml_sum_rows: rows of one element."""
        return self.op("SUM_ROWS", a.type, (1, *a.ne[1:]), a)

    def concat(self, a: GraphTensor, b: GraphTensor, dim: int) -> GraphTensor:
        """ggml_concat along dimension `dim`."""
        ne = list(a.ne)
        ne[dim] += b.ne[dim]
        return self.op("CONCAT", a.type, (ne[0], ne[1], ne[2], ne[3]), a, b)

    def repeat(self, a: GraphTensor, *ne: int) -> GraphTensor:
        """ggml_repeat to the shape `ne`, ggml `ne` order."""
        shape: TensorShape = (*ne, *(1,) * (4 - len(ne)))  # type: ignore[assignment]
        return self.op("REPEAT", a.type, shape, a)

    def pad(self, a: GraphTensor, *extra: int) -> GraphTensor:
        """ggml_pad: `extra` elements more in each dimension."""
        extras = (*extra, *(0,) * (4 - len(extra)))
        ne = (a.ne[0] + extras[0], a.ne[1] + extras[1], a.ne[2] + extras[2], a.ne[3] + extras[3])
        return self.op("PAD", a.type, ne, a)

    def cont(self, a: GraphTensor, *ne: int) -> GraphTensor:
        """A contiguous copy, in another shape of as many elements if one is given."""
        shape: TensorShape = (*ne, *(1,) * (4 - len(ne))) if ne else a.ne  # type: ignore[assignment]
        return self.op("CONT", a.type, shape, a)

    def cast(self, a: GraphTensor, type: str) -> GraphTensor:
        """ggml_cast to another type, shaped as `a`."""
        return self.op("CPY", type, a.ne, a)

    def flash_attn(
        self,
        q: GraphTensor,
        k: GraphTensor,
        v: GraphTensor,
        mask: GraphTensor | None,
        sinks: GraphTensor | None = None,
    ) -> GraphTensor:
        """ggml_flash_attn_ext: f32, (value size, heads, tokens, streams)."""
        return self.op("FLASH_ATTN_EXT", "F32", (v.ne[0], q.ne[2], q.ne[1], q.ne[3]), q, k, v, mask, sinks)

    # --- the same memory

    def view(
        self, a: GraphTensor, ne: TensorShape, nb: tuple[int, int, int], offset: int = 0, op: str = "VIEW"
    ) -> GraphTensor:
        """A view with strides of dimensions 1 to 3 and an offset in bytes (ggml_view_4d)."""
        node = GraphTensor(op, a.type, ne, (a.nb[0], *nb), [a])
        node.root = a.root or a
        node.offset = offset + a.offset
        return node

    def view_1d(self, a: GraphTensor, n: int, offset: int = 0) -> GraphTensor:
        """ggml_view_1d of `n` elements; `offset` in bytes."""
        strides = contiguous_strides(a.type, (n, 1, 1, 1))
        return self.view(a, (n, 1, 1, 1), strides[1:], offset)

    def view_2d(self, a: GraphTensor, ne0: int, ne1: int, nb1: int, offset: int = 0) -> GraphTensor:
        """ggml_view_2d; stride `nb1` and `offset` in bytes."""
        return self.view(a, (ne0, ne1, 1, 1), (nb1, nb1 * ne1, nb1 * ne1), offset)

    def view_3d(
        self, a: GraphTensor, ne0: int, ne1: int, ne2: int, nb1: int, nb2: int, offset: int = 0
    ) -> GraphTensor:
        """ggml_view_3d; strides and `offset` in bytes."""
        return self.view(a, (ne0, ne1, ne2, 1), (nb1, nb2, nb2 * ne2), offset)

    def reshape(self, a: GraphTensor, *ne: int) -> GraphTensor:
        """ggml_reshape to `ne`: a view."""
        shape: TensorShape = (*ne, *(1,) * (4 - len(ne)))  # type: ignore[assignment]
        return self.view(a, shape, contiguous_strides(a.type, shape)[1:], op="RESHAPE")

    def permute(self, a: GraphTensor, *axes: int) -> GraphTensor:
        """ggml_permute: dimension i of `a` becomes `axes[i]`; a view."""
        ne, nb = [0] * 4, [0] * 4
        for source, target in enumerate(axes):
            ne[target], nb[target] = a.ne[source], a.nb[source]
        node = self.view(a, (ne[0], ne[1], ne[2], ne[3]), (nb[1], nb[2], nb[3]), op="PERMUTE")
        node.nb = (nb[0], nb[1], nb[2], nb[3])
        return node

    def transpose(self, a: GraphTensor) -> GraphTensor:
        """ggml_transpose: the first two dimensions swapped; a view."""
        node = self.permute(a, 1, 0, 2, 3)
        node.op = "TRANSPOSE"
        return node

    def in_place(self, op: str, target: GraphTensor, *src: GraphTensor) -> GraphTensor:
        """A node that writes into the memory of `target` and is a view of it."""
        node = GraphTensor(op, target.type, target.ne, target.nb, list(src))
        node.root = target.root or target
        node.offset = target.offset
        return node

    def set_rows(self, target: GraphTensor, rows: GraphTensor, ids: GraphTensor) -> GraphTensor:
        """ggml_set_rows: `rows` written into `target` at `ids`, in place."""
        return self.in_place("SET_ROWS", target, rows, ids, target)

    def cpy(self, a: GraphTensor, target: GraphTensor) -> GraphTensor:
        """ggml_cpy: `a` copied into `target`, in its type and place."""
        return self.in_place("CPY", target, a, target)
