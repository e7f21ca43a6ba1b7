"""Calls of all kinds after one another on one arena, and what happens to results that are kept."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16, Case, on
from tests.ops import calls as rank_side
from tests.ops.calls import CPU_PLANS, Call, Setup, cpu_plans
from tests.ops.judge import check


def mixture(world_size, seed, count):
    """Small calls; every plan follows every other one sooner or later, some ranks own no row, some calls are empty."""
    choose, calls = random.Random(seed), []
    for number in range(count):
        op = choose.choice(list(CPU_PLANS))
        plan = choose.choice(cpu_plans(op, world_size))
        M, N, K = choose.choice([0, 1, 2, 3, 5, 8, 33, 70]), choose.choice([8, 24, 41, 72]), choose.choice([8, 24, 35])
        sizes = (1, N * 40, 0) if op == "all_reduce" else (M, N, K)
        case = Case(*sizes, choose.choice([BF16, FP16]), world_size, "mixed")
        calls.append(Call(op, case, "tagged", number, plan=plan, into_out=choose.random() < 0.3))
    return calls


@pytest.mark.parametrize("world_size, seed", [(2, 1), (2, 2), (3, 3), (4, 4), (8, 5)])
def test_any_plan_after_any_other(ranks, world_size, seed):
    check(ranks, Setup("interp", jitter_s=0.001), mixture(world_size, seed, 160 // world_size))


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_any_op_after_any_other(ranks, world_size):
    calls = [dataclasses.replace(call, plan=None) for call in mixture(world_size, 6, 60)]
    check(ranks, Setup("ref"), calls)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("op", list(CPU_PLANS))
def test_every_rank_late_now_and_then(ranks, op, world_size):
    """A rank may be a call ahead of another, and the next time behind it: no data may be of another call."""
    calls = []
    for number in range(24):
        sizes = (1, 2000 + number, 0) if op == "all_reduce" else (number % 7 * 11 + 1, 40, 16)
        late = number % world_size if number % 3 == 0 else None
        calls.append(Call(op, Case(*sizes, BF16, world_size, ""), "tagged", number, late_rank=late, late_s=0.02))
    plans = ("one_shot;push", "two_shot;push")
    for plan in plans:
        check(ranks, Setup("interp", plan, jitter_s=0.002), calls)


WRITERS = [  # of staging
    (op, plan, world_size)
    for world_size in (2, 3)
    for op in CPU_PLANS
    for plan in cpu_plans(op, world_size)
    if plan not in ("one_shot", "unfused_one_shot")
]


@pytest.mark.parametrize("op, plan, world_size", WRITERS)
def test_staging_is_not_written_while_a_reduce_scatter_reads_it(ranks, op, plan, world_size):
    """An owner of rows is slow; its peers, whose reduce-scatter is over, must wait for it before they write again."""
    calls, sizes = [], (1, 40 * 72, 0) if op == "all_reduce" else (40, 72, 24)
    for reader in ("push", "unfused_push", "chunked" if world_size == 2 else "push"):
        read = Case(40, 72, 24, BF16, world_size, "")
        calls.append(Call("gemm_reduce_scatter", read, "tagged", len(calls), plan=reader))
        calls.append(Call(op, Case(*sizes, BF16, world_size, ""), "tagged", len(calls), plan=plan))
    check(ranks, Setup("interp", jitter_s=0.03, slow_rank=1), calls)


# --- results that are kept

SETUPS = [Setup("ref"), Setup("interp", "one_shot;push"), Setup("interp", "two_shot;push")]
KEPT = [
    Call("gemm_all_reduce", Case(40, 72, 24, BF16, 2, ""), bias=True),
    Call("gemm_reduce_scatter", Case(40, 72, 24, BF16, 2, "")),
    Call("all_reduce", Case(1, 1000, 0, BF16, 2, "")),
]


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
@pytest.mark.parametrize("call", KEPT, ids=lambda call: call.op)
def test_a_result_is_the_callers_own(ranks, call, setup, world_size):
    """It lies neither in an input nor in the arena, and later calls leave it alone; writing into it, or into the inputs
    after a call, disturbs no other call."""
    setup = setup if world_size > 1 else Setup(setup.backend)
    for strangers, first, kept, again in ranks(world_size).run(keep_results, setup, call):
        assert strangers and torch.equal(first, kept) and torch.equal(first, again)


def keep_results(rank, world_size, setup, call):
    arena = rank_side.prepare_arena(setup)
    call = dataclasses.replace(call, case=on(call.case, world_size))
    tensors = rank_side.operands(call, rank)
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan), torch.inference_mode():
        kept = rank_side.invoke(call, tensors, rank)
        first, saved = kept.clone(), [x.clone() for x in tensors]
        others = [arena.store.peer_buffer(r) for r in range(world_size)]
        strangers = not any(overlap(kept, x) for x in (*tensors, *others))
        for x in tensors:
            x.fill_(7)
        for case in (call.case, Case(1, 24, 8, BF16, world_size, ""), Case(96, 72, 24, BF16, world_size, "")):
            for op in CPU_PLANS:
                other = Call(op, case, "integer", 9)
                rank_side.invoke(other, rank_side.operands(other, rank), rank).fill_(-3)
        again = rank_side.invoke(call, saved, rank)
    return strangers, first, kept, again


def overlap(x, y):
    start, other = x.untyped_storage().data_ptr(), y.untyped_storage().data_ptr()
    return start < other + y.untyped_storage().nbytes() and other < start + x.untyped_storage().nbytes()


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_calls_repeat_bit_for_bit(ranks, setup):
    case = Case(45, 72, 40, BF16, 3, "repeated")
    for op in ("gemm_all_reduce", "gemm_reduce_scatter"):
        calls = [Call(op, case, bias=True) for _ in range(4)]
        for results in ranks(3).run(rank_side.make_calls, setup, calls):
            assert all(torch.equal(result, results[0]) for result in results)
