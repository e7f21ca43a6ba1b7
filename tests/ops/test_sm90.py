"""The plan sm90 up to the C launcher, which keeps what it is given: what is copied, what is known again, what fits."""

import pytest
import torch

import tp_overlap_kernels as tpo
from tp_overlap_kernels.dispatch import Plan, Problem, Topology, select
from tp_overlap_kernels.dispatch.defaults import KERNELS_SM90, plan_of_kernel
from tp_overlap_kernels.dispatch.select import rows_of_whole_tiles, why_not
from tp_overlap_kernels.dispatch.table import Entry, Table
from tp_overlap_kernels.kernels.gemm_collectives import SCHEDULES, TILE_BYTES, TRACE_ROLES, TRACE_WORDS
from tp_overlap_kernels.kernels.start import Start
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.memory.layout import layout
from tp_overlap_kernels.ops import gemm_all_reduce, gemm_reduce_scatter, launches, sm90

M, N, K = 512, 256, 64
PLAN = Plan.parse("sm90:block_n=128,group_m=8,lead=5,stagings=2,piece=2048,senders=9,cluster_m=2,cluster_n=1")
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
    "piece",
    "senders",
    "hash",
    "start",
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
    launcher = arena.cache["sm90", module.OP] = Launcher()
    monkeypatch.setattr(module, "plan_for", lambda *args: (PLAN, 7))
    monkeypatch.setattr(launches, "rows_of_whole_tiles", lambda *of: M)
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
    expected |= {"M": M, "N": N, "K": K, "a_stride": K, "b_stride": K, "group_rows": 8, "lead": 5, "piece": 2048}
    expected |= {"schedule": SCHEDULES["sm90", "gemm_all_reduce"][128, 2, 2, 1], "senders": 9}
    expected |= {"dtype": 0 if dtype == torch.bfloat16 else 1, "hash": 7, "start": Start.LAUNCHED_AHEAD, "stream": 77}
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


def test_calls_are_traced_while_the_context_lasts():
    tpo.init(max_M=1024, max_N=512)
    arena = arenas.get("local")
    told = []
    arena.cache["sm90", "gemm_all_reduce"] = type("Launcher", (), {"trace": lambda self, *of: told.append(of)})()
    with pytest.raises(ZeroDivisionError), sm90.traced(arena, "sm90", "gemm_all_reduce", 5) as trace:
        assert told == [(trace.data_ptr(), 5)] and not trace.any()
        assert trace.shape == (arena.programs, len(TRACE_ROLES), 5, TRACE_WORDS) and trace.dtype == torch.int32
        raise ZeroDivisionError
    assert told[1:] == [(0, 0)]
    tpo.close()


def on_h200(W: int, **limits) -> Topology:
    return Topology("NVIDIA H200", "cuda", W, native=True, **limits)


@pytest.mark.parametrize("kernels", KERNELS_SM90, ids="-".join)
def test_dispatch_knows_which_kernels_there_are(kernels):
    schedules = SCHEDULES[kernels]
    assert set(schedules) == set(KERNELS_SM90[kernels])
    assert len({schedule.code for schedule in schedules.values()}) == len(schedules)
    for (cols, _, down, across), schedule in schedules.items():
        assert (schedule.rows, schedule.cols, schedule.blocks) == (128 * down, cols * across, down * across)


@pytest.mark.parametrize("W", [2, 3, 4, 8])
@pytest.mark.parametrize(("max_M", "max_N"), [(8192, 8192), (2048, 4096), (4099, 1032)])
@pytest.mark.parametrize("kernel", sorted({kernel for kernels in KERNELS_SM90.values() for kernel in kernels}), ids=str)
def test_the_rows_that_fit_have_room_and_a_cluster_more_a_rank_would_not(W, max_M, max_N, kernel):
    room, (cols, _, down, across) = layout(max_M, max_N, 2, W), kernel
    rows = rows_of_whole_tiles(max_N, plan_of_kernel("sm90", kernel), on_h200(W, **room.limits()))

    def fits(rows):
        owned = down * -(-(rows // W) // (128 * down)) * across * -(-max_N // (cols * across))  # tiles of an owner
        staged = owned * TILE_BYTES[cols]
        return staged <= room.staging_slot_bytes and max(2, W - 1) * staged <= room.total_bytes - room.result

    assert fits(rows) and not fits(rows + 128 * down * W)
    if max_N % 256 == 0 and max_M % (256 * W) == 0:
        assert rows == max_M


@pytest.mark.parametrize(
    ("staged", "slots", "pairs"),
    [(100, 400, 50), (7, 400, 3), (100, 31, 3), (1, 400, 0)],
    ids=["all", "staging", "flags of four ranks", "not one pair"],
)
def test_each_part_of_the_arena_may_be_what_limits(staged, slots, pairs):
    topology, wide = (
        on_h200(4, staged_bytes=staged * TILE_BYTES[256], tile_slots=slots),
        plan_of_kernel("sm90", (256, 1, 2, 1)),
    )
    assert rows_of_whole_tiles(256, wide, topology) == pairs * 4 * 256
    assert rows_of_whole_tiles(257, wide, topology) == pairs // 2 * 4 * 256


def test_an_arena_without_room_for_its_tiles_is_left_to_another_plan():
    """Also where a table names the plan; with the room that the refusal asks for it is taken."""
    problem = Problem("gemm_all_reduce", 512, 65536, 1, "bfloat16", 2)
    entry = Entry(problem.op, problem.N, problem.K, problem.dtype, problem.M, (PLAN,))
    measured = Table("", "NVIDIA H200", 2, (entry,))
    too_small = on_h200(2, **layout(512, 8192, 2, 2).limits())
    reason = why_not(PLAN, problem, too_small)
    assert "no room" in reason and "max_M=512 and max_N=65536" in reason
    assert select(problem, too_small, measured).name != "sm90"
    assert select(problem, on_h200(2, **layout(512, 65536, 2, 2).limits()), measured).name == "sm90"
