"""Launcher of csrc/kernels/reduce_scatter_one_shot_sentinel.cu, where formula, rounding and protocol are told.

out_r = sum over s of  x_s[r * part : (r + 1) * part],   on rank r
"""

import ctypes

from tp_overlap_kernels import native

from .all_reduce_one_shot_sentinel import Args as SumArgs
from .all_reduce_one_shot_sentinel import args_of as sum_args_of


class _Args(ctypes.Structure):
    """TpoReduceScatterArgs of csrc/api.h, field by field."""

    _fields_ = (("sum", SumArgs), ("part", ctypes.c_int64), ("launched_ahead", ctypes.c_int32))


class ReduceScatterLauncher:
    """Launches the kernel for one arena. Pointers and sizes are trusted; the op has checked them."""

    def __init__(self, *, launched_ahead: bool, **arena: int):
        """arena: the arguments of `all_reduce_one_shot_sentinel.args_of`.

        launched_ahead: whether a launch may begin, and then wait, while the kernel before it still runs. Not where
        ranks share a device: blocks that wait take the room of another rank's.
        Loads the kernels onto the current device. Raises NativeLibraryError if there is no library, TpOverlapError if
        the device cannot run what it holds.
        """
        library = native.library()
        prepared = library.tpo_reduce_scatter_prepare(arena["world_size"])
        native.check(prepared, "gemm_reduce_scatter: the CUDA kernels could not be loaded")
        self._args = _Args(sum=sum_args_of(**arena), launched_ahead=launched_ahead)
        self._sum = self._args.sum  # the same bytes
        self._args_ref = ctypes.byref(self._args)
        self._launch = library.tpo_reduce_scatter_one_shot_sentinel
        # No argtypes: a byref and a c_void_p need no conversion, and checking them would cost a third of the call.
        self._launch.restype = ctypes.c_int

    def __call__(
        self, x_ptr: int, out_ptr: int, n_elems: int, part: int, dtype_code: int, call_hash: int, stream: int
    ) -> None:
        """Enqueue one call on `stream` (a cudaStream_t as an integer) of the current device; capturable in a graph.

        x_ptr: n_elems elements, of which each rank owns `part`, the last ones fewer; out_ptr: ours. Any alignment; they
        do not overlap. call_hash: 16 bits, equal on all ranks. Every rank makes the same calls in the same order.
        Raises TpOverlapError with CUDA's reason.
        """
        args = self._sum
        args.x, args.out, args.n_elems, args.dtype, args.call_hash = x_ptr, out_ptr, n_elems, dtype_code, call_hash
        self._args.part = part
        error = self._launch(self._args_ref, ctypes.c_void_p(stream))
        if error:
            native.check(error, "gemm_reduce_scatter: the CUDA kernel could not be launched")
