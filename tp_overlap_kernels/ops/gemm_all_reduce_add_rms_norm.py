"""gemm_all_reduce_add_rms_norm: a row-parallel linear layer, the residual and the norm behind it. Contract below."""

from functools import partial

import torch
from torch import Tensor

from ..dispatch import Plan
from ..memory.arena import Arena
from .all_reduce_add_rms_norm import sum_and_norm
from .checks import check_apart, check_arena, check_gemm, check_norm, check_out, check_tensors
from .execute import plan_for, settle
from .gemm_all_reduce import begins_with_a_product, product_of, run_fused
from .library import register
from .norm import Norm, add_rms_norm
from .prepared import Behind, Prepared, norm_key_of, recall, remember

OP = "gemm_all_reduce_add_rms_norm"


def gemm_all_reduce_add_rms_norm(
    a: Tensor,
    b: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_name: str,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Equals `unfused.gemm_all_reduce_add_rms_norm(a, b, residual, weight, eps, group, bias)` but for the roundings.

        new_residual = sum over ranks of a @ b.T, + bias once, + residual
        y = new_residual / sqrt(mean(new_residual^2 over the last dimension) + eps) * weight

    a, b, bias: as `gemm_all_reduce` has them, with the same limits. residual: [..., N]; weight: [N]; a's dtype, any
    strides and offset. eps: at least 0. residual, weight, eps and bias are equal on all ranks.
    Returns (y, new_residual), two fresh contiguous tensors [..., N] that alias neither an input nor the arena; residual
    stays as it is. Every rank holds the same bits.
    Rounding: partials and their sum as in `gemm_all_reduce`, from there on as in `all_reduce_add_rms_norm`; plans whose
    last launch is only the norm round the sum before residual is added.
    All ranks of the group call the same ops in the same order with equal M, N, K, dtype and presence of bias, one
    call in flight a group.
    Errors: those of `gemm_all_reduce`.
    """
    key = norm_key_of(OP, eps, a, b, bias, residual, weight)
    call = recall(group_name, key, a, b, bias, residual, weight)
    if call is not None:
        y = a.new_empty_strided(call.shape, call.strides)
        new_residual = a.new_empty_strided(call.shape, call.strides)
        call.gemm_norm(a, b, bias, residual, weight, y, new_residual)
        return y, new_residual
    _check(a, b, bias, residual, weight, eps)
    arena = check_arena(OP, group_name, a, b.shape[0])
    y, new_residual = _empty(a, b)
    remember(arena, key, _run(arena, a, b, bias, residual, weight, eps, y, new_residual))
    return y, new_residual


def gemm_all_reduce_add_rms_norm_out(
    a: Tensor,
    b: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_name: str,
    y: Tensor,
    new_residual: Tensor,
    bias: Tensor | None = None,
) -> None:
    """`gemm_all_reduce_add_rms_norm` into y and new_residual: contiguous [..., N], a's dtype.

    new_residual may be residual itself, which is then overwritten; nothing else may overlap.
    """
    check_apart(OP, y, a, b, bias, residual, weight, name="y")
    check_apart(OP, new_residual, a, b, bias, residual, weight, may_be=residual, name="new_residual")
    check_apart(OP, y, new_residual, name="y", other="new_residual")
    key = norm_key_of(OP, eps, a, b, bias, residual, weight, y, new_residual)
    call = recall(group_name, key, a, b, bias, residual, weight, y, new_residual)
    if call is not None:
        call.gemm_norm(a, b, bias, residual, weight, y, new_residual)
        return
    _check_out(a, b, bias, residual, weight, eps, y, new_residual)
    arena = check_arena(OP, group_name, a, b.shape[0])
    remember(arena, key, _run(arena, a, b, bias, residual, weight, eps, y, new_residual))


def _run(
    arena: Arena,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    y: Tensor,
    new_residual: Tensor,
) -> Prepared | None:
    """Run a call that has been checked. Returns it for the next time, unless there was nothing to do."""
    N, K = b.shape
    if y.numel() == 0:
        return None
    plan, word = plan_for(arena, OP, y.numel() // N, N, K, a.dtype, bias is not None)
    call = Prepared(
        arena.turn, partial(_issue, arena, plan, word, eps), y, any_address=plan.name == "unfused_sentinel_norm"
    )
    with arena.turn:
        issued = call.issue(a, b, bias, residual, weight, y, new_residual)
    call.learn_norm(issued, x=y, residual=residual, weight=weight, y=y, new_residual=new_residual)
    return call


def _issue(
    arena: Arena,
    plan: Plan,
    word: int,
    eps: float,
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    y: Tensor,
    new_residual: Tensor,
) -> Behind | None:
    """The plan on these tensors. Returns what was issued, if it was one launch behind a product."""
    N, K = b.shape
    rows = Norm(residual.reshape(-1, N), weight, eps, y.view(-1, N), new_residual.view(-1, N))
    bias = bias.contiguous() if bias is not None else None  # the kernels index it by column
    behind = None
    if K == 0:  # nothing is sent
        rows.y.zero_() if bias is None else rows.y.copy_(bias.expand_as(rows.y))
        add_rms_norm(arena, rows.y, rows)
    elif begins_with_a_product(plan):
        product = product_of(arena, bias)
        product(a, b, bias, rows.y)
        issued = sum_and_norm(arena, Plan(plan.name.removeprefix("unfused_")), rows.y, rows, word, OP)
        behind = issued and Behind(product, issued, y, takes_bias=False)
    else:
        run_fused(arena, plan, a.reshape(-1, K), b, bias, rows.y, word)
        add_rms_norm(arena, rows.y, rows)
    settle(arena, y, new_residual)
    return behind


def _empty(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    shape = (*a.shape[:-1], b.shape[0])
    return torch.empty(shape, dtype=a.dtype, device=a.device), torch.empty(shape, dtype=a.dtype, device=a.device)


def _check(a: Tensor, b: Tensor, bias: Tensor | None, residual: Tensor, weight: Tensor, eps: float) -> None:
    check_gemm(OP, a, b, bias)
    check_tensors(OP, a, residual, weight)
    check_norm(OP, (*a.shape[:-1], b.shape[0]), residual, weight, eps)


def _check_out(
    a: Tensor,
    b: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    y: Tensor,
    new_residual: Tensor,
) -> None:
    _check(a, b, bias, residual, weight, eps)
    check_tensors(OP, a, y, new_residual)
    shape = (*a.shape[:-1], b.shape[0])
    check_out(OP, y, a, shape, "y")
    check_out(OP, new_residual, a, shape, "new_residual")


def _fake(
    a: Tensor,
    b: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_name: str,
    bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    _check(a, b, bias, residual, weight, eps)
    return _empty(a, b)


def _fake_out(
    a: Tensor,
    b: Tensor,
    residual: Tensor,
    weight: Tensor,
    eps: float,
    group_name: str,
    y: Tensor,
    new_residual: Tensor,
    bias: Tensor | None = None,
) -> None:
    _check_out(a, b, bias, residual, weight, eps, y, new_residual)


_INPUTS = "Tensor a, Tensor b, Tensor residual, Tensor weight, float eps, str group_name"
register(f"{OP}({_INPUTS}, Tensor? bias=None) -> (Tensor, Tensor)", gemm_all_reduce_add_rms_norm, _fake)
register(
    f"{OP}_out({_INPUTS}, Tensor(a!) y, Tensor(b!) new_residual, Tensor? bias=None) -> ()",
    gemm_all_reduce_add_rms_norm_out,
    _fake_out,
)
