"""all_reduce_add_rms_norm: the sum over the ranks, plus a residual, and its RMS norm, as one op. Contract below."""

from functools import partial

import torch
from torch import Tensor

from ..dispatch import Plan
from ..errors import InvalidInput
from ..memory.arena import Arena
from ..memory.record import op_code
from . import reference
from .all_reduce import sum_into
from .checks import check_apart, check_arena, check_norm, check_out, check_tensors
from .execute import plan_for, settle
from .library import register
from .norm import Norm, add_rms_norm
from .prepared import Prepared, norm_key_of, recall, remember

OP = "all_reduce_add_rms_norm"


def all_reduce_add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_name: str
) -> tuple[Tensor, Tensor]:
    """(y, new_residual): equals `unfused.all_reduce_add_rms_norm(x, residual, weight, eps, group)` but for roundings.

        new_residual = sum over ranks of x + residual
        y = new_residual / sqrt(mean(new_residual^2 over the last dimension) + eps) * weight

    x: [..., H], this rank's part of the sum; residual: [..., H]; weight: [H]; bf16 or fp16, all of one dtype, any
    strides and offset, on the group's device. eps: at least 0. residual, weight and eps are equal on all ranks.
    Returns two fresh contiguous tensors of x's shape, which alias neither an input nor the arena; residual stays as it
    is. Every rank holds the same bits.
    Rounding: ranks are added in rank order in f32, then residual, in f32: one rounding to new_residual. y is the norm
    of the rounded new_residual, in f32 with one rounding. Every plan but local, ref and those named *_norm rounds the
    sum once more, before residual is added. vLLM's fused_add_rms_norm and transformers' LlamaRMSNorm behind an
    all-reduce round four times: the sum, new_residual, new_residual / rms, and that times weight. So new_residual
    misses theirs by the rounding of the sum, and y by that and by the rounding of new_residual / rms.
    All ranks of the group call the same ops in the same order with equal shape and dtype, one call in flight a group.
    Errors: NotInitialised, InvalidInput (nothing is sent), GroupFailed and its kinds (an earlier call failed, or on
    the CPU this one).
    """
    key = norm_key_of(OP, eps, x, residual, weight)
    call = recall(group_name, key, x, residual, weight)
    if call is not None:
        y = x.new_empty_strided(call.shape, call.strides)
        new_residual = x.new_empty_strided(call.shape, call.strides)
        call.norm(x, residual, weight, y, new_residual)
        return y, new_residual
    _check(x, residual, weight, eps)
    arena = check_arena(OP, group_name, x, 0)
    y, new_residual = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    remember(arena, key, _run(arena, x, residual, weight, eps, y, new_residual))
    return y, new_residual


def all_reduce_add_rms_norm_out(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_name: str, y: Tensor, new_residual: Tensor
) -> None:
    """`all_reduce_add_rms_norm` into y and new_residual: contiguous, x's shape and dtype.

    y may be x itself and new_residual may be residual itself, which is then overwritten; nothing else may overlap.
    """
    check_apart(OP, y, x, residual, weight, may_be=x, name="y")
    check_apart(OP, new_residual, x, residual, weight, may_be=residual, name="new_residual")
    check_apart(OP, y, new_residual, name="y", other="new_residual")
    key = norm_key_of(OP, eps, x, residual, weight, y, new_residual)
    call = recall(group_name, key, x, residual, weight, y, new_residual)
    if call is not None:
        call.norm(x, residual, weight, y, new_residual)
        return
    _check_out(x, residual, weight, eps, y, new_residual)
    arena = check_arena(OP, group_name, x, 0)
    remember(arena, key, _run(arena, x, residual, weight, eps, y, new_residual))


def _run(
    arena: Arena, x: Tensor, residual: Tensor, weight: Tensor, eps: float, y: Tensor, new_residual: Tensor
) -> Prepared | None:
    """Run a call that has been checked. Returns it for the next time, unless there was nothing to do."""
    if x.numel() == 0:
        return None
    H = x.shape[-1]
    plan, word = plan_for(arena, OP, x.numel() // H, H, 0, x.dtype, False)
    call = Prepared(arena.turn, partial(_issue, arena, plan, word, eps), y, any_address=plan.name == "sentinel_norm")
    with arena.turn:
        issued = call.issue(x, residual, weight, y, new_residual)
    call.learn_norm(issued, x=x, residual=residual, weight=weight, y=y, new_residual=new_residual)
    return call


def _issue(
    arena: Arena,
    plan: Plan,
    word: int,
    eps: float,
    x: Tensor,
    residual: Tensor,
    weight: Tensor,
    y: Tensor,
    new_residual: Tensor,
):
    """The plan on these tensors. Returns what was issued, if it was one launch."""
    H = x.shape[-1]
    rows = Norm(residual.reshape(-1, H), weight, eps, y.view(-1, H), new_residual.view(-1, H))
    issued = sum_and_norm(arena, plan, x.reshape(-1, H), rows, word)
    settle(arena, y, new_residual)
    return issued


def sum_and_norm(arena: Arena, plan: Plan, x: Tensor, rows: Norm, word: int, op: str = OP):
    """Run a plan of this op on 2-D tensors; x may be rows.y. op: whose call it is, for errors.

    Returns what was issued, if it was one launch.
    """
    if plan.name == "one_shot_norm":
        from . import norm_launches

        return norm_launches.all_reduce_add_rms_norm(arena, x, rows, word)
    if plan.name == "sentinel_norm":
        from . import sentinel_norm

        return sentinel_norm.run(arena, x, rows, word)
    if plan.name == "ref":
        total = torch.empty(x.shape, dtype=torch.float32)
        reference.all_reduce(arena, x.contiguous().view(-1), total.view(-1), word, op)
    elif plan.name == "local":
        total = x
    else:
        total = rows.y
        sum_into(arena, plan, x.contiguous().view(-1), total.view(-1), word)
    add_rms_norm(arena, total, rows)
    return None


def _check(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> None:
    check_tensors(OP, x, residual, weight)
    if x.dim() < 1:
        raise InvalidInput(f"{OP}: x must be [..., H], got shape (). A single number has no row to norm.")
    check_norm(OP, tuple(x.shape), residual, weight, eps)


def _check_out(x: Tensor, residual: Tensor, weight: Tensor, eps: float, y: Tensor, new_residual: Tensor) -> None:
    check_tensors(OP, x, y, new_residual)
    _check(x, residual, weight, eps)
    check_out(OP, y, x, tuple(x.shape), "y")
    check_out(OP, new_residual, x, tuple(x.shape), "new_residual")


def _fake(x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_name: str) -> tuple[Tensor, Tensor]:
    _check(x, residual, weight, eps)
    y, new_residual = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for _ in range(2))
    return y, new_residual


def _fake_out(
    x: Tensor, residual: Tensor, weight: Tensor, eps: float, group_name: str, y: Tensor, new_residual: Tensor
) -> None:
    _check_out(x, residual, weight, eps, y, new_residual)


assert op_code(OP) == 5  # the number in the kernel
register(
    f"{OP}(Tensor x, Tensor residual, Tensor weight, float eps, str group_name) -> (Tensor, Tensor)",
    all_reduce_add_rms_norm,
    _fake,
)
register(
    f"{OP}_out(Tensor x, Tensor residual, Tensor weight, float eps, str group_name, Tensor(a!) y, "
    "Tensor(b!) new_residual) -> ()",
    all_reduce_add_rms_norm_out,
    _fake_out,
)
