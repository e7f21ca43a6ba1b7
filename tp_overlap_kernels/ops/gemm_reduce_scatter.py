"""gemm_reduce_scatter(a, b, group_name, bias): a row-parallel layer, its sum scattered by rows. Contract below."""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import Plan
from ..dispatch.defaults import SM90_PLANS
from ..memory.arena import Arena, get
from ..memory.layout import rows_per_rank
from . import reference, scatter_sentinel, two_level
from .checks import check_apart, check_arena, check_gemm, check_out
from .execute import plan_for, settle, warn_chunked
from .library import register
from .prepared import Behind, Prepared, key_of, recall, remember

OP = "gemm_reduce_scatter"


def gemm_reduce_scatter(a: Tensor, b: Tensor, group_name: str, bias: Tensor | None = None) -> Tensor:
    """Equals `unfused.gemm_reduce_scatter(a, b, group, bias)`: this rank's rows of the sum over the ranks of a @ b.T.

    a: [..., K] with M rows in all, this rank's slice of the input; any strides and offset. b: [N, K], this rank's
    slice of the weight.
    bias: [N] or None, equal on all ranks. bf16 or fp16, all of one dtype, on the group's device. Any M >= 0, any N
    up to max_N, any K.
    Returns a fresh contiguous tensor [rows, N]: rank r gets the rows [r*c, min(M, (r+1)*c)), c = ceil(M / W), so
    the last ranks may get fewer, or none. No padding by the caller.
    All ranks of the group call the same ops in the same order with equal M, N, K, dtype and presence of bias, one
    call in flight a group.
    M above max_M runs in row chunks.
    Errors: NotInitialised, InvalidInput (nothing is sent), GroupFailed and its kinds (an earlier call failed, or on
    the CPU this one).
    """
    key = key_of(OP, a, b, bias)
    call = recall(group_name, key, a, b, bias)
    if call is not None:
        out = a.new_empty_strided(call.shape, call.strides)  # a third less than torch.empty
        call.gemm(a, b, bias, out)
        return out
    check_gemm(OP, a, b, bias)
    arena = check_arena(OP, group_name, a, b.shape[0])
    rows = _own_rows(_rows(a), arena.rank, arena.world_size)
    out = torch.empty((rows, b.shape[0]), dtype=a.dtype, device=a.device)
    remember(arena, key, _run(arena, a, b, bias, out))
    return out


def gemm_reduce_scatter_out(a: Tensor, b: Tensor, group_name: str, out: Tensor, bias: Tensor | None = None) -> None:
    """`gemm_reduce_scatter` into `out`: contiguous [rows, N], a's dtype, overlapping no input."""
    check_apart(OP, out, a, b, bias)
    key = key_of(OP, a, b, bias, out)
    call = recall(group_name, key, a, b, bias)
    if call is not None:
        call.gemm(a, b, bias, out)
        return
    check_gemm(OP, a, b, bias)
    arena = check_arena(OP, group_name, a, b.shape[0])
    check_out(OP, out, a, (_own_rows(_rows(a), arena.rank, arena.world_size), b.shape[0]))
    remember(arena, key, _run(arena, a, b, bias, out))


def _rows(a: Tensor):
    rows = 1
    for size in a.shape[:-1]:
        rows = rows * size
    return rows


def _own_rows(M, rank: int, world_size: int):
    """Rows that this rank gets; M may be symbolic."""
    c = (M + world_size - 1) // world_size
    return torch.sym_max(0, torch.sym_min(M, (rank + 1) * c) - rank * c)


def _run(arena: Arena, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Prepared | None:
    """Run a call that has been checked. Returns it for the next time, unless there was nothing to do."""
    N, K = b.shape
    M = _rows(a)
    if M == 0 or N == 0:
        return None
    if K == 0:
        out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return None
    plan, word = plan_for(arena, OP, M, N, K, a.dtype, bias is not None)
    return _prepare(arena, plan, word, a, b, bias, out)


def _prepare(arena: Arena, plan: Plan, word: int, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Prepared:
    call = Prepared(arena.turn, partial(_issue, arena, plan, word), out)
    with arena.turn:
        issued = call.issue(a, b, bias, out)
    call.learn(issued, a, b, bias, out)
    return call


def scatter_inside(
    arena: Arena, plan: Plan, word: int, a: Tensor, b: Tensor, bias: Tensor | None, shard: Tensor
) -> None:
    """shard = this place's rows of the sum over our node of a @ b.T, plus bias on the first node, by `plan.inside`.

    arena, plan, word: of a two_level call, whatever its op; all that ranks must agree on inside is in the word.
    """
    span = two_level.span_of(arena)
    inside, bias = span.inside, bias if span.node == 0 else None
    assert plan.inside is not None
    key = (word, *key_of(OP, a, b, bias, shard))
    call = inside.prepared.get(key)
    if call is None:
        remember(inside, key, _prepare(inside, plan.inside, word, a, b, bias, shard))
    else:
        call.gemm(a, b, bias, shard)


def _issue(arena: Arena, plan: Plan, word: int, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor):
    """The plan on these tensors. Returns what was issued, if it can be had again with less work."""
    issued = None
    if a.dim() != 2:
        a = a.reshape(_rows(a), b.shape[1])
    bias = bias.contiguous() if bias is not None else None  # the kernels index it by column
    if plan.name == "two_level":
        scatter = partial(_scatter_rows, arena, plan, word, b, bias)
        two_level.reduce_scatter(arena, OP, scatter, a, out)
    elif plan.name in ("local", "ref") or plan.name == "unfused_nccl":
        _unfused(arena, plan, a, b, bias, out, word)
    else:
        issued = _in_chunks(arena, plan, a, b, bias, out, word)
    settle(arena, out)
    return issued


def _scatter_rows(
    arena: Arena, plan: Plan, word: int, b: Tensor, bias: Tensor | None, a: Tensor, shards: Tensor
) -> None:
    scatter_inside(arena, plan, word, a, b, bias, shards)


def _in_chunks(arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int):
    from . import launches

    M, limit = a.shape[0], launches.rows_that_fit(arena, plan, b.shape[0], a.element_size())
    if M <= limit:
        return _fused(arena, plan, a, b, bias, out, word)
    if M > arena.layout.max_M:
        warn_chunked(arena, OP, M, limit)
    W, c = arena.world_size, rows_per_rank(M, arena.world_size)
    step = max(limit // W, 1)
    # Every owner gives `step` of its rows to each chunk; short owners are padded with zero rows, whose sums nobody
    # reads.
    for start in range(0, c, step):
        height = min(step, c - start)
        chunk = a.new_zeros((W * height, a.shape[1]))
        for owner in range(W):
            part = a[owner * c + start : min(M, (owner + 1) * c, owner * c + start + height)]
            chunk[owner * height : owner * height + part.shape[0]] = part
        sums = out.new_empty((height, out.shape[1]))
        _fused(arena, plan, chunk, b, bias, sums, word)
        kept = out[start : start + height]
        kept.copy_(sums[: kept.shape[0]])
    launches.spoil(arena, out)
    return None


def _fused(arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int):
    from . import launches
    from .chunked import gemm_reduce_scatter_chunked

    if plan.name == "push":
        return launches.gemm_reduce_scatter(arena, plan, a, b, bias, out, word)
    if plan.name == "one_shot":
        return launches.gemm_reduce_scatter_one_shot(arena, plan, a, b, bias, out, word)
    if plan.name in SM90_PLANS:
        return launches.gemm_reduce_scatter_sm90(arena, plan, a, b, bias, out, word)
    if plan.name == "chunked":
        gemm_reduce_scatter_chunked(arena, plan, a, b, bias, out, word)
    elif plan.name == "unfused_sentinel":
        product = _product_of_rank_0 if bias is not None and arena.rank == 0 else _product
        partial = product(a, b, bias, out)
        return Behind(product, scatter_sentinel.run(arena, partial, out, word), partial, takes_bias=False)
    else:
        partial = _product(a, b, bias, out)
        return Behind(_product, launches.reduce_scatter(arena, partial, bias, out, word), partial, takes_bias=True)
    return None


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    """This rank's partial, fresh: a graph gets one of its own."""
    return torch.mm(a if a.dim() == 2 else a.reshape(-1, b.shape[1]), b.t())


def _product_of_rank_0(a: Tensor, b: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """The bias enters one rank's product, in f32, so that it is added once."""
    return torch.addmm(bias, a if a.dim() == 2 else a.reshape(-1, b.shape[1]), b.t())


def _unfused(arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int) -> None:
    """cuBLAS, then a collective. The bias enters rank 0's product, in f32, so that it is added once."""
    first = bias is not None and arena.rank == 0
    if plan.name == "local":
        torch.addmm(bias, a, b.t(), out=out) if first else torch.mm(a, b.t(), out=out)
        return
    partial = torch.addmm(bias, a, b.t()) if first else torch.mm(a, b.t())
    if plan.name == "ref":
        reference.reduce_scatter(arena, partial, out, word)
        return
    W, c = arena.world_size, rows_per_rank(a.shape[0], arena.world_size)
    if a.shape[0] < W * c:
        partial = torch.nn.functional.pad(partial, (0, 0, 0, W * c - a.shape[0]))
        shard = out.new_empty((c, out.shape[1]))
        dist.reduce_scatter_tensor(shard, partial, group=arena.group)
        out.copy_(shard[: out.shape[0]])
    else:
        dist.reduce_scatter_tensor(out, partial, group=arena.group)


def _fake(a: Tensor, b: Tensor, group_name: str, bias: Tensor | None = None) -> Tensor:
    check_gemm(OP, a, b, bias)
    arena = get(group_name, OP)
    rows = _own_rows(_rows(a), arena.rank, arena.world_size)
    return torch.empty((rows, b.shape[0]), dtype=a.dtype, device=a.device)


def _fake_out(a: Tensor, b: Tensor, group_name: str, out: Tensor, bias: Tensor | None = None) -> None:
    check_gemm(OP, a, b, bias)
    arena = get(group_name, OP)
    check_out(OP, out, a, (_own_rows(_rows(a), arena.rank, arena.world_size), b.shape[0]))


register(
    "gemm_reduce_scatter(Tensor a, Tensor b, str group_name, Tensor? bias=None) -> Tensor", gemm_reduce_scatter, _fake
)
register(
    "gemm_reduce_scatter_out(Tensor a, Tensor b, str group_name, Tensor(a!) out, Tensor? bias=None) -> ()",
    gemm_reduce_scatter_out,
    _fake_out,
)
