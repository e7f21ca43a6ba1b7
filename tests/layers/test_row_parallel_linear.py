"""The layer in one process: what it holds, loads and refuses. With several ranks: test_row_parallel_ranks.py."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.layers import RowParallelLinear, row_parallel_linear

WHOLE = torch.arange(6.0 * 12).reshape(6, 12)
BIAS = torch.arange(6.0)


@pytest.fixture
def rank_1_of_4(monkeypatch):
    """Layers are built as on rank 1 of 4. They can be built and loaded, not called."""
    monkeypatch.setattr(row_parallel_linear, "_place", lambda group: ("a group", 1, 4))


def test_what_engines_look_at(rank_1_of_4):
    layer = RowParallelLinear(12, 6, dtype=torch.bfloat16)
    assert (layer.in_features, layer.input_size, layer.input_size_per_partition) == (12, 12, 3)
    assert (layer.out_features, layer.output_size, layer.output_size_per_partition) == (6, 6, 6)
    assert (layer.tp_rank, layer.tp_size, layer.group_name) == (1, 4, "a group")
    assert (layer.input_is_parallel, layer.skip_bias_add, layer.reduce_results, layer.scatter) == (
        True,
        False,
        True,
        False,
    )
    assert {name: tuple(p.shape) for name, p in layer.named_parameters()} == {"weight": (6, 3), "bias": (6,)}
    assert all(p.dtype == torch.bfloat16 and not p.requires_grad for p in layer.parameters())
    assert layer.bias.abs().sum() == 0, "a bias that was never loaded adds nothing"
    assert "rank 1 of 4 in group 'a group'" in repr(layer)


def test_without_bias(rank_1_of_4):
    layer = RowParallelLinear(12, 6, bias=False)
    assert layer.bias is None and set(layer.state_dict()) == {"weight"}


def test_on_the_meta_device_nothing_is_allocated_and_nothing_can_be_loaded(rank_1_of_4):
    layer = RowParallelLinear(12, 6, device="meta")
    assert layer.weight.is_meta and layer.bias.is_meta
    with pytest.raises(InvalidInput, match="to_empty"):
        layer.weight_loader(layer.weight, WHOLE)


# ---- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_loader_keeps_this_ranks_columns(rank_1_of_4, dtype):
    layer = RowParallelLinear(12, 6, dtype=dtype)
    layer.weight_loader(layer.weight, WHOLE)
    layer.weight_loader(layer.bias, BIAS)
    assert torch.equal(layer.weight, WHOLE[:, 3:6].to(dtype)) and torch.equal(layer.bias, BIAS.to(dtype))


def test_the_loader_takes_a_shard_when_told(rank_1_of_4):
    layer = RowParallelLinear(12, 6)
    layer.weight_loader(layer.weight, WHOLE[:, :3], presharded=True)
    layer.weight_loader(layer.bias, BIAS, presharded=True)
    assert torch.equal(layer.weight, WHOLE[:, :3]) and torch.equal(layer.bias, BIAS)


def test_the_loader_is_found_on_the_parameters_as_engines_do(rank_1_of_4):
    layer = RowParallelLinear(12, 6)
    for name, loaded in (("weight", WHOLE), ("bias", BIAS)):
        param = dict(layer.named_parameters())[name]
        param.weight_loader(param, loaded)
    assert torch.equal(layer.weight, WHOLE[:, 3:6]) and torch.equal(layer.bias, BIAS)


@pytest.mark.parametrize(
    ("name", "shape", "presharded", "wanted"),
    [
        ("weight", (6, 3), False, "(6, 12), got (6, 3)"),
        ("weight", (6, 12), True, "(6, 3), got (6, 12)"),
        ("weight", (12, 6), False, "(6, 12), got (12, 6)"),
        ("bias", (3,), False, "(6,), got (3,)"),
        ("bias", (1,), True, "(6,), got (1,)"),
    ],
    ids=["a shard unannounced", "a whole announced as shard", "transposed", "part of a bias", "a bias to broadcast"],
)
def test_the_loader_refuses_other_shapes_and_changes_nothing(rank_1_of_4, name, shape, presharded, wanted):
    layer = RowParallelLinear(12, 6, name="mlp.down_proj")
    param = getattr(layer, name)
    before = param.clone()
    with pytest.raises(InvalidInput) as caught:
        layer.weight_loader(param, torch.ones(shape), presharded=presharded)
    text = str(caught.value)
    assert text.startswith("mlp.down_proj: ") and wanted in text and "presharded=True" in text
    assert torch.equal(param.nan_to_num(), before.nan_to_num())


class Block(nn.Module):
    """A model's view of the layer: under a prefix, beside another module."""

    def __init__(self, **flags):
        super().__init__()
        self.norm = nn.LayerNorm(6)
        self.down = RowParallelLinear(12, 6, **flags)


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_dict_of_the_whole_model_loads(rank_1_of_4, assign):
    whole = {"norm.weight": torch.ones(6), "norm.bias": torch.ones(6), "down.weight": WHOLE, "down.bias": BIAS}
    given = dict(whole)
    block = Block()
    block.load_state_dict(given, assign=assign)
    assert torch.equal(block.down.weight, WHOLE[:, 3:6]) and torch.equal(block.down.bias, BIAS)
    assert all(given[key] is whole[key] for key in whole), "the caller's dictionary is the caller's"
    assert block.down.weight.untyped_storage().nbytes() == 6 * 3 * 4, "the whole weight is not kept alive"
    assert not block.down.weight.requires_grad


def test_a_state_dict_of_shards_loads_and_is_what_the_layer_gives(rank_1_of_4):
    block, other = Block(), Block()
    block.load_state_dict({"down.weight": WHOLE, "down.bias": BIAS}, strict=False)
    saved = io.BytesIO()
    torch.save(block.state_dict(), saved)
    saved.seek(0)
    other.load_state_dict(torch.load(saved))
    assert torch.equal(other.down.weight, WHOLE[:, 3:6])


def test_a_state_dict_that_does_not_fit_is_reported_as_torch_does(rank_1_of_4):
    with pytest.raises(RuntimeError, match=r"size mismatch for down.weight.*\[6, 5\].*\[6, 3\]"):
        Block().load_state_dict({"down.weight": torch.ones(6, 5)}, strict=False)
    with pytest.raises(RuntimeError, match=r"Missing key.*down.weight"):
        Block().load_state_dict({"norm.weight": torch.ones(6), "norm.bias": torch.ones(6), "down.bias": BIAS})


def test_it_can_be_copied_and_pickled(rank_1_of_4):
    layer = RowParallelLinear(12, 6)
    layer.weight_loader(layer.weight, WHOLE)
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(other.weight, WHOLE[:, 3:6])
        other.weight_loader(other.weight, WHOLE + 1)
        assert torch.equal(other.weight, WHOLE[:, 3:6] + 1)
    assert torch.equal(layer.weight, WHOLE[:, 3:6])


def test_from_linear_takes_parameters_flags_and_dtype(rank_1_of_4):
    linear = nn.Linear(12, 6, dtype=torch.bfloat16)
    layer = RowParallelLinear.from_linear(linear, skip_bias_add=True, name="o_proj")
    assert layer.name == "o_proj" and layer.skip_bias_add and layer.weight.dtype == torch.bfloat16
    assert torch.equal(layer.weight, linear.weight[:, 3:6]) and torch.equal(layer.bias, linear.bias)
    assert RowParallelLinear.from_linear(nn.Linear(12, 6, bias=False)).bias is None


# ---- refusing


def test_features_that_do_not_divide_are_refused_with_values_and_fix(rank_1_of_4):
    with pytest.raises(InvalidInput) as caught:
        RowParallelLinear(1001, 6)
    assert "in_features=1001 with world_size=4 (remainder 1)" in str(caught.value)
    assert "to 1004" in str(caught.value)


@pytest.mark.parametrize("sizes", [(0, 6), (12, 0), (-4, 6)])
def test_sizes_below_one_are_refused(rank_1_of_4, sizes):
    with pytest.raises(InvalidInput, match="at least 1"):
        RowParallelLinear(*sizes)


def test_flags_that_contradict_each_other_are_refused(rank_1_of_4):
    with pytest.raises(InvalidInput, match=r"4 times.*skip_bias_add=True.*bias=False"):
        RowParallelLinear(12, 6, reduce_results=False)
    with pytest.raises(InvalidInput, match="scatter=True"):
        RowParallelLinear(12, 6, bias=False, reduce_results=False, scatter=True)
    RowParallelLinear(12, 6, bias=False, reduce_results=False)
    RowParallelLinear(12, 6, reduce_results=False, skip_bias_add=True)


@pytest.mark.parametrize(
    ("flags", "x", "text"),
    [
        ({}, torch.ones(2, 12), "must be 3.*got 12.*input_is_parallel=False"),
        ({"input_is_parallel": False}, torch.ones(2, 3), "must be 12.*got 3.*Give the input of the whole layer"),
        ({}, torch.ones(()), "got a scalar"),
        ({}, torch.ones(2, 3, dtype=torch.float16), "torch.float16 on cpu and torch.float32 on cpu"),
        ({}, torch.ones(2, 3, device="meta"), "on meta and torch.float32 on cpu"),
    ],
    ids=["the whole input", "a part of the input", "a scalar", "another dtype", "another device"],
)
def test_an_input_that_does_not_fit_is_refused_before_any_rank_waits(rank_1_of_4, flags, x, text):
    with pytest.raises(InvalidInput, match=f"(?s){text}"):
        RowParallelLinear(12, 6, **flags)(x)


# ---- one rank


@pytest.mark.parametrize("shape", [(12,), (5, 12), (2, 3, 12), (0, 12)], ids=str)
@pytest.mark.parametrize("scatter", [False, True])
def test_one_rank_is_a_plain_linear(shape, scatter):
    linear = nn.Linear(12, 6)
    layer = RowParallelLinear.from_linear(linear, scatter=scatter)
    assert (layer.tp_rank, layer.tp_size) == (0, 1)
    x = torch.randn(shape)
    wanted = linear(x).reshape(-1, 6) if scatter else linear(x)
    assert torch.equal(layer(x), wanted)


def test_one_rank_honours_skip_bias_add():
    linear = nn.Linear(12, 6)
    x = torch.randn(5, 12)
    output, bias = RowParallelLinear.from_linear(linear, skip_bias_add=True)(x)
    assert torch.equal(output, nn.functional.linear(x, linear.weight)) and torch.equal(bias, linear.bias)
    no_bias = RowParallelLinear(12, 6, bias=False, skip_bias_add=True)
    assert no_bias(x)[1] is None


@pytest.mark.parametrize("input_is_parallel", [True, False])
def test_one_rank_compiles_and_trains(input_is_parallel):
    layer = RowParallelLinear(12, 6, input_is_parallel=input_is_parallel)
    layer.weight_loader(layer.weight, WHOLE)
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    for M in (3, 5):
        x = torch.randn(M, 12, requires_grad=True)
        assert torch.equal(compiled(x), layer(x))
        layer(x).sum().backward()
        assert torch.allclose(x.grad, WHOLE.sum(0).expand(M, 12))
