"""Operands as the kernels want them: TMA descriptors of 2-D tensors, made from any strides and offsets.

TMA reads rows that start at multiples of 16 bytes. A tensor that cannot be described so (odd K, a stride that is no
multiple of 8 elements, an offset of one element) is copied once into one that can; the copy costs its bytes in
every call, and is the same on every rank or not without any rank knowing: which plan runs does not depend on it.
"""

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

_ROW_ELEMS = 8  # 16 bytes of a 2-byte dtype


def is_describable(x: Tensor) -> bool:
    """Whether TMA can read this 2-D tensor as it lies."""
    rows, cols = x.shape
    if x.data_ptr() % 16 or (cols > 1 and x.stride(1) != 1):
        return False
    return rows == 1 or (x.stride(0) >= cols and x.stride(0) % _ROW_ELEMS == 0)


def describe(x: Tensor, block_rows: int, block_cols: int) -> TensorDescriptor:
    """A descriptor of a 2-D tensor; what lies outside reads as zero."""
    rows, cols = x.shape
    if not is_describable(x):
        padded = torch.empty((rows, -(-cols // _ROW_ELEMS) * _ROW_ELEMS), dtype=x.dtype, device=x.device)
        padded[:, :cols].copy_(x)
        x = padded
    pitch = x.stride(0) if rows > 1 else -(-cols // _ROW_ELEMS) * _ROW_ELEMS
    return TensorDescriptor(x, [rows, cols], [pitch, 1], [block_rows, block_cols])
