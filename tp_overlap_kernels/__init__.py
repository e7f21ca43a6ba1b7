"""Fused GEMM + collective operators for tensor-parallel inference, beside stock PyTorch and stock Triton.

    import torch.distributed as dist, tp_overlap_kernels as tpo

    dist.init_process_group("nccl")
    tpo.init(max_M=8192, max_N=8192)                                     # one arena for every layer and every op
    y = torch.ops.tp_overlap.gemm_all_reduce(x, w, dist.group.WORLD.group_name)    # == all_reduce(x @ w.T)

Importing touches no GPU, starts no process and imports no Triton.
"""

from .errors import (
    CallMismatch,
    GroupFailed,
    InvalidInput,
    NativeLibraryError,
    NotInitialised,
    PeerClosed,
    PeerDied,
    PeerTimeout,
    TpOverlapError,
    UnsupportedTopology,
)
from .layers import RowParallelLinear, counters
from .ops import cpu_backend, force_plan
from .session import GroupInfo, MemoryReport, bytes_needed, check, close, explain, init, memory_report

__version__ = "0.1.0"

__all__ = [
    "CallMismatch",
    "GroupFailed",
    "GroupInfo",
    "InvalidInput",
    "MemoryReport",
    "NativeLibraryError",
    "NotInitialised",
    "PeerClosed",
    "PeerDied",
    "PeerTimeout",
    "RowParallelLinear",
    "TpOverlapError",
    "UnsupportedTopology",
    "bytes_needed",
    "check",
    "close",
    "counters",
    "cpu_backend",
    "explain",
    "force_plan",
    "init",
    "memory_report",
]
