"""torch.mm's product again, with a third of its host time: the same cuBLAS call on the same handle, bound once.

    out[M, N] = a[M, K] @ b[N, K].T

torch.mm(out=) takes the host 17.6 us on the reference machine (2 x H200), more than the launch behind it, and an eager
call of an unfused plan is host time at small M. What torch.mm does for 16-bit tensors without a bias is one call of
cublasGemmEx, made here through ctypes: equal arguments, handle, workspace and stream, hence equal bits.

The first call of a shape goes through torch.mm, which loads the library, makes the handle and refuses what must be
refused. The short way is for the settings that PyTorch starts with: whoever lets another library serve, or changes how
cuBLAS adds (which is looked at in every call), gets torch.mm.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from torch import Tensor

# The constants of cublas_api.h and library_types.h, equal since CUDA 11.
_OP_N, _OP_T = 0, 1
_COMPUTE_32F = 68
_DEFAULT_TENSOR_OP = 99  # what torch.mm asks for
_TYPES = {torch.bfloat16: 14, torch.float16: 2}
_MAX = (1 << 31) - 1  # sizes and strides are ints

_ONE, _ZERO = ctypes.c_float(1.0), ctypes.c_float(0.0)  # alpha and beta, read by cuBLAS during the call


@functools.lru_cache(maxsize=1)
def _gemm_ex() -> Any:
    """cublasGemmEx of the library that torch has loaded; None where torch has no CUDA's cuBLAS."""
    if torch.version.cuda is None:
        return None
    try:
        library = ctypes.CDLL(f"libcublas.so.{torch.version.cuda.partition('.')[0]}")
    except OSError:
        return None
    library.cublasGemmEx.restype = ctypes.c_int
    return library.cublasGemmEx  # no argtypes: every argument is a ctypes object already


def as_torch_starts(dtype: torch.dtype) -> bool:
    """Whether torch.mm would be the plain call: nobody has changed how cuBLAS adds."""
    c = torch._C
    if dtype == torch.bfloat16:
        reduced = c._get_cublas_allow_bf16_reduced_precision_reduction()
    elif c._get_cublas_allow_fp16_accumulation():
        return False
    else:
        reduced = c._get_cublas_allow_fp16_reduced_precision_reduction()
    return reduced in (True, (True, True))  # a pair in newer versions: whether at all, and whether with split K


class Product:
    """a @ b.T of one shape, dtype and device. Call it with three addresses, on the device's current stream."""

    __slots__ = ("_a", "_b", "_device", "_dtype", "_gemm", "_out", "_sizes", "made_of")

    def __init__(self, gemm: Any, a: Tensor, b: Tensor, out: Tensor):
        (M, K), N = a.shape, b.shape[0]
        integer, kind = ctypes.c_int, ctypes.c_int(_TYPES[a.dtype])
        self._gemm, self._dtype, self._device = gemm, a.dtype, a.device.index
        self.made_of = a.data_ptr(), b.data_ptr()  # a caller whose tensors lie elsewhere had them copied on the way
        # cuBLAS counts columns first: out.T[N, M] = b[N, K] @ a.T[K, M], where b and a are stored transposed.
        self._sizes = (integer(_OP_T), integer(_OP_N), integer(N), integer(M), integer(K), ctypes.byref(_ONE))
        self._b = (kind, integer(b.stride(0)))
        self._a = (kind, integer(a.stride(0)), ctypes.byref(_ZERO))
        self._out = (kind, integer(out.stride(0)), integer(_COMPUTE_32F), integer(_DEFAULT_TENSOR_OP))

    def __call__(self, a_ptr: int, b_ptr: int, out_ptr: int) -> bool:
        """False: nothing was launched, go through torch.mm (another device is current, or a setting was changed)."""
        if torch._C._cuda_getDevice() != self._device or not as_torch_starts(self._dtype):
            return False
        pointer = ctypes.c_void_p
        handle = pointer(torch._C._cuda_getCurrentBlasHandle())  # with torch's workspace and the current stream set
        return not self._gemm(
            handle, *self._sizes, pointer(b_ptr), *self._b, pointer(a_ptr), *self._a, pointer(out_ptr), *self._out
        )


def bind(a: Tensor, b: Tensor, out: Tensor) -> Product | None:
    """The product of tensors that torch.mm has just multiplied, or None where only torch.mm will do.

    a: [M, K], b: [N, K], out: [M, N], 16 bit, one device. Rows may be apart; elements of a row must be neighbours.
    """
    c = torch._C
    if a.device.type != "cuda" or a.dtype not in _TYPES or not as_torch_starts(a.dtype):
        return None
    if c._get_blas_preferred_backend() != c._BlasBackend.Cublas:
        return None
    for matrix in (a, b, out):
        if matrix.stride(1) != 1 or not matrix.shape[1] <= matrix.stride(0) <= _MAX:
            return None
    if max(*a.shape, *b.shape) > _MAX:
        return None
    gemm = _gemm_ex()
    return None if gemm is None else Product(gemm, a, b, out)
