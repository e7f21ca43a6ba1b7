"""all_reduce(x, group_name): the sum of x over the ranks, as one op. See `all_reduce` below for the contract."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from ..dispatch import Plan
from ..errors import InvalidInput
from ..memory.arena import Arena
from ..memory.record import op_code
from ..memory.turn import stream_of
from . import reference, two_level
from .arena_words import DTYPE_CODES, of_sentinels
from .checks import check_apart, check_arena, check_out, check_tensors
from .execute import backend_of, plan_for, settle
from .library import register
from .prepared import Prepared, recall, remember, sum_key_of

OP = "all_reduce"


def all_reduce(x: Tensor, group_name: str) -> Tensor:
    """Equals `unfused.all_reduce(x, group)`: the sum of x over the ranks.

    x: any shape and strides, bf16 or fp16, on the group's device. Returns a fresh contiguous tensor of x's shape;
    every rank holds the same bits. Ranks are added in rank order in f32, with one rounding.
    All ranks of the group call the same ops in the same order with equal shape and dtype, one call in flight a group.
    A size above what the arena holds runs in pieces.
    Errors: NotInitialised, InvalidInput (nothing is sent), GroupFailed and its kinds (an earlier call failed, or on
    the CPU this one).
    """
    key = sum_key_of(OP, x)
    call = recall(group_name, key, x)
    if call is not None:
        out = x.new_empty_strided(call.shape, call.strides)  # a third less than torch.empty
        call.sum(x, out)
        return out
    check_tensors(OP, x)
    arena = check_arena(OP, group_name, x, 0)
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    remember(arena, key, _run(arena, x, out))
    return out


def all_reduce_out(x: Tensor, group_name: str, out: Tensor) -> None:
    """`all_reduce` into `out`: contiguous, x's shape and dtype; it may be x itself, but not overlap it otherwise."""
    check_apart(OP, out, x, may_be=x)
    key = sum_key_of(OP, x, out)
    call = recall(group_name, key, x, out)
    if call is not None:
        call.sum(x, out)
        return
    check_tensors(OP, x, out)
    check_out(OP, out, x, tuple(x.shape))
    arena = check_arena(OP, group_name, x, 0)
    remember(arena, key, _run(arena, x, out))


def _run(arena: Arena, x: Tensor, out: Tensor) -> Prepared | None:
    """Run a call that has been checked. Returns it for the next time, unless there was nothing to do."""
    n = x.numel()
    if n == 0:
        return None
    plan, word = plan_for(arena, OP, 1, n, 0, x.dtype, False)
    call = Prepared(arena.turn, partial(_issue, arena, plan, word), out, any_address=plan.name == "sentinel")
    with arena.turn:
        issued = call.issue(x, out)
    if issued is not None:
        call.again = issued.again(x_ptr=x.data_ptr(), out_ptr=out.data_ptr())
    return call


def _issue(arena: Arena, plan: Plan, word: int, x: Tensor, out: Tensor):
    """The plan on these tensors. Returns what was issued, if it was one launch."""
    issued = sum_into(arena, plan, x.contiguous().view(-1), out.view(-1), word)
    settle(arena, out)
    return issued


def sum_into(arena: Arena, plan: Plan, x: Tensor, out: Tensor, word: int):
    """Run an all-reduce plan on flat contiguous tensors, in pieces that fit the arena.

    Returns what was issued, if it was one launch.
    """
    if plan.name == "local":
        out.copy_(x)
        return None
    if plan.name == "nccl":
        if out.data_ptr() != x.data_ptr():
            out.copy_(x)
        dist.all_reduce(out, group=arena.group)
        return None
    if plan.name == "ref":
        reference.all_reduce(arena, x, out, word)
        return None
    if plan.name == "two_level":
        _two_level(arena, x, out, word)
        return None
    from . import launches

    step = launches.elements_that_fit(arena, plan, x.element_size())
    if step < 1:
        raise InvalidInput(
            f"{OP}: plan {plan.name!r} has no room in this arena. Call init with a larger max_M or max_N."
        )
    run = {"one_shot": launches.all_reduce_one_shot, "two_shot": launches.all_reduce_two_shot}.get(plan.name, _sentinel)
    if x.numel() <= step:
        return run(arena, plan, x, out, word)
    for start in range(0, x.numel(), step):
        run(arena, plan, x[start : start + step], out[start : start + step], word)
    launches.spoil(arena, out)
    return None


def _two_level(arena: Arena, x: Tensor, out: Tensor, word: int) -> None:
    """In pieces of which the node's arena holds the shards; x and out flat."""
    inside = two_level.span_of(arena).inside
    backend, step = backend_of(arena), x.numel()
    if inside.world_size > 1 and backend != "ref":
        from . import launches

        step = launches.elements_that_fit(inside, Plan("two_shot"), x.element_size())
    for start in range(0, x.numel(), step):
        piece, sums = x[start : start + step].view(-1, 1), out[start : start + step].view(-1, 1)
        two_level.all_reduce(arena, OP, partial(_scatter_inside, inside, backend, piece, word), sums)


def _scatter_inside(inside: Arena, backend: str, x: Tensor, word: int, shard: Tensor) -> None:
    """shard = this place's elements of the sum of x [n, 1] over the ranks of our node."""
    with inside.turn:
        if inside.world_size == 1:
            shard.copy_(x)
        elif backend == "ref":
            reference.reduce_scatter(inside, x, shard, word)
        else:
            from . import launches

            launches.reduce_scatter(inside, x, None, shard, word)
        settle(inside, shard)


def _sentinel(arena: Arena, plan: Plan, x: Tensor, out: Tensor, word: int) -> "_IssuedSentinel":
    """csrc/kernels/all_reduce_one_shot_sentinel.cu; x and out flat."""
    issued = _IssuedSentinel(arena, x.data_ptr(), x.numel(), DTYPE_CODES[x.dtype], word)
    issued.launch(x.data_ptr(), out.data_ptr())
    return issued


@dataclass(slots=True)
class _IssuedSentinel:
    """The sentinel kernel's counterpart of lang.launch.Issued: a launch with a size, a dtype and a call hash."""

    arena: Arena
    x_ptr: int
    n_elems: int
    dtype_code: int
    word: int

    def launch(self, x_ptr: int, out_ptr: int) -> bool:
        """Launch on the device's current stream; any addresses."""
        launcher = self.arena.cache.get("sentinel") or _sentinel_launcher(self.arena)
        stream = stream_of(self.arena.device.index)
        launcher(x_ptr, out_ptr, self.n_elems, self.dtype_code, self.word, stream)
        return True

    def again(self, x_ptr: int, out_ptr: int) -> Callable[[int, int], bool] | None:
        """The same with other addresses; None if x had to be copied."""
        return self.launch if x_ptr == self.x_ptr else None


def _sentinel_launcher(arena: Arena):
    from ..kernels.all_reduce_one_shot_sentinel import SentinelLauncher

    launcher = arena.cache["sentinel"] = SentinelLauncher(**of_sentinels(arena))
    return launcher


def _fake(x: Tensor, group_name: str) -> Tensor:
    check_tensors(OP, x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def _fake_out(x: Tensor, group_name: str, out: Tensor) -> None:
    check_tensors(OP, x, out)
    check_out(OP, out, x, tuple(x.shape))


assert op_code(OP) == 3  # the number in the kernels
register("all_reduce(Tensor x, str group_name) -> Tensor", all_reduce, _fake)
register("all_reduce_out(Tensor x, str group_name, Tensor(a!) out) -> ()", all_reduce_out, _fake_out)
