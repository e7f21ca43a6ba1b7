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
    efficiency: float  # of the tensor cores while tiles last, beside the best schedule


LARGE = Schedule(code=0, rows=256, cols=256, blocks=2, efficiency=1.0)
SMALL = Schedule(code=5, rows=256, cols=128, blocks=2, efficiency=0.9)
SCHEDULES = (LARGE, SMALL)


def schedule_for(M: int, N: int, sms: int) -> Schedule:
    """The schedule whose waves of tiles take least: a started wave costs as much as a full one. Pure."""

    def cost(schedule: Schedule) -> float:
        tiles = -(-M // schedule.rows) * -(-N // schedule.cols)
        waves = -(-tiles // (sms // schedule.blocks))
        return waves * schedule.rows * schedule.cols / schedule.blocks / schedule.efficiency

    return min(SCHEDULES, key=cost)


class _Args(ctypes.Structure):
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
    group_rows: int = 8,
) -> None:
    """Enqueue on `stream` (a cudaStream_t as an integer) of the current device; capturable in a graph.

    a, b, out: 16-byte aligned; strides in elements, multiples of 8; N even. bias_ptr: N elements, 4-byte aligned, or 0.
    group_rows: cluster tiles down M that share their columns of b in L2; 8 of 256 rows make a wave of 132 blocks about
    square. Raises TpOverlapError with CUDA's reason.
    """
    args = _Args(
        a_ptr, b_ptr, out_ptr, bias_ptr, a_stride, b_stride, out_stride, M, N, K, dtype_code, schedule.code, group_rows
    )
    error = native.library().tpo_gemm(ctypes.byref(args), ctypes.c_void_p(stream))
    if error:
        native.check(error, "gemm: the CUDA kernel could not be launched")
