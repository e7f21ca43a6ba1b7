"""The sum over ranks by torch's own collectives, for the calls that a layer does not fuse. All are differentiable.

The functional collectives are used since torch.compile takes them as they are, and since they find a group by name.
"""

from __future__ import annotations

import torch
import torch.distributed  # registers torch.ops._c10d_functional
from torch import Tensor


def all_reduce(partial: Tensor, group_name: str) -> Tensor:
    """The sum of every rank's `partial`, a fresh tensor of the same shape."""
    return _AllReduce.apply(partial, group_name) if _needs_grad(partial) else _all_reduce(partial, group_name)


def reduce_scatter_rows(partial: Tensor, group_name: str, rank: int, world_size: int) -> Tensor:
    """This rank's rows of the sum of every rank's `partial` [M, N]: [r*c, min(M, (r+1)*c)) with c = ceil(M / W)."""
    if _needs_grad(partial):
        return _ReduceScatterRows.apply(partial, group_name, rank, world_size)
    return _reduce_scatter_rows(partial, group_name, rank, world_size)


def own_columns(x: Tensor, group_name: str, rank: int, world_size: int) -> Tensor:
    """This rank's columns of `x` [..., K], equal on all ranks: a view, or a copy where a gradient is wanted."""
    if world_size == 1:
        return x
    return _OwnColumns.apply(x, group_name, rank, world_size) if _needs_grad(x) else _columns(x, rank, world_size)


def _needs_grad(tensor: Tensor) -> bool:
    return tensor.requires_grad and torch.is_grad_enabled()


def _columns(x: Tensor, rank: int, world_size: int) -> Tensor:
    columns = x.shape[-1] // world_size
    return x.narrow(-1, rank * columns, columns)


def _all_reduce(partial: Tensor, group_name: str) -> Tensor:
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_reduce(partial.contiguous(), "sum", group_name))


def _reduce_scatter_rows(partial: Tensor, group_name: str, rank: int, world_size: int) -> Tensor:
    M = partial.shape[0]
    rows = -(-M // world_size)  # c
    functional = torch.ops._c10d_functional
    padded = torch.nn.functional.pad(partial, (0, 0, 0, rows * world_size - M))
    shard = functional.wait_tensor(functional.reduce_scatter_tensor(padded, "sum", world_size, group_name))
    return shard[: max(0, min(rows, M - rank * rows))]


def _gather(part: Tensor, group_name: str, world_size: int) -> Tensor:
    """Every rank's `part`, one after the other along dimension 0."""
    functional = torch.ops._c10d_functional
    return functional.wait_tensor(functional.all_gather_into_tensor(part.contiguous(), world_size, group_name))


class _AllReduce(torch.autograd.Function):
    """Every rank computes the same loss from the same sum: the gradient of its partial is the gradient of the sum."""

    @staticmethod
    def forward(ctx, partial, group_name):
        return _all_reduce(partial, group_name)

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class _ReduceScatterRows(torch.autograd.Function):
    """Each rank's loss sees its own rows only: the gradient of a partial is every rank's rows, gathered."""

    @staticmethod
    def forward(ctx, partial, group_name, rank, world_size):
        ctx.group_name, ctx.world_size, ctx.M = group_name, world_size, partial.shape[0]
        return _reduce_scatter_rows(partial, group_name, rank, world_size)

    @staticmethod
    def backward(ctx, grad):
        rows = -(-ctx.M // ctx.world_size)
        padded = torch.nn.functional.pad(grad, (0, 0, 0, rows - grad.shape[0]))
        return _gather(padded, ctx.group_name, ctx.world_size)[: ctx.M], None, None, None


class _OwnColumns(torch.autograd.Function):
    """Each rank sees the gradient of its own columns only: that of the whole is all of them, gathered."""

    @staticmethod
    def forward(ctx, x, group_name, rank, world_size):
        ctx.group_name, ctx.world_size = group_name, world_size
        return _columns(x, rank, world_size).clone()

    @staticmethod
    def backward(ctx, grad):
        return _gather(grad.movedim(-1, 0), ctx.group_name, ctx.world_size).movedim(0, -1), None, None, None
