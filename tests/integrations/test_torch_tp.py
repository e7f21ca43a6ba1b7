"""parallelize_module with our row-wise style, on CPU ranks. Small integers: sums are exact, and bits are compared."""

from __future__ import annotations

import contextlib
import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import tp_overlap_kernels as tpo
from tests.integrations.surroundings import environment, integers, no_arena
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.integrations import adoption
from tp_overlap_kernels.layers import counters, routing

K, N = 48, 40
ROWS = 12  # divides over 2 and 3 ranks


class Subclass(nn.Linear):
    """Might compute anything."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, how it is divided, and what is to come of it. reason: counted as unfused; empty: fused."""

    why: str
    reason: str = ""
    kind: type[nn.Linear] = nn.Linear
    bias: bool = True
    K: int = K
    dtype: torch.dtype = torch.bfloat16
    inputs: str = "Shard(-1)"  # what the caller brings
    outputs: str = "Replicate()"
    grad: bool = False
    required: bool | None = None
    overlap: str = "auto"
    no_arena: bool = False  # `init` finds that the machine cannot

    def __str__(self) -> str:
        return self.why


def whole(case: Case) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return integers((2, ROWS, case.K), -2, 2, 1), integers((N, case.K), -2, 2, 2), integers((N,), -8, 8, 3)


def run(rank: int, world_size: int, case: Case) -> tuple[Any, dict[str, int]]:
    """(output, or the text of an InvalidInput; what was counted)"""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.parallel import parallelize_module

    from tp_overlap_kernels.integrations.torch_tp import OverlapRowwise

    placement = {"Shard(-1)": Shard(-1), "Shard(0)": Shard(0), "Shard(1)": Shard(1), "Replicate()": Replicate()}
    x, weight, bias = whole(case)
    layer = case.kind(case.K, N, case.bias, dtype=case.dtype)
    layer.load_state_dict({"weight": weight} | ({"bias": bias} if case.bias else {}))
    mesh = init_device_mesh("cpu", (world_size,))
    routing.reset_counters()
    with environment(case.overlap), no_arena() if case.no_arena else contextlib.nullcontext():
        try:
            style = OverlapRowwise(
                input_layouts=placement[case.inputs],
                output_layouts=placement[case.outputs],
                max_tokens=64,
                required=case.required,
            )
            model = parallelize_module(nn.Sequential(layer), mesh, {"0": style})
            part = distribute_tensor(x.to(case.dtype), mesh, [placement[case.inputs]]).to_local()
            with torch.set_grad_enabled(case.grad):
                return model(part).detach().clone(), counters()  # a copy: torch gives what may be under way
        except InvalidInput as error:
            return str(error), counters()
        finally:
            tpo.close()


def group_of_one(rank: int, world_size: int) -> tuple[str, dict[str, int]]:
    routing.reset_counters()
    groups = [dist.new_group([each]) for each in range(world_size)]
    request = adoption.Request("test")
    layer = adoption.adopt(request, "down_proj", nn.Linear(K, N, dtype=torch.bfloat16), groups[rank])
    assert not layer.fuses(torch.zeros(1, K, dtype=torch.bfloat16), None, None)
    return layer.declined, counters()


FUSED = [
    Case("a bias"),
    Case("no bias", bias=False),
    Case("fp16", dtype=torch.float16),
    Case("the whole input", inputs="Replicate()"),
    Case("rows of the input", inputs="Shard(1)"),
]
DECLINED = [
    Case("float32", "dtype", dtype=torch.float32),
    Case("a subclass", "module", kind=Subclass),
    Case("rows of the sum are wanted", "output_layout", outputs="Shard(1)"),
    Case("a gradient is wanted", "needs_grad", grad=True),
    Case("K differs between ranks", "uneven", K=49, inputs="Replicate()"),
    Case("no arena can be made", "topology", no_arena=True),
]


def expected(case: Case, rank: int, world_size: int) -> torch.Tensor:
    x, weight, bias = whole(case)
    total = (x @ weight.T + (bias if case.bias else 0)).to(case.dtype)
    return total.chunk(world_size, dim=1)[rank] if case.outputs == "Shard(1)" else total


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_the_sum_comes_from_the_op(ranks, case, world_size):
    for rank, (output, counted) in enumerate(ranks(world_size).run(run, case)):
        assert counted == {"fused": 1}, output
        assert torch.equal(output, expected(case, rank, world_size))


@pytest.mark.parametrize("case", DECLINED, ids=str)
def test_what_is_declined_is_right_and_counted(ranks, case):
    case = dataclasses.replace(case, required=False)
    for rank, (output, counted) in enumerate(ranks(2).run(run, case)):
        assert counted == {f"unfused: {case.reason}": 1}, output
        assert torch.equal(output, expected(case, rank, 2))


@pytest.mark.parametrize("case", DECLINED, ids=str)
def test_a_layer_named_in_the_plan_is_required(ranks, case):
    for text, counted in ranks(2).run(run, case):
        assert isinstance(text, str) and "cannot be fused, and was required to be: " in text and counted == {}


def test_TP_OVERLAP_0_leaves_all_to_torch(ranks):
    case = Case("off", overlap="0")
    for rank, (output, counted) in enumerate(ranks(2).run(run, case)):
        assert counted == {} and torch.equal(output, expected(case, rank, 2))


def test_a_group_of_one_rank_has_nothing_to_sum(ranks):
    assert ranks(2).run(group_of_one) == [("one_rank", {"unfused: one_rank": 1})] * 2
