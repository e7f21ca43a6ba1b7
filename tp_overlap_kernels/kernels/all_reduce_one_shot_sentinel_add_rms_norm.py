"""Launcher of csrc/kernels/all_reduce_one_shot_sentinel_add_rms_norm.cu, where formula, rounding and protocol are told.

    new_residual = sum over r of x_r + residual,   y = new_residual / rms(new_residual) * weight,   on every rank

As all_reduce_one_shot_sentinel.py: the arguments live in one struct, of which a call writes the words that change.
"""

import ctypes

from tp_overlap_kernels import native

from .all_reduce_one_shot_sentinel import Args as SumArgs
from .all_reduce_one_shot_sentinel import args_of as sum_args_of

MAX_COLUMNS = 8192  # a block has one row


class _Args(ctypes.Structure):
    """TpoAllReduceNormArgs of csrc/api.h, field by field."""

    _fields_ = (
        ("sum", SumArgs),
        ("residual", ctypes.c_uint64),
        ("weight", ctypes.c_uint64),
        ("new_residual", ctypes.c_uint64),
        ("eps", ctypes.c_float),
        ("M", ctypes.c_int32),
        ("H", ctypes.c_int32),
        ("launched_ahead", ctypes.c_int32),
    )


class SentinelNormLauncher:
    """Launches the kernel for one arena. Pointers and sizes are trusted; the op has checked them."""

    def __init__(self, *, launched_ahead: bool, **arena: int):
        """arena: the arguments of `all_reduce_one_shot_sentinel.args_of`.

        launched_ahead: blocks may come before the kernel before it on the stream has ended; they wait for that. Not
        where ranks share a device: they would take the room of another rank's.
        Loads the kernels onto the current device. Raises NativeLibraryError if there is no library, TpOverlapError if
        the device cannot run what it holds.
        """
        library = native.library()
        error = library.tpo_all_reduce_one_shot_sentinel_add_rms_norm_prepare(arena["world_size"])
        native.check(error, "all_reduce_add_rms_norm: the CUDA kernels could not be loaded")
        self._args = _Args(sum=sum_args_of(**arena), launched_ahead=launched_ahead)
        self._sum = self._args.sum  # the same bytes
        self._args_ref = ctypes.byref(self._args)
        self._launch = library.tpo_all_reduce_one_shot_sentinel_add_rms_norm
        # No argtypes: a byref and a c_void_p need no conversion, and checking them would cost a third of the call.
        self._launch.restype = ctypes.c_int

    def __call__(
        self,
        x_ptr: int,
        residual_ptr: int,
        weight_ptr: int,
        y_ptr: int,
        new_residual_ptr: int,
        M: int,
        H: int,
        eps: float,
        dtype_code: int,
        call_hash: int,
        stream: int,
    ) -> None:
        """Enqueue one call on `stream` (a cudaStream_t as an integer) of the current device; capturable in a graph.

        Pointers of any alignment of their dtype; y may be x, new_residual may be residual. H up to MAX_COLUMNS.
        call_hash: 16 bits, equal on all ranks. Every rank makes the same calls in the same order. Raises TpOverlapError
        with CUDA's reason.
        """
        args, total = self._args, self._sum
        total.x, total.out, total.n_elems, total.dtype, total.call_hash = x_ptr, y_ptr, M * H, dtype_code, call_hash
        args.residual, args.weight, args.new_residual = residual_ptr, weight_ptr, new_residual_ptr
        args.M, args.H, args.eps = M, H, eps
        error = self._launch(self._args_ref, ctypes.c_void_p(stream))
        if error:
            native.check(error, "all_reduce_add_rms_norm: the CUDA kernel could not be launched")
