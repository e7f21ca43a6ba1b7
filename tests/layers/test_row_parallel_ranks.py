"""RowParallelLinear on several ranks, fused and unfused, against float64.

All numbers are small integers: every partial and every sum is exact in bfloat16, so results are compared by bits and a
bias that is added twice, or by every rank, cannot hide in a tolerance.
"""

import copy
import dataclasses
import functools
import logging

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tp_overlap_kernels.layers import RowParallelLinear, counters, routing

# Worlds of 1, 2, 3, 4 and 8 all divide 48 columns of small integers; |sum| <= 4 * 48 + 8 < 256 is exact in bfloat16.
K, N = 48, 40


@dataclasses.dataclass(frozen=True)
class Case:
    """How a layer is built and called."""

    why: str
    flags: tuple[str, ...] = ()  # those that differ from their default
    shape: tuple[int, ...] = (11,)  # of the input, without its last dimension
    bias: bool = True
    dtype: torch.dtype = torch.bfloat16
    backend: str = "unfused"  # or the CPU backend of the fused op

    def layer_flags(self):
        defaults = {"input_is_parallel": True, "skip_bias_add": False, "reduce_results": True, "scatter": False}
        return defaults | {flag: not defaults[flag] for flag in self.flags}

    def __str__(self):
        return f"{self.backend}: {self.why}"


def integers(shape, low, high, seed):
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).double()


def inputs(case):
    """x [..., K], weight [N, K], bias [N] of the whole layer, float64."""
    return integers((*case.shape, K), -2, 2, 1), integers((N, K), -2, 2, 2), integers((N,), -8, 8, 3)


def expected(case, rank, world_size):
    """What the docstring of the layer promises, in float64 from whole tensors."""
    x, weight, bias = inputs(case)
    flags = case.layer_flags()
    columns = slice(rank * K // world_size, (rank + 1) * K // world_size)
    total = x @ weight.T if flags["reduce_results"] else x[..., columns] @ weight[:, columns].T
    if case.bias and not flags["skip_bias_add"]:
        total = total + bias
    if flags["scatter"]:
        total = total.reshape(-1, N)
        rows = -(-len(total) // world_size)
        total = total[rank * rows : (rank + 1) * rows]
    return total.to(case.dtype)


def build(case, **more):
    _, weight, bias = inputs(case)
    layer = RowParallelLinear(K, N, case.bias, dtype=case.dtype, **case.layer_flags(), **more)
    layer.load_state_dict({"weight": weight} | ({"bias": bias} if case.bias else {}))
    return layer


def own_input(case, rank, world_size):
    x = inputs(case)[0].to(case.dtype)
    return x if "input_is_parallel" in case.flags else x.chunk(world_size, dim=-1)[rank]


def with_backend(task):
    """The task runs with an arena and the CPU backend that its case names, or with no arena."""

    @functools.wraps(task)
    def run(rank, world_size, case, *args):
        routing.reset_counters()
        if case.backend == "unfused":
            return task(rank, world_size, case, *args)
        with tpo.cpu_backend(case.backend):
            tpo.init(max_M=64, max_N=N)
            try:
                return task(rank, world_size, case, *args)
            finally:
                tpo.close()

    return run


# ---- tasks, run on every rank


@with_backend
@torch.inference_mode()
def call_three_times(rank, world_size, case):
    layer, x = build(case), own_input(case, rank, world_size)
    before = x.clone()
    outputs = [layer(x) for _ in range(3)]
    assert torch.equal(x, before)
    if "skip_bias_add" in case.flags:
        assert all(bias is layer.bias for _, bias in outputs)
        outputs = [output for output, _ in outputs]
    assert len({output.data_ptr() for output in outputs if output.numel()}) in (0, 3), "outputs are fresh tensors"
    return [output.clone() for output in outputs], counters()


@with_backend
@torch.inference_mode()
def call_compiled(rank, world_size, case, backend):
    torch.compiler.reset()
    layer = build(case)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend=backend)
    results = []
    for M in (11, 5, 32):
        other = dataclasses.replace(case, shape=(M,))
        output = compiled(own_input(other, rank, world_size))
        results.append((output.clone(), expected(other, rank, world_size)))
    return results, counters()


def train(rank, world_size, case):
    routing.reset_counters()
    layer = build(case)
    for param in layer.parameters():
        param.requires_grad_(True)
    x = own_input(case, rank, world_size).detach().requires_grad_(True)
    output = layer(x)
    pull = integers((len(output), N), -2, 2, 4 + rank * ("scatter" in case.flags)).to(case.dtype)
    (output * pull).sum().backward()
    return pull, x.grad, layer.weight.grad, layer.bias.grad, counters()


@torch.inference_mode()
def compiled_before_and_after_init(rank, world_size, case):
    torch.compiler.reset()
    routing.reset_counters()
    layer, x = build(case), own_input(case, rank, world_size)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    outputs, seen = [compiled(x)], [counters()]
    for max_N in (N, N - 1, N):
        tpo.init(max_M=64, max_N=max_N)
        outputs.append(compiled(x))
        tpo.close()
        seen.append(counters())
    outputs.append(compiled(x))
    return [torch.equal(output, expected(case, rank, world_size)) for output in outputs], seen, counters()


@with_backend
@torch.inference_mode()
def compiled_one_by_one(rank, world_size, case):
    torch.compiler.reset()
    x = own_input(case, rank, world_size)
    layers = [build(case, name=f"layers.{index}.o_proj") for index in range(12)]
    return [torch.compile(layer, fullgraph=True, backend="aot_eager")(x) for layer in layers], counters()


@with_backend
@torch.inference_mode()
def many_layers(rank, world_size, case, count):
    before = tpo.memory_report().groups if case.backend != "unfused" else None
    layers = [build(case) for _ in range(count)]
    x = own_input(case, rank, world_size)
    outputs = [layer(x) for layer in layers]
    after = tpo.memory_report().groups if case.backend != "unfused" else None
    return all(torch.equal(output, outputs[0]) for output in outputs), before, after


def half_group(rank, world_size, case):
    """Two groups of two ranks, each with a layer of its own."""
    groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    layer = build(case, group=groups[rank // 2])
    with torch.inference_mode():
        return layer.tp_rank, layer.tp_size, layer(own_input(case, rank % 2, 2))


def warnings_of(rank, world_size, case):
    routing.reset_counters()
    texts = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())
    routing.log.addHandler(handler)
    try:
        layers = [build(case, name=f"layers.{index}.o_proj") for index in range(3)]
        with torch.inference_mode():
            for layer in layers * 2:
                layer(own_input(case, rank, world_size))
    finally:
        routing.log.removeHandler(handler)
    return texts, counters()


def copies(rank, world_size, case):
    layer = copy.deepcopy(build(case))
    with torch.inference_mode():
        return layer(own_input(case, rank, world_size))


# ---- tests

FLAGS = [
    Case("every flag at its default"),
    Case("no bias", bias=False),
    Case("three dimensions", shape=(2, 7)),
    Case("one dimension", shape=()),
    Case("one row", shape=(1,)),
    Case("no rows", shape=(0,)),
    Case("fp16", dtype=torch.float16),
    Case("the whole input", ("input_is_parallel",), shape=(3, 5)),
    Case("the caller adds the bias", ("skip_bias_add",)),
    Case("somebody else owes the sum", ("reduce_results",), bias=False),
    Case("somebody else owes the sum, the caller the bias", ("reduce_results", "skip_bias_add")),
    Case("rows of the sum", ("scatter",)),
    Case("rows of the sum, three dimensions", ("scatter",), shape=(2, 7)),
    Case("rows of the sum, fewer than ranks", ("scatter",), shape=(1,)),
    Case("rows of the sum, none", ("scatter",), shape=(0,)),
    Case("rows of the sum of the whole input, bias kept", ("scatter", "input_is_parallel", "skip_bias_add")),
]
BACKENDS = ("unfused", "ref", "interp")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", FLAGS, ids=lambda case: case.why)
def test_every_flag_is_honoured(ranks, case, world_size, backend):
    check(ranks, dataclasses.replace(case, backend=backend), world_size)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world_size", [1, 4, 8])
@pytest.mark.parametrize("case", [FLAGS[0], FLAGS[-1]], ids=lambda case: case.why)
def test_other_worlds(ranks, case, world_size, backend):
    check(ranks, dataclasses.replace(case, backend=backend), world_size)


def check(ranks, case, world_size):
    results = ranks(world_size).run(call_three_times, case)
    for rank, (outputs, counted) in enumerate(results):
        for output in outputs:
            assert output.dtype == case.dtype
            assert torch.equal(output, expected(case, rank, world_size))
        if world_size == 1 or "reduce_results" in case.flags:
            assert counted == {}, "nothing to sum"
        else:
            assert counted == {"fused" if case.backend != "unfused" else "unfused: not_initialised": 3}


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("case", [FLAGS[0], FLAGS[11], FLAGS[7]], ids=lambda case: case.why)
def test_it_compiles_into_one_graph_for_any_M(ranks, case, backend):
    case = dataclasses.replace(case, backend=backend)
    for results, counted in ranks(2).run(call_compiled, case, "aot_eager", timeout=180):
        assert all(torch.equal(output, wanted) for output, wanted in results)
        assert counted == {"fused" if backend != "unfused" else "unfused: not_initialised": 1}, "one graph for all M"


def test_a_compiled_layer_follows_init_and_close(ranks):
    for equal, seen, last in ranks(2).run(compiled_before_and_after_init, Case("compiled")):
        assert equal == [True] * 5
        first = {"unfused: not_initialised": 1}
        both = first | {"fused": 1}
        wide = both | {"unfused: max_N": 1}
        assert seen == [first, both, wide, wide] and last == wide, "traced once for each, then found again"


def test_layers_that_are_compiled_one_by_one_share_a_graph(ranks):
    """Else the twelfth layer would meet torch's limit of eight graphs a function."""
    case = Case("", backend="ref")
    for rank, (outputs, counted) in enumerate(ranks(2).run(compiled_one_by_one, case)):
        assert all(torch.equal(output, expected(case, rank, 2)) for output in outputs)
        assert counted == {"fused": 1}


@pytest.mark.parametrize(
    "case",
    [
        Case("the sum", dtype=torch.float32),
        Case("the sum of the whole input", ("input_is_parallel",), dtype=torch.float32),
        Case("rows of the sum", ("scatter",), dtype=torch.float32),
    ],
    ids=lambda case: case.why,
)
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradients_go_the_unfused_way_and_are_those_of_the_whole_layer(ranks, case, world_size):
    results = ranks(world_size).run(train, case)
    x, weight, bias = (tensor.requires_grad_(True) for tensor in inputs(case))
    pull = results[0][0] if "scatter" not in case.flags else torch.cat([result[0] for result in results])
    ((x @ weight.T + bias) * pull).sum().backward()
    for rank, (_, x_grad, weight_grad, _, counted) in enumerate(results):
        columns = slice(rank * K // world_size, (rank + 1) * K // world_size)
        own_x = x.grad if "input_is_parallel" in case.flags else x.grad[:, columns]
        assert torch.equal(x_grad.double(), own_x) and torch.equal(weight_grad.double(), weight.grad[:, columns])
        assert counted == {"unfused: needs_grad": 1}
    # With scatter each rank has the bias gradient of its own rows, as every data-parallel parameter does.
    of_bias = results[0][3] if "scatter" not in case.flags else sum(result[3] for result in results)
    assert torch.equal(of_bias.double(), bias.grad)


def test_gradients_go_the_unfused_way_with_an_arena_too(ranks):
    for counted in ranks(2).run(train_with_arena):
        assert counted == {"unfused: needs_grad": 1}


def train_with_arena(rank, world_size):
    return with_backend(train)(rank, world_size, Case("", backend="ref"))[-1]


def test_a_dtype_that_the_op_does_not_take_is_unfused_and_right(ranks):
    case = Case("float32", dtype=torch.float32, backend="ref")
    for rank, (outputs, counted) in enumerate(ranks(2).run(call_three_times, case)):
        assert counted == {"unfused: dtype": 3}
        assert all(torch.equal(output, expected(case, rank, 2)) for output in outputs)


def test_a_layer_wider_than_the_arena_is_unfused_and_right(ranks):
    for counted in ranks(2).run(too_wide):
        assert counted == {"unfused: max_N": 1}


def too_wide(rank, world_size):
    routing.reset_counters()
    tpo.init(max_M=64, max_N=N - 1)
    try:
        with torch.inference_mode():
            output = build(Case(""))(own_input(Case(""), rank, world_size))
    finally:
        tpo.close()
    assert torch.equal(output, expected(Case(""), rank, world_size))
    return counters()


def test_the_warning_comes_once_on_rank_0_and_names_layer_and_reason(ranks):
    (first, counted), (second, _) = ranks(2).run(warnings_of, Case(""))
    assert len(first) == 1 and first[0].startswith("layers.0.o_proj runs unfused: ") and "init()" in first[0]
    assert second == [] and counted == {"unfused: not_initialised": 6}


def test_eighty_layers_take_the_memory_of_one(ranks):
    for equal, before, after in ranks(2).run(many_layers, Case("", backend="ref"), 80):
        assert equal and before == after


def test_groups_within_the_world_do_not_meet(ranks):
    case = Case("")
    for rank, (tp_rank, tp_size, output) in enumerate(ranks(4).run(half_group, case)):
        assert (tp_rank, tp_size) == (rank % 2, 2) and torch.equal(output, expected(case, tp_rank, 2))


def test_a_copy_of_a_layer_works_in_the_same_group(ranks):
    case = Case("")
    for rank, output in enumerate(ranks(2).run(copies, case)):
        assert torch.equal(output, expected(case, rank, 2))
