"""Calls that follow a great many others: epochs pass 2^31 and 2^32 unnoticed, and end, with an error, at 2^47."""

from __future__ import annotations

import dataclasses

import pytest

import tp_overlap_kernels as tpo
from tests import epochs
from tests.cases import BF16, Case
from tests.dist import barrier
from tests.ops import calls as rank_side
from tests.ops.calls import CPU_PLANS, Call, Setup, cpu_plans, in_a_row_with_late_ranks
from tests.ops.judge import judge
from tp_overlap_kernels.lang.signal import LAST_EPOCH
from tp_overlap_kernels.ops import reference

STARTS = epochs.STARTS | {"the last": LAST_EPOCH - 40}


def every_plan_twice(world_size: int) -> list[Call]:
    """Each crosses a start that lies five calls below a limit, or stands on either side of it."""
    calls = []
    for _ in range(2):
        for op in CPU_PLANS:
            for plan in cpu_plans(op, world_size):
                sizes = (1, 1000, 0) if op == "all_reduce" else (9, 40, 16)
                calls.append(Call(op, Case(*sizes, BF16, world_size, ""), "tagged", len(calls), plan=plan))
    return calls


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("start", STARTS)
def test_every_plan_beyond_the_limits(ranks, start, world_size):
    calls = every_plan_twice(world_size)
    for rotated in range(0, len(calls) // 2, 5):  # so that each plan crosses the limit itself
        row = calls[rotated:] + calls[:rotated]
        check(ranks, world_size, "interp", STARTS[start], row)


@pytest.mark.parametrize("start", epochs.STARTS)
def test_late_ranks_beyond_the_limits(ranks, start):
    """What an epoch is for: the words of an older call must look older, on both sides of the limit."""
    for op, plan in (("gemm_all_reduce", "one_shot"), ("gemm_all_reduce", "two_shot"), ("gemm_reduce_scatter", "push")):
        case = Case(9, 40, 16, BF16, 3, "late")
        calls = [dataclasses.replace(call, late_s=0.03) for call in in_a_row_with_late_ranks(op, case)]
        check(ranks, 3, "interp", STARTS[start], calls, plan)


@pytest.mark.parametrize("start", STARTS)
def test_the_reference_beyond_the_limits(ranks, start):
    calls = [Call(op, Case(9, 40, 16 * (op != "all_reduce"), BF16, 3, ""), "tagged", n) for n in range(4) for op in OPS]
    check(ranks, 3, "ref", STARTS[start], calls)


OPS = ("gemm_all_reduce", "gemm_reduce_scatter")


def check(ranks, world_size, backend, start, calls, plan=None):
    by_rank = ranks(world_size).run(calls_from, Setup(backend, plan), start, calls)
    for call, outs in zip(calls, zip(*(results for _, results in by_rank), strict=True), strict=True):
        judge(call, call.plan or plan or backend, list(outs))
    assert all(end > start for end, _ in by_rank)


def calls_from(rank, world_size, setup, start, calls):
    tpo.close()
    tpo.init(max_M=setup.max_M, max_N=setup.max_N)
    epochs.start_at(start, barrier)
    results = rank_side.make_calls(rank, world_size, setup, calls)
    end = epochs.epoch()
    tpo.close()  # nobody goes on from here
    return end, results


@pytest.mark.parametrize("backend", ["interp", "ref"])
def test_the_call_after_the_last_epoch_is_refused(ranks, backend):
    assert LAST_EPOCH == reference.LAST_EPOCH
    for last, refusal, after in ranks(2).run(up_to_the_end, backend):
        assert last == LAST_EPOCH
        assert f"epoch {LAST_EPOCH + 1} exceeds {LAST_EPOCH}. close() and init() begin again at 0." in refusal
        assert after == 1


def up_to_the_end(rank, world_size, backend):
    call = Call("all_reduce", Case(1, 100, 0, BF16, 2, ""))
    tpo.close()
    tpo.init(max_M=16, max_N=64)
    epochs.start_at(LAST_EPOCH - 1, barrier)
    with tpo.cpu_backend(backend):
        rank_side.invoke(call, rank_side.operands(call, rank), rank)
        last = epochs.epoch()
        with pytest.raises(OverflowError) as refusal:
            rank_side.invoke(call, rank_side.operands(call, rank), rank)
        tpo.close()
        tpo.init(max_M=16, max_N=64)
        rank_side.invoke(call, rank_side.operands(call, rank), rank)
    return last, str(refusal.value), epochs.epoch()
