"""Mixtures of calls: orders, forms, strides, graphs, the host's cost; inputs and judgement are those of the CPU tests.

Nothing synchronises between the calls of one row. Then results are gathered, and every rank raises if one has to.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import random
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_map

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16, Case
from tests.ops.calls import CPU_PLANS, Call, group_name, in_other_strides, invoke, operands
from tests.ops.judge import judge
from tp_overlap_kernels.dispatch import Plan, Problem
from tp_overlap_kernels.dispatch.problem import PLAN_NAMES
from tp_overlap_kernels.dispatch.select import why_not
from tp_overlap_kernels.memory import arena as arenas

DEVICE = "cuda"
MAX_M, MAX_N = 2048, 8192
SIZES = ((0, 1, 3, 16, 33, 70, 200, 600), (8, 41, 72, 1000), (8, 35, 128))  # M, N, K of a mixture
CYCLES_A_MS = 1_800_000  # of torch.cuda._sleep, about
HOST_LIMIT_US = 25.0


def plans_for(call: Call, capturable: bool = False) -> list[str]:
    """The plans that can run this call here."""
    topology, case = arenas.get(group_name()).topology, call.case
    dtype = "bfloat16" if case.dtype == BF16 else "float16"
    problem = Problem(call.op, case.M, case.N, case.K, dtype, case.world_size, call.bias)
    names = [name for name in PLAN_NAMES[call.op] if why_not(Plan(name), problem, topology) is None]
    return [name for name in names if not (capturable and "nccl" in name)]


def mixture(world_size: int, seed: int, count: int, capturable: bool = False) -> list[Call]:
    """Calls of every op, plan, dtype and form in random order; ranks are late now and then."""
    choose, calls = random.Random(seed), []
    for number in range(count):
        op = choose.choice(list(CPU_PLANS))
        M, N, K = (choose.choice(some) for some in SIZES)
        sizes = (1, N * choose.choice([1, 40, 400]), 0) if op == "all_reduce" else (M, N, K)
        late = choose.randrange(world_size) if choose.random() < 0.1 else None
        case = Case(*sizes, choose.choice([BF16, FP16]), world_size, "mixed")
        call = Call(op, case, "tagged", number, into_out=choose.random() < 0.3, late_rank=late)
        names = plans_for(call, capturable)
        calls.append(dataclasses.replace(call, plan=choose.choice(names)))
    return calls


def make(rank: int, calls: list[Call], prepared: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    results = []
    for call, tensors in zip(calls, prepared, strict=True):
        if call.late_rank == rank:
            torch.cuda._sleep(3 * CYCLES_A_MS)
        with tpo.force_plan(call.plan) if call.plan else contextlib.nullcontext():
            results.append(invoke(call, tensors, rank))
    return results


def judge_by_plan(call: Call, results: list[torch.Tensor]) -> None:
    judge(call, call.plan, results)


def judge_all(
    rank: int,
    world_size: int,
    calls: list,
    function: Callable[[], list],
    judged: Callable[[Any, list], None] = judge_by_plan,
) -> None:
    """Judge what `function` gives on all ranks. All of them raise, or none: their next calls have to match.

    function: a result for each call, a tensor or several. judged: takes a call and its results by rank, on the CPU.
    """
    text, results = "", []
    try:
        results = function()
        torch.cuda.synchronize()
        tpo.check()
    except Exception:
        text = traceback.format_exc()
    everyone: list = [None] * world_size
    dist.all_gather_object(everyone, (text, tree_map(torch.Tensor.cpu, results)))
    texts = [text for text, _ in everyone if text]
    if not texts:
        verdict = [_verdict(calls, [results for _, results in everyone], judged) if rank == 0 else None]
        dist.broadcast_object_list(verdict, src=0)
        texts = verdict
    assert not texts[0], texts[0]


def _verdict(calls: list, by_rank: list[list], judged: Callable[[Any, list], None]) -> str:
    for call, results in zip(calls, zip(*by_rank, strict=True), strict=True):
        try:
            judged(call, list(results))
        except AssertionError as error:
            return f"{call}: {error}"
    return ""


def on_device(rank: int, calls: list[Call]) -> list[list[torch.Tensor]]:
    return [operands(call, rank, DEVICE) for call in calls]


def call_and_judge(rank: int, world_size: int, calls: list[Call]) -> None:
    prepared = on_device(rank, calls)
    judge_all(rank, world_size, calls, lambda: make(rank, calls, prepared))


# --- the properties


def any_plan_after_any_other(rank: int, world_size: int) -> None:
    call_and_judge(rank, world_size, mixture(world_size, 11, 240))


def graphs_of_any_plans(rank: int, world_size: int) -> None:
    """Two graphs take turns, replayed an odd number of times, with new data each time and eager calls in between."""
    rows = [mixture(world_size, seed, count, capturable=True) for seed, count in ((13, 41), (14, 20))]
    eager = mixture(world_size, 12, 5, capturable=True)
    turns = (0, 1, 0, 0, 1, 1, 0, 0)
    calls = [(renumbered(rows[turn], 1000 * i), renumbered(eager, 1000 * i)) for i, turn in enumerate(turns, 1)]
    data = [(on_device(rank, replayed), on_device(rank, called)) for replayed, called in calls]

    def run() -> list[torch.Tensor]:
        recorded = [record(rank, row) for row in rows]
        results = []
        for turn, (_, between), (new, others) in zip(turns, calls, data, strict=True):
            static, graph, outs = recorded[turn]
            for old, fresh in zip(static, new, strict=True):
                torch._foreach_copy_(old, fresh)
            for out in outs:
                out.fill_(float("nan"))
            graph.replay()
            results += [out.clone() for out in outs]
            results += make(rank, between, others)
        return results

    judge_all(rank, world_size, [call for pair in calls for row in pair for call in row], run)


def renumbered(calls: list[Call], by: int) -> list[Call]:
    """The same calls with other data."""
    return [dataclasses.replace(call, number=call.number + by) for call in calls]


def record(rank: int, calls: list[Call]) -> tuple:
    """(inputs, the graph of the calls, its outputs)"""
    static = on_device(rank, calls)
    make(rank, calls, static)  # compiles, outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = make(rank, calls, static)
    return static, graph, outs


def any_strides_and_a_bias(rank: int, world_size: int) -> None:
    """Aligned and unaligned data of one shape takes turns, so that a kept launch is not used where it does not fit."""
    for op, case in (
        ("gemm_all_reduce", Case(33, 72, 72, BF16, world_size, "")),
        ("gemm_all_reduce", Case(63, 256, 512, FP16, world_size, "")),
        ("gemm_reduce_scatter", Case(300, 264, 136, BF16, world_size, "")),
        ("all_reduce", Case(1, 3 * 1001, 0, BF16, world_size, "")),
    ):
        for plan in plans_for(Call(op, case, bias=op != "all_reduce")):
            calls = [dataclasses.replace(call, plan=plan) for call in in_other_strides(op, case)] * 2
            call_and_judge(rank, world_size, calls)


def more_rows_than_the_arena_holds(rank: int, world_size: int) -> None:
    for op in ("gemm_all_reduce", "gemm_reduce_scatter"):
        case = Case(2 * MAX_M + 901, 264, 72, BF16, world_size, "chunks")
        for plan in plans_for(Call(op, case)):
            calls = [Call(op, case, "integer", 0, bias=True, plan=plan), Call(op, case, "tagged", 1, plan=plan)]
            call_and_judge(rank, world_size, [*calls, Call(op, case, "integer", 2, plan=plan)])


def host_cost(rank: int, world_size: int) -> None:
    """Microseconds that an eager call, launch included, takes of the host, with the plan that dispatch chooses.

    The GPU is never waited for. The least of nine samples, as timeit has it: cores are shared, and what others take of
    them is not the call's. The medians of equal calls were up to 9 us apart in one run.
    """
    if world_size > torch.cuda.device_count():
        return
    calls = [
        *(Call("gemm_all_reduce", Case(M, 8192, 1024, BF16, world_size, "")) for M in (16, 2048)),
        *(Call("gemm_reduce_scatter", Case(M, 8192, 1024, BF16, world_size, "")) for M in (16, 2048)),
        *(Call("all_reduce", Case(1, M * 8192, 0, BF16, world_size, "")) for M in (16, 2048)),
    ]
    costs = {}
    gc.collect()
    gc.freeze()  # a compiler's objects, say, would be looked through now and then: timeit leaves the collector out, too
    with torch.inference_mode():
        for call in calls:
            tensors = operands(call, rank, DEVICE)
            costs[f"{call.op} M={max(call.case.M, call.case.N // 8192)}"] = _microseconds(call, tensors, rank)
    everyone = [None] * world_size
    dist.all_gather_object(everyone, costs)
    worst = {name: max(one[name] for one in everyone) for name in costs}
    if rank == 0:
        print(
            "host cost of an eager call, us, slower rank:",
            {name: round(us, 1) for name, us in worst.items()},
            flush=True,
        )
    assert max(worst.values()) <= HOST_LIMIT_US, worst


def _microseconds(call: Call, tensors: list[torch.Tensor], rank: int) -> float:
    samples = []
    for _ in range(9):
        torch.cuda.synchronize()
        dist.barrier()
        started = time.perf_counter()
        for _ in range(50):
            invoke(call, tensors, rank)
        samples.append((time.perf_counter() - started) / 50 * 1e6)
    torch.cuda.synchronize()
    return min(samples)


CHECKS = (
    any_plan_after_any_other,
    graphs_of_any_plans,
    any_strides_and_a_bias,
    more_rows_than_the_arena_holds,
    host_cost,
)
