"""A kernel whose last wait fails leaves no sums behind, also not those of tiles that it had finished.

One rank of two, by itself: the flags of its peer are all there but the one that the last tile waits for.
"""

from __future__ import annotations

import types

import pytest
import torch

from tp_overlap_kernels.dispatch import Plan
from tp_overlap_kernels.lang.launch import Launch
from tp_overlap_kernels.memory.arena import heap_of
from tp_overlap_kernels.memory.layout import layout
from tp_overlap_kernels.memory.record import Record
from tp_overlap_kernels.ops import launches, norm_launches
from tp_overlap_kernels.ops.chunked import _Call
from tp_overlap_kernels.ops.norm import Norm

W, EPOCH, HASH = 2, 1, 4321
WORD = EPOCH << 16 | HASH
M, N, K, BLOCK_M = 64, 32, 16, 16
PLAN = f"block_m={BLOCK_M},block_n=32,block_k=16,num_stages=2,num_warps=4,group_m=8"
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
DEVICES = [
    "cpu",
    pytest.param(
        "cuda",
        marks=[pytest.mark.gpu, pytest.mark.skipif(not HOPPER, reason="needs a CUDA device of compute capability 9.0")],
    ),
]


def arena(device="cpu"):
    """As much of an arena as launchers look at, on real memory; rank 0 runs two programs, so that one may be over."""
    room, device = layout(256, 64, 2, W), torch.device(device)
    buffers = [torch.zeros(room.total_bytes, dtype=torch.uint8, device=device) for _ in range(W)]
    bases = [buffer.data_ptr() for buffer in buffers]
    control = torch.zeros(64, dtype=torch.int64)
    control[8], control[9] = bases[0] + room.header, 8 * W
    return types.SimpleNamespace(
        layout=room,
        buffers=buffers,
        world_size=W,
        rank=0,
        device=device,
        heap=heap_of(bases, 0, device),
        control=control.to(device),
        record=Record(device),
        programs=2,
        timeout_s=0.05,
        timeout_ns=50_000_000,
        cache={},
    )


def slots(room, offset, count):
    """The first slots of a pad of rank 0."""
    return room.buffers[0][offset : offset + 8 * count].view(torch.int64)


def zeros(room, *shape):
    return torch.zeros(shape, dtype=torch.bfloat16, device=room.device)


def gemm(launch, plan, rows):
    def run(room):
        out, a, b = zeros(room, rows, N), zeros(room, M, K), zeros(room, N, K)
        launch(room, Plan.parse(f"{plan}:{PLAN}"), a, b, None, out, HASH)
        return out

    return run


def a_sum(launch, plan):
    def run(room):
        out = zeros(room, 4 * 1024)
        launch(room, Plan(plan), torch.ones_like(out), out, HASH)
        return out

    return run


def rows_of_a_sum(room):
    out = zeros(room, M // W * 4, N * 2)
    launches.reduce_scatter(room, zeros(room, M * 4, N * 2), None, out, HASH)
    return out


def sum_and_norm(room):
    results = zeros(room, 2, 4, N)  # y and new_residual
    norm = Norm(zeros(room, 4, N), zeros(room, N), 1e-5, *results)
    norm_launches.all_reduce_add_rms_norm(room, torch.ones_like(results[0]), norm, HASH)
    return results


TILES, OWN_TILES = M // BLOCK_M, M // BLOCK_M // W
# what runs, and the slot that is missing: pad, index; kernels that copy make two blocks of what they get
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
        lambda room: (room.one_shot_flags + 8 * room.one_shot_tiles * W * (EPOCH & 1), 3),
    ),
    "all_reduce_add_rms_norm": (
        sum_and_norm,
        lambda room: (room.one_shot_flags + 8 * room.one_shot_tiles * W * (EPOCH & 1), 3 * W + 1),
    ),
    "all_reduce_two_shot": (
        a_sum(launches.all_reduce_two_shot, "two_shot"),
        lambda room: (room.result_flags, 3),
    ),
    "reduce_scatter": (rows_of_a_sum, lambda room: (room.partial_flags, 3)),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KERNELS)
def test_no_sum_is_left_where_the_last_wait_fails(name, device):
    run, missing = KERNELS[name]
    for fails in (False, True):
        room = arena(device)
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
        out = run(room).cpu()
        assert (room.record.read() is not None) == fails
        assert not out.isnan().any() if not fails else out.isnan().all(), f"{out.isnan().sum()} of {out.numel()}"


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("failed", [0, 1])
@pytest.mark.parametrize("n", [1, 4096, 10001])
def test_after_pieces(n, failed, device):
    """The kernel of `launches.spoil`, which runs on devices alone."""
    room = arena(device)
    out = zeros(room, n + 5)
    room.control[4] = failed
    meta = {"DTYPE": launches._triton_dtype(out), "num_warps": 4}
    launch = Launch(launches.stream_signals.spoil_call, meta, device == "cpu")
    launch(1, out, room.control, n)
    assert out[:n].isnan().all() == bool(failed) and not out[n:].isnan().any()


def test_the_end_of_a_chunked_call():
    room = arena()
    out = zeros(room, 5000)
    room.control[4] = 1
    _Call(room, "gemm_all_reduce", HASH).end(out)
    assert out.isnan().all()
