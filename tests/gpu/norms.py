"""The ops that end in a norm on devices: every plan, results of every form, graphs, late ranks, compiled calls.

Calls and their judge are those of tests/ops/norms.py.
"""

from __future__ import annotations

import contextlib

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16, Case
from tests.ops.calls import group_name
from tests.ops.norms import EPS, FRESH, GEMM, IN_PLACE, OUT, SUM, NormCall, call_of, check_norm, invoke, judge, operands
from tp_overlap_kernels.dispatch import Plan, Problem
from tp_overlap_kernels.dispatch.problem import PLAN_NAMES
from tp_overlap_kernels.dispatch.select import why_not
from tp_overlap_kernels.memory import arena as arenas

MAX_M, MAX_N = 1024, 8192
OPS = torch.ops.tp_overlap
SIZES = [(1, 8192), (16, 8192), (5, 5120), (64, 4096), (3, 1003), (2, 8200), (0, 64), (300, 264)]  # M, H
K = 136


def plans_for(call: NormCall, M: int) -> list[str]:
    """The plans that can run this call here."""
    problem = Problem(call.op, M, call.H, call.case.K, str(call.case.dtype).split(".")[1], call.case.world_size)
    topology = arenas.get(group_name()).topology
    return [name for name in PLAN_NAMES[call.op] if why_not(Plan(name), problem, topology) is None]


def on_device(call: NormCall, rank: int) -> list[torch.Tensor]:
    return [x.cuda() for x in operands(call, rank)]


def check_calls(calls: list[NormCall], rank: int, late: int | None = None) -> None:
    """In a row, by their plans; each judged by every rank."""
    prepared, results = [on_device(call, rank) for call in calls], []
    for call, tensors in zip(calls, prepared, strict=True):
        if rank == late:
            torch.cuda._sleep(5_000_000)
        with tpo.force_plan(call.plan) if call.plan else contextlib.nullcontext():
            results.append(invoke(call, tensors, rank))
    torch.cuda.synchronize()
    tpo.check()
    for call, pair in zip(calls, results, strict=True):
        by_rank = [None] * call.case.world_size
        dist.all_gather_object(by_rank, tuple(result.cpu() for result in pair))
        judge(call, call.plan or "", by_rank)


def plans_are_right(rank: int, world_size: int) -> None:
    """Every plan on every size that it can run, in every form."""
    for op in (SUM, GEMM):
        for M, H in SIZES:
            if op == GEMM and H > MAX_N:
                continue
            case = Case(M, H, K * (op == GEMM), FP16 if M == 5 else BF16, world_size, "")
            for plan in plans_for(call_of(op, case), M):
                forms = enumerate((FRESH, OUT, IN_PLACE, FRESH))
                check_calls([call_of(op, case, form, number=i, plan=plan, bias=op == GEMM) for i, form in forms], rank)


def late_ranks(rank: int, world_size: int) -> None:
    """Each rank in turn comes milliseconds late; sums are exact."""
    for late in range(world_size):
        calls = [
            call_of(
                op, Case(16, 4096, K * (op == GEMM), BF16, world_size, ""), kind="integer", number=number, plan=plan
            )
            for op in (SUM, GEMM)
            for number, plan in enumerate(PLAN_NAMES[op][:2] * 2)
        ]
        check_calls([call for call in calls if call.plan in plans_for(call, 16)], rank, late)


def ranks_agree_wherever_their_tensors_lie(rank: int, world_size: int) -> None:
    """Rank 0's are at multiples of 16 bytes, the others' are not."""
    case = Case(7, 5120, 0, BF16, world_size, "")
    for plan in plans_for(call_of(SUM, case), 7):
        call = call_of(SUM, case, plan=plan)
        given = []
        for x in on_device(call, rank):
            memory = torch.zeros(x.numel() + 8, dtype=x.dtype, device="cuda")
            given.append(memory[rank : rank + x.numel()].view(x.shape).copy_(x))
        with tpo.force_plan(plan):
            results = OPS.all_reduce_add_rms_norm(*given, EPS, group_name())
        torch.cuda.synchronize()
        by_rank = [None] * world_size
        dist.all_gather_object(by_rank, tuple(result.cpu() for result in results))
        judge(call, plan, by_rank)


def graphs_replay(rank: int, world_size: int) -> None:
    """A layer of each op on the residual of the one before it, replayed with new inputs, eager calls in between."""
    a, b, residual, weight = on_device(call_of(GEMM, Case(16, 4096, K, BF16, world_size, "")), rank)
    name = group_name()

    def layers() -> tuple[torch.Tensor, torch.Tensor]:
        y, hidden = OPS.gemm_all_reduce_add_rms_norm(a, b, residual, weight, EPS, name)
        return OPS.all_reduce_add_rms_norm(y, hidden, weight, EPS, name)

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            layers()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = layers()
    for turn in range(7):
        residual.copy_(on_device(call_of(GEMM, Case(16, 4096, K, BF16, world_size, ""), number=turn), rank)[2])
        for out in captured:
            out.fill_(float("nan"))
        graph.replay()
        eager = layers()
        torch.cuda.synchronize()
        tpo.check()
        assert all(torch.equal(x, y) for x, y in zip(captured, eager, strict=True)), f"turn {turn}"
        check_norm(captured[0].cpu(), captured[1].cpu(), weight.cpu())


def compiles(rank: int, world_size: int) -> None:
    """torch.compile(fullgraph=True) with dynamic M, and opcheck."""
    name = group_name()

    @torch.compile(fullgraph=True, dynamic=True)
    def layer(a, b, residual, weight):
        y, hidden = OPS.gemm_all_reduce_add_rms_norm(a * 1, b, residual, weight, EPS, name)
        return OPS.all_reduce_add_rms_norm(y + 0, hidden, weight, EPS, name)

    for M in (33, 64, 257):
        given = on_device(call_of(GEMM, Case(M, 512, K, BF16, world_size, "")), rank)
        y, new_residual = layer(*given)
        torch.cuda.synchronize()
        tpo.check()
        assert y.shape == (M, 512)
        check_norm(y.cpu(), new_residual.cpu(), given[3].cpu())
    a, b, residual, weight = given
    torch.library.opcheck(OPS.gemm_all_reduce_add_rms_norm.default, (a, b, residual, weight, EPS, name))
    torch.library.opcheck(OPS.all_reduce_add_rms_norm.default, (residual, residual, weight, EPS, name))


CHECKS = (plans_are_right, late_ranks, ranks_agree_wherever_their_tensors_lie, graphs_replay, compiles)
