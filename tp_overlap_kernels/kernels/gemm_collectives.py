"""Launchers of csrc/kernels/gemm_reduce_scatter_push.cu and gemm_all_reduce_two_shot_push.cu, which tell the protocol,
and of gemm_reduce_scatter_push_add.cu and gemm_all_reduce_one_shot_push.cu, where two ranks have the L2 cache add.

    out = sum over r of  a_r[M, K] @ b_r[N, K].T  (+ bias):  this rank's rows of it, or all of it on every rank

A call costs the host a few microseconds: the arguments live in one struct that is made once, and only the words that
change are written. Calls on one rank do not overlap, so one struct is enough.
"""

import ctypes
import dataclasses

from tp_overlap_kernels import native

from . import gemm

_ANY = {  # by columns of a tile, staging buffers of a block, rows and columns of blocks in a cluster
    (256, 1, 2, 1): gemm.LARGE,
    (128, 1, 2, 1): gemm.SMALL,
    (128, 2, 2, 1): dataclasses.replace(gemm.SMALL, code=3),  # TPO_GEMM_128X128_PAIR_TWO_STAGINGS
}
_WIDE_ADD = dataclasses.replace(gemm.LARGE, code=6)
SCHEDULES = {  # by plan and op
    ("sm90", "gemm_all_reduce"): _ANY,
    ("sm90", "gemm_reduce_scatter"): _ANY
    | {
        (128, 2, 1, 2): gemm.Schedule(code=4, rows=128, cols=256, blocks=2, group_rows=8),
        (64, 2, 1, 2): gemm.Schedule(code=5, rows=128, cols=128, blocks=2, group_rows=8),
    },
    ("sm90_add", "gemm_all_reduce"): {
        (256, 1, 2, 1): _WIDE_ADD,
        (128, 1, 2, 1): dataclasses.replace(gemm.SMALL, code=7),
    },
    ("sm90_add", "gemm_reduce_scatter"): {
        (256, 1, 2, 1): _WIDE_ADD,
        (128, 2, 2, 1): dataclasses.replace(gemm.SMALL, code=8),
    },
}
_FUNCTIONS = {  # of the C interface
    ("sm90", "gemm_all_reduce"): "tpo_gemm_all_reduce",
    ("sm90", "gemm_reduce_scatter"): "tpo_gemm_reduce_scatter",
    ("sm90_add", "gemm_all_reduce"): "tpo_gemm_all_reduce_one_shot",
    ("sm90_add", "gemm_reduce_scatter"): "tpo_gemm_reduce_scatter_add",
}
TILE_BYTES = {cols: 128 * cols * 2 for cols in (64, 128, 256)}  # of a block's tile, on its way between ranks


# TpoTraceRole and TpoTraceStep of csrc/api.h.
TRACE_ROLES = ("consumer", "courier", "collector", "fetcher")
TRACE_STEPS = (
    "none",
    "multiply",
    "await staging",
    "await partial",
    "add",
    "stage",
    "await tile",
    "await flag",
    "send",
    "publish",
    "await sum",
    "copy",
    "await turn",
)
TRACE_WORDS = 8  # of 32 bits, an interval: begin and end, of 64; step, owner, tile, unused


class _Args(ctypes.Structure):
    """TpoGemmCollectiveArgs of csrc/api.h, field by field."""

    _fields_ = (
        ("gemm", gemm.Args),
        ("base_table", ctypes.c_uint64),
        ("control", ctypes.c_uint64),
        ("record", ctypes.c_uint64),
        ("header_offset", ctypes.c_int64),
        ("done_offset", ctypes.c_int64),
        ("partial_flags_offset", ctypes.c_int64),
        ("result_flags_offset", ctypes.c_int64),
        ("tile_slots", ctypes.c_int64),
        ("staging_offset", ctypes.c_int64),
        ("staging_slot_bytes", ctypes.c_int64),
        ("result_offset", ctypes.c_int64),
        ("result_bytes", ctypes.c_int64),
        ("timeout_ns", ctypes.c_int64),
        ("call_hash", ctypes.c_int64),
        ("rank", ctypes.c_int32),
        ("world_size", ctypes.c_int32),
        ("blocks", ctypes.c_int32),
        ("lead_tiles", ctypes.c_int32),
        ("piece_bytes", ctypes.c_int32),
        ("senders", ctypes.c_int32),
        ("start", ctypes.c_int32),
        ("trace", ctypes.c_uint64),
        ("trace_intervals", ctypes.c_int64),
    )


class GemmCollectiveLauncher:
    """Launches the kernels of one plan and op for one arena. Pointers, sizes are trusted; the op has checked them."""

    def __init__(
        self,
        plan: str,
        op: str,
        /,
        *,
        base_table_ptr: int,
        control_ptr: int,
        record_ptr: int,
        header_offset: int,
        done_offset: int,
        partial_flags_offset: int,
        result_flags_offset: int,
        tile_slots: int,
        staging_offset: int,
        staging_slot_bytes: int,
        result_offset: int,
        result_bytes: int,
        timeout_ns: int,
        rank: int,
        world_size: int,
        blocks: int,
    ):
        """plan, op: of SCHEDULES. Offsets and sizes in bytes within the arena; pointers as the
        device sees them; see TpoGemmCollectiveArgs. blocks: of the grid at most, at least those of a cluster.

        Loads the kernels onto the current device. Raises NativeLibraryError if there is no library, TpOverlapError if
        the device cannot run what it holds.
        """
        library = native.library()
        self._op = op
        function = _FUNCTIONS[plan, op]
        native.check(getattr(library, f"{function}_prepare")(), f"{op}: the CUDA kernels could not be loaded")
        self._args = _Args(
            base_table=base_table_ptr,
            control=control_ptr,
            record=record_ptr,
            header_offset=header_offset,
            done_offset=done_offset,
            partial_flags_offset=partial_flags_offset,
            result_flags_offset=result_flags_offset,
            tile_slots=tile_slots,
            staging_offset=staging_offset,
            staging_slot_bytes=staging_slot_bytes,
            result_offset=result_offset,
            result_bytes=result_bytes,
            timeout_ns=timeout_ns,
            rank=rank,
            world_size=world_size,
            blocks=blocks,
        )
        self._gemm = self._args.gemm  # the same bytes
        self._args_ref = ctypes.byref(self._args)
        self._launch = getattr(library, function)
        # No argtypes: a byref and a c_void_p need no conversion, and checking them would cost a third of the call.
        self._launch.restype = ctypes.c_int

    def trace(self, ptr: int, intervals: int) -> None:
        """Calls from now on write what their threads did, over what calls before wrote; 0: they write nothing.

        ptr: device, zeros, `blocks` x len(TRACE_ROLES) x intervals x TRACE_WORDS of 32 bits. Such calls are of bf16.
        """
        self._args.trace, self._args.trace_intervals = ptr, intervals

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
        schedule: gemm.Schedule,
        group_rows: int,
        lead_tiles: int,
        piece_bytes: int,
        senders: int,
        call_hash: int,
        start: int,
        stream: int,
    ) -> None:
        """Enqueue one call on `stream` (a cudaStream_t as an integer) of the current device; capturable in a graph.

        As gemm.launch; out: contiguous, N a multiple of 8. lead_tiles: own tiles begin after so many pairs of tiles of
        each peer; 0: after all. piece_bytes: of a tile on its way to a peer, twice that at a time; a multiple of 16, at
        least 256. senders: blocks that send at a time; 0: all. call_hash: 16 bits; it and lead_tiles are equal on all
        ranks. start: of Start, but not WEIGHTS_AHEAD. Every rank makes the same calls in the same order. Raises
        TpOverlapError with CUDA's reason.
        """
        args = self._gemm
        args.a, args.b, args.bias, args.out = a_ptr, b_ptr, bias_ptr, out_ptr
        args.a_stride, args.b_stride, args.out_stride = a_stride, b_stride, N
        args.M, args.N, args.K = M, N, K
        args.dtype, args.schedule, args.group_rows = dtype_code, schedule.code, group_rows
        self._args.lead_tiles, self._args.call_hash = lead_tiles, call_hash
        self._args.piece_bytes, self._args.senders = piece_bytes, senders
        self._args.start = start
        error = self._launch(self._args_ref, ctypes.c_void_p(stream))
        if error:
            native.check(error, f"{self._op}: the CUDA kernel could not be launched")
