"""Shapes of models, late ranks, compiled calls, failures: what each rank does, one function a property.

Inputs are made on the device from (case, rank, call), so that every rank can make every other rank's and hold its own
result against float64 with the computed tolerance.
"""

import time

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.cases import GPU_ALL_REDUCE_CASES, GPU_CASES, Case, on
from tests.ops.calls import group_name
from tests.tolerance import Rounding, check, check_bites, tolerance
from tests.truth import Truth
from tp_overlap_kernels.dispatch.defaults import KERNELS_SM90, SM90_PLANS, plan_of_kernel
from tp_overlap_kernels.memory import arena as arenas

MAX_M, MAX_N = 8192, 8192
OPS = torch.ops.tp_overlap


def hopper(op: str) -> list[str]:
    """Each of the CUDA kernels for Hopper, sending whole tiles by turns, and small pieces at any time."""
    ways = ("", ",lead=3,piece=512,senders=0")
    kernels = [plan_of_kernel(name, kernel) for name in SM90_PLANS for kernel in KERNELS_SM90[name, op]]
    return [f"{kernel}{way}" for kernel in kernels for way in ways]


GEMM_PLANS = (
    "one_shot",
    "decode",
    "two_shot",
    *hopper("gemm_all_reduce"),
    "chunked",
    "unfused_one_shot",
    "unfused_two_shot",
    "unfused_sentinel",
    "unfused_nccl",
)
SCATTER_PLANS = (
    "push",
    "one_shot",
    *hopper("gemm_reduce_scatter"),
    "chunked",
    "unfused_push",
    "unfused_sentinel",
    "unfused_nccl",
)
SUM_PLANS = ("one_shot", "two_shot", "sentinel", "nccl")
OWNER_F32 = ("two_shot", "push")  # chunked: cuBLAS may round the owner's product before it adds


def operands(case: Case, rank: int, call: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b of a rank, on the device of whoever asks."""
    generator = torch.Generator("cuda").manual_seed(1000003 * call + 101 * rank + case.M)
    a = torch.randn(case.M, case.K, generator=generator, device="cuda").to(case.dtype)
    b = (torch.randn(case.N, case.K, generator=generator, device="cuda") / max(case.K, 1) ** 0.5).to(case.dtype)
    return a, b


def truth(case: Case, call: int) -> Truth:
    """Float64, from the rounded inputs of all ranks."""
    partials, magnitude = [], 0.0
    for rank in range(case.world_size):
        a, b = (x.double() for x in operands(case, rank, call))
        partials.append(a @ b.T)
        magnitude = magnitude + a.abs() @ b.abs().T
    stacked = torch.stack(partials)
    return Truth(stacked.sum(0), stacked, magnitude, case.dtype, case.K)


def owners(case: Case) -> torch.Tensor:
    """(M,) the rank that owns each row."""
    rows = -(-case.M // case.world_size)
    return torch.arange(case.M, device="cuda") // max(rows, 1)


def bits_agree(x: torch.Tensor) -> bool:
    """Whether all ranks hold the same bits, by a hash that knows positions."""
    words = x.reshape(-1).view(torch.int16).long()
    sums = (words * (torch.arange(words.numel(), device=x.device) % 65521 + 1)).sum().cpu().view(1)
    gathered = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, int(sums))
    return len(set(gathered)) == 1


def plans_are_right(rank: int, W: int) -> None:
    """Every plan on every shape it can run, three calls in a row, outputs full of NaN beforehand."""
    group = group_name()
    for case in (on(case, W) for case in GPU_CASES):
        truths = [truth(case, call) for call in range(3)]
        inputs = [operands(case, rank, call) for call in range(3)]
        for plan in GEMM_PLANS:
            _gemm(rank, group, case, plan, truths, inputs, scatter=False)
        for plan in SCATTER_PLANS:
            _gemm(rank, group, case, plan, truths, inputs, scatter=True)


def _gemm(rank, group, case, plan, truths, inputs, scatter):
    op = OPS.gemm_reduce_scatter_out if scatter else OPS.gemm_all_reduce_out
    rows = case.rows_of(rank) if scatter else slice(0, case.M)
    shape = (max(0, rows.stop - rows.start), case.N)
    outs = [torch.full(shape, float("nan"), dtype=case.dtype, device="cuda") for _ in inputs]
    try:
        with tpo.force_plan(plan):
            for (a, b), out in zip(inputs, outs, strict=True):
                op(a, b, group, out)
    except tpo.InvalidInput as refusal:
        assert "cannot run" in str(refusal), refusal
        return
    torch.cuda.synchronize()
    tpo.check()
    what = f"{plan} {'scatter' if scatter else 'sum'} {case}"
    for call, (exact, out) in enumerate(zip(truths, outs, strict=True)):
        if out.numel() == 0:
            continue
        owner = owners(case) if plan in OWNER_F32 else None
        rounding = Rounding.OWNER_F32 if plan in OWNER_F32 else Rounding.EACH_HOP if "nccl" in plan else Rounding.WIRE
        part = exact.rows(rows)
        tol = tolerance(part, rounding, owner=None if owner is None else owner[rows])
        check(out, part, tol, f"{what}, call {call}")
        if call == 0 and case.K >= 64:
            check_bites(part, tol)
        if not scatter:
            assert bits_agree(out), f"{what}, call {call}: ranks hold different bits"


def sums_are_right(rank: int, W: int) -> None:
    """all_reduce, every plan."""
    group = group_name()
    for case in (on(case, W) for case in GPU_ALL_REDUCE_CASES):
        messages = []
        for source in range(W):
            generator = torch.Generator("cuda").manual_seed(source + 7)
            messages.append(torch.randn(case.N, generator=generator, device="cuda").to(case.dtype))
        stacked = torch.stack([m.double() for m in messages])
        exact = Truth(stacked.sum(0), stacked, stacked.abs().sum(0), case.dtype, 0)
        for plan in SUM_PLANS:
            try:
                with tpo.force_plan(plan):
                    for _ in range(3):
                        total = OPS.all_reduce(messages[rank], group)
            except tpo.InvalidInput as refusal:
                assert "cannot run" in str(refusal), refusal
                continue
            torch.cuda.synchronize()
            tpo.check()
            rounding = Rounding.EACH_HOP if plan == "nccl" else Rounding.WIRE
            check(total, exact, tolerance(exact, rounding), f"{plan} {case}")
            assert bits_agree(total), f"{plan} {case}: ranks hold different bits"


def graphs_replay(rank: int, W: int) -> None:
    """Two graphs, of three and of two calls, replayed an odd number of times, interleaved, eager calls in between."""
    group = group_name()
    small, large = Case(16, 4096, 1024, torch.bfloat16, W, "small"), Case(768, 2048, 512, torch.bfloat16, W, "large")
    inputs = {case: operands(case, rank, 0) for case in (small, large)}

    def calls(case, n):
        a, b = inputs[case]
        return [OPS.gemm_all_reduce(a, b, group) for _ in range(n)] + [OPS.gemm_reduce_scatter(a, b, group)]

    graphs = []
    for case, n in ((small, 2), (large, 1)):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                calls(case, n)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            outs = calls(case, n)
        graphs.append((case, graph, outs))
    for turn in range(7):
        for case, graph, outs in graphs if turn % 2 else reversed(graphs):
            a, b = operands(case, rank, turn)
            inputs[case][0].copy_(a)
            inputs[case][1].copy_(b)
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            eager = OPS.gemm_all_reduce(a, b, group)
            torch.cuda.synchronize()
            tpo.check()
            exact = truth(case, turn)
            tol = tolerance(exact, Rounding.WIRE)
            for out in (*outs[:-1], eager):
                check(out, exact, tol, f"graph of {case}, turn {turn}")
            rows = case.rows_of(rank)
            check(outs[-1], exact.rows(rows), tol[rows], f"scatter in graph of {case}, turn {turn}")


def late_ranks(rank: int, W: int) -> None:
    """Each rank in turn arrives milliseconds late."""
    group = group_name()
    case = Case(300, 1024, 256, torch.bfloat16, W, "late")
    for late in range(W):
        for call, plan in enumerate(("one_shot", "decode", "two_shot", "unfused_sentinel", "unfused_two_shot")):
            a, b = operands(case, rank, call)
            if plan in ("unfused_sentinel", "decode"):
                a = a[:32]
            if rank == late:
                torch.cuda._sleep(20_000_000)
            with tpo.force_plan(plan):
                out = OPS.gemm_all_reduce(a, b, group)
            torch.cuda.synchronize()
            tpo.check()
            exact = truth(case, call).rows(slice(0, a.shape[0]))
            check(out, exact, tolerance(exact, Rounding.WIRE), f"{plan}, rank {late} late")


def compiles(rank: int, W: int) -> None:
    """torch.compile(fullgraph=True) with dynamic M, and opcheck of every op."""
    group = group_name()

    @torch.compile(fullgraph=True, dynamic=True)
    def layer(a, b):
        return OPS.gemm_all_reduce(a * 1, b, group) + 0, OPS.gemm_reduce_scatter(a * 1, b, group) + 0

    for call, M in enumerate((33, 64, 257)):
        case = Case(M, 512, 256, torch.bfloat16, W, f"compiled {M}")
        a, b = operands(case, rank, call)
        total, part = layer(a, b)
        exact = truth(case, call)
        tol = tolerance(exact, Rounding.WIRE)
        check(total, exact, tol, str(case))
        check(part, exact.rows(case.rows_of(rank)), tol[case.rows_of(rank)], str(case))
    a, b = operands(Case(33, 128, 64, torch.bfloat16, W, "opcheck"), rank, 0)
    torch.library.opcheck(OPS.gemm_all_reduce.default, (a, b, group))
    torch.library.opcheck(OPS.gemm_reduce_scatter.default, (a, b, group))
    torch.library.opcheck(OPS.all_reduce.default, (a, group))
    torch.library.opcheck(
        OPS.gemm_all_reduce_out.default, (a, b, group, torch.empty(33, 128, device="cuda", dtype=a.dtype))
    )


def growth_in_capture_is_refused(rank: int, W: int) -> None:
    """init with larger sizes inside a capture names the call to make before it."""
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            torch.zeros(1, device="cuda")
            tpo.init(max_M=16384, max_N=8192)
    except tpo.InvalidInput as error:
        assert "max_M=16384" in str(error) and "before the capture" in str(error), error
    else:
        raise AssertionError("the arena grew during a capture")


def failures_are_named(rank: int, W: int) -> None:
    """Another M on rank 1; then a rank that never comes; after each, close and init make a group that works."""
    group = group_name()
    b = torch.randn(512, 256, device="cuda").bfloat16()
    _expect(
        tpo.CallMismatch,
        lambda: OPS.gemm_all_reduce(torch.ones(64 + 8 * rank, 256, device="cuda").bfloat16(), b, group),
    )
    arenas.get(group).timeout_s = 2.0
    started = time.monotonic()
    if rank == 0:
        _expect(tpo.PeerTimeout, lambda: OPS.gemm_all_reduce(torch.ones(64, 256, device="cuda").bfloat16(), b, group))
        assert time.monotonic() - started < 6, "the wait was not bounded"
    dist.barrier()
    tpo.close()
    tpo.init(max_M=8192, max_N=8192)
    late_ranks(rank, W)


def a_rank_that_closes_ends_the_waits_for_it(rank: int, W: int) -> None:
    """Long before the timeout; the others are told by words in host memory, and every rank names it."""
    group, arena = group_name(), arenas.get(group_name())
    arena.timeout_s = 60.0
    a, b = torch.ones(64, 256, device="cuda").bfloat16(), torch.ones(512, 256, device="cuda").bfloat16()
    for plan in ("one_shot", "decode", "two_shot", "unfused_sentinel"):
        with tpo.force_plan(plan):
            OPS.gemm_all_reduce(a, b, group)  # compiled, where it is not yet
            torch.cuda.synchronize()
            dist.barrier()
            started = time.monotonic()
            if rank == W - 1:
                time.sleep(0.3)
            else:
                _expect(tpo.PeerClosed, lambda: OPS.gemm_all_reduce(a, b, group), f"rank {W - 1}")
                assert time.monotonic() - started < 3, "the wait lasted"
        tpo.close()
        tpo.init(max_M=8192, max_N=8192)
        arenas.get(group).timeout_s = 60.0


def one_rank_that_gives_up_tells_the_others(rank: int, W: int) -> None:
    """Rank W-1 never comes; rank 0 gives up after two seconds, the others would wait a minute."""
    if W < 3:
        return
    group = group_name()
    arenas.get(group).timeout_s = 2.0 if rank == 0 else 60.0
    a, b = torch.ones(64, 256, device="cuda").bfloat16(), torch.ones(512, 256, device="cuda").bfloat16()
    dist.barrier()
    started = time.monotonic()
    if rank != W - 1:
        _expect(tpo.PeerTimeout, lambda: OPS.gemm_all_reduce(a, b, group), f"rank {W - 1}")
        assert time.monotonic() - started < 6, "it was not told"
    dist.barrier()
    tpo.close()
    tpo.init(max_M=8192, max_N=8192)


def streams_take_turns(rank: int, W: int) -> None:
    """Calls on three streams that nobody orders, busy for a while each, other whiles on other ranks; then captured."""
    group = group_name()
    case = Case(300, 1024, 256, torch.bfloat16, W, "streams")
    plans = ("one_shot", "two_shot", "unfused_two_shot")
    inputs = [operands(case, rank, call) for call in range(9)]
    torch.cuda.synchronize()
    streams, outs = [torch.cuda.Stream() for _ in range(3)], []
    for call, (a, b) in enumerate(inputs):
        with torch.cuda.stream(streams[call % 3]), tpo.force_plan(plans[call // 3 % 3]):
            torch.cuda._sleep(1_000_000 * ((call * 5 + rank * 3) % 7))
            outs.append(OPS.gemm_all_reduce(a, b, group))
    torch.cuda.synchronize()
    tpo.check()
    graph, main, side = torch.cuda.CUDAGraph(), torch.cuda.Stream(), torch.cuda.Stream()
    with torch.cuda.graph(graph, stream=main), tpo.force_plan("two_shot"):
        side.wait_stream(main)
        captured = []
        for call, (a, b) in enumerate(inputs):
            with torch.cuda.stream(side if call % 2 else main):
                captured.append(OPS.gemm_all_reduce(a, b, group))
        main.wait_stream(side)
    for _ in range(3):
        for out in captured:
            out.fill_(float("nan"))
        graph.replay()
    torch.cuda.synchronize()
    tpo.check()
    for call, pair in enumerate(zip(outs, captured, strict=True)):
        exact = truth(case, call)
        for out in pair:
            check(out, exact, tolerance(exact, Rounding.WIRE), f"call {call} on another stream")


def _expect(kind: type[Exception], call, named: str = "rank") -> None:
    try:
        out = call()
    except kind:
        pass  # told of the failure before it called
    else:
        torch.cuda.synchronize()
        assert out.isnan().all(), "the output of a failed call is not NaN"
    for attempt in (tpo.check, call):
        try:
            attempt()
        except kind as error:
            assert named in str(error), error
        else:
            raise AssertionError(f"{attempt} passed on a failed group")
    if kind is tpo.CallMismatch:
        dist.barrier()
        tpo.close()
        tpo.init(max_M=8192, max_N=8192)


CHECKS = (
    plans_are_right,
    sums_are_right,
    graphs_replay,
    late_ranks,
    compiles,
    growth_in_capture_is_refused,
    failures_are_named,
    streams_take_turns,
    a_rank_that_closes_ends_the_waits_for_it,
    one_rank_that_gives_up_tells_the_others,
)
