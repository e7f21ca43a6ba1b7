"""The plan sm90 up to the C launcher, which keeps what it is given: what is copied, what is known again, what fits."""

import pytest
import torch

import tp_overlap_kernels as tpo
from tp_overlap_kernels.dispatch import Plan
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.kernels.gemm import LARGE, SMALL
from tp_overlap_kernels.kernels.gemm_collectives import TILE_BYTES, rows_that_fit
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.memory.layout import layout
from tp_overlap_kernels.ops import gemm_all_reduce, gemm_reduce_scatter, sm90

M, N, K = 512, 256, 64
PLAN = Plan.parse("sm90:block_n=128,group_m=8,lead=5")
MODULES = [gemm_all_reduce, gemm_reduce_scatter]
NAMES = (
    "a",
    "b",
    "bias",
    "out",
    "M",
    "N",
    "K",
    "a_stride",
    "b_stride",
    "dtype",
    "schedule",
    "group_rows",
    "lead",
    "hash",
)


class Launcher:
    """calls: of the kernel, by argument name."""

    def __init__(self):
        self.calls = []

    def __call__(self, *args):
        self.calls.append(dict(zip((*NAMES, "stream"), args, strict=True)))


@pytest.fixture(params=MODULES, ids=lambda module: module.OP)
def kernel(request, monkeypatch):
    """One rank on a CPU that is told to run sm90, in an arena laid out for two."""
    module = request.param
    tpo.init(max_M=1024, max_N=512)
    arena = arenas.get("local")
    launcher = arena.cache[module.OP] = Launcher()
    monkeypatch.setattr(module, "plan_for", lambda *args: (PLAN, 7))
    monkeypatch.setattr(sm90, "rows_that_fit", lambda arena, plan, N: M)
    monkeypatch.setattr(sm90, "stream_of", lambda index: 77)
    launcher.op = getattr(torch.ops.tp_overlap, module.OP)
    launcher.out_op = getattr(torch.ops.tp_overlap, module.OP + "_out")
    yield launcher
    tpo.close()


def inputs(dtype=torch.bfloat16, rows=M, cols=K):
    return torch.zeros(rows, cols, dtype=dtype), torch.zeros(N, cols, dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["plain", "bias"])
def test_a_call_and_its_like_hand_over_the_same(kernel, dtype, with_bias):
    a, b = inputs(dtype)
    bias = torch.zeros(N, dtype=dtype) if with_bias else None
    expected = {"a": a.data_ptr(), "b": b.data_ptr(), "bias": bias.data_ptr() if with_bias else 0}
    expected |= {"M": M, "N": N, "K": K, "a_stride": K, "b_stride": K, "schedule": SMALL, "group_rows": 8, "lead": 5}
    expected |= {"dtype": 0 if dtype == torch.bfloat16 else 1, "hash": 7, "stream": 77}
    for _ in range(3):  # the second and the third are known
        out = kernel.op(a, b, "local", bias)
        assert kernel.calls[-1] == expected | {"out": out.data_ptr()}


def test_rows_that_the_copy_engine_cannot_read_are_copied(kernel):
    a, b = inputs(cols=K + 3)
    for _ in range(2):
        kernel.op(a[:, :K], b[:, :K], "local")
        call = kernel.calls[-1]
        assert call["a"] != a.data_ptr() and call["b"] != b.data_ptr()
        assert (call["K"], call["a_stride"], call["b_stride"]) == (K, K, K)
    kernel.op(a[:, : K + 3], b[:, : K + 3], "local")
    assert (kernel.calls[-1]["K"], kernel.calls[-1]["a_stride"]) == (K + 3, K + 8)  # rounded up to whole 16 bytes


def test_longer_rows_are_not_copied(kernel):
    a, b = inputs(cols=2 * K)
    kernel.op(a[:, :K], b[:, K:], "local")
    call = kernel.calls[-1]
    assert (call["a"], call["b"]) == (a.data_ptr(), b[:, K:].data_ptr())
    assert (call["K"], call["a_stride"], call["b_stride"]) == (K, 2 * K, 2 * K)


def test_an_output_that_the_copy_engine_cannot_write_is_copied_to(kernel):
    a, b = inputs()
    out = torch.zeros(M * N + 1, dtype=a.dtype)[1:].view(M, N)
    for _ in range(2):
        kernel.out_op(a, b, "local", out)
        assert kernel.calls[-1]["out"] % 16 == 0 and kernel.calls[-1]["out"] != out.data_ptr()


def test_a_call_larger_than_the_arena_runs_in_chunks(kernel):
    kernel.op(*inputs(rows=M + 100), "local")
    assert kernel.calls[0]["M"] == M and sum(call["M"] for call in kernel.calls) >= M + 100


@pytest.mark.parametrize("W", [2, 3, 4, 8])
@pytest.mark.parametrize(("max_M", "max_N"), [(8192, 8192), (2048, 4096), (4099, 1032)])
@pytest.mark.parametrize("schedule", [LARGE, SMALL], ids=["large", "small"])
def test_the_rows_that_fit_have_room_and_256_rows_a_rank_more_would_not(W, max_M, max_N, schedule):
    room = layout(max_M, max_N, 2, W)
    limits = {"staging_slot_bytes": room.staging_slot_bytes, "result_bytes": room.total_bytes - room.result}
    rows = rows_that_fit(max_N, schedule.cols, W, **limits, tile_slots=room.tile_slots)

    def fits(rows):
        owned = 2 * -(-(rows // W) // 256) * -(-max_N // schedule.cols)  # tiles of an owner, of either kernel
        staged = owned * TILE_BYTES[schedule.cols]
        return staged <= limits["staging_slot_bytes"] and (W - 1) * staged <= limits["result_bytes"]

    assert fits(rows) and not fits(rows + 256 * W)
    if max_N % 256 == 0 and max_M % (256 * W) == 0:
        assert rows == max_M


@pytest.mark.parametrize(
    ("staged", "results", "slots", "pairs"),
    [(100, 300, 400, 50), (7, 300, 400, 3), (100, 23, 400, 3), (100, 300, 31, 3), (1, 300, 400, 0)],
    ids=["all", "staging", "results of three peers", "flags of four ranks", "not one pair"],
)
def test_each_part_of_the_arena_may_be_what_limits(staged, results, slots, pairs):
    tile = TILE_BYTES[256]
    limits = {"staging_slot_bytes": staged * tile, "result_bytes": results * tile, "tile_slots": slots}
    assert rows_that_fit(256, 256, 4, **limits) == pairs * 4 * 256
    assert rows_that_fit(257, 256, 4, **limits) == pairs // 2 * 4 * 256


def test_too_small_an_arena_is_refused_with_what_would_do():
    tpo.init(max_M=64, max_N=128)
    arena = arenas.get("local")
    arena.world_size = 2
    try:
        with pytest.raises(InvalidInput, match=r"no room for its tiles.*N=128.*max_M of at least 512"):
            sm90.rows_that_fit(arena, PLAN, 128)
        with pytest.raises(InvalidInput, match=r"block_n must be one of 128, 256"):
            sm90.rows_that_fit(arena, Plan.parse("sm90:block_n=64"), 128)
    finally:
        arena.world_size = 1
        tpo.close()
