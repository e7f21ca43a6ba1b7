"""Input that one rank can see to be wrong: each refusal names the op, the values and the fix, and sends nothing.

One rank by itself, in this process: no check looks at another rank.
"""

from __future__ import annotations

import pytest
import torch

import tp_overlap_kernels as tpo
from tp_overlap_kernels.memory import nodes

GROUP = "local"  # the group of one rank, where torch.distributed is not initialised
GEMMS = ("gemm_all_reduce", "gemm_reduce_scatter")
OPS = (*GEMMS, "all_reduce")


def tensor(*shape, dtype=torch.bfloat16, **more):
    return torch.zeros(shape, dtype=dtype, **more)


@pytest.fixture(autouse=True)
def arena():
    tpo.init(max_M=32, max_N=64)
    yield
    tpo.close()


def refused(op, wanted, *arguments, error=tpo.InvalidInput, group=GROUP, **more):
    """The call raises `error`, whose text begins with the op's name and holds every string of `wanted`."""
    function = getattr(torch.ops.tp_overlap, op)
    with pytest.raises(error) as caught:
        function(*arguments, group, **more)
    text = str(caught.value)
    assert text.startswith(op.removesuffix("_out") + ": "), text
    assert [part for part in wanted if part not in text] == [], text


A, B = tensor(5, 24), tensor(40, 24)

INPUTS = [
    ("a dtype that no kernel takes", (A.float(), B.float()), ["bfloat16 or float16", "float32", "Convert"]),
    ("two dtypes", (A, B.half()), ["one dtype", "bfloat16", "float16", "Convert"]),
    ("two devices", (A, B.to("meta")), ["one device", "cpu", "meta", "Move"]),
    ("another K", (A, tensor(40, 32)), ["(5, 24)", "(40, 32)", "K=24 and 32", "transposed"]),
    ("b transposed", (A, tensor(24, 40)), ["(24, 40)", "transposed"]),
    ("a without dimensions", (tensor(), B), ["[..., K]", "()", "(40, 24)", "nn.Linear"]),
    ("b of one dimension", (A, tensor(24)), ["[N, K]", "(24,)", "nn.Linear"]),
    ("b of three dimensions", (A, tensor(2, 20, 24)), ["[N, K]", "(2, 20, 24)"]),
    ("more columns than the arena", (A, tensor(65, 24)), ["N=65", "max_N=64", "init(group, max_M=32, max_N=65)"]),
    ("a bias of another length", (A, B, tensor(24)), ["bias", "N=40", "(24,)"]),
    ("a bias of two dimensions", (A, B, tensor(1, 40)), ["bias", "N=40", "(1, 40)"]),
    ("a bias of another dtype", (A, B, tensor(40, dtype=torch.float32)), ["one dtype", "float32"]),
    ("a bias elsewhere", (A, B, tensor(40, device="meta")), ["one device", "meta"]),
]


@pytest.mark.parametrize("op", GEMMS)
@pytest.mark.parametrize("why, tensors, wanted", INPUTS, ids=[row[0].replace(" ", "_") for row in INPUTS])
def test_inputs_of_a_gemm(op, why, tensors, wanted):
    a, b, *bias = tensors
    more = {"bias": bias[0]} if bias else {}
    refused(op, wanted, a, b, **more)
    with pytest.raises(tpo.InvalidInput):  # the _out form: the same checks
        getattr(torch.ops.tp_overlap, op + "_out")(a, b, GROUP, tensor(5, 40), **more)


def test_input_of_all_reduce():
    refused("all_reduce", ["bfloat16 or float16", "int32", "Convert"], tensor(3, dtype=torch.int32))
    with pytest.raises(tpo.InvalidInput, match="one dtype"):
        torch.ops.tp_overlap.all_reduce_out(tensor(3), GROUP, tensor(3, dtype=torch.float16))


OUTPUTS = [
    ("too few rows", tensor(4, 40), ["(5, 40)", "(4, 40)"]),
    ("flat", tensor(200), ["(5, 40)", "(200,)"]),
    ("another dtype", tensor(5, 40, dtype=torch.float16), ["bfloat16", "float16"]),
    ("elsewhere", tensor(5, 40, device="meta"), ["cpu", "meta"]),
    ("not contiguous", tensor(40, 5).t(), ["contiguous", "strides (1, 5)", "(5, 40)"]),
]


@pytest.mark.parametrize("why, out, wanted", OUTPUTS, ids=[row[0].replace(" ", "_") for row in OUTPUTS])
def test_outputs(why, out, wanted):
    for op, inputs in zip(OPS, [(A, B), (A, B), (tensor(5, 40),)], strict=True):
        with pytest.raises(tpo.InvalidInput) as caught:
            getattr(torch.ops.tp_overlap, op + "_out")(*inputs, GROUP, out)
        text = str(caught.value)
        assert text.startswith(op + ": ") and all(part in text for part in wanted), text


def over(*shapes, offset=0):
    """Two tensors of these shapes in one memory; the second begins `offset` elements later."""
    memory = torch.zeros(4000, dtype=A.dtype)
    tensors = []
    for shape, start in zip(shapes, (0, offset), strict=True):
        size = torch.Size(shape).numel()
        tensors.append(memory[start : start + size].view(shape))
    return tensors


@pytest.mark.parametrize("offset", [0, 1, 119], ids=["same start", "one later", "last element"])
@pytest.mark.parametrize("op", GEMMS)
def test_out_over_an_input_is_refused(op, offset):
    function = getattr(torch.ops.tp_overlap, op + "_out")
    a, out = over((5, 24), (5, 40), offset=offset)
    bias, out_over_bias = over((40,), (5, 40), offset=min(offset, 39))
    for arguments in ((a, B, GROUP, out), (A, B, GROUP, out_over_bias, bias)):
        for _ in range(2):  # as a new call, and where an equal one is known
            with pytest.raises(tpo.InvalidInput, match=f"{op}: out must not overlap an input.*Give it memory"):
                function(*arguments)
            function(A, B, GROUP, tensor(5, 40), *arguments[4:])
    beside, out = over((5, 24), (5, 40), offset=120)
    function(beside, B, GROUP, out)


def test_out_of_all_reduce_may_be_its_input_and_nothing_else_over_it():
    function = torch.ops.tp_overlap.all_reduce_out
    x, same = over((5, 40), (5, 40))
    function(x, GROUP, x)
    function(x, GROUP, same)
    _, later = over((5, 40), (5, 40), offset=200)
    function(x, GROUP, later)
    for x, out in (over((5, 40), (5, 40), offset=1), (same.view(40, 5).t(), same)):
        with pytest.raises(tpo.InvalidInput, match="all_reduce: out must not overlap an input"):
            function(x, GROUP, out)


@pytest.mark.parametrize("op", OPS)
def test_gradients_are_refused_with_the_way_round(op):
    tensors = [tensor(5, 24), tensor(40, 24)] if op in GEMMS else [tensor(5, 24)]
    for x in tensors:
        x.requires_grad_(True)
        refused(op, ["no backward", "requires grad", "torch.inference_mode()", "detach"], *tensors)
        with torch.no_grad():
            getattr(torch.ops.tp_overlap, op)(*tensors, GROUP)  # now it is known ...
        refused(op, ["no backward"], *tensors)  # ... and still refused
        with torch.inference_mode():
            getattr(torch.ops.tp_overlap, op)(*tensors, GROUP)
        x.requires_grad_(False)
    if op in GEMMS:
        refused(op, ["no backward", "(40,)"], *tensors, bias=tensor(40, requires_grad=True))


@pytest.mark.parametrize("op", OPS)
def test_a_group_that_nobody_initialised(op):
    tensors = [A, B] if op in GEMMS else [A]
    error = tpo.NotInitialised
    refused(op, ["'tensor_parallel'", "'local'", "init(group"], *tensors, group="tensor_parallel", error=error)
    tpo.close()
    refused(op, ["'local'", "none", "init(group"], *tensors, error=error)


def test_a_refusal_leaves_the_group_as_it_was():
    refused("gemm_all_reduce", [], A, tensor(65, 24))
    assert torch.ops.tp_overlap.gemm_all_reduce(A + 1, B + 1, GROUP).eq(24).all()
    tpo.check()


# --- what is chosen for the process


def test_plans_that_do_not_exist_or_cannot_run():
    with pytest.raises(tpo.InvalidInput, match=r"'three_shot'.*Known are"), tpo.force_plan("three_shot"):
        pass
    with pytest.raises(tpo.InvalidInput, match=r"'two_shot:block_m=0'.*cannot read 'block_m=0'"):
        tpo.force_plan("two_shot:block_m=0").__enter__()
    with tpo.force_plan("two_shot"):
        refused("gemm_all_reduce", ["'two_shot'", "M=5, N=40, K=24", "world_size=1", "Force one of local"], A, B)
    assert torch.ops.tp_overlap.gemm_all_reduce(A, B, GROUP).shape == (5, 40)


def test_backends_that_do_not_exist():
    with pytest.raises(tpo.InvalidInput, match=r"'gpu' is unknown. Give 'ref' or 'interp'"), tpo.cpu_backend("gpu"):
        pass


# --- init and its pure relative

SIZES = [
    ({"max_M": 0}, "max_M=0"),
    ({"max_N": -3}, "max_N=-3"),
    ({"dtype": torch.float32}, "bfloat16 or float16, got torch.float32"),
]


@pytest.mark.parametrize("more, text", SIZES, ids=lambda x: x if isinstance(x, str) else "")
def test_sizes(more, text):
    sizes = {"max_M": 16, "max_N": 16} | more
    with pytest.raises(tpo.InvalidInput, match=text) as caught:
        tpo.init(**sizes)
    assert str(caught.value).startswith("init: ")
    with pytest.raises(tpo.InvalidInput, match=text) as caught:
        tpo.bytes_needed(**sizes)
    assert str(caught.value).startswith("bytes_needed: ")


@pytest.mark.parametrize("world_size", [0, 9])
def test_world_sizes(world_size):
    with pytest.raises(tpo.InvalidInput, match=f"bytes_needed: world_size must be 1 to 8, got {world_size}"):
        tpo.bytes_needed(16, 16, world_size=world_size)


def test_a_group_that_is_too_large(monkeypatch):
    tpo.close()
    monkeypatch.setattr(nodes, "MAX_WORLD_SIZE", 0)
    with pytest.raises(tpo.UnsupportedTopology, match="init: 1 to 0 ranks of a group on a node are supported, got 1"):
        tpo.init(max_M=16, max_N=16)


def test_stores(monkeypatch):
    tpo.close()
    wrong = [("nvlink", r"unknown store 'nvlink'\. Give auto,"), ("symm_mem", r"1 ranks on cpu\. Use store='local'")]
    for store, text in wrong:
        with pytest.raises(tpo.UnsupportedTopology, match=text):
            tpo.init(max_M=16, max_N=16, store=store)
    with pytest.raises(tpo.NotInitialised):  # and nothing is half made
        tpo.check()
    assert tpo.init(max_M=16, max_N=16, store="shm").store == "local"


def test_init_during_a_capture_names_the_call_to_make_before_it(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tpo.init(max_M=16, max_N=64).max_M == 32  # large enough: nothing to do
    with pytest.raises(tpo.InvalidInput, match=r"init\(group, max_M=33, max_N=64\) on every rank before the capture"):
        tpo.init(max_M=33, max_N=64)
    monkeypatch.undo()


def test_explain_refuses_what_no_op_takes():
    for arguments, text in [(("gemm", 1, 1, 1), "unknown op 'gemm'"), (("all_reduce", 1, -1, 0), "N=-1")]:
        with pytest.raises(tpo.InvalidInput, match=text):
            tpo.explain(*arguments)
    with pytest.raises(tpo.InvalidInput, match="explain: dtype must be bfloat16 or float16"):
        tpo.explain("gemm_all_reduce", 1, 1, 1, dtype=torch.int8)
