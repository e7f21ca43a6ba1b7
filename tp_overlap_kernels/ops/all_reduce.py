"""all_reduce(x, group_name): the sum of x over the ranks, as one op. See `all_reduce` below for the contract."""

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import Plan
from ..errors import InvalidInput
from ..memory.arena import Arena
from ..memory.record import op_code
from . import reference
from .checks import check_arena, check_out, check_tensors
from .execute import plan_for, settle
from .library import register

OP = "all_reduce"
DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1}


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """Equals `unfused.all_reduce(x, group)`: the sum of x over the ranks.

    x: any shape and strides, bf16 or fp16, on the group's device. Returns a fresh contiguous tensor of x's shape;
    every rank holds the same bits. Ranks are added in rank order in f32, with one rounding.
    All ranks of the group call the same ops in the same order with equal shape and dtype, one call in flight a group.
    A size above what the arena holds runs in pieces.
    Errors: NotInitialised, InvalidInput (nothing is sent), GroupFailed and its kinds (an earlier call failed, or on
    the CPU this one).
    """
    check_tensors(OP, x)
    arena = check_arena(OP, group_name, x, 0)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    _run(arena, x, out)
    return out


def all_reduce_out(x: Tensor, group_name: str, out: Tensor) -> None:
    """`all_reduce` into `out`: contiguous, x's shape and dtype; it may be x itself, but not overlap it otherwise."""
    check_tensors(OP, x, out)
    check_out(OP, out, x, tuple(x.shape))
    _run(check_arena(OP, group_name, x, 0), x, out)


def _run(arena: Arena, x: Tensor, out: Tensor) -> None:
    n = x.numel()
    if n == 0:
        return
    plan, word = plan_for(arena, OP, 1, n, 0, x.dtype, False)
    sum_into(arena, plan, x.contiguous().view(-1), out.view(-1), word)
    settle(arena)


def sum_into(arena: Arena, plan: Plan, x: Tensor, out: Tensor, word: int) -> None:
    """Run an all-reduce plan on flat contiguous tensors, in pieces that fit the arena."""
    if plan.name == "local":
        out.copy_(x)
        return
    if plan.name == "nccl":
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        dist.all_reduce(out, group=arena.group)
        return
    if plan.name == "ref":
        reference.all_reduce(arena, x, out, word)
        return
    from . import launches

    step = launches.elements_that_fit(arena, plan, x.element_size())
    if step < 1:
        raise InvalidInput(
            f"{OP}: plan {plan.name!r} has no room in this arena. Call init with a larger max_M or max_N."
        )
    for start in range(0, x.numel(), step):
        piece, target = x[start : start + step], out[start : start + step]
        if plan.name == "one_shot":
            launches.all_reduce_one_shot(arena, plan, piece, target, word)
        elif plan.name == "two_shot":
            launches.all_reduce_two_shot(arena, plan, piece, target, word)
        else:
            _sentinel(arena, piece, target, word)


def _sentinel(arena: Arena, x: Tensor, out: Tensor, word: int) -> None:
    launcher = arena.cache.get("sentinel")
    if launcher is None:
        from ..kernels.all_reduce_one_shot_sentinel import SentinelLauncher

        room = arena.layout
        launcher = arena.cache["sentinel"] = SentinelLauncher(
            base_table_ptr=arena.heap.data_ptr(),
            control_ptr=arena.control.data_ptr(),
            record_ptr=arena.record.words.data_ptr(),
            sentinel_offset=room.sentinel,
            sentinel_bytes=room.sentinel_bytes,
            header_offset=room.header,
            done_offset=room.done,
            rank=arena.rank,
            world_size=arena.world_size,
            timeout_ns=arena.timeout_ns,
        )
    stream = torch.cuda.current_stream(arena.device).cuda_stream
    launcher(x.data_ptr(), out.data_ptr(), x.numel(), DTYPE_CODES[x.dtype], word, stream)


def _fake(x: Tensor, group_name: str) -> Tensor:
    check_tensors(OP, x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_out(x: Tensor, group_name: str, out: Tensor) -> None:
    check_tensors(OP, x, out)


assert op_code(OP) == 3  # the number in the kernels
register("all_reduce(Tensor x, str group_name) -> Tensor", all_reduce, _fake)
register("all_reduce_out(Tensor x, str group_name, Tensor(a!) out) -> ()", all_reduce_out, _fake_out)
