"""What a rank cannot see by itself: peers that call something else, never come, or die.

Every rank gets an error in bounded time that says whom it waited for; outputs are NaN; the group refuses further calls;
and after close() and init() the next call is right.
"""

from __future__ import annotations

import dataclasses
import os
import pickle
import signal
import time

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16, Case
from tests.dist import RankDied, RankPool, barrier
from tests.ops.calls import Call, Setup, group_name, invoke, operands, out_shape, prepare_arena
from tests.ops.judge import judge, plan_name
from tp_overlap_kernels.memory import arena as arenas

TIMEOUT_S = 1.0
SETUPS = [Setup("ref"), *(Setup("interp", plan) for plan in ("unfused_push;one_shot", "two_shot;push", "chunked"))]


@pytest.fixture(scope="module")
def own_ranks():
    """Pools of this file, since a test that goes wrong here leaves ranks that wait for each other."""
    pools = {}
    yield lambda world_size: pools.setdefault(world_size, RankPool(world_size))
    for pool in pools.values():
        pool.close()


@dataclasses.dataclass
class Outcome:
    error: str  # name of the exception's class; "" for none
    text: str
    seconds: float
    out: torch.Tensor | None = None

    @classmethod
    def of(cls, function, *arguments):
        started = time.monotonic()
        try:
            out, error, text = function(*arguments), "", ""
        except tpo.TpOverlapError as raised:
            out, error, text = None, type(raised).__name__, str(raised)
        return cls(error, text, time.monotonic() - started, out)


@dataclasses.dataclass
class Story:
    """What a rank saw: its call, what it wrote, the next call, and a call after close() and init()."""

    first: Outcome
    out: torch.Tensor
    second: Outcome
    after: torch.Tensor


def attempt(rank, setup, call):
    """The call into a tensor that was zero, so that a NaN is the op's own; None makes no call."""
    if call is None:
        return Outcome("", "", 0.0), torch.empty(0)
    tensors = operands(call, rank)
    fixed = 1 if call.op == "all_reduce" else 2
    out = torch.zeros(out_shape(call, rank), dtype=call.case.dtype)
    function = getattr(torch.ops.tp_overlap, call.op + "_out")
    return Outcome.of(function, *tensors[:fixed], group_name(), out, *tensors[fixed:]), out


def recover(rank, setup, good):
    """close() and init() on every rank, then a call."""
    tpo.close()
    prepare_arena(setup)
    return invoke(good, operands(good, rank), rank)


def tell(rank, world_size, setup, calls, good, late_s=0.0):
    """calls: what each rank calls; None for one that never does. late_s: how much later rank 1 does."""
    prepare_arena(setup).timeout_s = TIMEOUT_S
    barrier()
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan), torch.inference_mode():
        if rank == 1:
            time.sleep(late_s)
        first, out = attempt(rank, setup, calls[rank])
        second = Outcome.of(invoke, good, operands(good, rank), rank) if first.error else first
        return Story(first, out, second, recover(rank, setup, good))


def says(outcome, *parts):
    """The text begins with the first part and ends with the way out."""
    assert outcome.text.startswith(parts[0]) and "close() and init()" in outcome.text, outcome.text
    assert [part for part in parts if part not in outcome.text] == [], outcome.text


def check_recovery(setup, good, stories):
    judge(good, plan_name(setup, good), [story.after for story in stories])


def good_call(op, world_size):
    sizes = (1, 200, 0) if op == "all_reduce" else (33, 40, 24)
    return Call(op, Case(*sizes, BF16, world_size, ""))


# --- another call

GEMM = Case(33, 40, 24, BF16, 2, "")
AR, RS, SUM = "gemm_all_reduce", "gemm_reduce_scatter", "all_reduce"
MISMATCHES = [
    ("M", Call(AR, GEMM), Call(AR, dataclasses.replace(GEMM, M=34))),
    ("M far off", Call(AR, GEMM), Call(AR, dataclasses.replace(GEMM, M=150))),
    ("N", Call(AR, GEMM), Call(AR, dataclasses.replace(GEMM, N=48))),
    ("K", Call(AR, GEMM), Call(AR, dataclasses.replace(GEMM, K=32))),
    ("dtype", Call(AR, GEMM), Call(AR, dataclasses.replace(GEMM, dtype=FP16))),
    ("bias", Call(AR, GEMM), Call(AR, GEMM, bias=True)),
    ("M of a reduce-scatter", Call(RS, GEMM), Call(RS, dataclasses.replace(GEMM, M=35))),
    ("op", Call(AR, GEMM), Call(RS, GEMM)),
    ("op and everything", Call(AR, GEMM), Call(SUM, Case(1, 777, 0, BF16, 2, ""))),
    ("number of elements", Call(SUM, Case(1, 776, 0, BF16, 2, "")), Call(SUM, Case(1, 777, 0, BF16, 2, ""))),
]


@pytest.mark.parametrize("setup", [SETUPS[0], *SETUPS[1:3]], ids=str)
@pytest.mark.parametrize("why, ours, theirs", MISMATCHES, ids=[row[0].replace(" ", "_") for row in MISMATCHES])
def test_another_call_is_named_on_both_ranks(own_ranks, why, ours, theirs, setup):
    good = good_call(AR, 2)
    stories = own_ranks(2).run(tell, setup, (ours, theirs), good)
    for rank, story in enumerate(stories):
        call = (ours, theirs)[rank]
        assert story.first.error == "CallMismatch", story.first
        says(story.first, f"{call.op}: rank {rank} waited for rank {1 - rank}", "another call", "hash wanted 0x")
        assert story.first.seconds < TIMEOUT_S, "found by its hash, not by the timeout"
        assert story.out.isnan().all()
        assert story.second.error == "CallMismatch" and story.second.seconds < 0.5
    check_recovery(setup, good, stories)


@pytest.mark.parametrize("setup", [SETUPS[0], SETUPS[2]], ids=str)
def test_another_call_among_three_ranks(own_ranks, setup):
    case = dataclasses.replace(GEMM, world_size=3)
    calls = (Call(AR, case), Call(AR, dataclasses.replace(case, M=37)), Call(AR, case))
    good = good_call(RS, 3)
    stories = own_ranks(3).run(tell, setup, calls, good)
    for story in stories:
        assert story.first.error == "CallMismatch" and "rank 1" in story.first.text, story.first
    check_recovery(setup, good, stories)


# --- a rank that is late, or never comes


@pytest.mark.parametrize(
    "op, setup", [(op, s) for op in (AR, RS, SUM) for s in SETUPS if (op, s.plan) != (SUM, "chunked")], ids=str
)
def test_a_rank_that_never_comes(own_ranks, op, setup):
    good = good_call(op, 2)
    stories = own_ranks(2).run(tell, setup, (good, None), good)
    first = stories[0].first
    assert first.error == "PeerTimeout" and first.seconds < TIMEOUT_S + 2
    says(first, f"{op}: rank 0 waited for rank 1", "for 1 s", "TP_OVERLAP_TIMEOUT")
    assert stories[0].out.isnan().all()
    assert stories[0].second.error == "PeerTimeout" and stories[0].second.seconds < 0.5
    check_recovery(setup, good, stories)


@pytest.mark.parametrize("setup", SETUPS[:3], ids=str)
def test_a_rank_that_comes_after_the_others_gave_up(own_ranks, setup):
    """It may still get its result, an error, or NaN; it waits no longer than its own timeout."""
    good = good_call(AR, 2)
    stories = own_ranks(2).run(tell, setup, (good, good), good, TIMEOUT_S + 0.5)
    early, late = stories
    assert early.first.error == "PeerTimeout" and early.out.isnan().all()
    assert late.first.seconds < TIMEOUT_S + 2
    if not late.first.error and not late.out.isnan().any():
        assert torch.equal(late.out, late.after)
    check_recovery(setup, good, stories)


@pytest.mark.parametrize("setup", [SETUPS[0], SETUPS[2]], ids=str)
def test_every_rank_that_waits_for_it_says_so(own_ranks, setup):
    good = good_call(AR, 3)
    stories = own_ranks(3).run(tell, setup, (good, None, good), good)
    waited = (stories[0], stories[2])
    for story in waited:
        assert story.first.error == "PeerTimeout"
        assert story.first.seconds < TIMEOUT_S + 2 and story.out.isnan().all()
    assert any("waited for rank 1" in story.first.text for story in waited)  # the other may wait for this one's sums
    check_recovery(setup, good, stories)


@pytest.mark.parametrize("closes", [(True, False), (False, True), (False, False)], ids=str)
def test_init_alone_makes_a_failed_group_anew(own_ranks, closes):
    """Rank 1 knows nothing of the failure: what is to be done is decided together."""
    good = good_call(AR, 2)
    judge(good, "ref", own_ranks(2).run(fail_and_init, good, closes))


def fail_and_init(rank, world_size, good, closes):
    setup = Setup("ref")
    prepare_arena(setup).timeout_s = 0.2
    barrier()
    if rank == 0:
        assert attempt(rank, setup, good)[0].error == "PeerTimeout"
    if closes[rank]:
        tpo.close()
    prepare_arena(setup)
    return invoke(good, operands(good, rank), rank)


def test_waiting_for_ever_is_a_choice(own_ranks):
    """TP_OVERLAP_TIMEOUT=0."""
    good = good_call(AR, 2)
    for setup in SETUPS[:3]:
        results = own_ranks(2).run(come_late_without_timeout, setup, good)
        judge(good, plan_name(setup, good), results)


def come_late_without_timeout(rank, world_size, setup, call):
    prepare_arena(setup).timeout_s = 0.0
    barrier()
    if rank == 1:
        time.sleep(0.5)
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan):
        out = invoke(call, operands(call, rank), rank)
    tpo.close()
    return out


# --- a rank that dies


@pytest.mark.parametrize("setup", SETUPS[:3], ids=str)
@pytest.mark.parametrize("when", ["in the call", "before it"])
def test_a_killed_peer_is_named_in_under_a_second(when, setup, tmp_path):
    pool, good = RankPool(2), good_call(AR, 2)
    try:
        pool.run(prepare, setup)
        with pytest.raises(RankDied, match="rank 1: the process ended, exit code -9"):
            pool.run(outlive, setup, good, when, str(tmp_path))
        outcome, out, second = pickle.loads((tmp_path / "rank_0").read_bytes())
    finally:
        pool.kill()
    assert outcome.error == "PeerDied" and "rank 1 (pid " in outcome.text and "ended" in outcome.text, outcome
    assert outcome.seconds < 1.3  # rank 1 dies 0.3 s after rank 0 has begun
    assert second.error == "PeerDied"
    assert when == "before it" or out.isnan().all()


def prepare(rank, world_size, setup):
    prepare_arena(setup)


def outlive(rank, world_size, setup, call, when, folder):
    barrier()
    if rank == 1:
        time.sleep(0.3 if when == "in the call" else 0.0)
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.3 if when == "before it" else 0.0)
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan), torch.inference_mode():
        first, out = attempt(rank, setup, call)
        second, _ = attempt(rank, setup, call)
        tpo.close()
    with open(os.path.join(folder, "rank_0"), "wb") as file:
        pickle.dump((first, out, second), file)


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
