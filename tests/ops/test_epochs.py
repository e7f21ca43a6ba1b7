"""Epochs of any size: nothing happens where 31, 32 or almost 48 bits are full.

A slot that was last written long ago must count as old, however far the epoch has gone since.
"""

from __future__ import annotations

import time

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, Case
from tests.dist import barrier
from tests.ops import calls as rank_side
from tests.ops.calls import CPU_PLANS, Call, Setup, cpu_plans
from tests.ops.judge import judge
from tp_overlap_kernels.lang.signal import EPOCH

CALLS = 16
LATE_S = 0.03
# The word is signed where Python reads it: 47 bits of epoch are what there is. 16,000 calls a second for 279 years.
STARTS = {"31 bits": 2**31 - CALLS // 2, "32 bits": 2**32 - CALLS // 2, "47 bits": 2**47 - CALLS - 1}


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("start", STARTS)
def test_calls_around_a_limit(ranks, start, world_size):
    plans = [(op, plan) for op in CPU_PLANS for plan in cpu_plans(op, world_size)]
    calls = []
    for number in range(CALLS):
        op, plan = plans[number % len(plans)]
        sizes = (1, 600, 0) if op == "all_reduce" else (20, 24, 8)
        calls.append(Call(op, Case(*sizes, BF16, world_size, ""), "tagged", number, plan=plan))
    by_rank = ranks(world_size).run(call_from, calls, STARTS[start])
    for call, results in zip(calls, zip(*by_rank, strict=True), strict=True):
        judge(call, call.plan, list(results))


def call_from(rank, world_size, calls, epoch):
    """The calls on a new arena, as if `epoch` calls had gone before."""
    tpo.close()
    try:
        arena = rank_side.prepare_arena(Setup())
        arena.control[EPOCH.value] = epoch
        barrier()
        results = []
        with tpo.cpu_backend("interp"), torch.inference_mode():
            for call in calls:
                if call.number % world_size == rank:  # late: who does not wait for it has old data
                    time.sleep(LATE_S)
                with tpo.force_plan(call.plan):
                    results.append(rank_side.invoke(call, rank_side.operands(call, rank), rank))
        assert int(arena.control[EPOCH.value]) == epoch + len(calls)
        return results
    finally:
        tpo.close()
