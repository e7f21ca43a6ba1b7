"""The plan two_level, for groups on several nodes: a reduce-scatter inside each node, a sum across, a gather inside.

    out[M, N] = sum over nodes j of s_j,   s_j = sum over the ranks r of node j of  a_r @ b_r.T

n nodes of L ranks, W = n * L. Rank r is the rank of place l on node j. Inside a node the arena of its ranks serves, and
whatever plan dispatch has for gemm_reduce_scatter on L ranks; across, torch.distributed, in one group for each place:
NCCL, or gloo on the CPU. One rank a node has nothing to sum inside: a GEMM and torch's collective remain.

    gemm_all_reduce, all_reduce             gemm_reduce_scatter                                            time
    reduce-scatter inside: place l has      rows of a in the order of places; reduce-scatter inside:         |
      rows [l*c, (l+1)*c) of s_j,             place l has of s_j the n blocks of rows that the ranks         v
      c = ceil(M / L)                         of place l own; c = ceil(M / W) rows each
    all-reduce across: of the sum           reduce-scatter across: our block of the sum
    all-gather inside: all rows

Order of the levels: the node comes first, since what crosses between nodes is then 1/L of the sum. With ranks counted
node by node, the blocks of one place are rows c*(l + L*j), which do not lie together: so the rows of a are gathered in
that order before the product, a copy of a. The last block is filled up with copies of the last row, whose sums are
dropped.

Rounding: inside a node as the plan there has it, s_j rounded once; across, each of torch's n - 1 additions is rounded
once more. The bias enters s_0, on the node of rank 0. An element is summed across by the ranks of one place alone, and
torch gives them the same bits: all ranks hold the same ones.
Bytes a rank sends: inside, (L-1)/L of the sum for the scatter and as much for the gather; across, 2 (n-1)/n of 1/L of
it. A reduce-scatter: no gather, and half as much across.
Failure: inside the node as everywhere, ranks being named by their place; the ranks of other nodes then wait for as long
as torch.distributed lets them. What torch raises fails the group. On a device neither is met before the call returns:
the sums of a node that has failed are NaN, and so is what other nodes make of them; only its own ranks learn why.
"""

import contextlib
from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
from torch import Tensor

from ..errors import GroupFailed
from ..memory.arena import Arena, Span
from ..memory.layout import rows_per_rank

Scatter = Callable[[Tensor], object]  # fills this place's rows of the sum over the node, a contiguous tensor


def span_of(arena: Arena) -> Span:
    """What dispatch has seen when it chose this plan."""
    assert arena.span is not None
    return arena.span


def all_reduce(arena: Arena, op: str, scatter: Scatter, out: Tensor) -> None:
    """out [M, N] = the sum, on every rank."""
    span = span_of(arena)
    inside, L = span.inside, span.nodes.ranks_per_node
    (M, N), c = out.shape, rows_per_rank(out.shape[0], L)
    shard = out if L == 1 else out.new_empty((c, N))
    own = shard[: max(0, min(M, (inside.rank + 1) * c) - inside.rank * c)]
    with _nan_where_it_fails(out):
        scatter(own)
        with _by_torch(arena, op):
            if own.shape[0]:  # alike for all ranks of our place
                dist.all_reduce(own, group=span.across)
            if L > 1:
                _gather(inside, shard, out)


def reduce_scatter(arena: Arena, op: str, scatter: Callable[[Tensor, Tensor], object], a: Tensor, out: Tensor) -> None:
    """out = this rank's rows of the sum. scatter: takes the rows of a in another order, and fills as `Scatter` does."""
    span = span_of(arena)
    M, N, c = a.shape[0], out.shape[1], rows_per_rank(a.shape[0], arena.world_size)
    shards = out.new_empty((len(span.nodes.ranks) * c, N))
    own = out if out.shape[0] == c else out.new_empty((c, N))
    with _nan_where_it_fails(out):
        scatter(a.index_select(0, _rows_by_place(span, M, c)), shards)
        with _by_torch(arena, op):
            dist.reduce_scatter_tensor(own, shards, group=span.across)
        if own is not out:
            out.copy_(own[: out.shape[0]])


def _rows_by_place(span: Span, M: int, c: int) -> Tensor:
    """(W * c,) int64: the rows of each rank's block, by place, and of a place as the ranks are in its group."""
    blocks = span.order[:, None] * c + torch.arange(c, device=span.order.device)
    return blocks.view(-1).clamp_(max=M - 1)


def _gather(inside: Arena, shard: Tensor, out: Tensor) -> None:
    """out = the shards of all places, the last of which may be short, or have no rows."""
    M, rows = out.shape[0], shard.shape[0] * inside.world_size
    whole = out if M == rows else out.new_empty((rows, out.shape[1]))
    dist.all_gather_into_tensor(whole, shard, group=inside.group)
    if whole is not out:
        out.copy_(whole[:M])


@contextlib.contextmanager
def _by_torch(arena: Arena, op: str) -> Iterator[None]:
    """Collectives of torch's. Errors: GroupFailed for what they raise; the group has failed then."""
    try:
        yield
    except RuntimeError as reason:
        arena.record.abort()
        raise GroupFailed(
            f"{op}: torch.distributed has failed on rank {arena.rank} of group {arena.group_name!r}: {reason}. "
            "How long it waits is the timeout of that group. close() and init() on every rank make a new one."
        ) from reason


@contextlib.contextmanager
def _nan_where_it_fails(out: Tensor) -> Iterator[None]:
    try:
        yield
    except GroupFailed:
        out.fill_(float("nan"))
        raise
