"""Before an arm is timed: every row-parallel sum of a pass, from the inputs that the model gave it, against float64.

The tolerance is that of ../truth.py, computed for each element of sampled rows. Where the op adds the residual and
norms the result, new_residual has one rounding more, and y is held against the norm of it, on all rows (../norm.py).
It is judged layer by layer, since what a model makes of one rounding more or less is no measure of any arm: over many
layers two right results drift apart, and greedy tokens with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..attempts import Dropped, Outcome, together
from ..launch import World
from ..norm import wrong_norm
from ..timing import Clock
from ..truth import AT_EACH_HOP, ONCE, Reference, of_one_more, outside, products, sample_rows, tolerance
from .arms import CEILING, OURS, OURS_SUMS, Arms, local_weight
from .steps import Decode, Prefill
from .witness import Joined, witnessed


@contextlib.contextmanager
def watched(arms: Arms, arm: str, world: World) -> Iterator[list[str]]:
    """Meanwhile every pass is checked: its sums, and in an arm of ours that the op makes them. The list fills with a
    sentence for each that is wrong.

    Collective in each layer: all ranks run the same passes, and none is captured.
    """
    wrong: list[str] = []
    with contextlib.ExitStack() as watches:
        if arm != OURS:
            watches.enter_context(_sums_judged(arms, arm, world, wrong))
        if arm in (OURS, OURS_SUMS):
            watches.enter_context(_ops_judged(arms, arm, world, wrong))
        with arms.active(arm):
            yield wrong
        if arm in (OURS, OURS_SUMS):
            arms.check()


@contextlib.contextmanager
def _sums_judged(arms: Arms, arm: str, world: World, wrong: list[str]) -> Iterator[None]:
    """What each row-parallel layer gives is its sum."""
    hooks = []
    for name, module in arms.rows.items():

        def look(module: Any, inputs: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            reason = wrong_sum(inputs[0], local_weight(module), out, world)
            if reason is not None:
                wrong.append(f"{arm}: {name}: {reason}")

        hooks.append(module.register_forward_hook(look))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _ops_judged(arms: Arms, arm: str, world: World, wrong: list[str]) -> Iterator[None]:
    """Each row-parallel layer calls the op in every pass: in `ours` the one with the norm, whose results are right."""
    called: set[str] = set()

    def saw(name: str, call: Joined | None) -> None:
        if (call is not None) == (arm == OURS):
            called.add(name)
        reason = None if call is None else wrong_joint(call, world)
        if reason is not None:
            wrong.append(f"{arm}: {name}: {reason}")

    def passed(*_: Any) -> None:
        wrong.extend(f"{arm}: {name}: the op was not called" for name in arms.rows if name not in called)
        called.clear()

    hook = arms.model.register_forward_hook(passed)  # around all layers, and so in the way of no joint
    try:
        with witnessed(arms, arm, saw):
            yield
    finally:
        hook.remove()


def checked_pass(arms: Arms, arm: str, clock: Clock, prefill: Prefill, decode: Decode | None) -> Tensor:
    """The first tokens of an eager pass, which also compiles and allocates what a capture could not.

    Collective. Dropped on all ranks where a sum is wrong, an op was not called, or a rank failed; the sums of the
    ceiling are not looked at.
    """

    def passes() -> tuple[Tensor, list[str]]:
        with arms.active(arm) if arm == CEILING else watched(arms, arm, clock.world) as seen:
            prefill(arms.model)
            tokens = prefill.cache.tokens.clone()
            if decode is not None:
                decode(arms.model)
        clock.idle()
        return tokens, [] if arm == CEILING else seen

    tokens, wrong = together(clock.world, passes)
    reason = clock.world.agree(wrong[0] if wrong else None)
    if reason is not None:
        raise Dropped(Outcome("wrong", reason))
    return tokens


def wrong_joint(call: Joined, world: World) -> str | None:
    """What is wrong with new_residual as the sum over ranks with residual in it, or with y as its norm; None where all
    is well. Collective."""
    reason = wrong_sum(call.x, call.weight, call.new_residual, world, call.residual)
    if reason is not None:
        return f"new_residual: {reason}"
    y, new_residual = (each.reshape(-1, each.shape[-1]) for each in (call.y, call.new_residual))
    return wrong_norm(y, new_residual, call.scale, call.eps, outside)


def wrong_sum(x: Tensor, weight: Tensor, out: Tensor, world: World, residual: Tensor | None = None) -> str | None:
    """What is wrong with out[..., N], the sum over ranks of x[..., K] @ weight[N, K].T; None where all is well.

    residual: [..., N], equal on all ranks, was added to the sum. Collective. A NaN or an infinity in the inputs is
    wrong, too: no sum could be judged by it.
    """
    K, N = x.shape[-1], weight.shape[0]
    x, out = x.reshape(-1, K), out.reshape(-1, N)
    rows = torch.tensor(sample_rows(x.shape[0], world.world_size), device=x.device)
    own, own_products = products(x[rows].double(), weight)
    total, magnitude, of_all = own.clone(), own.abs(), own_products.clone()
    for field in (total, magnitude, of_all):
        dist.all_reduce(field)
    reference = Reference(total, magnitude, of_all, own, own_products)
    rounding = ONCE if world.world_size == 2 else AT_EACH_HOP  # a plan of `ours` may add as NCCL does
    bound = tolerance(reference, K, world.world_size, x.dtype, rounding)
    want = reference.total
    if residual is not None:
        want = want + residual.reshape(-1, N)[rows].double()
        bound = bound + of_one_more(want, x.dtype)
    if not bool(want.isfinite().all()):
        return "the inputs hold a NaN or an infinity"
    return outside(out[rows].double(), want, bound, rows.tolist())
