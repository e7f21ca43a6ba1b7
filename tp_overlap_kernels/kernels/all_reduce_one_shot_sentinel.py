"""Launcher of csrc/kernels/all_reduce_one_shot_sentinel.cu, where formula, rounding and protocol are told.

    out[n] = sum over r of  x_r[n],   the same bits on every rank

A call costs the host about 3 us, most of it CUDA's own launch: the arguments live in one struct that is made once, and
only the five words that change are written. Calls on one rank do not overlap, so one struct is enough.
"""

import ctypes

from tp_overlap_kernels import native

BF16, FP16 = 0, 1  # dtype codes


class Args(ctypes.Structure):
    """TpoAllReduceArgs of csrc/api.h, field by field."""

    _fields_ = (
        ("x", ctypes.c_uint64),
        ("out", ctypes.c_uint64),
        ("base_table", ctypes.c_uint64),
        ("control", ctypes.c_uint64),
        ("record", ctypes.c_uint64),
        ("n_elems", ctypes.c_int64),
        ("sentinel_offset", ctypes.c_int64),
        ("sentinel_bytes", ctypes.c_int64),
        ("header_offset", ctypes.c_int64),
        ("done_offset", ctypes.c_int64),
        ("timeout_ns", ctypes.c_int64),
        ("call_hash", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("world_size", ctypes.c_int32),
        ("dtype", ctypes.c_int32),
        ("data_threads", ctypes.c_int32),
    )


def args_of(
    *,
    base_table_ptr: int,
    control_ptr: int,
    record_ptr: int,
    sentinel_offset: int,
    sentinel_bytes: int,
    header_offset: int,
    done_offset: int,
    rank: int,
    world_size: int,
    timeout_ns: int,
) -> Args:
    """What no call on an arena changes. Offsets and sizes in bytes within it; pointers as the device sees them."""
    return Args(
        base_table=base_table_ptr,
        control=control_ptr,
        record=record_ptr,
        sentinel_offset=sentinel_offset,
        sentinel_bytes=sentinel_bytes,
        header_offset=header_offset,
        done_offset=done_offset,
        timeout_ns=timeout_ns,
        rank=rank,
        world_size=world_size,
    )


class SentinelLauncher:
    """Launches the kernel for one arena. Pointers and sizes are trusted; the op has checked them."""

    def __init__(self, *, data_threads: int = 0, **arena: int):
        """arena: the arguments of `args_of`.

        data_threads: threads a block that move data, a multiple of 32 up to 512; 0 leaves it to the library.
        Loads the kernels onto the current device. Raises NativeLibraryError if there is no library, TpOverlapError if
        the device cannot run what it holds.
        """
        library = native.library()
        native.check(library.tpo_prepare(arena["world_size"]), "all_reduce: the CUDA kernels could not be loaded")
        self._args = args_of(**arena)
        self._args.data_threads = data_threads
        self._args_ref = ctypes.byref(self._args)
        self._launch = library.tpo_all_reduce_one_shot_sentinel
        # No argtypes: a byref and a c_void_p need no conversion, and checking them would cost a third of the call.
        self._launch.restype = ctypes.c_int

    def __call__(self, x_ptr: int, out_ptr: int, n_elems: int, dtype_code: int, call_hash: int, stream: int) -> None:
        """Enqueue one call on `stream` (a cudaStream_t as an integer) of the current device; capturable in a graph.

        x_ptr, out_ptr: n_elems elements each, any alignment of theirs; they may be equal. call_hash: 16 bits, equal
        on all ranks. Every rank makes the same calls in the same order. Raises TpOverlapError with CUDA's reason.
        """
        args = self._args
        args.x, args.out, args.n_elems, args.dtype, args.call_hash = x_ptr, out_ptr, n_elems, dtype_code, call_hash
        error = self._launch(self._args_ref, ctypes.c_void_p(stream))
        if error:
            native.check(error, "all_reduce: the CUDA kernel could not be launched")
