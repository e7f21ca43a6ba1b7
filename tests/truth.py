"""What each operator should give, in float64, from the rounded inputs of all ranks.

Meant for the process that gathers the ranks' results (a truth costs world_size products), but any rank can compute it.
"""

from __future__ import annotations

import dataclasses

import torch

from tests import inputs
from tests.cases import Case


@dataclasses.dataclass(frozen=True)
class Truth:
    """`ref`: the exact result. The rest is what bounds the error of a kernel that rounds (tests/tolerance.py)."""

    ref: torch.Tensor  # (rows, N) f64, with the bias
    partials: torch.Tensor  # (world_size, rows, N) f64: p_r
    magnitude: torch.Tensor  # (rows, N) f64: sum_r |a_r| @ |b_r|.T
    dtype: torch.dtype
    K_local: int  # 0: the partials are inputs, and exact

    def rows(self, rows: slice) -> Truth:
        """The part of the result that a rank keeps: `truth.rows(case.rows_of(rank))`."""
        return dataclasses.replace(
            self, ref=self.ref[rows], partials=self.partials[:, rows], magnitude=self.magnitude[rows]
        )

    def exact(self) -> torch.Tensor:
        """The result in the operator's dtype, for inputs of kind integer or tagged: by bits, or the kernel is wrong."""
        out = self.ref.to(self.dtype)
        assert torch.equal(out.double(), self.ref), "these inputs are not exact"
        assert (self.partials.abs().sum(0) <= inputs.EXACT_LIMIT[self.dtype]).all(), "a sum of partials may round"
        return out


def gemm_all_reduce(
    case: Case, kind: str = "normal", call: int = 0, with_bias: bool = False, device: str = "cpu"
) -> Truth:
    """out[M, N] = sum_r a_r @ b_r.T (+ bias, once)."""
    partials, magnitude = [], torch.zeros(case.M, case.N, dtype=torch.float64, device=device)
    for rank in range(case.world_size):
        a, b = (x.double() for x in inputs.operands(case, rank, kind, call, device))
        partials.append(a @ b.T)
        magnitude += a.abs() @ b.abs().T
    stacked = torch.stack(partials)
    ref = stacked.sum(0)
    if with_bias:
        ref = ref + inputs.bias(case, call, device).double()
    return Truth(ref, stacked, magnitude, case.dtype, case.K)


def gemm_reduce_scatter(
    case: Case, rank: int, kind: str = "normal", call: int = 0, with_bias: bool = False, device: str = "cpu"
) -> Truth:
    """The rows of the sum that `rank` keeps. For all ranks at once, take `.rows` of gemm_all_reduce's truth."""
    return gemm_all_reduce(case, kind, call, with_bias, device).rows(case.rows_of(rank))


def all_reduce(case: Case, kind: str = "normal", call: int = 0, device: str = "cpu") -> Truth:
    """out[N] = sum_r x_r."""
    messages = [inputs.message(case, rank, kind, call, device).double() for rank in range(case.world_size)]
    stacked = torch.stack(messages)
    return Truth(stacked.sum(0), stacked, stacked.abs().sum(0), case.dtype, 0)
