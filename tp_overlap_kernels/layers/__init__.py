"""Modules that hold this rank's parameters and call one op."""

from .routing import counters
from .row_parallel_linear import RowParallelLinear

__all__ = ["RowParallelLinear", "counters"]
