"""Launcher of csrc/kernels/gemm.cu, where formula, rounding and pipeline are told.

out[M, N] = a[M, K] @ b[N, K].T  (+ bias[N])
"""

import ctypes
import dataclasses

from tp_overlap_kernels import native

BF16, FP16 = 0, 1  # dtype codes


@dataclasses.dataclass(frozen=True)
class Schedule:
    """How the work is cut. Any gives the same bits."""

    code: int  # TpoGemmSchedule of csrc/api.h
    rows: int  # of out, of the tiles that a cluster of blocks works on at a time
    cols: int
    blocks: int  # of a cluster
    group_rows: int  # cluster tiles down M that share their columns of b in L2


LARGE = Schedule(code=0, rows=256, cols=256, blocks=2, group_rows=8)
PING_PONG = Schedule(code=1, rows=128, cols=256, blocks=2, group_rows=16)
SMALL = Schedule(code=2, rows=256, cols=128, blocks=2, group_rows=8)
SCHEDULES = (LARGE, PING_PONG, SMALL)
PING_PONG_MAX_K = 2048  # up to here a tile is so short that its epilogue is worth hiding


def schedule_for(M: int, N: int, K: int, sms: int) -> Schedule:
    """The schedule to take. Pure.

    Measured on H200, six layers x M of 256 to 8192: in geometric mean 0.9 % (at most 3.5 %) slower than the best of 16
    variants and settings for each case, and from M = 1024 up 1.030 (at least 0.986) times as fast as cuBLAS.
    """
    large_tiles = -(-M // LARGE.rows) * -(-N // LARGE.cols)
    if large_tiles <= sms // LARGE.blocks:  # they would leave SMs idle
        return SMALL
    return PING_PONG if K <= PING_PONG_MAX_K else LARGE


class Args(ctypes.Structure):
    """TpoGemmArgs of csrc/api.h, field by field."""

    _fields_ = (
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("a_stride", ctypes.c_int64),
        ("b_stride", ctypes.c_int64),
        ("out_stride", ctypes.c_int64),
        ("M", ctypes.c_int32),
        ("N", ctypes.c_int32),
        ("K", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("schedule", ctypes.c_int32),
        ("group_rows", ctypes.c_int32),
    )


def prepare() -> None:
    """Load the kernels onto the current device, once before the first launch there. Raises NativeLibraryError if there
    is no library, TpOverlapError if the device cannot run what it holds."""
    native.check(native.library().tpo_gemm_prepare(), "gemm: the CUDA kernels could not be loaded")


def launch(
    *,
    a_ptr: int,
    b_ptr: int,
    out_ptr: int,
    bias_ptr: int,
    M: int,
    N: int,
    K: int,
    a_stride: int,
    b_stride: int,
    out_stride: int,
    dtype_code: int,
    schedule: Schedule,
    stream: int,
    group_rows: int = 0,
) -> None:
    """Enqueue on `stream` (a cudaStream_t as an integer) of the current device; capturable in a graph.

    a, b, out: 16-byte aligned; strides in elements, multiples of 8; N even. bias_ptr: N elements, 4-byte aligned, or 0.
    group_rows: in place of the schedule's. Raises TpOverlapError with CUDA's reason.
    """
    group_rows = group_rows or schedule.group_rows
    args = Args(
        a_ptr, b_ptr, out_ptr, bias_ptr, a_stride, b_stride, out_stride, M, N, K, dtype_code, schedule.code, group_rows
    )
    error = native.library().tpo_gemm(ctypes.byref(args), ctypes.c_void_p(stream))
    if error:
        native.check(error, "gemm: the CUDA kernel could not be launched")
