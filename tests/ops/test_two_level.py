"""The ops in groups on several nodes: 2 x 2, 2 x 1 and 3 x 1 CPU ranks, the nodes being parts of one host."""

from __future__ import annotations

import dataclasses
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16, Case
from tests.dist import RankPool, barrier
from tests.ops import norms
from tests.ops.calls import (
    Call,
    Setup,
    group_name,
    in_a_row,
    in_a_row_with_late_ranks,
    in_other_strides,
    invoke,
    make_calls,
    nodes_of,
    operands,
    prepare_arena,
)
from tests.ops.faults import Outcome
from tests.ops.judge import check, judge
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.memory import nodes as on_nodes

GEMMS = ("gemm_all_reduce", "gemm_reduce_scatter")
OPS = (*GEMMS, "all_reduce")
REF = Setup("ref", ranks_per_node=2)
INTERPRETED = [
    Setup("interp", f"two_level;{plan}", ranks_per_node=2) for plan in ("push", "one_shot", "chunked", "unfused_push")
]
RAGGED = Case(33, 40, 24, BF16, 4, "ragged")
CASES = [
    Case(64, 64, 64, BF16, 4, "whole blocks"),
    Case(33, 72, 72, BF16, 4, "ragged M, N and K"),
    Case(17, 1000, 40, FP16, 4, "N of 1000, fp16"),
    Case(5, 40, 24, BF16, 4, "the last rank has no rows"),
    Case(3, 40, 24, FP16, 4, "fewer rows than ranks, fp16"),
    Case(1, 24, 5, BF16, 4, "one row, fewer than a node has ranks"),
    Case(0, 24, 16, BF16, 4, "no rows"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("op", GEMMS)
def test_gemms(ranks, op, case):
    check(ranks, REF, in_a_row(op, case))


@pytest.mark.parametrize("setup", INTERPRETED, ids=str)
@pytest.mark.parametrize("op", GEMMS)
def test_gemms_interpreted(ranks, op, setup):
    check(ranks, setup, in_a_row(op, RAGGED)[:4])
    check(ranks, setup, in_a_row(op, Case(2, 24, 16, FP16, 4, "fewer rows than ranks"))[1:4])


@pytest.mark.parametrize("setup", [REF, Setup("interp", ranks_per_node=2)], ids=str)
def test_all_reduce(ranks, setup):
    for n, dtype in ((4096, BF16), (4099, FP16), (3, BF16), (1, BF16), (0, BF16)):
        check(ranks, setup, in_a_row("all_reduce", Case(1, n, 0, dtype, 4, "")))


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("op", OPS)
def test_one_rank_a_node(ranks, op, world_size):
    """A GEMM, and torch's collective."""
    sizes = [(1, 1000, 0)] if op == "all_reduce" else [(33, 72, 72), (2, 24, 16), (0, 24, 16)]
    for size in sizes:
        check(ranks, Setup("interp", ranks_per_node=1), in_a_row(op, Case(*size, BF16, world_size, "")))


@pytest.mark.parametrize("op", OPS)
def test_one_flat_collective_may_be_forced(ranks, op):
    """Then the nodes do not matter, and the bound is that of one level."""
    case = Case(1, 1000, 0, BF16, 4, "") if op == "all_reduce" else RAGGED
    calls = in_a_row(op, case)[:3]
    by_rank = ranks(4).run(make_calls, dataclasses.replace(REF, plan="unfused_nccl;nccl"), calls)
    for call, results in zip(calls, zip(*by_rank, strict=True), strict=True):
        judge(call, "nccl" if op == "all_reduce" else "unfused_nccl", list(results))


@pytest.mark.parametrize("op", [norms.SUM, norms.GEMM])
def test_a_norm_follows_the_sum(ranks, op):
    case = Case(5, 40, 24 if op == norms.GEMM else 0, BF16, 4, "")
    norms.check(ranks, REF, norms.in_a_row(op, case))


def test_inputs_of_any_strides_and_dimension(ranks):
    for op in OPS:
        case = Case(1, 3 * 37, 0, BF16, 4, "") if op == "all_reduce" else RAGGED
        check(ranks, REF, in_other_strides(op, case))


def test_more_than_the_arena_holds(ranks):
    """The node's reduce-scatter runs in chunks; an all-reduce in pieces."""
    tiny = Setup("interp", "two_level;push", 12, 80, ranks_per_node=2)
    for op in GEMMS:
        check(ranks, tiny, in_a_row(op, Case(29, 40, 8, BF16, 4, ""))[1:4])
    small = Setup("interp", max_M=16, max_N=1040, ranks_per_node=2)
    check(ranks, small, [Call("all_reduce", Case(1, 60_001, 0, BF16, 4, ""), "integer")])


@pytest.mark.parametrize("op", OPS)
def test_a_late_rank_is_waited_for(ranks, op):
    case = Case(1, 900, 0, BF16, 4, "") if op == "all_reduce" else RAGGED
    check(ranks, REF, in_a_row_with_late_ranks(op, case)[::3])


# --- what ran


def test_dispatch_has_seen_the_nodes(ranks):
    """Without it every test above would pass by shared memory alone."""
    for rank, (plan, inside, words, text) in enumerate(ranks(4).run(say_plan)):
        assert (plan, inside) == ("two_level", "push")
        assert len(words) == 2, "ops, and plans inside, are told apart"
        assert "inside push:" in text and "2 nodes of 2 ranks" in text, rank


def say_plan(rank, world_size):
    arena = prepare_arena(Setup("interp", ranks_per_node=2))
    calls = [Call(op, RAGGED) for op in GEMMS]
    before = dict(arena.record.calls)
    with tpo.cpu_backend("interp"):
        for call in calls:
            invoke(call, operands(call, rank), rank)
        explained = tpo.explain("gemm_all_reduce", 33, 40, 24)
    words = {word: op for word, op in arena.record.calls.items() if word not in before}
    return explained.plan.name, explained.plan.inside.name, sorted(words.values()), str(explained)


# --- ranks that do not lie in order


@pytest.mark.parametrize("nodes", [((0, 2), (1, 3)), ((0, 3), (1, 2))], ids=str)
def test_nodes_that_take_turns(ranks, nodes):
    """Who owns which rows does not change. In the second row rank 2 stands before rank 3, and its node behind."""
    for op in GEMMS:
        calls = [call for call in in_a_row(op, RAGGED) if call.kind != "normal"]
        for call, results in zip(calls, zip(*ranks(4).run(take_turns, nodes, calls), strict=True), strict=True):
            judge(call, "", list(results))


def take_turns(rank, world_size, nodes, calls):
    tpo.close()
    before, on_nodes.node_id = on_nodes.node_id, lambda: f"host {int(rank in nodes[1])}"
    try:
        tpo.init(max_M=64, max_N=64)
    finally:
        on_nodes.node_id = before
    assert arenas.get(group_name()).span.nodes.ranks == nodes
    results = [invoke(call, operands(call, rank), rank) for call in calls]
    barrier()
    tpo.close()
    return results


# --- torch.compile


@pytest.mark.parametrize("op", OPS)
def test_compiled(ranks, op):
    for checked, results in ranks(4).run(compile_and_call, op, timeout=120):
        assert set(checked.values()) == {"SUCCESS"}
        for eager, compiled in results:
            assert torch.equal(eager, compiled) and not compiled.isnan().any()


def compile_and_call(rank, world_size, op):
    prepare_arena(REF)
    torch._dynamo.reset()
    name, function = group_name(), getattr(torch.ops.tp_overlap, op)

    def layer(x, *more):
        return function(x * 2, *more[:1], name, *more[1:]) * 0.5

    compiled, results = torch.compile(layer, fullgraph=True, backend="aot_eager"), []
    with torch.no_grad():
        for number, M in enumerate((9, 33, 14)):
            case = Case(M, 40, 24, BF16, 4, "") if op != "all_reduce" else Case(1, 40 * M, 0, BF16, 4, "")
            tensors = operands(Call(op, case, "normal", number, bias=op != "all_reduce"), rank)
            results.append((layer(*tensors), compiled(*tensors)))
        checked = torch.library.opcheck(function.default, (*tensors[:2], name, *tensors[2:]))
    torch._dynamo.reset()
    return checked, results


# --- failures


@pytest.fixture(scope="module")
def own_ranks():
    """A pool of this file, since a test that goes wrong here leaves ranks that wait for each other."""
    pool = RankPool(4)
    yield pool
    pool.close()


@pytest.mark.parametrize("op", OPS)
def test_a_missing_rank_is_named_on_its_node_and_timed_out_on_others(own_ranks, op):
    call = Call(op, Case(1, 40, 0, BF16, 4, "") if op == "all_reduce" else RAGGED, "integer")
    stories = own_ranks.run(miss_a_call, call)
    (beside, out), (missing, _), *elsewhere = (story[:2] for story in stories)
    assert out.isnan().all()
    assert beside.error == "PeerTimeout" and f"{op}: rank 0 waited for rank 1" in beside.text
    assert "node 0, where rank i is rank [0, 1][i] of the group" in beside.text
    assert missing.error == "PeerTimeout" and "rank 0 had given up" in missing.text
    for rank, (outcome, out) in enumerate(elsewhere, 2):
        assert outcome.error == "GroupFailed" and f"{op}: torch.distributed has failed on rank {rank}" in outcome.text
        assert out.isnan().all()
        assert 1 < outcome.seconds < 8, "the timeout of the group, and not torch's half an hour"
    for story in stories:
        assert story[2].error == story[0].error and story[2].seconds < 0.5, "the group refuses further calls"
        assert "torch.distributed has failed" not in story[2].text, "and does not try"
    judge(call, "", [story[3] for story in stories])


def miss_a_call(rank, world_size, call):
    """Rank 1 comes when all others have given up. Then a new arena, and the call once more."""
    group = dist.new_group(list(range(world_size)), timeout=timedelta(seconds=2))
    name = group.group_name

    def run(out):
        tensors, fixed = operands(call, rank), 1 if call.op == "all_reduce" else 2
        getattr(torch.ops.tp_overlap, call.op + "_out")(*tensors[:fixed], name, out)

    rows = call.case.rows_of(rank) if call.op == "gemm_reduce_scatter" else slice(0, call.case.M)
    shape = (40,) if call.op == "all_reduce" else (rows.stop - rows.start, 40)
    first, second = torch.zeros(shape, dtype=BF16), torch.zeros(shape, dtype=BF16)
    with nodes_of(2):
        tpo.init(group, max_M=64, max_N=64)
        arenas.get(name).span.inside.timeout_s = 0.5
        if rank == 1:
            barrier()
        outcome = Outcome.of(run, first)
        again = Outcome.of(run, second)
        if rank != 1:
            barrier()
        tpo.close(group)
        barrier()
        tpo.init(group, max_M=64, max_N=64)
    run(second)
    tpo.close(group)
    return outcome, first, again, second
