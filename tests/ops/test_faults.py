"""The table of faults: what is done to one rank, and what every other rank must make of it, and how soon.

Everywhere: the error has the class and names the rank of the table; the output is NaN as a whole; the group refuses the
next call at once; nothing is left behind. Where the ranks live on, close() and init() make a group that works; where
one ends, the others come to their own end by themselves.
"""

from __future__ import annotations

import collections
import dataclasses
import os
import signal
import tempfile

import pytest
import torch

from tests.cases import BF16, FP16, Case
from tests.dist import RankPool
from tests.ops import faults
from tests.ops.calls import Call, Setup
from tests.ops.faults import ENDS, IN_POOL, LATER_S, REF, STEPS, TIMEOUT_S, Fault
from tests.ops.judge import judge, plan_name

UNFUSED, TWO_SHOT, CHUNKED = (Setup("interp", plan) for plan in ("unfused_push;one_shot", "two_shot;push", "chunked"))
ONE_SHOT_RS = Setup("interp", "one_shot")
AR, RS, SUM = "gemm_all_reduce", "gemm_reduce_scatter", "all_reduce"

AT_ONCE_S = 2.0  # far from any timeout
DEATH_S = 1.0  # in which the end of a process is noticed
LATE_S = TIMEOUT_S + 2


def call_of(op: str, world_size: int = 2) -> Call:
    sizes = (1, 200, 0) if op == SUM else (33, 40, 24)
    return Call(op, Case(*sizes, BF16, world_size, ""))


def with_case(call: Call, **changes) -> Call:
    return dataclasses.replace(call, case=dataclasses.replace(call.case, **changes))


A_CALL, A_SUM, A_SCATTER = call_of(AR), call_of(SUM), call_of(RS)
OTHER_CALLS = [
    ("M", A_CALL, with_case(A_CALL, M=34)),
    ("M far off", A_CALL, with_case(A_CALL, M=150)),
    ("N", A_CALL, with_case(A_CALL, N=48)),
    ("K", A_CALL, with_case(A_CALL, K=32)),
    ("dtype", A_CALL, with_case(A_CALL, dtype=FP16)),
    ("bias", A_CALL, dataclasses.replace(A_CALL, bias=True)),
    ("M of a reduce-scatter", A_SCATTER, with_case(A_SCATTER, M=35)),
    ("op", A_CALL, A_SCATTER),
    ("op and everything", A_CALL, with_case(A_SUM, N=777)),
    ("number of elements", with_case(A_SUM, N=776), with_case(A_SUM, N=777)),
]


def _with_other_calls() -> list[Fault]:
    rows = [
        Fault(f"{why} {setup}", "another call", "CallMismatch", AT_ONCE_S, ours, setup, theirs, named="peer")
        for why, ours, theirs in OTHER_CALLS
        for setup in (REF, UNFUSED, TWO_SHOT)
    ]
    three = call_of(AR, 3)
    rows += [
        Fault(
            f"M, one of three {setup}", "another call", "CallMismatch", AT_ONCE_S, three, setup, with_case(three, M=37)
        )
        for setup in (REF, TWO_SHOT)
    ]
    rows += [
        Fault(f"{op} {setup}", "another plan", "CallMismatch", AT_ONCE_S, call_of(op), setup, step=plan, named="peer")
        for op, setup, plan in (
            (AR, TWO_SHOT, "two_shot:block_m=64,block_n=32,block_k=32,num_stages=2,num_warps=4,group_m=8"),
            (AR, Setup("interp", "one_shot"), "two_shot"),
            (SUM, Setup("interp", "one_shot"), "two_shot"),
        )
    ]
    return rows


def _with_absent_ranks() -> list[Fault]:
    rows = [
        Fault(f"{op} {setup}", "never arrives", "PeerTimeout", LATE_S, call_of(op), setup)
        for op in (AR, RS, SUM)
        for setup in (REF, UNFUSED, TWO_SHOT, CHUNKED)
        if (op, setup) != (SUM, CHUNKED)
    ]
    rows += [
        Fault(f"{plan} says {AR}", "never arrives", "PeerTimeout", LATE_S, A_CALL, Setup("interp", plan))
        for plan in ("unfused_one_shot", "unfused_two_shot")
    ]
    rows += [Fault("one-shot reduce-scatter", "never arrives", "PeerTimeout", LATE_S, A_SCATTER, ONE_SHOT_RS)]
    rows += [
        Fault(f"one of three {setup}", "never arrives", "PeerTimeout", LATE_S, call_of(AR, 3), setup)
        for setup in (REF, TWO_SHOT)
    ]
    rows += [
        Fault(
            f"rank 2 is told {op} {setup}", "never arrives", "PeerTimeout", LATE_S, call_of(op, 3), setup, patient=(2,)
        )
        for op, setup in ((AR, REF), (AR, TWO_SHOT), (RS, TWO_SHOT))
    ]
    rows += [
        Fault(str(setup), "SIGSTOP", "PeerTimeout", LATE_S, call_of(op), setup)
        for op, setup in ((AR, REF), (RS, UNFUSED), (AR, TWO_SHOT))
    ]
    rows += [Fault("one of three", "SIGSTOP", "PeerTimeout", LATE_S, call_of(AR, 3))]
    return rows


def _with_ranks_that_leave() -> list[Fault]:
    rows = [
        Fault(f"{op} {setup}", kind, "PeerClosed", LATER_S + DEATH_S, call_of(op), setup)
        for kind, op, setup in (
            ("closes", AR, REF),
            ("closes", AR, UNFUSED),
            ("closes", RS, TWO_SHOT),
            ("closes", AR, CHUNKED),
            ("exception", AR, REF),
            ("exception", SUM, TWO_SHOT),
        )
    ]
    limit_s = LATER_S + DEATH_S
    rows += [
        Fault(f"one of three {setup}", "closes", "PeerClosed", limit_s, call_of(AR, 3), setup)
        for setup in (REF, TWO_SHOT)
    ]
    rows += [
        Fault(f"{step} the call {setup}", "SIGKILL", "PeerDied", limit_s, A_CALL, setup, step=step)
        for step in ("in", "before")
        for setup in (REF, UNFUSED, TWO_SHOT)
    ]
    rows += [
        Fault("one of three", "SIGKILL", "PeerDied", limit_s, call_of(AR, 3), TWO_SHOT, step="in"),
        Fault("two of three", "SIGKILL", "PeerDied", limit_s, call_of(AR, 3), REF, step="in", victims=(1, 2)),
        Fault("chunked", "SIGKILL", "PeerDied", limit_s, A_CALL, CHUNKED, step="in"),
        Fault("in the call", "SIGABRT", "PeerDied", limit_s, A_SUM, REF, step="in"),
        # An interpreter that ends by itself takes its time to do so.
        Fault("in the call", "sys.exit", "PeerDied", limit_s + 2, A_CALL, REF, step="in"),
        Fault("in the call", "uncaught exception", "PeerDied", limit_s + 2, A_CALL, TWO_SHOT, step="in"),
    ]
    return rows


EXCHANGES = 9  # of init: hosts, cards, file, mapping, reach (2), board (2), ready
ERROR_AT = {
    "sizes": "InvalidInput",
    "table": "InvalidInput",
    "memory": "UnsupportedTopology",
    "mapping": "UnsupportedTopology",
    "reach": "UnsupportedTopology",
    "board": "UnsupportedTopology",
    "device": "TpOverlapError",
}


def _in_init() -> list[Fault]:
    raised = [
        Fault(step, "error in init", error, 10.0, call_of(AR, 3), step=step, victims=(1,))
        for step, error in ERROR_AT.items()
    ]
    killed = [
        Fault(
            f"at exchange {step}",
            "SIGKILL in init",
            "PeerDied",
            10.0,
            A_CALL,
            step=step,
            named="rank 1 (pid " if step else "a rank",  # nobody knows yet who takes part
        )
        for step in range(EXCHANGES)
    ]
    return raised + killed


def _with_forks() -> list[Fault]:
    return [Fault(str(setup), "fork", "NotInitialised", 5.0, A_CALL, setup) for setup in (REF, TWO_SHOT)]


FAULTS = [*_with_other_calls(), *_with_absent_ranks(), *_with_ranks_that_leave(), *_in_init(), *_with_forks()]


@pytest.fixture(scope="module")
def own_ranks():
    """Pools of this file, since a test that goes wrong here leaves ranks that wait for each other."""
    pools: dict[int, RankPool] = {}
    yield lambda world_size: pools.setdefault(world_size, RankPool(world_size))
    for pool in pools.values():
        pool.close()


def rows_of(*kinds: str) -> list[Fault]:
    return [fault for fault in FAULTS if fault.kind in kinds]


def test_the_table_holds_enough_of_each_kind():
    kinds = collections.Counter(fault.kind for fault in FAULTS)
    assert len(FAULTS) >= 60 and len({str(fault) for fault in FAULTS}) == len(FAULTS)
    assert set(kinds) == {*IN_POOL, *ENDS, "error in init", "SIGKILL in init", "fork"}
    assert set(ERROR_AT) == set(STEPS)


def check(fault: Fault, rank: int, outcome: faults.Outcome) -> None:
    named = f"rank {1 - rank}" if fault.named == "peer" else fault.named
    assert outcome.error == fault.error, outcome
    assert named in outcome.text, outcome.text
    assert outcome.seconds < fault.limit_s, outcome


def check_refusal(story: faults.Story) -> None:
    """The whole output is NaN, and the next call is refused at once, for the same reason."""
    assert story.out.isnan().all(), "sums were left in the output"
    assert story.second.error == story.first.error and story.second.seconds < 0.5, story.second


@pytest.mark.parametrize("fault", rows_of(*IN_POOL), ids=str)
def test_the_ranks_live_on(own_ranks, fault):
    good = call_of(AR, fault.world_size)
    stories = own_ranks(fault.world_size).run(faults.suffer, fault, good)
    for rank, story in enumerate(stories):
        if rank in fault.victims and story.out.numel() == 0:
            continue
        if rank not in fault.victims or fault.world_size == 2:
            check(fault, rank, story.first)
        assert "close() and init()" in story.first.text
        if fault.kind == "never arrives" and f" for {TIMEOUT_S:g} s." in story.first.text:
            assert "Not in this call yet: rank 1. " in story.first.text, story.first.text
        check_refusal(story)
        op = (fault.theirs or fault.call).op if rank in fault.victims else fault.call.op
        assert story.first.text.startswith((f"{op}: rank {rank} waited for rank ", "group ")), story.first.text
    judge(good, plan_name(fault.setup, good), [story.after for story in stories])


@pytest.mark.parametrize("fault", rows_of("error in init"), ids=str)
def test_what_one_rank_meets_in_init_is_raised_on_all(own_ranks, fault):
    good = call_of(AR, fault.world_size)
    stories = own_ranks(fault.world_size).run(faults.init_and_suffer, fault, good)
    for rank, story in enumerate(stories):
        if rank in fault.victims:
            assert story.first.error in (fault.error, "RuntimeError"), story.first  # its own, as it was raised
            continue
        check(fault, rank, story.first)
        assert story.second.error == "NotInitialised"
    judge(good, plan_name(fault.setup, good), [story.after for story in stories])


@pytest.mark.parametrize("fault", rows_of("fork"), ids=str)
def test_a_forked_child_is_no_rank(own_ranks, fault):
    stories = own_ranks(fault.world_size).run(faults.fork_and_call, fault, fault.call)
    for story in stories:
        assert story.first.error == fault.error and "forked" in story.first.text, story.first
    judge(fault.call, plan_name(fault.setup, fault.call), [story.after for story in stories])


def left_in_the_machine() -> list[str]:
    places = ("/dev/shm", tempfile.gettempdir())
    return sorted(os.path.join(place, name) for place in places for name in os.listdir(place) if "tp_overlap" in name)


@pytest.mark.parametrize("fault", rows_of(*ENDS, "SIGKILL in init"), ids=str)
def test_a_rank_ends(fault, tmp_path):
    before = left_in_the_machine()
    task = faults.die_in_init if fault.kind == "SIGKILL in init" else faults.die_in_a_call
    codes, stories = faults.run_job(fault.world_size, tmp_path, task, fault)
    expected = {"SIGABRT": -signal.SIGABRT, "sys.exit": 3, "uncaught exception": 1}.get(fault.kind, -signal.SIGKILL)
    for rank, (code, story) in enumerate(zip(codes, stories, strict=True)):
        assert code == (expected if rank in fault.victims else 0), f"exit codes {codes}"
        if rank in fault.victims:
            continue
        check(fault, rank, story.first)
        if fault.kind == "SIGKILL in init":
            assert story.second.error == "NotInitialised"
        elif fault.step == "in":
            check_refusal(story)
        else:
            assert story.second.error == fault.error
    assert left_in_the_machine() == before


def test_the_next_job_after_a_kill_is_clean(tmp_path):
    (fault,) = [row for row in rows_of("SIGKILL") if row.why == "two of three"]
    for folder in ("first", "next"):
        (tmp_path / folder).mkdir()
    faults.run_job(fault.world_size, tmp_path / "first", faults.die_in_a_call, fault)
    codes, results = faults.run_job(fault.world_size, tmp_path / "next", faults.succeed, fault.call)
    assert codes == [0] * fault.world_size
    judge(fault.call, "ref", results)
    assert all(isinstance(result, torch.Tensor) for result in results)
