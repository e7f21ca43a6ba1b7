"""What the ops mean: plain torch programs over a process group, as every engine runs them today.

All ranks of the group call these together, as they would call the ops.
"""

import torch
import torch.distributed as dist
from torch import Tensor

from ..memory.layout import rows_per_rank


def all_reduce(x: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The sum of x over the ranks, a fresh tensor of x's shape on every rank."""
    total = x.clone(memory_format=torch.contiguous_format)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total


def gemm_all_reduce(a: Tensor, b: Tensor, group: dist.ProcessGroup | None, bias: Tensor | None = None) -> Tensor:
    """all_reduce(a @ b.T) + bias. a: [..., K], b: [N, K], bias: [N]; result [..., N] on every rank."""
    total = torch.nn.functional.linear(a, b)
    if group is not None:
        dist.all_reduce(total, group=group)
    return total if bias is None else total.add_(bias)


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group: dist.ProcessGroup | None
) -> tuple[Tensor, Tensor]:
    """(y, new_residual): new_residual = all_reduce(x) + residual, y = its RMS norm over the last dimension."""
    return _add_rms_norm(all_reduce(x, group), residual, weight, eps)


def gemm_all_reduce_add_rms_norm(
    a: Tensor,
    b: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group: dist.ProcessGroup | None,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(y, new_residual): new_residual = gemm_all_reduce(a, b, bias) + residual, y = its RMS norm."""
    return _add_rms_norm(gemm_all_reduce(a, b, group, bias), residual, weight, eps)


def _add_rms_norm(total: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    new_residual = total + residual
    return torch.nn.functional.rms_norm(new_residual, weight.shape, weight, eps), new_residual


def gemm_reduce_scatter(a: Tensor, b: Tensor, group: dist.ProcessGroup | None, bias: Tensor | None = None) -> Tensor:
    """This rank's rows of gemm_all_reduce: [r*c, min(M, (r+1)*c)) with c = ceil(M / W), 2-D.

    The product is padded to W*c rows, since the collective wants equal parts.
    """
    partial = torch.nn.functional.linear(a.reshape(-1, a.shape[-1]), b)
    M = partial.shape[0]
    if group is None:
        return partial if bias is None else partial.add_(bias)
    W, rank = dist.get_world_size(group), dist.get_rank(group)
    c = rows_per_rank(M, W)
    if M < W * c:
        partial = torch.nn.functional.pad(partial, (0, 0, 0, W * c - M))
    shard = partial.new_empty((c, b.shape[0]))
    dist.reduce_scatter_tensor(shard, partial, group=group)
    shard = shard[: max(0, min(M, (rank + 1) * c) - rank * c)]
    return shard if bias is None else shard.add_(bias)
