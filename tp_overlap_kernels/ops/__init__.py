"""The operators. Importing this registers `torch.ops.tp_overlap.*`."""

from . import (
    all_reduce,
    all_reduce_add_rms_norm,
    gemm_all_reduce,
    gemm_all_reduce_add_rms_norm,
    gemm_reduce_scatter,
)
from .execute import cpu_backend, force_plan

__all__ = [
    "all_reduce",
    "all_reduce_add_rms_norm",
    "cpu_backend",
    "force_plan",
    "gemm_all_reduce",
    "gemm_all_reduce_add_rms_norm",
    "gemm_reduce_scatter",
]
