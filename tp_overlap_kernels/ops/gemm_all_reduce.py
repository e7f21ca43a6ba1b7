"""gemm_all_reduce(a, b, group_name, bias): a row-parallel linear layer as one op. The contract is below."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..dispatch import Plan
from ..memory.arena import Arena
from . import reference, two_level
from .all_reduce import sum_into
from .checks import check_apart, check_arena, check_gemm, check_out
from .execute import plan_for, settle, warn_chunked
from .gemm_reduce_scatter import scatter_inside
from .library import register
from .prepared import Behind, Prepared, key_of, recall, remember

OP = "gemm_all_reduce"


def gemm_all_reduce(a: Tensor, b: Tensor, group_name: str, bias: Tensor | None = None) -> Tensor:
    """Equals `unfused.gemm_all_reduce(a, b, group, bias)`: the sum over the ranks of a @ b.T, plus bias once.

    a: [..., K], this rank's slice of the input; any strides and offset. b: [N, K], this rank's slice of the weight,
    as nn.Linear lays it out. bias: [N] or None, equal on all ranks. bf16 or fp16, all of one dtype, on the group's
    device. Any number of rows M >= 0, any N up to max_N, any K.
    Returns a fresh contiguous tensor [..., N]: it aliases neither an input nor the arena. Every rank holds the same
    bits.
    Rounding: f32 over K and over ranks; the kernel's file says where a partial is rounded.
    All ranks of the group call the same ops in the same order with equal M, N, K, dtype and presence of bias, one
    call in flight a group.
    M above max_M runs in row chunks.
    The plan decode reads a weight that it has seen before under the end of the kernel before it on the stream. That
    kernel may write b only in ways that torch counts (`Tensor._version`): not through `.data`, nor as a user's own.
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
    out = torch.empty((*a.shape[:-1], b.shape[0]), dtype=a.dtype, device=a.device)
    remember(arena, key, _run(arena, a, b, bias, out))
    return out


def gemm_all_reduce_out(a: Tensor, b: Tensor, group_name: str, out: Tensor, bias: Tensor | None = None) -> None:
    """`gemm_all_reduce` into `out`: contiguous [..., N], a's dtype, overlapping no input."""
    check_apart(OP, out, a, b, bias)
    key = key_of(OP, a, b, bias, out)
    call = recall(group_name, key, a, b, bias)
    if call is not None:
        call.gemm(a, b, bias, out)
        return
    check_gemm(OP, a, b, bias)
    check_out(OP, out, a, (*a.shape[:-1], b.shape[0]))
    arena = check_arena(OP, group_name, a, b.shape[0])
    remember(arena, key, _run(arena, a, b, bias, out))


def _run(arena: Arena, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Prepared | None:
    """Run a call that has been checked. Returns it for the next time, unless there was nothing to do."""
    N, K = b.shape
    if out.numel() == 0:
        return None
    if K == 0:
        out.zero_() if bias is None else out.copy_(bias.expand_as(out))
        return None
    plan, word = plan_for(arena, OP, out.numel() // N, N, K, a.dtype, bias is not None)
    call = Prepared(arena.turn, partial(_issue, arena, plan, word), out)
    with arena.turn:
        issued = call.issue(a, b, bias, out)
    call.learn(issued, a, b, bias, out)
    return call


def _issue(arena: Arena, plan: Plan, word: int, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor):
    """The plan on these tensors. Returns what was issued, if it can be had again with less work."""
    if a.dim() != 2:
        a, out = a.reshape(-1, b.shape[1]), out.view(-1, b.shape[0])
    bias = bias.contiguous() if bias is not None else None  # the kernels index it by column
    run = _unfused if begins_with_a_product(plan) else run_fused
    issued = run(arena, plan, a, b, bias, out, word)
    settle(arena, out)
    return issued


def begins_with_a_product(plan: Plan) -> bool:
    """Whether cuBLAS multiplies first, in a launch of its own."""
    return plan.name in ("local", "ref") or plan.name.startswith("unfused_")


def run_fused(arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int):
    """A plan in which the sum begins before the product has ended; a 2-D, out [M, N], in chunks that fit the arena."""
    if plan.name == "two_level":
        two_level.all_reduce(arena, OP, partial(scatter_inside, arena, plan, word, a, b, bias), out)
        return None
    from . import decode, launches
    from .chunked import gemm_all_reduce_chunked

    run = {
        "one_shot": launches.gemm_all_reduce_one_shot,
        "decode": decode.run,
        "two_shot": launches.gemm_all_reduce_two_shot,
        "sm90": launches.gemm_all_reduce_sm90,
        "sm90_add": launches.gemm_all_reduce_sm90,
        "chunked": gemm_all_reduce_chunked,
    }[plan.name]
    M, limit = a.shape[0], launches.rows_that_fit(arena, plan, b.shape[0], a.element_size())
    if M <= limit:
        return run(arena, plan, a, b, bias, out, word)
    if M > arena.layout.max_M:
        warn_chunked(arena, OP, M, limit)
    for row in range(0, M, limit):
        run(arena, plan, a[row : row + limit], b, bias, out[row : row + limit], word)
    launches.spoil(arena, out)
    return None


def _unfused(arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int):
    """cuBLAS, then an all-reduce."""
    product = product_of(arena, bias)
    flat = product(a, b, bias, out).view(-1)
    if plan.name == "ref":
        reference.all_reduce(arena, flat, flat, word, OP)
    elif plan.name != "local":
        issued = sum_into(arena, Plan(plan.name.removeprefix("unfused_")), flat, flat, word)
        return issued and Behind(product, issued, out, takes_bias=False)
    return None


def product_of(arena: Arena, bias: Tensor | None) -> Callable[..., Tensor]:
    """How this rank multiplies: (a, b, bias, out) -> out, the bias entering one rank's product."""
    return _product_of_rank_0 if bias is not None and arena.rank == 0 else _product


def _product(a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor) -> Tensor:
    if a.dim() != 2:
        torch.mm(a.reshape(-1, b.shape[1]), b.t(), out=out.view(-1, b.shape[0]))
        return out
    return torch.mm(a, b.t(), out=out)


def _product_of_rank_0(a: Tensor, b: Tensor, bias: Tensor, out: Tensor) -> Tensor:
    """The bias enters one rank's product, in f32, so that it is added once."""
    torch.addmm(bias, a.reshape(-1, b.shape[1]), b.t(), out=out.view(-1, b.shape[0]))
    return out


def _fake(a: Tensor, b: Tensor, group_name: str, bias: Tensor | None = None) -> Tensor:
    check_gemm(OP, a, b, bias)
    return torch.empty((*a.shape[:-1], b.shape[0]), dtype=a.dtype, device=a.device)


def _fake_out(a: Tensor, b: Tensor, group_name: str, out: Tensor, bias: Tensor | None = None) -> None:
    check_gemm(OP, a, b, bias)
    check_out(OP, out, a, (*a.shape[:-1], b.shape[0]))


register("gemm_all_reduce(Tensor a, Tensor b, str group_name, Tensor? bias=None) -> Tensor", gemm_all_reduce, _fake)
register(
    "gemm_all_reduce_out(Tensor a, Tensor b, str group_name, Tensor(a!) out, Tensor? bias=None) -> ()",
    gemm_all_reduce_out,
    _fake_out,
)
