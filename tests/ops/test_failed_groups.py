"""Groups that have failed, and ranks that come late, or want something else. The faults themselves: test_faults.py."""

from __future__ import annotations

import contextlib
import dataclasses
import time
from unittest import mock

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, Case
from tests.dist import RankPool, barrier
from tests.ops.calls import Call, Setup, group_name, invoke, operands, prepare_arena
from tests.ops.faults import TIMEOUT_S, Outcome, attempt, in_force, recover
from tests.ops.judge import judge, plan_name
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.ops import launches, reference

SETUPS = [Setup("ref"), *(Setup("interp", plan) for plan in ("unfused_push;one_shot", "two_shot;push"))]
GOOD = Call("gemm_all_reduce", Case(33, 40, 24, BF16, 2, ""))


@pytest.fixture(scope="module")
def own_ranks():
    """Pools of this file, since a test that goes wrong here leaves ranks that wait for each other."""
    pools = {}
    yield lambda world_size: pools.setdefault(world_size, RankPool(world_size))
    for pool in pools.values():
        pool.close()


# --- a rank that is late, or never comes


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_rank_that_comes_after_the_other_gave_up_hears_why(own_ranks, setup):
    early, late = own_ranks(2).run(come_late, setup, TIMEOUT_S + 0.5)
    assert early[0].error == "PeerTimeout" and early[1].isnan().all()
    assert late[0].error == "PeerTimeout" and late[0].seconds < 0.2, "it was told before it came"
    assert "rank 0 had given up (gemm_all_reduce: rank 0 waited for rank 1" in late[0].text
    judge(GOOD, plan_name(setup, GOOD), [early[2], late[2]])


def come_late(rank, world_size, setup, late_s):
    prepare_arena(setup).timeout_s = TIMEOUT_S
    barrier()
    with in_force(setup):
        time.sleep(late_s if rank == 1 else 0.0)
        first, out = attempt(rank, setup, GOOD)
        barrier()
        return first, out, recover(rank, setup, GOOD)


@pytest.mark.parametrize("op", ["gemm_all_reduce", "gemm_reduce_scatter", "all_reduce"])
@pytest.mark.parametrize("setup", [Setup(), Setup("interp", "two_shot;push")], ids=str)
def test_the_sums_of_finished_pieces_become_nan_too(own_ranks, setup, op):
    """A call above the capacity runs in pieces; rank 1 leaves after the first."""
    setup = dataclasses.replace(setup, max_M=32, max_N=64)
    rows = 90 if setup.backend == "interp" else 50_000
    sizes = (1, 48 * rows, 0) if op == "all_reduce" else (rows, 48, 8)
    error, out, pieces = own_ranks(2).run(leave_after_a_piece, setup, Call(op, Case(*sizes, BF16, 2, "")))[0]
    assert error == "PeerClosed" and pieces > 1 and out.isnan().all()


def leave_after_a_piece(rank, world_size, setup, call):
    prepare_arena(setup)
    pieces = []

    def piece(function):
        def run(*arguments):
            pieces.append(1)
            if rank == 1 and len(pieces) == 2:
                raise InterruptedError
            return function(*arguments)

        return run

    patches = [
        mock.patch.object(reference, "_exchange", piece(reference._exchange)),
        mock.patch.object(launches, "gemm_all_reduce_two_shot", piece(launches.gemm_all_reduce_two_shot)),
        mock.patch.object(launches, "all_reduce_two_shot", piece(launches.all_reduce_two_shot)),
        mock.patch.object(launches, "gemm_reduce_scatter", piece(launches.gemm_reduce_scatter)),
    ]
    with contextlib.ExitStack() as stack, in_force(setup):
        [stack.enter_context(patch) for patch in patches]
        outcome, out = attempt(rank, setup, call)
    tpo.close()
    return outcome.error, out[:1000].clone() if rank else out, len(pieces)


@pytest.mark.parametrize("closes", [(True, False), (False, True), (False, False)], ids=str)
def test_init_alone_makes_a_failed_group_anew(own_ranks, closes):
    """Rank 0 alone has failed: what is to be done is decided together, whoever has closed."""
    judge(GOOD, "ref", own_ranks(2).run(fail_and_init, GOOD, closes))


def fail_and_init(rank, world_size, good, closes):
    setup = Setup("ref")
    prepare_arena(setup).timeout_s = 0.2
    barrier()
    if rank == 0:
        assert attempt(rank, setup, good)[0].error == "PeerTimeout"
    barrier()
    if closes[rank]:
        tpo.close()
    prepare_arena(setup)
    return invoke(good, operands(good, rank), rank)


def test_waiting_for_ever_is_a_choice(own_ranks):
    """TP_OVERLAP_TIMEOUT=0."""
    for setup in SETUPS:
        results = own_ranks(2).run(come_late_without_timeout, setup, GOOD)
        judge(GOOD, plan_name(setup, GOOD), results)


def come_late_without_timeout(rank, world_size, setup, call):
    prepare_arena(setup).timeout_s = 0.0
    barrier()
    if rank == 1:
        time.sleep(0.5)
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan):
        out = invoke(call, operands(call, rank), rank)
    tpo.close()
    return out


# --- init, where ranks disagree


def test_sizes_that_differ_are_refused_on_every_rank(own_ranks):
    for fresh, larger, sizes, out in own_ranks(3).run(disagree):
        assert fresh.error == "InvalidInput" and "init: all ranks must agree on max_N, got [64, 80, 96]" in fresh.text
        assert larger.error == "InvalidInput" and "max_M, got [32, 48, 64]" in larger.text
        assert sizes == (40, 64), "the arena that was there is there still"
        assert torch.equal(out, torch.full((40,), 6.0, dtype=torch.bfloat16))


def disagree(rank, world_size):
    tpo.close()
    fresh = Outcome.of(lambda: tpo.init(max_M=40, max_N=64 + 16 * rank))
    tpo.init(max_M=40, max_N=64)
    larger = Outcome.of(lambda: tpo.init(max_M=32 + 16 * rank, max_N=64))  # rank 0 asks for less than there is
    info = tpo.init(max_M=1, max_N=1)
    x = torch.full((40,), float(rank + 1), dtype=torch.bfloat16)
    return fresh, larger, (info.max_M, info.max_N), torch.ops.tp_overlap.all_reduce(x, group_name())


def test_settings_that_differ_are_refused_on_every_rank(own_ranks):
    for outcome in own_ranks(2).run(disagree_about_the_plan):
        assert outcome.error == "InvalidInput" and "agree on plan, got [None, 'two_shot'] (by rank)" in outcome.text


def disagree_about_the_plan(rank, world_size):
    tpo.close()
    mine = dataclasses.replace(arenas.settings(), plan="two_shot" if rank else None)
    before, arenas.settings = arenas.settings, lambda: mine
    try:
        return Outcome.of(lambda: tpo.init(max_M=16, max_N=16))
    finally:
        arenas.settings = before
