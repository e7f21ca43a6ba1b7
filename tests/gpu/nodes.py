"""Groups on several nodes, on devices: every op by every route, in graphs, on other streams, across nodes by gloo.

Two nodes that are parts of one host, of one rank each or of two. Four ranks on two devices lie so that those of a node
have both, and so have those of a place: NCCL refuses two ranks of a group on one. Calls and judges are those of
tests/ops.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16, Case
from tests.gpu.mixtures import CYCLES_A_MS, judge_all
from tests.ops import calls as sums
from tests.ops import judge as of_sums
from tests.ops import norms
from tests.ops.calls import Call, group_name
from tests.ops.norms import NormCall
from tp_overlap_kernels.dispatch import Problem
from tp_overlap_kernels.dispatch.select import runnable
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.ops.execute import topology_of

DEVICE = "cuda"
NODES = 2
MAX_M, MAX_N = 256, 4096
GEMMS = ("gemm_all_reduce", "gemm_reduce_scatter")
# M, N, K; few N and K, since each pair is compiled anew.
GEMM_SIZES = ((1, 4096, 1024), (3, 1000, 72), (33, 264, 136), (0, 64, 64), (200, 1032, 328), (701, 264, 136))
SUM_SIZES = (1_100_003, 4099, 3, 1, 0)
NORM_SIZES = {norms.SUM: ((1, 4096, 0), (3, 1003, 0), (33, 264, 0), (0, 64, 0)), norms.GEMM: GEMM_SIZES[:4]}
AnyCall = Call | NormCall


@dataclasses.dataclass(frozen=True)
class Route:
    """plan: what is forced. judged_by: the plan inside a node, or that of one flat collective."""

    plan: str
    judged_by: str
    ranks_per_node: int | None  # None: one level


def routes(call: AnyCall) -> list[Route]:
    """Every way that dispatch knows for this call here."""
    case, topology = call.case, topology_of(arenas.get(group_name()))
    M, N = (case.M, case.N) if case.K else ((call.shape[0], call.H) if isinstance(call, NormCall) else (1, case.N))
    problem = Problem(call.op, M, N, case.K, str(case.dtype).split(".")[1], case.world_size)
    found = [Route(name, name, None) for name in runnable(problem, topology) if name != "two_level"]
    per_node = topology.inside.world_size
    inside = problem.inside(per_node)
    if inside is None:
        return [*found, Route("two_level", "", per_node)]
    return [*found, *(Route(f"two_level;{name}", name, per_node) for name in runnable(inside, topology.inside))]


# --- calls of either kind


def with_sum(call: AnyCall, **fields) -> AnyCall:
    """The same call with other fields of Call."""
    if isinstance(call, NormCall):
        return dataclasses.replace(call, sum=dataclasses.replace(call.sum, **fields))
    return dataclasses.replace(call, **fields)


def on_device(rank: int, calls: list[AnyCall]) -> list[list[torch.Tensor]]:
    of = [norms.operands(call, rank) if isinstance(call, NormCall) else sums.operands(call, rank) for call in calls]
    return [[x.to(DEVICE) for x in tensors] for tensors in of]


def invoke(call: AnyCall, tensors: list[torch.Tensor], rank: int) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    return (norms if isinstance(call, NormCall) else sums).invoke(call, tensors, rank)


def make(rank: int, calls: list[AnyCall], prepared: list[list[torch.Tensor]]) -> list:
    results = []
    for call, tensors in zip(calls, prepared, strict=True):
        if (call.sum if isinstance(call, NormCall) else call).late_rank == rank:
            torch.cuda._sleep(3 * CYCLES_A_MS)
        with tpo.force_plan(call.plan) if call.plan else contextlib.nullcontext():
            results.append(invoke(call, tensors, rank))
    return results


def judge_by(route: Route) -> Callable[[AnyCall, list], None]:
    def judge(call: AnyCall, results: list) -> None:
        of = norms if isinstance(call, NormCall) else of_sums
        of.judge(call, route.judged_by, results, ranks_per_node=route.ranks_per_node)

    return judge


def by_bits(world_size: int) -> Callable[[AnyCall, list], None]:
    """For exact inputs, whatever the plan."""
    return judge_by(Route("two_level", "", world_size // NODES))


def exact_calls(world_size: int) -> list[AnyCall]:
    """One of every op, with inputs whose sums are exact."""
    size = Case(33, 264, 136, BF16, world_size, "")
    return [
        *(Call(op, size, "tagged", number, bias=True) for number, op in enumerate(GEMMS)),
        Call("all_reduce", Case(1, 4099, 0, FP16, world_size, ""), "tagged", 2),
        norms.call_of(norms.GEMM, size, kind="integer", number=3, bias=True),
        norms.call_of(norms.SUM, dataclasses.replace(size, K=0), kind="integer", number=4),
    ]


# --- the properties


def the_nodes_are_there(rank: int, world_size: int) -> None:
    """Without them every check below would pass by shared memory alone."""
    arena, per_node = arenas.get(group_name()), world_size // NODES
    assert arena.span is not None
    assert arena.span.nodes.ranks == tuple(tuple(range(i, i + per_node)) for i in range(0, world_size, per_node))
    assert arena.span.inside.store.name == ("local" if per_node == 1 else "symm_mem")
    problem = Problem("gemm_all_reduce", 64, 64, 64, "bfloat16", world_size)
    flat = ["unfused_nccl"] if world_size <= torch.cuda.device_count() else []  # else ranks share devices
    assert sorted(runnable(problem, arena.topology)) == ["two_level", *flat]


def every_route_is_right(rank: int, world_size: int) -> None:
    """Calls in a row, in every form; more rows than the arena holds, fewer than ranks, and none."""
    for op, size in [(op, size) for op in GEMMS for size in GEMM_SIZES]:
        _by_every_route(
            rank, world_size, sums.in_a_row(op, Case(*size, FP16 if size[0] == 3 else BF16, world_size, ""))
        )
    for n in SUM_SIZES:
        case = Case(1, n, 0, FP16 if n == 4099 else BF16, world_size, "")
        row = sums.in_a_row("all_reduce", case)
        _by_every_route(rank, world_size, row if n > 3 else row[3:])  # of few numbers a rank's may be within the bound


def norms_follow_their_sums(rank: int, world_size: int) -> None:
    for op, sizes in NORM_SIZES.items():
        for size in sizes:
            case = Case(*size, FP16 if size[0] == 3 else BF16, world_size, "")
            _by_every_route(rank, world_size, norms.in_a_row(op, case))


def _by_every_route(rank: int, world_size: int, calls: list[AnyCall]) -> None:
    for route in routes(calls[0]):
        forced = [with_sum(call, plan=route.plan) for call in calls]
        prepared = on_device(rank, forced)
        run = lambda forced=forced, prepared=prepared: make(rank, forced, prepared)
        judge_all(rank, world_size, forced, run, judge_by(route))


def late_ranks(rank: int, world_size: int) -> None:
    """Each rank in turn comes milliseconds late; tags say whose data was not waited for."""
    calls = [with_sum(call, late_rank=late) for late in range(world_size) for call in exact_calls(world_size)]
    prepared = on_device(rank, calls)
    judge_all(rank, world_size, calls, lambda: make(rank, calls, prepared), by_bits(world_size))


def graphs_replay(rank: int, world_size: int) -> None:
    """Every op in one graph, by each route that all ops have and as dispatch chooses; new data in every replay, eager
    calls in between."""
    flat = ["unfused_nccl;nccl"] if world_size <= torch.cuda.device_count() else []
    for plan in ("two_level", None, *flat):
        calls = [with_sum(call, plan=plan) for call in exact_calls(world_size)]
        turns = [[with_sum(call, number=10 * turn + i) for i, call in enumerate(calls)] for turn in range(1, 10)]
        data = [on_device(rank, row) for row in turns]

        def run(calls=calls, data=data) -> list:
            static, replay, outs = record(rank, calls)
            results = []
            for turn, fresh in enumerate(data):
                if turn % 3 == 2:
                    results += make(rank, calls, fresh)  # eager
                    continue
                for old, new in zip(static, fresh, strict=True):
                    torch._foreach_copy_(old, new)
                _spoil(outs)
                replay()
                results += [_cloned(out) for out in outs]
            return results

        judge_all(rank, world_size, [call for row in turns for call in row], run, by_bits(world_size))


def record(rank: int, calls: list[AnyCall]) -> tuple[list, Callable[[], None], list]:
    """(inputs, what replays the graph of the calls, its outputs)"""
    static = on_device(rank, calls)
    make(rank, calls, static)  # compiles, and connects the ranks of a place, outside the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = make(rank, calls, static)
    return static, graph.replay, outs


def _spoil(outs: list) -> None:
    for out in outs:
        for tensor in out if isinstance(out, tuple) else (out,):
            tensor.fill_(float("nan"))


def _cloned(out):
    return tuple(each.clone() for each in out) if isinstance(out, tuple) else out.clone()


def other_streams(rank: int, world_size: int) -> None:
    """Inputs come late on the caller's own stream, and are overwritten there right behind the call."""
    calls = exact_calls(world_size) * 2
    calls = [with_sum(call, number=i) for i, call in enumerate(calls)]
    data, streams = on_device(rank, calls), [torch.cuda.Stream() for _ in range(2)]
    late = [[torch.full_like(x, float("nan")) for x in tensors] for tensors in data]

    def run() -> list:
        torch.cuda.synchronize()
        results = []
        for i, (call, given, new) in enumerate(zip(calls, late, data, strict=True)):
            with torch.cuda.stream(streams[i % 2]):
                torch.cuda._sleep(CYCLES_A_MS)
                torch._foreach_copy_(given, new)
                results.append(_cloned(invoke(call, given, rank)))
                _spoil(given)
        return results

    judge_all(rank, world_size, calls, run, by_bits(world_size))


def gloo_between_the_nodes(rank: int, world_size: int) -> None:
    """A group of gloo's, with tensors on devices."""
    group = dist.new_group(list(range(world_size)), backend="gloo")
    tpo.init(group, max_M=64, max_N=264)
    calls = [call for call in exact_calls(world_size) if isinstance(call, Call)] * 3
    calls = [with_sum(call, number=i, bias=False) for i, call in enumerate(calls)]
    prepared = on_device(rank, calls)

    def run() -> list:
        ops = torch.ops.tp_overlap
        return [
            getattr(ops, call.op)(*tensors, group.group_name) for call, tensors in zip(calls, prepared, strict=True)
        ]

    try:
        judge_all(rank, world_size, calls, run, by_bits(world_size))
        tpo.check(group)
    finally:
        tpo.close(group)


CHECKS = (
    the_nodes_are_there,
    every_route_is_right,
    norms_follow_their_sums,
    late_ranks,
    graphs_replay,
    other_streams,
    gloo_between_the_nodes,
)
