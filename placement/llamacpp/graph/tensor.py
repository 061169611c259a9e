"""The tensors of a compute graph: shapes, strides and sources as ggml has them, without any data."""

from __future__ import annotations

import functools

from placement.inputs.quants import BLOCKS

TensorShape = tuple[int, int, int, int]  # ggml `ne` order: row length first


def row_size(type: str, n_elements: int) -> int:
    """Bytes of a row of that many elements (ggml_row_size)."""
    block_elements, block_bytes = BLOCKS[type]
    return n_elements // block_elements * block_bytes


@functools.lru_cache(maxsize=4096)  # tensors of one shape share their strides
def contiguous_strides(type: str, ne: TensorShape) -> TensorShape:
    """Byte strides of a contiguous tensor; the first is the bytes of one block, as in ggml."""
    block_elements, block_bytes = BLOCKS[type]
    nb1 = ne[0] // block_elements * block_bytes
    nb2 = nb1 * ne[1]
    return (block_bytes, nb1, nb2, nb2 * ne[2])


class GraphTensor:
    """One node or leaf of a graph.

    `root` is the tensor whose memory a view shares (ggml's view_src, always the innermost), `weight` the name
    in the model file of a weight, `cache_layer` the layer at whose home a cache tensor lives, and `pin` the
    layer whose device llama.cpp's graph callback forces the node to.
    """

    __slots__ = (
        "cache_layer",
        "index",
        "is_input",
        "is_output",
        "kind",
        "layer",
        "nb",
        "ne",
        "offset",
        "op",
        "pin",
        "root",
        "src",
        "type",
        "weight",
    )

    def __init__(self, op: str, type: str, ne: TensorShape, nb: TensorShape, src: list[GraphTensor]) -> None:
        self.op = op
        self.type = type
        self.ne = ne
        self.nb = nb
        self.src = src
        self.root: GraphTensor | None = None
        self.offset = 0
        self.kind = ""  # which unary, GLU, ... operation; "cpu" on a node that is forced to the CPU
        self.weight: str | None = None
        self.cache_layer: int | None = None
        self.pin: int | None = None
        self.layer: int | None = None
        self.is_input = False
        self.is_output = False
        self.index = -1  # position in its graph; -1 until it has been added

    @property
    def n_elements(self) -> int:
        """The number of elements."""
        a, b, c, d = self.ne
        return a * b * c * d

    @property
    def n_bytes(self) -> int:
        """Bytes from the first to the last element (ggml_nbytes)."""
        ne, nb = self.ne, self.nb
        if 0 in ne:
            return 0
        block_elements, block_bytes = BLOCKS[self.type]
        rest = (ne[1] - 1) * nb[1] + (ne[2] - 1) * nb[2] + (ne[3] - 1) * nb[3]
        if block_elements == 1:
            return block_bytes + (ne[0] - 1) * nb[0] + rest
        return ne[0] * nb[0] // block_elements + rest

    @property
    def is_contiguous(self) -> bool:
        """Whether rows, planes and blocks follow each other without gaps (ggml_is_contiguous)."""
        return self._is_contiguous_from(0)

    @property
    def is_contiguous_rows(self) -> bool:
        """Whether the elements of each row follow each other (ggml_is_contiguous_rows)."""
        return self.ne[0] == BLOCKS[self.type][0] or self.nb[0] == BLOCKS[self.type][1]

    @property
    def is_contiguous_to_planes(self) -> bool:
        """Whether there are no gaps below the last dimension (ggml_is_contiguous_to_3)."""
        ne, nb = self.ne, self.nb
        block_elements, block_bytes = BLOCKS[self.type]
        if ne[0] != block_elements and nb[0] != block_bytes:
            return False
        expected = block_bytes * (ne[0] // block_elements)
        for i in (1, 2):
            if ne[i] != 1 and nb[i] != expected:
                return False
            expected *= ne[i]
        return True

    def _is_contiguous_from(self, n: int) -> bool:
        """ggml_is_contiguous_n: gaps are allowed up to dimension n."""
        ne, nb = self.ne, self.nb
        block_elements, block_bytes = BLOCKS[self.type]
        next_nb = block_bytes
        if ne[0] != block_elements and nb[0] != next_nb:
            return False
        next_nb *= ne[0] // block_elements
        for i in (1, 2, 3):
            if i > n:
                if ne[i] != 1 and nb[i] != next_nb:
                    return False
                next_nb *= ne[i]
            else:
                next_nb = ne[i] * nb[i]
        return True

    def is_contiguous_above(self, n: int) -> bool:
        """Whether dimensions above n have no gaps (ggml_is_contiguous_1 and _2)."""
        return self._is_contiguous_from(n)
