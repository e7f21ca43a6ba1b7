"""The ops that end in a norm, in torch.compile and under torch.library.opcheck, and their fake kernels."""

from __future__ import annotations

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, Case
from tests.ops.calls import Setup, group_name, prepare_arena
from tests.ops.norms import CPU_PLANS, EPS, GEMM, SUM, call_of, operands

N, K = 40, 24
SIZES = (5, 24, 17)  # the first is traced as it is, the second with a symbol, which serves the last


def tensors_of(op: str, M: int, rank: int, bias: bool = False) -> list[torch.Tensor]:
    return operands(call_of(op, Case(M, N, K * (op == GEMM), BF16, 2, "compiled"), number=M, bias=bias), rank)


def layer(op, *tensors):
    """The op between others: what it gives is the next layer's residual."""
    fixed = 4 if op == GEMM else 3
    given, bias = [tensors[0] * 2, *tensors[1:fixed]], tensors[fixed:]
    y, new_residual = getattr(torch.ops.tp_overlap, op)(*given, EPS, group_name(), *bias)
    return y * 0.5, new_residual + 1


def layer_out(op, *tensors):
    """The _out form, in place as far as the op allows it, on tensors made in the graph."""
    *given, residual, weight = (x * 2 for x in tensors[: 4 if op == GEMM else 3])
    y = torch.full_like(residual, float("nan")) if op == GEMM else given[0]
    getattr(torch.ops.tp_overlap, op + "_out")(*given, residual, weight, EPS, group_name(), y, residual)
    return y, residual


@pytest.mark.parametrize(
    "op, form, backend",
    [(SUM, layer, "interp"), (SUM, layer_out, "ref"), (GEMM, layer, "ref"), (GEMM, layer_out, "ref")],
)
def test_one_graph_serves_every_M(ranks, op, form, backend):
    for results, traced in ranks(2).run(compile_and_call, op, form, backend, timeout=120):
        assert traced == 2, "once for a number, once for a symbol"
        for M, (eager, compiled) in zip(SIZES, results, strict=True):
            for wanted, got in zip(eager, compiled, strict=True):
                assert torch.equal(wanted, got) and got.shape == (M, N) and not got.isnan().any()


def compile_and_call(rank, world_size, op, form, backend):
    prepare_arena(Setup())
    torch._dynamo.reset()
    traced = []

    def counting(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend("aot_eager")(graph, inputs)

    compiled, results = torch.compile(form, fullgraph=True, dynamic=None, backend=counting), []
    with tpo.cpu_backend(backend), torch.inference_mode():
        for M in SIZES:
            tensors = tensors_of(op, M, rank, bias=op == GEMM and form is layer)
            results.append((form(op, *tensors), compiled(op, *tensors)))
    torch._dynamo.reset()
    return results, len(traced)


@pytest.mark.parametrize("op", [*CPU_PLANS, *(op + "_out" for op in CPU_PLANS)])
def test_opcheck(ranks, op):
    for outcome in ranks(2).run(run_opcheck, op, timeout=120):
        assert set(outcome.values()) == {"SUCCESS"} and len(outcome) == 4


def run_opcheck(rank, world_size, op):
    prepare_arena(Setup())
    base = op.removesuffix("_out")
    tensors, fixed = tensors_of(base, 7, rank, bias=base == GEMM), 4 if base == GEMM else 3
    outs = [torch.zeros(7, N, dtype=BF16) for _ in range(2)] if op != base else []
    arguments = (*tensors[:fixed], EPS, group_name(), *outs, *tensors[fixed:])
    with torch.no_grad():
        return torch.library.opcheck(getattr(torch.ops.tp_overlap, op).default, arguments)


@pytest.mark.parametrize("op", CPU_PLANS)
def test_meta_tensors(ranks, op):
    """Shapes without data, and what is wrong refused there as well."""
    for shapes, refused in ranks(1).run(on_meta, op):
        assert shapes == [(7, N), (7, N)] and "weight must be [H]" in refused


def on_meta(rank, world_size, op):
    prepare_arena(Setup())
    tensors = [x.to("meta") for x in tensors_of(op, 7, rank)]
    call = getattr(torch.ops.tp_overlap, op)
    shapes = [tuple(result.shape) for result in call(*tensors, EPS, group_name())]
    try:
        call(*tensors[:-1], tensors[-1][:-1], EPS, group_name())
    except tpo.InvalidInput as error:
        return shapes, str(error)
    return shapes, ""
