"""Calls of the ops that end in a norm: described by values, made by ranks, judged by bits and against float64.

A call is one of the sum, whose inputs and truth it shares, and what the norm adds: residual and weight, equal on all
ranks. y is judged as the norm of the new_residual that came with it, which it promises to be.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time

import torch

import tp_overlap_kernels as tpo
from tests import inputs, tolerance
from tests.cases import BF16, FP16, Case
from tests.dist import barrier
from tests.ops import calls as sums
from tests.ops import judge as of_sums
from tests.ops.calls import LAYOUTS, NAN, Call, Setup, group_name, prepare_arena
from tp_overlap_kernels.dispatch.problem import SUM_OF
from tp_overlap_kernels.lang.interpreter import jitter

EPS = 1e-5
SUM, GEMM = "all_reduce_add_rms_norm", "gemm_all_reduce_add_rms_norm"
# The plans that interpreted CPU ranks can run: each launches another kernel, or another before the norm.
CPU_PLANS = {
    SUM: ("one_shot_norm", "one_shot", "two_shot"),
    GEMM: ("unfused_one_shot_norm", "one_shot", "two_shot", "chunked", "unfused_two_shot"),
}
FRESH, OUT, IN_PLACE = "fresh", "out", "in place"


@dataclasses.dataclass(frozen=True)
class NormCall:
    """sum: of all_reduce with `leading`, or of gemm_all_reduce. form: IN_PLACE has new_residual for residual, and y
    for x where there is one."""

    op: str
    sum: Call
    form: str = FRESH

    @property
    def case(self) -> Case:
        return self.sum.case

    @property
    def plan(self) -> str | None:
        return self.sum.plan

    @property
    def shape(self) -> tuple[int, ...]:
        return sums.out_shape(self.sum, 0)

    @property
    def H(self) -> int:
        return self.shape[-1]


def call_of(op: str, case: Case, form: str = FRESH, **more) -> NormCall:
    """case: (M, H, K), K = 0 for the op without a GEMM. more: fields of Call."""
    if op == GEMM:
        return NormCall(op, Call(SUM_OF[op], case, **more), form)
    flat = dataclasses.replace(case, M=1, N=case.M * case.N)
    return NormCall(op, Call(SUM_OF[op], flat, **{"leading": (case.M, case.N)} | more), form)


def in_a_row(op: str, case: Case) -> list[NormCall]:
    """More calls than an arena has halves, in every form; the last two have exact sums."""
    biased = {"bias": True} if op == GEMM else {}
    return [
        call_of(op, case, number=0, **biased),
        call_of(op, case, OUT, number=1),
        call_of(op, case, IN_PLACE, number=2, **biased),
        call_of(op, case, number=3, kind="integer", **biased),
        call_of(op, case, IN_PLACE, number=4, kind="integer"),
    ]


# --- one rank


def residual_and_weight(call: NormCall) -> tuple[torch.Tensor, torch.Tensor]:
    """The same on every rank. Of an exact sum the residual is of integers too."""
    generator = torch.Generator().manual_seed(1000 * call.sum.number + call.H)
    residual = torch.randn(call.shape, generator=generator)
    if call.sum.kind != "normal":
        residual = (8 * residual).round()
    weight = 1 + torch.randn(call.H, generator=generator) / 4
    return residual.to(call.case.dtype), weight.to(call.case.dtype)


def operands(call: NormCall, rank: int) -> list[torch.Tensor]:
    """x or a and b, residual, weight, and perhaps bias."""
    first, bias = sums.operands(call.sum, rank), []
    if call.sum.bias:
        *first, bias = first
        bias = [bias]
    lay_out = LAYOUTS[call.sum.layout]
    if call.form == IN_PLACE:
        first, lay_out = [first[0].contiguous(), *first[1:]], LAYOUTS["contiguous"]
    residual, weight = residual_and_weight(call)
    return [*first, lay_out(residual), LAYOUTS[call.sum.layout](weight), *bias]


def invoke(call: NormCall, tensors: list[torch.Tensor], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The call itself: (y, new_residual)."""
    ops, fixed = torch.ops.tp_overlap, 3 if call.op == SUM else 4
    given, bias = tensors[:fixed], tensors[fixed:]
    if call.form == FRESH:
        return getattr(ops, call.op)(*given, EPS, group_name(), *bias)
    y, new_residual = (torch.full(call.shape, NAN, dtype=call.case.dtype, device=given[0].device) for _ in range(2))
    if call.form == IN_PLACE:
        y, new_residual = given[0] if call.op == SUM else y, given[-2]
    getattr(ops, call.op + "_out")(*given, EPS, group_name(), y, new_residual, *bias)
    return y, new_residual


def make_calls(rank: int, world_size: int, setup: Setup, calls: list[NormCall], flags: int | None = None) -> list:
    """(y, new_residual) of the calls, which follow each other without a pause, but for ranks that are late on purpose.

    flags: tiles that the one-shot pad has flags for; None: all of it.
    """
    arena = prepare_arena(setup)
    whole, arena.layout = arena.layout, dataclasses.replace(arena.layout, one_shot_tiles=flags or 2048)
    prepared = [operands(call, rank) for call in calls]
    before = [[tensor.clone() for tensor in tensors] for tensors in prepared]
    barrier()
    results = []
    try:
        with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan), jitter(setup.jitter_s), torch.inference_mode():
            for call, tensors in zip(calls, prepared, strict=True):
                if call.sum.late_rank == rank:
                    time.sleep(call.sum.late_s)
                with tpo.force_plan(call.plan) if call.plan else contextlib.nullcontext():
                    results.append(invoke(call, tensors, rank))
    finally:
        arena.layout = whole
        arena.cache.clear()
    for call, tensors, olds in zip(calls, prepared, before, strict=True):
        for tensor, old in zip(tensors, olds, strict=True):
            written = any(tensor is result for result in results[calls.index(call)])
            assert written or torch.equal(tensor, old), "an input has changed"
    return results


# --- the judge


def check(
    ranks, setup: Setup, calls: list[NormCall], rows_at_once: int | None = None, flags: int | None = None
) -> None:
    """Every rank makes the calls in a row; every result is judged. ranks: the fixture."""
    by_rank = ranks(calls[0].case.world_size).run(make_calls, setup, calls, flags)
    for call, results in zip(calls, zip(*by_rank, strict=True), strict=True):
        judge(call, plan_name(setup, call), list(results), rows_at_once, setup.ranks_per_node)


def plan_name(setup: Setup, call: NormCall) -> str:
    """The plan that runs; on several nodes the one inside."""
    if setup.ranks_per_node is not None:
        return of_sums.plan_name(setup, call.sum)
    if call.case.world_size == 1:
        return "local"
    if setup.backend == "ref":
        return "ref"
    return (call.plan or setup.plan or "").split(":")[0]


def judge(
    call: NormCall,
    plan: str,
    results: list[tuple[torch.Tensor, torch.Tensor]],
    rows_at_once: int | None = None,
    ranks_per_node: int | None = None,
) -> None:
    """Raises unless `results`, by rank, are what the op promises. plan: that ran.

    ranks_per_node: where the ranks were on several nodes; plan is then the one inside.
    """
    dtype = call.case.dtype
    for rank, pair in enumerate(results):
        for result, first in zip(pair, results[0], strict=True):
            assert result.dtype == dtype and result.shape == call.shape and result.is_contiguous(), f"rank {rank}"
            assert of_sums.same_bits(result, first), f"rank {rank} holds other bits than rank 0"
    y, new_residual = (result.reshape(-1, call.H) for result in results[0])
    residual, weight = residual_and_weight(call)
    what = f"{call.op} {call.sum.kind} call {call.sum.number}"
    check_sum(call, plan, new_residual, residual.reshape(-1, call.H), rows_at_once, what, ranks_per_node)
    check_norm(y, new_residual, weight, what)


def check_sum(
    call: NormCall,
    plan: str,
    new_residual: torch.Tensor,
    residual: torch.Tensor,
    rows: int | None,
    what: str,
    ranks_per_node: int | None = None,
) -> None:
    """new_residual against sum + residual: the sum as its plan promises it, rounded with the residual in it, or before
    it too."""
    of_sum, case = call.sum, call.case
    truth = of_sums.truth_of(of_sum)
    if of_sum.kind != "normal":
        exact = truth.ref.reshape(residual.shape) + residual.double()
        assert of_sums.same_bits(new_residual + 0.0, exact.to(case.dtype) + 0.0), f"{what}: new_residual is not exact"
        return
    bias, plan_of_sum = inputs.bias(case, of_sum.number), plan.removesuffix("_norm")
    truth, bound = of_sums.allowed(of_sum, plan_of_sum, truth, bias, rows, ranks_per_node)
    u, slack = torch.finfo(case.dtype).eps / 2, 1 + 2.0**-6
    # The sum is rounded with the residual in it. On one rank too, but for a GEMM's: a product is rounded as such.
    in_one = plan == "ref" or plan.endswith("_norm") or (call.op, plan) == (SUM, "local")
    if in_one and ranks_per_node is None:
        bound = bound - slack * u * truth.ref.abs()
    smallest = torch.finfo(case.dtype).smallest_normal * 2 * u if case.dtype == FP16 else 0.0
    ref = truth.ref + residual.double().reshape(truth.ref.shape)
    bound = bound + slack * (u + tolerance.U32) * ref.abs() + smallest
    truth = dataclasses.replace(truth, ref=ref)
    if truth.partials.abs().mean() > 4 * bound.mean():  # a share of a sum over many ranks may be within its roundings
        tolerance.check_bites(truth, bound)
    tolerance.check(new_residual.reshape(ref.shape), truth, bound, f"{what}: new_residual")


def check_norm(y: torch.Tensor, new_residual: torch.Tensor, weight: torch.Tensor, what: str = "y") -> None:
    """y against the norm of the new_residual beside it: one rounding, and those of f32.

    Of the H squares each is rounded and so is each addition; the mean, eps, the root, its inverse (of 2 units on a GPU)
    and two products are eight more. The 2 is for units that truncate.
    """
    hidden = new_residual.double()
    exact = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + EPS) * weight.double()
    u = torch.finfo(y.dtype).eps / 2
    smallest = torch.finfo(y.dtype).smallest_normal * 2 * u
    bound = (1 + 2.0**-6) * (u + 2 * (y.shape[-1] + 8) * tolerance.U32) * exact.abs() + smallest
    assert ((y.double() - exact).abs() <= bound).all(), f"{what}: y is not the norm of new_residual"
    assert (0.02 * exact.abs() > bound).double().mean() > 0.5 or not y.numel(), "a scale wrong by 2 % would pass"


CASES = [
    Case(8, 64, 0, BF16, 2, "more rows than programs"),
    Case(1, 4096, 0, BF16, 2, "one row"),
    Case(3, 41, 0, FP16, 2, "odd H, fp16"),
    Case(5, 203, 0, BF16, 2, "ragged H"),
    Case(1, 1, 0, BF16, 2, "one element"),
    Case(0, 64, 0, BF16, 2, "no rows"),
    Case(2, 8_200, 0, BF16, 2, "H above a block"),
    Case(2, 24, 0, BF16, 3, "three ranks, fewer rows"),
    Case(7, 72, 0, FP16, 3, "three ranks, fp16"),
    Case(5, 136, 0, BF16, 4, "four ranks"),
]
