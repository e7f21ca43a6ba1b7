"""Offsets beyond 2^31 and 2^32, rows further apart than 2^31 elements, unreadable pages on both sides of everything."""

from __future__ import annotations

import contextlib
import os
from unittest import mock

import pytest
import torch

import tp_overlap_kernels as tpo
from tests import guards
from tests.cases import BF16, FP16, Case
from tests.dist import RankDied, barrier
from tests.ops import calls as rank_side
from tests.ops.calls import CPU_PLANS, Call, Setup, cpu_plans
from tests.ops.judge import judge
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.memory import store as stores
from tp_overlap_kernels.ops import launches

# of a capacity that fills pages: staging slots of 64, 48 and 32 rows
CAPACITY = {2: (128, 64), 3: (96, 64), 4: (128, 64)}
FAR_PITCH = (1 << 30) + 2048


@contextlib.contextmanager
def guarded_arena(world_size: int, pitch: int | None = None):
    """An arena with far regions between guards. pitch: elements between rows in it; the gaps are then readable."""
    max_M, max_N = CAPACITY[world_size] if pitch is None else (4 * world_size, pitch)

    def map_file(self, pid, fd, nbytes, rank):
        opened = os.open(f"/proc/{pid}/fd/{fd}", os.O_RDWR | os.O_CLOEXEC)
        padded = -(-nbytes // guards.PAGE) * guards.PAGE
        address = guards.between_guards(padded, opened)
        os.close(opened)
        return (guards.ctypes.c_ubyte * nbytes).from_address(address)

    tpo.close()
    with (
        mock.patch.object(stores.SharedMemoryStore, "_map", map_file),
        mock.patch.object(arenas, "layout", guards.far_layout),
        mock.patch.object(launches, "pitch", (lambda N: pitch) if pitch else launches.pitch),
    ):
        tpo.init(max_M=max_M, max_N=max_N)
        arena = arenas.get(rank_side.group_name())
        if pitch is None:
            for base in arena.store.bases:
                guards.forbid_gaps(base, arena.layout)
        barrier()
        try:
            yield arena
        finally:
            tpo.close()


def make(rank: int, calls: list[Call], lay_out) -> list[torch.Tensor]:
    results = []
    with tpo.cpu_backend("interp"), torch.inference_mode():
        for call in calls:
            tensors = [lay_out(x) for x in rank_side.operands(call, rank)]
            with tpo.force_plan(call.plan):
                results.append(rank_side.invoke(call, tensors, rank))
    return results


def judge_all(calls: list[Call], by_rank: list[list[torch.Tensor]]) -> None:
    for call, results in zip(calls, zip(*by_rank, strict=True), strict=True):
        judge(call, call.plan, list(results))


# --- far regions


def plans_of_all_ops(world_size: int) -> list[tuple[str, str]]:
    return [(op, plan) for op in CPU_PLANS for plan in cpu_plans(op, world_size)]


def calls_up_to_capacity(world_size: int) -> list[Call]:
    """Every plan; all rows that there is room for, and few of them; the last bytes of every region are used."""
    M, N = CAPACITY[world_size]
    calls = []
    for op, plan in plans_of_all_ops(world_size):
        for rows, cols in ((M, N), (1, N - 3), (M - 1, 8)):
            sizes = (1, rows * cols, 0) if op == "all_reduce" else (rows, cols, 16)
            dtype = FP16 if rows == 1 else BF16
            calls.append(Call(op, Case(*sizes, dtype, world_size, ""), "tagged", len(calls), plan=plan))
    return calls


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_regions_and_slots_beyond_4_gib(ranks, world_size):
    calls = calls_up_to_capacity(world_size)
    judge_all(calls, ranks(world_size).run(with_far_regions, calls, timeout=120))


def with_far_regions(rank, world_size, calls):
    with guarded_arena(world_size) as arena:
        room = arena.layout
        assert room.one_shot > 1 << 31 and room.staging > 1 << 32 and room.result > room.staging + (1 << 32)
        ends = [False, True]
        results = [make(rank, calls, lambda x, end=end: guards.at_the_edge(x, end)) for end in ends]
        for first, second in zip(*results, strict=True):
            assert torch.equal(first.view(torch.int16), second.view(torch.int16))
        return [result.clone() for result in results[0]]


@pytest.mark.parametrize("world_size", [2, 3])
def test_rows_beyond_2_31_elements(ranks, world_size):
    """In the arena, by its pitch, and in the inputs, by their stride. A descriptor holds both strides in 64 bits."""
    calls = []
    for op, plan in plans_of_all_ops(world_size):
        if op == "all_reduce" or plan not in ("one_shot", "two_shot", "push"):
            continue
        for M in (4 * world_size, 3):
            calls.append(Call(op, Case(M, 40, 16, BF16, world_size, ""), "tagged", len(calls), plan=plan))
    judge_all(calls, ranks(world_size).run(with_far_rows, calls, timeout=120))


def with_far_rows(rank, world_size, calls):
    with guarded_arena(world_size, FAR_PITCH):
        return make(rank, calls, lambda x: guards.in_far_rows(x, FAR_PITCH))


@pytest.mark.parametrize("outside", ["before", "behind", "a gap"])
def test_an_overrun_ends_the_rank(ranks, outside):
    """What the tests above rely on."""
    with pytest.raises(RankDied, match="exit code -11"):
        ranks(2).run(overrun, outside)


def overrun(rank, world_size, outside):
    with guarded_arena(world_size) as arena:
        offset = {
            "before": -1,
            "behind": arena.layout.total_bytes,
            "a gap": arena.layout.staging + guards.used_bytes(arena.layout)[1],
        }[outside]
        guards.ctypes.c_ubyte.from_address(arena.address(offset)).value = 1


# --- inputs and outputs between guards


@pytest.mark.parametrize("world_size", [2, 3])
def test_nothing_is_read_outside_the_inputs(ranks, world_size):
    """Ragged sizes whose tiles stand out on every side, and the caller's own out."""
    calls = []
    for op, plan in plans_of_all_ops(world_size):
        for sizes in ((33, 41, 24), (5, 72, 40)):
            case = Case(*((1, sizes[0] * sizes[1], 0) if op == "all_reduce" else sizes), BF16, world_size, "")
            calls.append(Call(op, case, "tagged", len(calls), plan=plan, into_out=True))
    judge_all(calls, ranks(world_size).run(with_inputs_at_edges, calls))


def with_inputs_at_edges(rank, world_size, calls):
    rank_side.prepare_arena(Setup())
    results = []
    for end in (False, True):
        full = torch.full

        def out_at_the_edge(*args, end=end, full=full, **options):
            return guards.at_the_edge(full(*args, **options), end)

        with mock.patch.object(rank_side.torch, "full", out_at_the_edge):
            results.append(make(rank, calls, lambda x, end=end: guards.at_the_edge(x, end)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first.view(torch.int16), second.view(torch.int16))
    return [result.clone() for result in results[0]]
