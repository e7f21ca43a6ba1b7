"""all_reduce on CPU ranks: every row of the table by every plan that runs there, inputs of other forms."""

from __future__ import annotations

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import ALL_REDUCE_CASES, BF16, FP16, Case
from tests.ops import calls as rank_side
from tests.ops.calls import Call, Setup, in_a_row, in_a_row_with_late_ranks, in_other_strides
from tests.ops.judge import check

OP = "all_reduce"
SETUPS = [Setup("ref"), Setup("interp", "one_shot"), Setup("interp", "two_shot")]


@pytest.mark.parametrize("case", ALL_REDUCE_CASES, ids=str)
def test_ref(ranks, case):
    check(ranks, Setup("ref"), in_a_row(OP, case))


@pytest.mark.parametrize("setup", SETUPS[1:], ids=str)
@pytest.mark.parametrize("case", [case for case in ALL_REDUCE_CASES if case.world_size > 1], ids=str)
def test_interpreted(ranks, setup, case):
    check(ranks, setup, in_a_row(OP, case))


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_inputs_of_any_strides(ranks, setup):
    cases = [Case(1, 3 * 37, 0, BF16, 2, "odd"), Case(1, 3 * 64, 0, FP16, 2, "aligned")]
    check(ranks, setup, [call for case in cases for call in in_other_strides(OP, case)])


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_inputs_of_any_dimension(ranks, setup):
    one, some = Case(1, 1, 0, BF16, 2, "one"), Case(1, 120, 0, BF16, 2, "some")
    none = Case(1, 0, 0, BF16, 2, "none")
    shapes = [(one, ()), (one, (1, 1)), (some, (2, 3, 4, 5)), (none, (3, 0)), (some, (120, 1))]
    check(ranks, setup, [Call(OP, case, leading=shape, into_out=i % 2 == 1) for i, (case, shape) in enumerate(shapes)])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("setup, n", [(SETUPS[0], (1 << 21) + 17), (SETUPS[2], 50_001)], ids=str)
def test_more_elements_than_the_arena_holds(ranks, setup, n, world_size):
    """At least two whole pieces and an odd one."""
    case = Case(1, n, 0, BF16, world_size, "large")
    small = Setup(setup.backend, setup.plan, max_M=16, max_N=1040)
    check(ranks, small, [Call(OP, case, "integer", i) for i in range(3)])


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_a_late_rank_is_waited_for(ranks, setup, world_size):
    check(ranks, setup, in_a_row_with_late_ranks(OP, Case(1, 9000, 0, BF16, world_size, "late")))


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_in_place(ranks, setup):
    """out may be x; long enough that every program has several blocks."""
    for world_size in (2, 3):
        case = Case(1, 40_001, 0, BF16, world_size, "in place")
        for got, fresh in ranks(world_size).run(sum_in_place, setup, [Call(OP, case, number=i) for i in range(3)]):
            assert all(torch.equal(x, y) for x, y in zip(got, fresh, strict=True))


def sum_in_place(rank, world_size, setup, calls):
    fresh = rank_side.make_calls(rank, world_size, setup, calls)
    inputs = [rank_side.operands(call, rank)[0] for call in calls]
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan):
        for x in inputs:
            torch.ops.tp_overlap.all_reduce_out(x, rank_side.group_name(), x)
    return inputs, fresh


@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_ranks_are_added_in_rank_order(ranks, setup):
    """A sum in f32 whose value depends on the order: (large + 1) - large is 0, (large - large) + 1 is 1."""
    values = {3: [(1, 2**30, -(2**30)), (2**30, 1, -(2**30)), (2**30, -(2**30), 1)], 4: [(3, 2**30, -(2**30), 1)]}
    for world_size, rows in values.items():
        for out in ranks(world_size).run(sum_of, setup, rows):
            assert out.tolist() == [in_order(row) for row in rows]


def in_order(row):
    total = torch.zeros((), dtype=torch.float32)
    for value in row:
        total = total + value
    return total.item()


def sum_of(rank, world_size, setup, rows):
    rank_side.prepare_arena(setup)
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan):
        mine = torch.tensor([row[rank] for row in rows], dtype=torch.bfloat16)
        return torch.ops.tp_overlap.all_reduce(mine, rank_side.group_name())
