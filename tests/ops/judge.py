"""Whether the ranks' results of one call are right.

Against float64, with the bound that follows from what the plan promises under `Rounding:`; by bits where the inputs
are exact; and rank against rank, by bits.
"""

from __future__ import annotations

import dataclasses
import functools

import torch

from tests import inputs, tolerance, truth
from tests.cases import Case
from tests.ops.calls import Call, Setup, make_calls, out_shape
from tests.tolerance import Rounding
from tests.truth import Truth
from tp_overlap_kernels.dispatch.problem import PLAN_NAMES

# Where a plan adds the bias: to the finished sum in f32, to rank 0's product before it is rounded, or to the partial
# that travels to the owner.
SUM, RANK_0, TRAVELLER = "sum", "rank 0", "traveller"

# By plan, what its docstring says under `Rounding:`.
RULES = {
    "local": (Rounding.F32, SUM),
    "ref": (Rounding.WIRE, RANK_0),
    "one_shot": (Rounding.WIRE, SUM),
    "decode": (Rounding.WIRE, SUM),
    "two_shot": (Rounding.OWNER_F32, SUM),
    "push": (Rounding.OWNER_F32, SUM),
    "sm90": (Rounding.WIRE, SUM),  # the owner's own stays in f32; owners have tiles there, not rows
    "sm90_add": (Rounding.WIRE, RANK_0),
    "chunked": (Rounding.WIRE, TRAVELLER),  # cuBLAS may round the owner's product before it adds
    "unfused_one_shot": (Rounding.WIRE, RANK_0),
    "unfused_two_shot": (Rounding.WIRE, RANK_0),
    "unfused_sentinel": (Rounding.WIRE, RANK_0),
    "unfused_push": (Rounding.WIRE, SUM),
    "unfused_nccl": (Rounding.EACH_HOP, RANK_0),
    "unfused_symm_mem_two_shot": (Rounding.WIRE, RANK_0),
}


def count_in_f32() -> None:
    """For a process that is judged by RULES on a GPU: cuBLAS adds the parts of a split K in f32.

    torch lets it add them in the dtype unless told otherwise, a rounding a part that no plan's docstring counts.
    """
    torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction = False
    torch.backends.cuda.matmul.allow_fp16_reduced_precision_reduction = False


def check(ranks, setup: Setup, calls: list[Call], rows_at_once: int | None = None) -> None:
    """Every rank makes the calls in a row; every result is judged. ranks: the fixture."""
    by_rank = ranks(calls[0].case.world_size).run(make_calls, setup, calls)
    for call, results in zip(calls, zip(*by_rank, strict=True), strict=True):
        judge(call, plan_name(setup, call), list(results), rows_at_once, setup.ranks_per_node)


def plan_name(setup: Setup, call: Call) -> str:
    """The plan that runs, on several nodes the one inside; "" where dispatch chooses, enough for exact inputs."""
    if 1 in (call.case.world_size, setup.ranks_per_node):
        return "local"
    if setup.backend == "ref":
        return "ref"
    names = [plan.split(":")[0] for plan in (call.plan or setup.plan or "").split(";")]
    op = call.op if setup.ranks_per_node is None else "gemm_reduce_scatter"
    return next((name for name in names if name in PLAN_NAMES[op]), "")


def judge(
    call: Call,
    plan: str,
    results: list[torch.Tensor],
    rows_at_once: int | None = None,
    ranks_per_node: int | None = None,
) -> None:
    """Raises unless `results`, by rank, are what the operator promises.

    plan: name of the plan that ran. rows_at_once: rows of a chunk, where the call was larger than the arena.
    ranks_per_node: where the ranks were on several nodes; plan is then the one inside.
    """
    case = call.case
    for rank, result in enumerate(results):
        assert result.dtype == case.dtype and result.shape == out_shape(call, rank), f"rank {rank}: {result.shape}"
        assert result.is_contiguous()
    if call.op == "gemm_reduce_scatter":
        whole = torch.cat(results)
    else:
        whole = results[0].reshape(case.M, case.N)
        for rank, result in enumerate(results[1:], 1):
            assert same_bits(result, results[0]), f"rank {rank} holds other bits than rank 0"
    wanted = truth_of(call)
    what = f"{call.op} {call.kind} call {call.number}"
    if call.kind != "normal":
        _check_exact(call, whole, wanted, what)
        return
    wanted, bound = allowed(call, plan, wanted, inputs.bias(case, call.number), rows_at_once, ranks_per_node)
    tolerance.check_bites(wanted, bound)
    tolerance.check(whole, wanted, bound, what)


def allowed(
    call: Call,
    plan: str,
    wanted: Truth,
    bias: torch.Tensor,
    rows_at_once: int | None = None,
    ranks_per_node: int | None = None,
) -> tuple[Truth, torch.Tensor]:
    """The truth with the bias where the plan adds it, and by how much the plan may miss it, element by element."""
    if ranks_per_node is not None:
        return _allowed_on_nodes(call, plan, wanted, bias, ranks_per_node)
    if call.op == "all_reduce":
        return wanted, tolerance.tolerance(wanted, Rounding.EACH_HOP if plan == "nccl" else Rounding.WIRE)
    rounding, place = RULES[plan]
    owner = owners(call, rows_at_once).to(wanted.ref.device)
    if not call.bias or place == SUM:
        return wanted, tolerance.tolerance(wanted, rounding, owner=owner)
    assert place == RANK_0 or call.case.world_size == 2, "only one partial travels"
    wanted, product = _with_bias_in_partial(call, wanted, bias, place, owner)
    # torch.addmm adds the bias in f32 where cuBLAS has an epilogue for the layout, else as beta * C, before which
    # cuBLAS may round the product.
    u = torch.finfo(call.case.dtype).eps / 2
    return wanted, tolerance.tolerance(wanted, rounding, owner=owner) + (1 + 2.0**-6) * u * product.abs()


def _allowed_on_nodes(
    call: Call, plan: str, wanted: Truth, bias: torch.Tensor, ranks_per_node: int
) -> tuple[Truth, torch.Tensor]:
    rounding, place = RULES[plan] if call.op != "all_reduce" else (Rounding.WIRE, SUM)
    owner = places(call, ranks_per_node)
    if not call.bias or place == SUM:
        return wanted, tolerance.two_level(wanted, rounding, ranks_per_node, owner=owner)
    assert place == RANK_0 or ranks_per_node == 2, "only one partial of the first node travels"
    wanted, product = _with_bias_in_partial(call, wanted, bias, place, owner)
    u = torch.finfo(call.case.dtype).eps / 2  # as in `allowed`
    own = (1 + 2.0**-6) * u * product.abs()
    return wanted, tolerance.two_level(wanted, rounding, ranks_per_node, owner=owner) + own


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    return torch.equal(x.view(torch.int16), y.view(torch.int16))


def truth_of(call: Call) -> Truth:
    """The whole sum, with the bias; (M, N), also for all-reduce and for reduce-scatter."""
    if call.op == "all_reduce":
        flat = truth.all_reduce(call.case, call.kind, call.number)
        parts = {name: getattr(flat, name).unsqueeze(-2) for name in ("ref", "partials", "magnitude")}
        return dataclasses.replace(flat, **parts)
    return _truth_of_gemm(call.case, call.kind, call.number, call.bias)


@functools.lru_cache(maxsize=12)  # one row of calls is often made by several plans
def _truth_of_gemm(case: Case, kind: str, number: int, bias: bool) -> Truth:
    return truth.gemm_all_reduce(case, kind, number, bias)


def owners(call: Call, rows_at_once: int | None = None) -> torch.Tensor:
    """(M,) the rank that sums each row. An all-reduce in chunks has owners within each chunk."""
    M, world_size = call.case.M, call.case.world_size
    row = torch.arange(M)
    if call.op == "gemm_reduce_scatter" or rows_at_once is None or not M:
        return row // max(1, -(-M // world_size))
    first = row // rows_at_once * rows_at_once
    height = (M - first).clamp_max(rows_at_once)
    return (row - first) // ((height + world_size - 1) // world_size)


def places(call: Call, ranks_per_node: int) -> torch.Tensor:
    """(M,) the place within each node of the rank that sums each row there."""
    M, world_size = call.case.M, call.case.world_size
    if call.op == "gemm_reduce_scatter":
        return torch.arange(M) // max(1, -(-M // world_size)) % ranks_per_node
    return torch.arange(M) // max(1, -(-M // ranks_per_node))


def _with_bias_in_partial(
    call: Call, wanted: Truth, bias: torch.Tensor, place: str, owner: torch.Tensor
) -> tuple[Truth, torch.Tensor]:
    """The truth with the bias in one partial of each row, and what that partial, (M, N), was without it.

    The partial of rank 0, or of the one of ranks 0 and 1 that is not the owner.
    """
    rows = torch.arange(call.case.M, device=owner.device)
    which = torch.zeros_like(owner) if place == RANK_0 else 1 - owner
    partials = wanted.partials.clone()
    partials[which, rows] += bias.double()
    return dataclasses.replace(wanted, partials=partials), wanted.partials[which, rows]


def _check_exact(call: Call, out: torch.Tensor, wanted: Truth, what: str) -> None:
    try:
        tolerance.check_bits(out, wanted, what)
    except AssertionError as error:
        if call.kind == "tagged":
            row, col = (~((out.double() - wanted.ref) == 0)).nonzero()[0].tolist()
            bias = inputs.bias(call.case, call.number)[col].item() if call.bias else 0.0
            sign = 1.0 if wanted.ref[row, col].item() > bias else -1.0
            reading = inputs.read_tags(sign * (out[row, col].item() - bias), call.case.world_size, call.case.dtype)
            raise AssertionError(f"{error}\nat [{row}, {col}]: {reading}") from None
        raise
