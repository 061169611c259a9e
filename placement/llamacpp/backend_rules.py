"""What ggml's backends make of tensors: alignment, padding, offload of operations, and kernels that CUDA has.

Every rule that more than one module needs stands here alone, with the file and function it mirrors.
"""

from __future__ import annotations

from placement.inputs.quants import row_bytes

CPU_ALIGNMENT_BYTES = 32  # TENSOR_ALIGNMENT of ggml-impl.h; pinned host memory too
CUDA_ALIGNMENT_BYTES = 128  # ggml_backend_cuda_buffer_type_get_alignment (ggml-cuda.cu)
CUDA_ROW_PADDING = 512  # elements; MATRIX_ROW_PADDING of ggml-cuda's common.cuh

# GGML_OP_OFFLOAD_MIN_BATCH (ggml_backend_cuda_device_offload_op): smaller batches are computed where the weights are.
MIN_OFFLOAD_TOKENS = 32

# Load modes that leave the CPU's weights in pinned memory, which cards read at full speed (llama-model-loader.cpp).
PINNED_LOAD_MODES = ("none", "dio")

# ggml_backend_cuda_device_supports_op (ggml-cuda.cu).
NO_CUDA_TYPES = frozenset({"TQ1_0", "TQ2_0", "Q8_1", "F64"})  # of weights that are multiplied
CUDA_FLASH_TYPES = frozenset({"F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"})  # of K and V


def cuda_padding_bytes(type: str, row_elements: int) -> int:
    """What a CUDA buffer adds once to a quantised tensor whose row is no multiple of 512 elements.

    Mirrors ggml_backend_cuda_buffer_type_get_alloc_size. The type must be quantised.
    """
    rest = row_elements % CUDA_ROW_PADDING
    return row_bytes(type, CUDA_ROW_PADDING - rest) if rest else 0


def has_vector_kernel(head_elements: int) -> bool:
    """Whether flash attention of one token reads quantised caches as they are (fattn.cu)."""
    return 0 < head_elements <= 256 and head_elements % 64 == 0 and head_elements != 192


def has_conv_kernel(n_channels: int) -> bool:
    """Whether CUDA has SSM_CONV for that many channels (ssm-conv.cu)."""
    return n_channels % 128 == 0


def has_scan_kernel(n_rows: int, d_state: int, head_elements: int, n_head: int, n_group: int) -> bool:
    """Whether CUDA has SSM_SCAN for these sizes (ssm-scan.cu); `n_rows` are A's: one for Mamba-2, else its states."""
    if n_rows == 1:
        return d_state in (96, 128, 256) and head_elements % 16 == 0
    return d_state == 16 and head_elements == 1 and n_head % 128 == 0 and n_group <= 1
