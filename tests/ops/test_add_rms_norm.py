"""The ops that end in a norm, on CPU ranks: every size, plans that end in either kernel, inputs and outputs of other
forms, ranks that are late or never come."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16, Case, on
from tests.dist import barrier
from tests.ops.calls import LAYOUTS, Setup, group_name, prepare_arena
from tests.ops.norms import (
    CASES,
    CPU_PLANS,
    EPS,
    GEMM,
    IN_PLACE,
    OUT,
    SUM,
    call_of,
    check,
    check_norm,
    in_a_row,
    invoke,
    operands,
)
from tp_overlap_kernels.ops import norm_launches, unfused

ONE_LAUNCH = {SUM: "one_shot_norm", GEMM: "unfused_one_shot_norm"}
TWO_LAUNCHES = [(op, plan) for op, plans in CPU_PLANS.items() for plan in plans if plan not in ONE_LAUNCH.values()]
RAGGED = CASES[3]


def with_op(op: str, case: Case) -> Case:
    """The case as the op takes it: with a K where there is a GEMM, and then no wider than the arena."""
    return case if op == SUM else dataclasses.replace(case, N=min(case.N, 1003), K=24)


@pytest.mark.parametrize("case", [*CASES, *(on(RAGGED, W) for W in (1, 8))], ids=lambda x: f"{x}-W{x.world_size}")
def test_ref(ranks, case):
    for op in CPU_PLANS if case.why == RAGGED.why else (SUM,):
        check(ranks, Setup("ref"), in_a_row(op, with_op(op, case)))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_launch(ranks, case):
    check(ranks, Setup("interp", "one_shot_norm"), in_a_row(SUM, case)[::2])


@pytest.mark.parametrize("case", [CASES[3], CASES[8]], ids=str)
def test_one_launch_behind_a_product(ranks, case):
    check(ranks, Setup("interp", "unfused_one_shot_norm"), in_a_row(GEMM, with_op(GEMM, case))[::2])


@pytest.mark.parametrize("op", CPU_PLANS)
def test_it_equals_its_unfused_program(ranks, op):
    """Sums are exact; y is rounded once here and twice there."""
    for (y, new_residual), (their_y, theirs) in ranks(2).run(beside_unfused, op):
        assert torch.equal(new_residual, theirs)
        u = torch.finfo(BF16).eps / 2
        assert ((y - their_y).abs().double() <= (1 + 2.0**-6) * 3 * u * y.abs().double()).all() and y.abs().max() > 1


def beside_unfused(rank, world_size, op):
    prepare_arena(Setup())
    call = call_of(op, with_op(op, RAGGED), kind="integer", bias=op == GEMM)
    tensors = operands(call, rank)
    fixed = 4 if op == GEMM else 3
    with torch.inference_mode():
        theirs = getattr(unfused, op)(*tensors[:fixed], EPS, dist.group.WORLD, *tensors[fixed:])
        return invoke(call, tensors, rank), theirs


@pytest.mark.parametrize("op, plan", TWO_LAUNCHES)
def test_the_sum_and_then_the_norm(ranks, op, plan):
    check(ranks, Setup("interp", plan), in_a_row(op, with_op(op, RAGGED))[1:4])


@pytest.mark.parametrize("case", [CASES[2], CASES[6]], ids=str)
def test_one_rank_norms_in_the_kernel_too(ranks, case):
    check(ranks, Setup("interp"), in_a_row(SUM, on(case, 1)))
    check(ranks, Setup("interp"), in_a_row(GEMM, with_op(GEMM, on(case, 1)))[:2])


@pytest.mark.parametrize("op", CPU_PLANS)
def test_what_dispatch_chooses(ranks, op):
    """Exact sums: which plan it is does not matter. 4 rows are one launch, 40 of 1000 are not."""
    cases = [with_op(op, Case(*sizes, 0, BF16, 2, "")) for sizes in ((4, 136), (40, 1000))]
    check(ranks, Setup("interp", max_M=64), [call_of(op, case, kind="integer") for case in cases])


@pytest.mark.parametrize("op, plan", [*ONE_LAUNCH.items(), (SUM, None)])
def test_inputs_of_any_strides(ranks, op, plan):
    """The kernels assume rows at multiples of 16 bytes: the op has to notice, and copy."""
    aligned = with_op(op, Case(6, 64, 0, FP16, 2, "aligned"))
    calls = [
        call_of(op, aligned, ("fresh", IN_PLACE)[number % 2], number=number, layout=layout)
        for number, layout in enumerate([*LAYOUTS, *LAYOUTS][1:-4])
    ]
    check(ranks, Setup("interp", plan) if plan else Setup("ref"), calls)


def test_inputs_of_any_dimension(ranks):
    case = Case(6, 40, 0, BF16, 2, "")
    row = dataclasses.replace(case, M=1)
    shapes = [(case, (2, 3, 40)), (case, (6, 1, 40)), (row, (40,))]
    check(ranks, Setup("interp"), [call_of(SUM, sizes, OUT, leading=shape) for sizes, shape in shapes])
    gemms = [(case, (2, 3)), (case, (6, 1)), (row, ())]
    check(
        ranks,
        Setup("interp", "one_shot"),
        [call_of(GEMM, with_op(GEMM, sizes), leading=shape) for sizes, shape in gemms],
    )


@pytest.mark.parametrize("offset", [0, 1], ids=["aligned", "one element later"])
@pytest.mark.parametrize("backend", ["ref", "interp"])
def test_ranks_agree_wherever_their_tensors_lie(ranks, backend, offset):
    """Results of one rank go to odd addresses; the other's do not."""
    (y, new_residual), (other_y, other) = ranks(2).run(at_odd_addresses, backend, offset)
    assert torch.equal(y, other_y) and torch.equal(new_residual, other) and not y.isnan().any()
    check_norm(y, new_residual, torch.ones(64, dtype=BF16))


def at_odd_addresses(rank, world_size, backend, offset):
    prepare_arena(Setup())
    x = torch.linspace(-3, 5, 3 * 64).view(3, 64).to(BF16)
    outs = [torch.full((3 * 64 + 8,), float("nan"), dtype=BF16) for _ in range(2)]
    y, new_residual = (out[(first := offset * rank) : first + 3 * 64].view(3, 64) for out in outs)
    with tpo.cpu_backend(backend), torch.inference_mode():
        name, weight = group_name(), torch.ones(64, dtype=BF16)
        for _ in range(2):
            torch.ops.tp_overlap.all_reduce_add_rms_norm_out(x, x, weight, EPS, name, y, new_residual)
    assert outs[0][offset * rank + 3 * 64 :].isnan().all(), "written past the end"
    return y.clone(), new_residual.clone()


@pytest.mark.parametrize("op, rows", [(SUM, 9), (SUM, 16), (GEMM, 20)])
def test_more_rows_than_there_are_flags(ranks, op, rows):
    """Chunks of 8 rows, the last one short."""
    case = with_op(op, Case(rows, 41, 0, BF16, 2, "chunks"))
    check(ranks, Setup("interp", ONE_LAUNCH[op]), in_a_row(op, case)[1:4], flags=8)


def test_more_rows_than_the_arena_holds(ranks):
    case = Case(97, 40, 24, BF16, 2, "chunks of the sum")
    check(ranks, Setup("interp", "two_shot", max_M=40, max_N=80), in_a_row(GEMM, case)[:2], rows_at_once=40)


@pytest.mark.parametrize("op, world_size", [(SUM, 3), (GEMM, 2)])
def test_a_late_rank_is_waited_for(ranks, op, world_size):
    case = with_op(op, Case(4, 40, 0, BF16, world_size, "late"))
    late = [rank for rank in range(world_size) for _ in range(2)]
    calls = [call_of(op, case, kind="integer", number=number, late_rank=rank) for number, rank in enumerate(late)]
    check(ranks, Setup("interp", jitter_s=0.001), calls)


@pytest.mark.parametrize("world_size", [1, 2])
def test_without_K_the_sum_is_zero_or_the_bias(ranks, world_size):
    case = Case(5, 24, 0, BF16, world_size, "")
    check(ranks, Setup("interp"), [call_of(GEMM, case, form, kind="integer", bias=True) for form in ("fresh", OUT)])
    check(ranks, Setup("ref"), [call_of(GEMM, case, kind="integer")])


def test_ranks_are_added_in_rank_order_and_the_residual_last(ranks):
    """In f32 large + small - large is 0 and large - large + small is not; likewise for the residual."""
    large, small = 2.0**30, 1.0
    rows = [(large, small, -large, 0.0), (large, -large, small, 0.0), (small, large, 0.0, -large)]
    for setup in (Setup("ref"), Setup("interp", "one_shot_norm")):
        for new_residual in ranks(3).run(sum_of, setup, rows):
            assert new_residual.tolist() == [0.0, small, 0.0]


def sum_of(rank, world_size, setup, rows):
    prepare_arena(setup)
    x, residual = (torch.tensor([row[which] for row in rows], dtype=BF16) for which in (rank, 3))
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan), torch.inference_mode():
        return torch.ops.tp_overlap.all_reduce_add_rms_norm(x, residual, torch.ones(3, dtype=BF16), EPS, group_name())[
            1
        ]


def test_eps_counts(ranks):
    """Rows of ones with eps 3 are halved, rows of zeros stay zeros."""
    for setup in (Setup("ref"), Setup("interp", "one_shot_norm"), Setup("interp", "two_shot")):
        for halves, zeros in ranks(2).run(of_ones_and_zeros, setup):
            assert halves.eq(torch.arange(40) / 2).all() and zeros.eq(0).all()


def of_ones_and_zeros(rank, world_size, setup):
    prepare_arena(setup)
    x, weight = torch.ones(2, 40, dtype=BF16) / 2, torch.arange(40).to(BF16)
    op = torch.ops.tp_overlap.all_reduce_add_rms_norm
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan), torch.inference_mode():
        return [op(x, x * minus - x, weight, eps, group_name())[0] for minus, eps in ((1, 3.0), (-1, EPS))]


def test_a_nan_stays_in_its_row(ranks):
    for setup in (Setup("ref"), Setup("interp", "one_shot_norm"), Setup("interp", "two_shot")):
        for y, new_residual in ranks(2).run(with_a_nan, setup):
            assert new_residual.isnan().nonzero().tolist() == [[1, 7]]
            assert y[1].isnan().all() and not y[[0, 2]].isnan().any()


def with_a_nan(rank, world_size, setup):
    prepare_arena(setup)
    x, residual, weight = torch.ones(3, 40, dtype=FP16), torch.ones(3, 40, dtype=FP16), torch.ones(40, dtype=FP16)
    x[1, 7] = float("nan") if rank == 1 else 1.0
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan), torch.inference_mode():
        return torch.ops.tp_overlap.all_reduce_add_rms_norm(x, residual, weight, EPS, group_name())


@pytest.mark.parametrize("op, plan", [(SUM, "one_shot_norm"), (GEMM, "one_shot"), (SUM, None)])
def test_without_a_peer_both_results_are_nan(ranks, op, plan):
    error, outs = ranks(2).run(call_alone, op, plan)[0]
    assert error.startswith(f"PeerTimeout {op}: rank 0 waited for rank 1")
    assert all(out.isnan().all() for out in outs)


@pytest.mark.parametrize("op, plan", ONE_LAUNCH.items())
def test_chunks_before_one_that_failed_are_nan_too(ranks, op, plan):
    """Rank 1 ends after the first of two chunks."""
    error, outs = ranks(2).run(fail_in_the_second_chunk, op, plan)[0]
    assert error == "PeerTimeout" and all(out.isnan().all() for out in outs)


def fail_in_the_second_chunk(rank, world_size, op, plan):
    arena = prepare_arena(Setup())
    arena.timeout_s, arena.layout = 0.3, dataclasses.replace(arena.layout, one_shot_tiles=8)
    call, error, chunks = call_of(op, with_op(op, Case(12, 24, 0, BF16, 2, "")), IN_PLACE), "", []
    tensors = operands(call, rank)

    def launch(*args):
        chunks.append(args)
        if rank == 0 or len(chunks) == 1:
            real(*args)

    real = norm_launches._all_reduce_add_rms_norm
    try:
        with mock.patch.object(norm_launches, "_all_reduce_add_rms_norm", launch), torch.inference_mode():
            with tpo.cpu_backend("interp"), tpo.force_plan(plan):
                invoke(call, tensors, rank)
    except tpo.TpOverlapError as raised:
        error = type(raised).__name__
    barrier()
    tpo.close()
    return error, [tensors[-2]] if op == GEMM else tensors[:2]


def call_alone(rank, world_size, op, plan):
    """A call of both ranks, then one of rank 0 alone: its error, and what its results then hold."""
    prepare_arena(Setup()).timeout_s = 0.3
    call, error = call_of(op, with_op(op, Case(4, 40, 0, BF16, 2, "")), IN_PLACE), ""
    outs = []
    try:
        with tpo.cpu_backend("interp" if plan else "ref"), tpo.force_plan(plan), torch.inference_mode():
            invoke(call, operands(call, rank), rank)
            barrier()
            if rank == 0:
                tensors = operands(call, rank)
                outs = [tensors[-2]] if op == GEMM else [tensors[0], tensors[1]]
                invoke(call, tensors, rank)
    except tpo.TpOverlapError as raised:
        error = f"{type(raised).__name__} {raised}"
    barrier()
    tpo.close()
    return error, outs
