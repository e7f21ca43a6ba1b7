"""Before an arm is timed: every row-parallel sum of a pass, from the inputs that the model gave it, against float64.

The tolerance is that of ../truth.py, computed for each element of sampled rows. It is judged layer by layer, since
what a model makes of one rounding more or less is no measure of either arm: over many layers two right results drift
apart, and greedy tokens with them.
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
from ..timing import Clock
from ..truth import AT_EACH_HOP, ONCE, Reference, outside, products, sample_rows, tolerance
from .arms import CEILING, OURS, Arms, local_weight
from .steps import Decode, Prefill


@contextlib.contextmanager
def watched(arms: Arms, arm: str, world: World) -> Iterator[list[str]]:
    """Meanwhile the sums of every pass are checked; the list fills with a sentence for each that is wrong.

    Collective in each layer: all ranks run the same passes, and none is captured.
    """
    wrong: list[str] = []
    rounding = ONCE if world.world_size == 2 else AT_EACH_HOP  # a plan of `ours` may add as NCCL does
    hooks = []
    for name, module in arms.rows.items():

        def look(module: Any, inputs: tuple[Tensor, ...], out: Tensor, name: str = name) -> None:
            reason = wrong_sum(inputs[0], local_weight(module), out, world, rounding)
            if reason is not None:
                wrong.append(f"{arm}: {name}: {reason}")

        hooks.append(module.register_forward_hook(look))
    try:
        with arms.active(arm):
            yield wrong
        if arm == OURS:
            arms.check()
    finally:
        for hook in hooks:
            hook.remove()


def checked_pass(arms: Arms, arm: str, clock: Clock, prefill: Prefill, decode: Decode | None) -> Tensor:
    """The first tokens of an eager pass, which also compiles and allocates what a capture could not.

    Collective. Dropped on all ranks where a sum is wrong or a rank failed; the sums of the ceiling are not looked at.
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


def wrong_sum(x: Tensor, weight: Tensor, out: Tensor, world: World, rounding: str) -> str | None:
    """What is wrong with out[..., N], the sum over ranks of x[..., K] @ weight[N, K].T; None where all is well.

    Collective. A NaN or an infinity in the inputs is wrong, too: no sum could be judged by it.
    """
    K = x.shape[-1]
    x, out = x.reshape(-1, K), out.reshape(-1, weight.shape[0])
    rows = torch.tensor(sample_rows(x.shape[0], world.world_size), device=x.device)
    own, own_products = products(x[rows].double(), weight)
    total, magnitude, of_all = own.clone(), own.abs(), own_products.clone()
    for field in (total, magnitude, of_all):
        dist.all_reduce(field)
    reference = Reference(total, magnitude, of_all, own, own_products)
    if not bool(reference.total.isfinite().all()):
        return "the inputs hold a NaN or an infinity"
    bound = tolerance(reference, K, world.world_size, x.dtype, rounding)
    return outside(out[rows].double(), reference.total, bound, rows.tolist())
