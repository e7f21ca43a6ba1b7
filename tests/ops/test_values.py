"""What a sum does to each value, on CPU ranks: the rules of tests/values.py, for every op and plan."""

from __future__ import annotations

import itertools

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16
from tests.ops import calls as rank_side
from tests.ops.calls import CPU_PLANS, Setup
from tests.ops.judge import same_bits
from tests.values import PATTERNS, arrangements, assert_sum, in_order, shuffled_patterns

DTYPES = pytest.mark.parametrize("dtype", [BF16, FP16], ids=["bf16", "fp16"])
SUMS = [Setup("ref"), *(Setup("interp", plan) for plan in CPU_PLANS["all_reduce"])]
# Tiles as flat as the rows, which the interpreter takes: its cost is by the tile and by the element.
WIDE = ":block_m=4,block_n=4096,block_k=8"
TILED = ("one_shot", "two_shot", "push")
ROOM = {"max_M": 64, "max_N": PATTERNS}  # for one-shot with eight ranks, too
GEMMS = [
    (op, Setup("interp", plan + WIDE * (plan in TILED)))
    for op in ("gemm_all_reduce", "gemm_reduce_scatter")
    for plan in CPU_PLANS[op]
] + [("gemm_all_reduce", Setup("ref")), ("gemm_reduce_scatter", Setup("ref"))]


def is_tiled(setup: Setup) -> bool:
    """Whether a kernel of ours multiplies."""
    return setup.plan is not None and setup.plan.split(":")[0] in TILED


# --- all_reduce


@DTYPES
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("setup", SUMS, ids=str)
def test_every_pattern_with_every_other_rank_silent(ranks, setup, world_size, dtype):
    """Rank by rank holds all patterns while the others hold zeros: nothing but the sign of a zero, and NaN, changes."""
    results = ranks(world_size).run(sum_alone, setup, dtype)
    expected = shuffled_patterns(0, dtype)
    expected[expected == 0] = 0.0
    for alone, outs in enumerate(zip(*results, strict=True)):
        assert_sum(outs[0], expected, f"rank {alone} alone")
        assert all(same_bits(out, outs[0]) for out in outs)


def sum_alone(rank, world_size, setup, dtype):
    patterns = shuffled_patterns(0, dtype)
    xs = [patterns if rank == alone else torch.zeros_like(patterns) for alone in range(world_size)]
    return sums(setup, xs)


@DTYPES
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
@pytest.mark.parametrize("setup", SUMS, ids=str)
def test_every_pattern_with_every_other_rank_s(ranks, setup, world_size, dtype):
    results = ranks(world_size).run(sum_shuffled, setup, dtype)
    expected = in_order([shuffled_patterns(rank, dtype) for rank in range(world_size)])
    assert expected.isnan().any() and expected.isinf().any()
    for (out,) in results:
        assert_sum(out, expected, "sum")
        assert same_bits(out, results[0][0])


def sum_shuffled(rank, world_size, setup, dtype):
    return sums(setup, [shuffled_patterns(rank, dtype)])


@pytest.mark.parametrize("setup", SUMS, ids=str)
def test_negative_zeros_make_a_positive_one(ranks, setup):
    for world_size in (2, 3):
        for (out,) in ranks(world_size).run(sum_of_negative_zeros, setup):
            assert not out.view(torch.int16).any()


def sum_of_negative_zeros(rank, world_size, setup):
    return sums(setup, [torch.full((1000,), -0.0, dtype=BF16)])


def test_one_rank_alone_keeps_every_bit(ranks):
    (((out,),)) = ranks(1).run(sum_shuffled, Setup("ref"), BF16)
    assert same_bits(out, shuffled_patterns(0, BF16))


def sums(setup: Setup, xs: list[torch.Tensor]) -> list[torch.Tensor]:
    rank_side.prepare_arena(Setup(**ROOM))
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan):
        return [torch.ops.tp_overlap.all_reduce(x, rank_side.group_name()) for x in xs]


# --- with a product: one column of ones, so that the weights are what is summed


@DTYPES
@pytest.mark.parametrize(
    "op, setup, world_size", [(op, setup, W) for op, setup in GEMMS for W in (2, 3) if setup.has_ranks(W)], ids=str
)
def test_every_pattern_as_a_weight(ranks, op, setup, world_size, dtype):
    """The first rank, then the last, has all patterns and the others zeros; every rank owns a row of the sum."""
    results = ranks(world_size).run(gemm_of_patterns, op, setup, dtype)
    expected = shuffled_patterns(0, dtype)
    expected[expected == 0] = 0.0
    if dtype == BF16 and not is_tiled(setup):  # torch multiplies, and the CPU's bf16 instructions take them for zeros
        expected[expected.abs() < torch.finfo(BF16).smallest_normal] = 0.0
    for alone, outs in zip((0, world_size - 1), zip(*results, strict=True), strict=True):
        for rank, out in enumerate(outs):
            for row in out:
                assert_sum(row, expected, f"rank {alone} alone, on rank {rank}")
        assert op != "gemm_all_reduce" or all(same_bits(out, outs[0]) for out in outs)


def gemm_of_patterns(rank, world_size, op, setup, dtype):
    patterns = shuffled_patterns(0, dtype)[:, None]
    weights = [patterns if rank == alone else torch.zeros_like(patterns) for alone in (0, world_size - 1)]
    return gemms(op, setup, torch.ones(world_size, 1, dtype=dtype), weights)


def gemms(op: str, setup: Setup, a: torch.Tensor, weights: list[torch.Tensor]) -> list[torch.Tensor]:
    rank_side.prepare_arena(Setup(**ROOM))
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan):
        return [getattr(torch.ops.tp_overlap, op)(a, b, rank_side.group_name()) for b in weights]


# --- the order of addition: large + small - large is 0 in f32, large - large + small is small


OWNER_FIRST = ("two_shot", "push", "chunked")


@DTYPES
@pytest.mark.parametrize("world_size", [3, 4, 8])
@pytest.mark.parametrize(
    "op, setup", [*(("all_reduce", setup) for setup in SUMS), *((op, s) for op, s in GEMMS if s.has_ranks(3))], ids=str
)
def test_ranks_are_added_in_the_order_that_is_stated(ranks, op, setup, world_size, dtype):
    rows = arrangements(world_size, dtype)
    by_rank = list(rows.T.contiguous())
    assert any(not torch.equal(in_order(by_rank), in_order(others)) for others in itertools.permutations(by_rank))
    results = ranks(world_size).run(ordered, op, setup, rows)
    owner_first = op != "all_reduce" and setup.plan is not None and setup.plan.split(":")[0] in OWNER_FIRST
    for rank, out in enumerate(results):
        for row in range(len(out)):
            owner = rank if op == "gemm_reduce_scatter" else row
            first = [owner] if owner_first else []
            order = first + [source for source in range(world_size) if source not in first]
            assert_sum(out[row], in_order([by_rank[source] for source in order]), f"row {row} on rank {rank}")


def ordered(rank, world_size, op, setup, rows):
    """(rows, arrangements): rows of all owners, or our own; one row for all_reduce."""
    mine = rows[:, rank].contiguous()
    if op == "all_reduce":
        return sums(setup, [mine])[0][None]
    return gemms(op, setup, torch.ones(world_size, 1, dtype=rows.dtype), [mine[:, None]])[0]
