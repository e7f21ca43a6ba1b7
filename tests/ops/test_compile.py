"""The ops in torch.compile and under torch.library.opcheck. Every rank does both in step, since each calls the op."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16, Case
from tests.ops.calls import Call, Setup, group_name, invoke, operands, out_shape, prepare_arena

OPS = ("gemm_all_reduce", "gemm_reduce_scatter", "all_reduce")
N, K = 40, 24
# The first is traced as it is, the second with a symbol, which serves the others. At least two rows a rank: torch makes
# graphs of their own for tensors of one row and of none, whatever the op.
SIZES = (5, 64, 17, 4)


def call_of(op, M, number=0, bias=False, dtype=BF16):
    sizes = (1, M * N, 0) if op == "all_reduce" else (M, N, K)
    return Call(
        op, Case(*sizes, dtype, 2, "compiled"), "normal", number, bias, leading=(M, N) if op == "all_reduce" else None
    )


# --- torch.compile


def layer(op, *tensors):
    """The op between two others, so that a graph has something around it."""
    fixed = 1 if op == "all_reduce" else 2
    y = getattr(torch.ops.tp_overlap, op)(tensors[0] * 2, *tensors[1:fixed], group_name(), *tensors[fixed:])
    return y * 0.5


def layer_out(op, *tensors):
    """The _out form, into a tensor made in the graph."""
    fixed = 1 if op == "all_reduce" else 2
    x = tensors[0]
    rows = x.shape[0]
    if op == "gemm_reduce_scatter":
        c = (rows + 1) // 2
        rank = torch.distributed.get_rank()
        rows = c if rank == 0 else rows - c
    out = torch.full((rows, N), float("nan"), dtype=x.dtype)
    getattr(torch.ops.tp_overlap, op + "_out")(*tensors[:fixed], group_name(), out, *tensors[fixed:])
    return out


def compile_and_call(rank, world_size, setup, op, bias, form, compiler):
    """Results by size, how often it was traced, and that the compiled ones are what eager gives."""
    prepare_arena(setup)
    torch._dynamo.reset()
    traced = []

    def counting(graph, inputs):
        traced.append(graph)
        return torch._dynamo.lookup_backend(compiler)(graph, inputs)

    compiled = torch.compile(form, fullgraph=True, dynamic=None, backend=counting)
    results = []
    with tpo.cpu_backend(setup.backend), torch.inference_mode():
        for number, M in enumerate(SIZES):
            tensors = operands(call_of(op, M, number, bias), rank)
            results.append((form(op, *tensors), compiled(op, *tensors)))
    torch._dynamo.reset()
    return results, len(traced)


@pytest.mark.parametrize("setup", [Setup("ref"), Setup("interp")], ids=str)
@pytest.mark.parametrize("form", [layer, layer_out], ids=lambda form: form.__name__)
@pytest.mark.parametrize("op", OPS)
def test_one_graph_serves_every_M(ranks, op, form, setup):
    check_compiled(ranks, setup, op, form, "aot_eager")


@pytest.mark.slow
@pytest.mark.parametrize("op", OPS[:2])
def test_inductor(ranks, op):
    check_compiled(ranks, Setup("ref"), op, layer, "inductor", timeout=240)


def check_compiled(ranks, setup, op, form, compiler, timeout=120):
    bias = op != "all_reduce" and form is layer
    by_rank = ranks(2).run(compile_and_call, setup, op, bias, form, compiler, timeout=timeout)
    for rank, (results, traced) in enumerate(by_rank):
        assert traced == 2, "once for a number, once for a symbol"
        for M, (eager, compiled) in zip(SIZES, results, strict=True):
            assert torch.equal(eager, compiled) and not compiled.isnan().any()
            assert compiled.shape == (out_shape(call_of(op, M), rank) if op != "all_reduce" else (M, N))


def test_ranks_do_not_find_each_others_code(ranks):
    """Their graphs read the same, and their shapes differ: the key of torch's caches has to tell them apart."""
    before, with_arena, after = zip(*ranks(2).run(tags), strict=True)
    assert before == after == ("", "") and with_arena[0] != with_arena[1]


def tags(rank, world_size):
    tpo.close()
    seen = []
    for step in (lambda: None, lambda: prepare_arena(Setup()), lambda: tpo.init(max_M=1, max_N=1), tpo.close):
        step()
        seen.append(torch.compiler.config.cache_key_tag)
    assert seen[1] == seen[2]
    return seen[0], seen[1], seen[3]


def test_two_layers_in_one_graph_keep_their_order(ranks):
    """Each adds what only the right order gives."""
    for eager, compiled in ranks(2).run(compile_a_chain):
        assert torch.equal(eager, compiled)


def compile_a_chain(rank, world_size):
    prepare_arena(Setup())
    torch._dynamo.reset()
    call = call_of("gemm_all_reduce", 12)
    a, b = operands(call, rank)

    def chain(a, b):
        ops, name = torch.ops.tp_overlap, group_name()
        y = ops.gemm_all_reduce(a, b, name)
        z = ops.gemm_reduce_scatter(y[:, :K].contiguous(), b, name)
        return ops.all_reduce(y, name).sum(0) + z.sum(0)

    with torch.inference_mode():
        return chain(a, b), torch.compile(chain, fullgraph=True, backend="aot_eager")(a, b)


def test_what_eager_refuses_is_refused_in_a_graph(ranks):
    for texts in ranks(2).run(compile_what_is_wrong):
        wrong_K, wrong_out, gradient, after = texts
        assert "K must be equal" in wrong_K and "(5, 24)" in wrong_K
        assert "out must have shape (5, 40)" in wrong_out
        assert "no backward" in gradient and "inference_mode" in gradient
        assert after == (5, 40)


def compile_what_is_wrong(rank, world_size):
    prepare_arena(Setup())
    ops, name = torch.ops.tp_overlap, group_name()
    a, b = torch.ones(5, K, dtype=BF16), torch.ones(N, K, dtype=BF16)
    out = torch.empty(4, N, dtype=BF16)
    wants_gradient = torch.ones(5, K, dtype=BF16, requires_grad=True)
    wrong = [
        lambda: ops.gemm_all_reduce(a, b.t(), name),
        lambda: ops.gemm_all_reduce_out(a, b, name, out),
        lambda: ops.gemm_all_reduce(wants_gradient, b, name),
    ]
    texts = []
    for call in wrong:
        torch._dynamo.reset()
        try:
            torch.compile(call, fullgraph=True, backend="aot_eager")()
            texts.append("")
        except Exception as error:  # the compiler wraps it
            texts.append(str(error))
    with torch.no_grad():
        return [*texts, tuple(ops.gemm_all_reduce(a, b, name).shape)]


# --- opcheck


@pytest.mark.parametrize("dtype", [BF16, FP16], ids=str)
@pytest.mark.parametrize("op", [*OPS, *(op + "_out" for op in OPS)])
def test_opcheck(ranks, op, dtype):
    """Schema, fake kernel, autograd registration and dynamic shapes, as torch checks them."""
    for outcome in ranks(2).run(run_opcheck, op, dtype, timeout=120):
        assert set(outcome.values()) == {"SUCCESS"} and len(outcome) == 4


def run_opcheck(rank, world_size, op, dtype):
    prepare_arena(Setup())
    base = op.removesuffix("_out")
    call = call_of(base, 7, bias=base != "all_reduce", dtype=dtype)  # 7 rows: the ranks' shares differ
    tensors = operands(call, rank)
    fixed = 1 if base == "all_reduce" else 2
    shape = (7, N) if base == "all_reduce" else out_shape(call, rank)
    out = [torch.zeros(shape, dtype=dtype)] if op != base else []
    arguments = (*tensors[:fixed], group_name(), *out, *tensors[fixed:])
    with torch.no_grad():
        return torch.library.opcheck(getattr(torch.ops.tp_overlap, op).default, arguments)


# --- fake kernels


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_fake_shapes_are_the_real_ones(ranks, world_size):
    """For every number of rows, also with a symbol in its place."""
    for fakes, reals, symbols in ranks(world_size).run(shapes_of):
        assert fakes == reals == symbols


def shapes_of(rank, world_size):
    prepare_arena(Setup())
    fakes, reals, symbols = [], [], []
    for op in OPS[:2]:
        for M in (1, 2, 3, 4, 8):
            call = Call(op, Case(M, N, K, BF16, world_size, ""))
            a, b = operands(call, rank)
            reals.append((op, M, tuple(invoke(call, [a, b], rank).shape)))
            with FakeTensorMode() as mode:
                fakes.append((op, M, tuple(invoke(call, [mode.from_tensor(a), mode.from_tensor(b)], rank).shape)))
            traced = make_fx(lambda a, b: invoke(call, [a, b], rank), tracing_mode="symbolic")(a, b)  # noqa: B023  now
            symbols.append((op, M, tuple(traced(a, b).shape)))
    return fakes, reals, symbols


@pytest.mark.parametrize("op", OPS)
def test_meta_tensors(ranks, op):
    """Shapes without data, and gradients refused there as well."""
    for shape, refused in ranks(1).run(on_meta, op):
        assert shape == (7, N) and "no backward" in refused


def on_meta(rank, world_size, op):
    prepare_arena(Setup())
    tensors = [x.to("meta") for x in operands(call_of(op, 7), rank)]
    shape = tuple(getattr(torch.ops.tp_overlap, op)(*tensors, group_name()).shape)
    tensors[0].requires_grad_(True)
    try:
        getattr(torch.ops.tp_overlap, op)(*tensors, group_name())
    except tpo.InvalidInput as error:
        return shape, str(error)
    return shape, ""


@pytest.mark.slow
def test_ranks_keep_one_order_of_independent_calls(ranks):
    """Inductor orders what is independent by sizes, and a reduce-scatter's are not the same on all ranks."""
    for eager, compiled in ranks(2).run(compile_independent_calls, timeout=240):
        assert all(torch.equal(a, b) for a, b in zip(eager, compiled, strict=True))


def compile_independent_calls(rank, world_size):
    prepare_arena(Setup())
    torch._dynamo.reset()
    a, b = operands(Call("gemm_all_reduce", Case(33, 128, 64, BF16, 2, "compiled"), "normal", 0), rank)

    def both(a, b):
        ops, name = torch.ops.tp_overlap, group_name()
        part = ops.gemm_reduce_scatter(a * 1, b, name)
        return ops.gemm_all_reduce(a * 1, b, name) + 0, part + 0

    with torch.inference_mode(), torch._inductor.config.patch(force_disable_caches=True):
        return both(a, b), torch.compile(both, fullgraph=True, dynamic=True)(a, b)
