"""What the CUDA backend can run and how much it allocates for it (ggml-cuda.cu, fattn.cu)."""

from __future__ import annotations

from collections.abc import Callable

from placement.inputs.quants import BLOCKS
from placement.llamacpp.backend_rules import (
    CUDA_ALIGNMENT_BYTES,
    CUDA_FLASH_TYPES,
    NO_CUDA_TYPES,
    cuda_padding_bytes,
    has_conv_kernel,
    has_scan_kernel,
    has_vector_kernel,
)
from placement.llamacpp.graph.tensor import GraphTensor
from placement.units import pad

KERNEL_STRIDE = 256  # FATTN_KQ_STRIDE
MAX_SORT_COLUMNS = 25600 // 4  # shared memory that any card has, for bitonic sorts in builds without CUB

_NO_MUL_MAT = NO_CUDA_TYPES | {"I32", "I64"}
_GET_ROWS = frozenset(BLOCKS) - {"TQ1_0", "TQ2_0", "NVFP4", "Q8_1", "Q8_K", "I64", "F64", "I8", "I16"}
_NEEDS_ROWS_OF_256 = frozenset({"IQ4_NL", "MXFP4"})
_SAME_HEADS = frozenset({40, 64, 72, 80, 96, 112, 128, 256})


def is_quantised(type: str) -> bool:
    """Whether elements come in blocks."""
    return BLOCKS[type][0] != 1


def alloc_bytes(tensor: GraphTensor) -> int:
    """Bytes that the CUDA buffer takes for a tensor: padded rows, and f16 copies for flash attention."""
    size = tensor.n_bytes
    if tensor.op == "FLASH_ATTN_EXT":
        size = _with_half_copies(tensor, size)
    if is_quantised(tensor.type):
        size += cuda_padding_bytes(tensor.type, tensor.ne[0])
    return size


def _with_half_copies(node: GraphTensor, size: int) -> int:
    q, k, v = node.src[:3]
    if q.ne[1] <= 1 and _can_use_vectors(q, k):
        return size
    if k.type != "F16":
        size = pad(size, CUDA_ALIGNMENT_BYTES) + 2 * k.n_elements
    is_shared = v.root is not None and (v.root is k or (v.root is k.root and v.offset == k.offset))
    if v.type != "F16" and not is_shared:
        size = pad(size, CUDA_ALIGNMENT_BYTES) + 2 * v.n_elements
    return size


def _can_use_vectors(q: GraphTensor, k: GraphTensor) -> bool:
    return has_vector_kernel(q.ne[0]) and k.ne[1] % KERNEL_STRIDE == 0


def offload_batch(node: GraphTensor) -> int:
    """The batch size by which CUDA decides to take over an operation on host weights."""
    if node.op == "GET_ROWS":
        return 0
    ne = node.ne
    if node.op == "MUL_MAT":
        return ne[1]
    if node.op in ("MUL_MAT_ID", "ROPE"):
        return ne[2]
    return ne[1] * ne[2] * ne[3]


def supports(node: GraphTensor, has_alibi: bool) -> bool:
    """Whether a CUDA device can run the node, its buffers aside."""
    check = _CHECKS.get(node.op)
    if check is not None:
        return check(node)
    if node.op == "FLASH_ATTN_EXT":
        return _supports_flash(node, has_alibi)
    return True


def _supports_flash(node: GraphTensor, has_alibi: bool) -> bool:
    q, k, v = node.src[:3]
    mask = node.src[3] if len(node.src) > 3 else None
    ratio = q.ne[2] // k.ne[2]
    is_grouped = ratio >= 2 and mask is not None and not has_alibi and k.ne[1] % KERNEL_STRIDE == 0
    for tensor in (q, k, v, mask):
        if tensor is not None and not is_quantised(tensor.type) and any(nb % 16 for nb in tensor.nb[1:]):
            is_grouped = False
    if not _supports_heads(k.ne[0], v.ne[0], ratio, is_grouped):
        return False
    has_types = k.type in CUDA_FLASH_TYPES and v.type in CUDA_FLASH_TYPES
    return has_types and (mask is None or mask.ne[2] == 1)


def _supports_heads(k_head: int, v_head: int, ratio: int, is_grouped: bool) -> bool:
    if k_head in _SAME_HEADS:
        return v_head == k_head
    if k_head == 192:
        return v_head == 128 and is_grouped and ratio % 8 == 0
    if k_head == 320:
        return v_head == 256 and is_grouped and ratio % 32 == 0
    if k_head == 512:
        return v_head == 512 and is_grouped
    return k_head == 576 and v_head == 512 and is_grouped


def _mul_mat(node: GraphTensor) -> bool:
    a, b = node.src[:2]
    if a.nb[0] != BLOCKS[a.type][1] or b.nb[0] != BLOCKS[b.type][1]:
        return False
    if b.type == "F16" and a.type != "F16" and node.kind != "hadamard":
        return False
    return a.type not in _NO_MUL_MAT and not (node.op == "MUL_MAT_ID" and node.kind == "prec_f32")


def _get_rows(node: GraphTensor) -> bool:
    table = node.src[0]
    return table.type in _GET_ROWS and not (table.type in _NEEDS_ROWS_OF_256 and table.ne[0] % 256)


def _set_rows(node: GraphTensor) -> bool:
    rows = node.src[0].type
    return rows == "F32" or (rows == "F16" and node.type == "F16")


def _unary(node: GraphTensor) -> bool:
    return node.src[0].is_contiguous


def _glu(node: GraphTensor) -> bool:
    return node.src[0].is_contiguous_above(1) and node.kind != "swiglu_oai_bf16"


def _norm(node: GraphTensor) -> bool:
    return node.src[0].is_contiguous_rows


def _rope(node: GraphTensor) -> bool:
    source = node.src[0]
    return source.nb[0] == BLOCKS[source.type][1] and source.is_contiguous_above(2)


def _scale(node: GraphTensor) -> bool:
    return node.type in ("F32", "BF16") and node.src[0].type == node.type


def _binary(node: GraphTensor) -> bool:
    a, b = node.src[0].type, node.src[1].type
    if "BF16" in (a, b, node.type):
        return a == "BF16" and node.type == "BF16" and b in ("BF16", "F32")
    return all(type in ("F32", "F16") for type in (a, b, node.type))


def _concat(node: GraphTensor) -> bool:
    a, b = node.src[:2]
    if not a.type == b.type == node.type:
        return False
    if not is_quantised(node.type):
        return True
    is_last = a.ne[3] != node.ne[3]
    return all(t.is_contiguous if is_last else t.is_contiguous_to_planes for t in (a, b))


def _ssm_scan(node: GraphTensor) -> bool:
    state, a_matrix, b_matrix = node.src[0], node.src[3], node.src[4]
    return has_scan_kernel(a_matrix.ne[0], *state.ne[:3], b_matrix.ne[1])


def _ssm_conv(node: GraphTensor) -> bool:
    return has_conv_kernel(node.src[0].ne[1])


def _repeat(node: GraphTensor) -> bool:
    return node.src[0].type in ("F32", "F16")


def _rows_f32(node: GraphTensor) -> bool:
    return node.type == "F32" and node.src[0].is_contiguous_rows


def _indexer(node: GraphTensor) -> bool:
    q, k = node.src[:2]
    if q.ne[0] != 128 or q.ne[1] not in (4, 32, 64) or k.type not in CUDA_FLASH_TYPES:
        return False
    return not any(nb % 16 for t in (q, k) if not is_quantised(t.type) for nb in t.nb[1:])


def _contiguous(node: GraphTensor) -> bool:
    return node.src[0].is_contiguous


def _contiguous_pair(node: GraphTensor) -> bool:
    return node.src[0].is_contiguous and node.src[1].is_contiguous


def _cpy(node: GraphTensor) -> bool:
    source, target = node.src[0].type, node.type
    plain = ("F32", "F16", "BF16")
    if source in plain and target in plain:
        return True
    if source == "F32":
        return target in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "IQ4_NL", "I32")
    if target == "F32":
        return source in ("Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "I32")
    return source == target and node.src[0].is_contiguous


_CHECKS: dict[str, Callable[[GraphTensor], bool]] = {
    "MUL_MAT": _mul_mat,
    "MUL_MAT_ID": _mul_mat,
    "GET_ROWS": _get_rows,
    "SET_ROWS": _set_rows,
    "UNARY": _unary,
    "GLU": _glu,
    "NORM": _norm,
    "RMS_NORM": _norm,
    "L2_NORM": _norm,
    "ROPE": _rope,
    "ROPE_BACK": _rope,
    "SCALE": _scale,
    "ADD": _binary,
    "SUB": _binary,
    "MUL": _binary,
    "DIV": _binary,
    "CONCAT": _concat,
    "SSM_SCAN": _ssm_scan,
    "SSM_CONV": _ssm_conv,
    "REPEAT": _repeat,
    "SUM_ROWS": _rows_f32,
    "MEAN": _rows_f32,
    "GROUP_NORM": _contiguous,
    "CPY": _cpy,
    "LIGHTNING_INDEXER": _indexer,
    "IM2COL": _contiguous_pair,
}
