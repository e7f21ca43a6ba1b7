"""What the judge of the ranks' results notices, and that it names the rank whose data is missing or doubled."""

from __future__ import annotations

import pytest
import torch

from tests.cases import BF16, Case
from tests.ops.calls import CPU_PLANS, Call
from tests.ops.judge import judge, truth_of


def call_of(op: str, world_size: int, kind: str, bias: bool = False) -> Call:
    sizes = (1, 200, 0) if op == "all_reduce" else (2 * world_size, 24, 16)
    return Call(op, Case(*sizes, BF16, world_size, ""), kind, number=3, bias=bias)


def by_rank(call: Call, whole: torch.Tensor) -> list[torch.Tensor]:
    """The result (M, N) as the ranks hold it."""
    whole = whole.to(BF16)
    if call.op == "gemm_reduce_scatter":
        return [whole[call.case.rows_of(rank)] for rank in range(call.case.world_size)]
    return [whole.view(-1) if call.op == "all_reduce" else whole] * call.case.world_size


@pytest.mark.parametrize(
    "op, bias, world_size",
    [*((op, False, W) for op in CPU_PLANS for W in (2, 3, 4, 8)), ("gemm_all_reduce", True, 2)],  # sums are exact
)
def test_a_wrong_sum_of_tags_names_the_rank(op, bias, world_size):
    call = call_of(op, world_size, "tagged", bias)
    wanted = truth_of(call)
    judge(call, "", by_rank(call, wanted.ref))
    for rank, partial in enumerate(wanted.partials):
        for wrong, reading in (
            (wanted.ref - partial, f"rank {rank} is missing"),
            (wanted.ref + partial, f"rank {rank} is there twice"),
            (wanted.ref - 2 * partial, f"the partial of rank {rank} is of another call"),
            (wanted.ref - partial + wanted.partials[rank - 1], f"rank {(rank - 1) % world_size} is there in place of"),
        ):
            with pytest.raises(AssertionError, match=reading):
                judge(call, "", by_rank(call, wanted.ref.clone().index_copy_(0, torch.tensor([0]), wrong[:1])))


def test_a_nan_is_wrong_and_is_no_tag():
    call = call_of("all_reduce", 2, "tagged")
    whole = truth_of(call).ref
    whole[0, 7] = float("nan")
    with pytest.raises(AssertionError, match=r"1 of them NaN(.|\n)*nan fits no single mistake"):
        judge(call, "", by_rank(call, whole))


@pytest.mark.parametrize("op", CPU_PLANS)
@pytest.mark.parametrize("kind", ["integer", "normal"])
def test_a_lost_rank_is_noticed_at_every_element_count(op, kind):
    """By bits or by the bound, also where only one element lacks one rank."""
    for world_size in (2, 3, 8):
        call = call_of(op, world_size, kind)
        wanted = truth_of(call)
        plan = "ref" if kind == "normal" else ""
        judge(call, plan, by_rank(call, wanted.ref.to(BF16)))
        for rank in range(world_size):
            at = wanted.partials[rank].abs().argmax()
            lacking = wanted.ref.clone()
            lacking.view(-1)[at] -= wanted.partials[rank].reshape(-1)[at]
            with pytest.raises(AssertionError, match=r"1 of .* elements are wrong"):
                judge(call, plan, by_rank(call, lacking))


def test_ranks_with_other_bits_are_named():
    call = call_of("gemm_all_reduce", 3, "normal")
    results = [result.clone() for result in by_rank(call, truth_of(call).ref)]
    results[2].view(-1)[5] *= 1 + 2**-7
    with pytest.raises(AssertionError, match="rank 2 holds other bits than rank 0"):
        judge(call, "ref", results)
