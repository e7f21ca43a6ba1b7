"""A kernel whose last wait fails leaves no sums behind, also not those of tiles that it had finished.

One rank of two, by itself: the flags of its peer are all there but the one that the last tile waits for.
"""

from __future__ import annotations

import types

import pytest
import torch

from tp_overlap_kernels.dispatch import Plan
from tp_overlap_kernels.lang.launch import Launch
from tp_overlap_kernels.memory.layout import layout
from tp_overlap_kernels.memory.record import Record
from tp_overlap_kernels.ops import launches
from tp_overlap_kernels.ops.chunked import _Call

W, EPOCH, HASH = 2, 1, 4321
WORD = EPOCH << 16 | HASH
M, N, K, BLOCK_M = 64, 32, 16, 16
PLAN = f"block_m={BLOCK_M},block_n=32,block_k=16,num_stages=2,num_warps=4,group_m=8"
CPU = torch.device("cpu")


def arena():
    """As much of an arena as launchers look at, on real memory; rank 0 runs one program."""
    room = layout(256, 64, 2, W)
    buffers = [torch.zeros(room.total_bytes, dtype=torch.uint8) for _ in range(W)]
    bases = [buffer.data_ptr() for buffer in buffers]
    control = torch.zeros(64, dtype=torch.int64)
    control[8], control[9] = bases[0] + room.header, 8 * W
    return types.SimpleNamespace(
        layout=room,
        buffers=buffers,
        world_size=W,
        rank=0,
        device=CPU,
        heap=torch.tensor(bases),
        control=control,
        record=Record(CPU),
        programs=1,
        timeout_s=0.05,
        timeout_ns=50_000_000,
        cache={},
    )


def slots(room, offset, count):
    """The first slots of a pad of rank 0."""
    return room.buffers[0][offset : offset + 8 * count].view(torch.int64)


def gemm(launch, plan, rows):
    def run(room):
        out = torch.zeros(rows, N, dtype=torch.bfloat16)
        a, b = torch.ones(M, K, dtype=torch.bfloat16), torch.ones(N, K, dtype=torch.bfloat16)
        launch(room, Plan.parse(f"{plan}:{PLAN}"), a, b, None, out, HASH)
        return out

    return run


def a_sum(launch, plan):
    def run(room):
        out = torch.zeros(4 * 1024, dtype=torch.bfloat16)
        launch(room, Plan(plan), torch.ones_like(out), out, HASH)
        return out

    return run


def rows_of_a_sum(room):
    out = torch.zeros(M // W, N, dtype=torch.bfloat16)
    launches.reduce_scatter(room, torch.ones(M, N, dtype=torch.bfloat16), None, out, HASH)
    return out


TILES, OWN_TILES = M // BLOCK_M, M // BLOCK_M // W
# what runs, and the slot that is missing: pad, index
KERNELS = {
    "gemm_all_reduce_one_shot": (
        gemm(launches.gemm_all_reduce_one_shot, "one_shot", M),
        lambda room: (room.one_shot_flags + 8 * room.one_shot_tiles * W * (EPOCH & 1), (TILES - 1) * W + 1),
    ),
    "gemm_reduce_scatter_one_shot": (
        gemm(launches.gemm_reduce_scatter_one_shot, "one_shot", M // W),
        lambda room: (room.one_shot_flags + 8 * room.one_shot_tiles * W * (EPOCH & 1), (TILES - 1) * W + 1),
    ),
    "gemm_all_reduce_two_shot": (
        gemm(launches.gemm_all_reduce_two_shot, "two_shot", M),
        lambda room: (room.result_flags, OWN_TILES + OWN_TILES - 1),
    ),
    "gemm_reduce_scatter": (
        gemm(launches.gemm_reduce_scatter, "push", M // W),
        lambda room: (room.partial_flags, (OWN_TILES - 1) * W + 1),
    ),
    "all_reduce_one_shot": (
        a_sum(launches.all_reduce_one_shot, "one_shot"),
        lambda room: (room.one_shot_flags + 8 * room.one_shot_tiles * W * (EPOCH & 1), 1),
    ),
    "all_reduce_two_shot": (
        a_sum(launches.all_reduce_two_shot, "two_shot"),
        lambda room: (room.result_flags, 1),
    ),
    "reduce_scatter": (rows_of_a_sum, lambda room: (room.partial_flags, 1)),
}


@pytest.mark.parametrize("name", KERNELS)
def test_no_sum_is_left_where_the_last_wait_fails(name):
    run, missing = KERNELS[name]
    for fails in (False, True):
        room = arena()
        at = room.layout
        for pad, count in (
            (at.one_shot_flags, 2 * at.one_shot_tiles * W),
            (at.partial_flags, at.tile_slots),
            (at.result_flags, at.tile_slots),
        ):
            slots(room, pad, count).fill_(WORD)
        if fails:
            pad, index = missing(at)
            slots(room, pad, index + 1)[index] = 0
        out = run(room)
        assert (room.record.read() is not None) == fails
        assert not out.isnan().any() if not fails else out.isnan().all(), f"{out.isnan().sum()} of {out.numel()}"


@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("n", [1, 4096, 10001])
def test_after_pieces(n, failed):
    """The kernel of `launches.spoil`, which runs on devices alone."""
    room, out = arena(), torch.zeros(n + 5, dtype=torch.bfloat16)
    room.control[4] = failed
    launch = Launch(launches.stream_signals.spoil_call, {"DTYPE": launches._triton_dtype(out), "num_warps": 4}, True)
    launch(1, out, room.control, n)
    assert out[:n].isnan().all() == bool(failed) and not out[n:].isnan().any()


def test_the_end_of_a_chunked_call():
    room, out = arena(), torch.zeros(5000, dtype=torch.bfloat16)
    room.control[4] = 1
    _Call(room, "gemm_all_reduce", HASH).end(out)
    assert out.isnan().all()
