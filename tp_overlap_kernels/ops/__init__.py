"""The operators. Importing this registers `torch.ops.tp_overlap.*`."""

from . import all_reduce, gemm_all_reduce, gemm_reduce_scatter
from .execute import cpu_backend, force_plan

__all__ = ["all_reduce", "cpu_backend", "force_plan", "gemm_all_reduce", "gemm_reduce_scatter"]
