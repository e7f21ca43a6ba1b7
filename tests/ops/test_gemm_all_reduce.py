"""gemm_all_reduce on CPU ranks: every row of the table by every plan that runs there, inputs of other forms."""

from __future__ import annotations

import pytest

from tests.cases import BF16, CASES, FP16, Case, on
from tests.ops.calls import CPU_PLANS, Call, Setup, in_a_row, in_a_row_with_late_ranks, in_other_strides
from tests.ops.judge import check

OP = "gemm_all_reduce"
SETUPS = [Setup("ref"), *(Setup("interp", plan) for plan in CPU_PLANS[OP])]
RAGGED = Case(33, 72, 72, BF16, 2, "ragged")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_ref(ranks, case):
    check(ranks, Setup("ref"), in_a_row(OP, case))


@pytest.mark.parametrize(
    "setup, case",
    [(setup, case) for setup in SETUPS[1:] for case in CASES if setup.has_ranks(case.world_size)],
    ids=str,
)
def test_interpreted(ranks, setup, case):
    check(ranks, setup, in_a_row(OP, case))


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_inputs_of_any_strides(ranks, setup):
    """Most of these cannot be read by the kernels as they lie: the op has to notice, and copy."""
    aligned = Case(15, 64, 32, FP16, 2, "aligned")
    check(ranks, setup, in_other_strides(OP, RAGGED) + in_other_strides(OP, aligned))


@pytest.mark.parametrize("setup", SETUPS[:3], ids=str)
def test_inputs_of_any_dimension(ranks, setup):
    one_row, none = Case(1, 40, 24, BF16, 2, "one row"), Case(0, 40, 24, BF16, 2, "no rows")
    calls = [
        Call(OP, one_row, leading=(), bias=True),  # a: [K], out: [N]
        Call(OP, one_row, leading=(), into_out=True),
        Call(OP, one_row, leading=(1, 1, 1)),
        Call(OP, RAGGED, leading=(3, 11), into_out=True),
        Call(OP, none, leading=(2, 0)),
        Call(OP, none, leading=(0, 3), into_out=True, bias=True),
    ]
    check(ranks, setup, calls)


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("backend", ["ref", "interp"])
@pytest.mark.parametrize("bias", [False, True], ids=["no bias", "bias"])
def test_nothing_to_sum_is_zero_or_the_bias(ranks, world_size, backend, bias):
    no_K, no_N = (Case(5, *sizes, BF16, world_size, "") for sizes in ((24, 0), (0, 24)))
    calls = [Call(OP, case, "integer", bias=bias, into_out=into) for case in (no_K, no_N) for into in (False, True)]
    check(ranks, Setup(backend), [*calls, Call(OP, on(RAGGED, world_size), "integer")])


@pytest.mark.parametrize("setup, world_size", [(s, w) for s in SETUPS for w in (2, 3) if s.has_ranks(w)], ids=str)
def test_more_rows_than_the_arena_holds(ranks, setup, world_size):
    """Chunks of max_M rows, the last one short; owners are those of each chunk."""
    small = Setup(setup.backend, setup.plan, max_M=40, max_N=80)
    calls = in_a_row(OP, Case(97, 72, 40, BF16, world_size, "more than two chunks"))
    rows = 40 if setup.plan in ("two_shot", "chunked") else None
    check(ranks, small, calls, rows_at_once=rows)


@pytest.mark.parametrize("setup, world_size", [(s, w) for s in SETUPS for w in (2, 3) if s.has_ranks(w)], ids=str)
def test_a_late_rank_is_waited_for(ranks, setup, world_size):
    check(ranks, setup, in_a_row_with_late_ranks(OP, Case(40, 40, 24, BF16, world_size, "late")))


def test_chunks_of_the_chunked_plan(ranks):
    """Enough rows for several chunks a rank: of equal size, tapered, and more for the own rows than for the peer's."""
    case = Case(1100, 24, 16, BF16, 2, "several chunks")
    plans = ("chunked", "chunked:chunks=4,own_chunks=3", "chunked:chunks=1,own_chunks=4,taper=1")
    calls = [
        Call(OP, case, kind, i, bias=True, plan=plan) for i, plan in enumerate(plans) for kind in ("normal", "integer")
    ]
    check(ranks, Setup("interp", max_M=1100, max_N=64), calls)
