"""What one launch may take: at the largest call allowed, the kernels' own index arithmetic stays in its region."""

from __future__ import annotations

import itertools
import types

import pytest

from tp_overlap_kernels.dispatch import Plan, Problem, Topology
from tp_overlap_kernels.dispatch.defaults import default_params
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.lang.launch import specialisation
from tp_overlap_kernels.memory.layout import layout, pitch, rows_per_rank
from tp_overlap_kernels.ops.execute import warn_chunked
from tp_overlap_kernels.ops.launches import COPY_BLOCKS, copy_block, elements_that_fit, rows_that_fit

PROGRAMS = 132  # SMs
CAPACITIES = list(itertools.product((1, 3, 16, 64, 100, 8192, 16384), (1, 40, 1000, 8192, 28672, 152064), (2, 3, 4, 8)))


def arena(max_M, max_N, W):
    return types.SimpleNamespace(layout=layout(max_M, max_N, 2, W), world_size=W, programs=PROGRAMS)


def plans(name, op, room, N, K=1024):
    """The plan with every default that dispatch has for some M."""
    for backend, M in itertools.product(("cuda", "interp"), (1, 17, 33, 64, 2048, 8192)):
        problem, topology = Problem(op, M, N, K, "bfloat16", room.world_size), Topology("", backend, room.world_size)
        yield Plan(name, tuple(default_params(name, problem, topology).items()))


def sizes(room):
    return sorted({1, room.layout.max_N // 2 + 1, room.layout.max_N})


@pytest.mark.parametrize("name, op", [("two_shot", "gemm_all_reduce"), ("push", "gemm_reduce_scatter")])
def test_rows_of_the_staged_kernels(name, op):
    for capacity in CAPACITIES:
        room = arena(*capacity)
        at, W = room.layout, room.world_size
        for N in sizes(room):
            for plan in plans(name, op, room, N):
                M = rows_that_fit(room, plan, N, 2)
                assert 1 <= M <= at.max_M, (capacity, N, plan)
                c = rows_per_rank(M, W)
                tiles = -(-c // plan.get("block_m")) * -(-N // plan.get("block_n"))
                assert tiles * W <= at.tile_slots, (capacity, N, M, plan)
                assert c * pitch(N) * 2 <= at.staging_slot_bytes
                assert M * pitch(N) * 2 <= at.total_bytes - at.result


def test_rows_of_one_shot():
    """Where dispatch allows the plan at all: its padded message fits the region."""
    for capacity in CAPACITIES:
        room = arena(*capacity)
        for N in sizes(room):
            if pitch(N) * 2 > room.layout.one_shot_bytes:
                continue
            for plan in plans("one_shot", "gemm_all_reduce", room, N):  # the reduce-scatter's are the same
                if N > room.layout.one_shot_tiles * plan["block_n"]:  # the interpreter's small tiles
                    with pytest.raises(InvalidInput, match=f"no room for one row of N={N}. Give it a larger block_n"):
                        rows_that_fit(room, plan, N, 2)
                    continue
                M = rows_that_fit(room, plan, N, 2)
                assert M >= 1, (capacity, N, plan)
                tiles = -(-M // plan.get("block_m")) * -(-N // plan.get("block_n"))
                assert tiles <= room.layout.one_shot_tiles and M * pitch(N) * 2 <= room.layout.one_shot_bytes


def test_rows_of_the_unfused_reduce_scatter():
    for capacity in CAPACITIES:
        room = arena(*capacity)
        at, W = room.layout, room.world_size
        for N in sizes(room):
            most = rows_that_fit(room, Plan("unfused_push"), N, 2)
            assert most >= 1
            for M in fewer(most):
                part = rows_per_rank(M, W) * N
                blocks = -(-part // copy_block(room, part)["BLOCK"])
                assert part * 2 <= at.staging_slot_bytes and blocks * W <= at.tile_slots, (capacity, N, M)


def test_elements_of_all_reduce():
    for capacity in CAPACITIES:
        room = arena(*capacity)
        at, W = room.layout, room.world_size
        for n in fewer(elements_that_fit(room, Plan("two_shot"), 2)):
            share = rows_per_rank(n, W)
            block = copy_block(room, share)["BLOCK"]
            part = -(-share // block) * block
            assert part // block * W <= at.tile_slots, (capacity, n, block)
            assert min(n, part) * 2 <= at.staging_slot_bytes and n * 2 <= at.total_bytes - at.result, (capacity, n)
        n = elements_that_fit(room, Plan("one_shot"), 2)
        assert n * 2 <= at.one_shot_bytes and -(-n // COPY_BLOCKS[0]) <= at.one_shot_tiles


def test_an_all_reduce_of_as_much_as_init_was_told_of_is_one_call():
    for capacity in ((2048, 8192, 2), (1024, 4096, 4)):
        assert elements_that_fit(arena(*capacity), Plan("two_shot"), 2) == capacity[0] * capacity[1]


def test_a_kept_launch_is_not_used_for_wider_integers():
    """Triton passes 2**31 and more as i64, and the kernel that it compiled for i32 takes no such number."""
    assert specialisation(1 << 30) != specialisation(1 << 31)
    assert specialisation(1 << 30) == specialisation(48)


def fewer(most):
    """Sizes up to the largest; the smallest blocks are taken somewhere between."""
    assert most >= 1
    return sorted({max(1, most >> shift) for shift in range(12)})


@pytest.mark.parametrize("rank, said", [(0, 1), (1, 0)])
def test_calls_in_chunks_are_warned_of_once_and_by_rank_0(caplog, rank, said):
    room = types.SimpleNamespace(rank=rank, cache={}, group_name="tp")
    for _ in range(3):
        warn_chunked(room, "gemm_all_reduce", 300, 256)
    assert len(caplog.records) == said
    assert said == 0 or ("300 rows runs in chunks of 256" in caplog.text and "init(max_M=300)" in caplog.text)
