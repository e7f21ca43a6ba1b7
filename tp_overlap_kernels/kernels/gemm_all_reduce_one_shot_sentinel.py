"""Launcher of csrc/kernels/gemm_all_reduce_one_shot_sentinel.cu, where formula, rounding and protocol are told.

    out[M, N] = sum over r of  a_r[M, K] @ b_r[N, K].T  (+ bias[N]),   few rows, the same bits on every rank

The arguments live in one struct that is made once; a call writes the words that change. Calls on one rank do not
overlap, so one struct is enough.
"""

import ctypes

from tp_overlap_kernels import native

from .all_reduce_one_shot_sentinel import Args as SumArgs
from .all_reduce_one_shot_sentinel import args_of as sum_args_of
from .start import Start

MAX_ROWS = {64: 128, 128: 64}  # of a, by rows of b in a tile
SPLITS = (1, 2, 4, 8)  # parts of K, one a block of a cluster


class _Args(ctypes.Structure):
    """TpoGemmAllReduceDecodeArgs of csrc/api.h, field by field."""

    _fields_ = (
        ("sum", SumArgs),
        ("a", ctypes.c_uint64),
        ("b", ctypes.c_uint64),
        ("bias", ctypes.c_uint64),
        ("a_stride", ctypes.c_int64),
        ("b_stride", ctypes.c_int64),
        ("M", ctypes.c_int32),
        ("N", ctypes.c_int32),
        ("K", ctypes.c_int32),
        ("tile_rows", ctypes.c_int32),
        ("splits", ctypes.c_int32),
        ("stages", ctypes.c_int32),
        ("start", ctypes.c_int32),
    )


def slot_bytes(M: int, N: int, tile_rows: int) -> int:
    """Bytes of one rank's partial in its slot: tiles are whole, whatever N. Pure."""
    return -(-N // tile_rows) * tile_rows * M * 2


def rows_that_fit(N: int, tile_rows: int, sentinel_bytes: int) -> int:
    """The most rows that one launch takes; 0 where a slot does not hold one. Pure."""
    return min(MAX_ROWS[tile_rows], sentinel_bytes // slot_bytes(1, N, tile_rows))


class DecodeLauncher:
    """Launches the kernel for one arena. Pointers and sizes are trusted; the op has checked them."""

    def __init__(self, **arena: int):
        """arena: the arguments of `all_reduce_one_shot_sentinel.args_of`.

        Loads the kernels onto the current device. Raises NativeLibraryError if there is no library, TpOverlapError if
        the device cannot run what it holds.
        """
        library = native.library()
        error = library.tpo_gemm_all_reduce_decode_prepare()
        native.check(error, "gemm_all_reduce: the CUDA kernels could not be loaded")
        self._args = _Args(sum=sum_args_of(**arena))
        self._sum = self._args.sum  # the same bytes
        self._args_ref = ctypes.byref(self._args)
        self._launch = library.tpo_gemm_all_reduce_decode
        # No argtypes: a byref and a c_void_p need no conversion, and checking them would cost a third of the call.
        self._launch.restype = ctypes.c_int

    def __call__(
        self,
        a_ptr: int,
        b_ptr: int,
        bias_ptr: int,
        out_ptr: int,
        M: int,
        N: int,
        K: int,
        a_stride: int,
        b_stride: int,
        dtype_code: int,
        tile_rows: int,
        splits: int,
        stages: int,
        start: Start,
        call_hash: int,
        stream: int,
    ) -> None:
        """Enqueue one call on `stream` (a cudaStream_t as an integer) of the current device; capturable in a graph.

        a, b: 16-byte aligned, strides in elements, multiples of 8. bias_ptr: 0 for none. out: contiguous, any
        alignment of its dtype. stages: 0 for as many as let an SM hold two blocks. call_hash: 16 bits, equal on all
        ranks. Every rank makes the same calls in the same order. Raises TpOverlapError with CUDA's reason.
        """
        args, total = self._args, self._sum
        args.a, args.b, args.bias, args.a_stride, args.b_stride = a_ptr, b_ptr, bias_ptr, a_stride, b_stride
        args.M, args.N, args.K = M, N, K
        args.tile_rows, args.splits, args.stages, args.start = tile_rows, splits, stages, start
        total.out, total.n_elems, total.dtype, total.call_hash = out_ptr, M * N, dtype_code, call_hash
        error = self._launch(self._args_ref, ctypes.c_void_p(stream))
        if error:
            native.check(error, "gemm_all_reduce: the CUDA kernel could not be launched")
