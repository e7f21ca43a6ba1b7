"""From a failed wait on a rank writes into nobody's memory, whatever is still queued, or replayed.

A launch is made again with its old arguments, as a graph would, by one rank alone; the other's arena is looked at.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, Case
from tests.dist import RankPool, barrier
from tests.ops import calls, norms
from tests.ops.calls import Call, Setup, prepare_arena
from tp_overlap_kernels.lang.launch import Launch

PLANS = [
    ("gemm_all_reduce", "one_shot"),
    ("gemm_all_reduce", "two_shot"),
    ("gemm_reduce_scatter", "one_shot"),
    ("gemm_reduce_scatter", "push"),
    ("gemm_reduce_scatter", "unfused_push"),
    ("all_reduce", "one_shot"),
    ("all_reduce", "two_shot"),
    (norms.SUM, "one_shot_norm"),
]
STAGED = [row for row in PLANS if "one_shot" not in row[1]]  # they wait for `done` before they send
TIMEOUT_S = 0.3
REPLAYS = 3


@pytest.fixture(scope="module")
def two_ranks():
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.mark.parametrize("op, plan", PLANS)
def test_nothing_is_sent_behind_a_call_that_failed(two_ranks, op, plan):
    assert two_ranks.run(fail_and_replay, op, plan, False)[0] == []


@pytest.mark.parametrize("op, plan", STAGED)
def test_nothing_is_sent_where_a_peer_may_still_read(two_ranks, op, plan):
    """The call itself fails in its wait for `done`. Its header has gone before."""
    assert two_ranks.run(fail_and_replay, op, plan, True)[0] == []


def fail_and_replay(rank, world_size, op, plan, still_reading):
    """Regions of rank 1's arena that rank 0 has changed though it had failed."""
    arena = prepare_arena(Setup("interp", max_M=64, max_N=128))
    arena.timeout_s = TIMEOUT_S
    call, module = (
        Call(op, Case(1, 300, 0, BF16, 2, "") if op == "all_reduce" else Case(40, 72, 24, BF16, 2, "")),
        calls,
    )
    if op == norms.SUM:
        call, module = norms.call_of(op, Case(4, 72, 0, BF16, 2, "")), norms
    launched = []

    def remembered(launch, grid, *args):
        launched.append((launch, grid, args))
        return run(launch, grid, *args)

    run, found = Launch.__call__, []
    with tpo.cpu_backend("interp"), tpo.force_plan(plan), torch.inference_mode():
        barrier()
        with mock.patch.object(Launch, "__call__", remembered):
            module.invoke(call, module.operands(call, rank), rank)
        barrier()
        if rank == 0:
            launch, grid, args = launched[-1]
            if still_reading:
                arena.view(0, arena.layout.done + 8, (1,), torch.int64).zero_()
                arena.control[7] = 1  # lang.signal.STAGED: a call has used staging
            else:
                launch(grid, *args)
                assert arena.record.failed
            sent = getattr(args[0], "base", args[0])  # a, or what cuBLAS has multiplied, or x
            sent.add_(1.0)  # so that it can be told from what was sent before
            before = arena.store.peer_buffer(1).clone()
            for _ in range(REPLAYS):
                launch(grid, *args)
            assert arena.record.failed
            changed = (arena.store.peer_buffer(1) != before).nonzero().flatten()
            header = range(arena.layout.header, arena.layout.closed) if still_reading else ()
            found = [offset for offset in changed.tolist() if offset not in header][:5]
        barrier()
    tpo.close()
    return found
