"""The check before the clock: it passes what is right and stops what is slightly wrong, on every kind of result."""

import dataclasses
import re

import pytest
import torch

from tp_overlap_kernels.bench import truth
from tp_overlap_kernels.bench.cases import (
    ALL_REDUCE,
    ALL_REDUCE_NORM,
    GEMM_ALL_REDUCE,
    GEMM_REDUCE_SCATTER,
    Case,
    Layer,
)
from tp_overlap_kernels.bench.inputs import LayerInputs, MessageInputs, weight_copies
from tp_overlap_kernels.bench.launch import Topology, World
from tp_overlap_kernels.bench.norm import EPS, norm_operands

LAYER = Layer("any", "", 48, 40)
UNSAMPLED = next(row for row in range(300) if row not in truth.sample_rows(300, 2))  # the wider check alone sees it


@dataclasses.dataclass
class AloneOfTwo(World):
    """Rank 0 of two, without processes: what the other rank would say is what this one says."""

    def gather(self, value):
        return [value] * self.world_size


@pytest.fixture
def world():
    return AloneOfTwo(0, Topology(2, "cpu"), torch.device("cpu"), "group", None)


def right(inputs: LayerInputs, M: int, rounding: str) -> torch.Tensor:
    """The sum as a kernel makes it: partials rounded to the wire, added in float32, rounded once."""
    partials = [inputs.activation(rank)[:M] @ inputs.weight(rank, 0).T for rank in range(2)]
    if rounding == truth.PARTIAL:
        return partials[0]
    return (partials[0].float() + partials[1].float()).to(inputs.dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("M", [1, 64, 300], ids=["one row", "all rows sampled", "rows left out"])
@pytest.mark.parametrize("rounding", [truth.ONCE, truth.AT_EACH_HOP, truth.PARTIAL])
def test_right_results_pass(world, M, dtype, rounding):
    inputs = LayerInputs(LAYER, 300, dtype, world, seed=1)
    case = Case(GEMM_ALL_REDUCE, LAYER, M, str(dtype).removeprefix("torch."), 2)
    assert truth.Truth(inputs, M).wrong(right(inputs, M, rounding), case, rounding) is None


def wrong_results():
    def without_a_rank(out, inputs):
        return out - (inputs.activation(1)[: len(out)] @ inputs.weight(1, 0).T)

    def one_element(out, inputs):
        out[UNSAMPLED, 5] += 0.25
        return out

    def stale_tile(out, inputs):
        out[UNSAMPLED, :16] = 0.0
        return out

    def nan_row(out, inputs):
        out[299] = torch.nan
        return out

    def a_row_short(out, inputs):
        return out[:-1]

    def other_dtype(out, inputs):
        return out.float()

    return [without_a_rank, one_element, stale_tile, nan_row, a_row_short, other_dtype]


@pytest.mark.parametrize("spoil", wrong_results(), ids=lambda spoil: spoil.__name__)
def test_wrong_results_are_stopped(world, spoil):
    inputs = LayerInputs(LAYER, 300, torch.bfloat16, world, seed=1)
    case = Case(GEMM_ALL_REDUCE, LAYER, 300, "bfloat16", 2)
    out = spoil(right(inputs, 300, truth.ONCE), inputs)
    assert truth.Truth(inputs, 300).wrong(out, case, truth.ONCE)


def test_scattered_rows_are_held_against_their_own_part(world):
    inputs = LayerInputs(LAYER, 300, torch.bfloat16, world, seed=1)
    case = Case(GEMM_REDUCE_SCATTER, LAYER, 300, "bfloat16", 2)
    whole = right(inputs, 300, truth.ONCE)
    check = truth.Truth(inputs, 300)
    assert check.wrong(whole[:150], case, truth.ONCE) is None
    assert check.wrong(whole[150:], case, truth.ONCE)


def test_a_message_is_its_own_partial(world):
    inputs = MessageInputs(LAYER, 300, torch.bfloat16, world, seed=1)
    case = Case(ALL_REDUCE, LAYER, 300, "bfloat16", 2)
    total = sum(inputs.activation(rank).float() for rank in range(2)).bfloat16()
    check = truth.Truth(inputs, 300)
    assert check.wrong(total, case, truth.ONCE) is None
    assert check.wrong(total * 1.03, case, truth.ONCE)


def normed(inputs: LayerInputs, M: int, one_rounding: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """(y, new_residual) as our kernel rounds, or as torch does behind a sum that was rounded."""
    residual, weight = norm_operands(LAYER, M, inputs.dtype, torch.device("cpu"))
    total = sum(inputs.activation(rank)[:M].float() for rank in range(2))
    if not one_rounding:
        hidden = total.to(inputs.dtype) + residual
        return torch.nn.functional.rms_norm(hidden, weight.shape, weight, EPS), hidden
    hidden = (total + residual.float()).to(inputs.dtype)
    scale = torch.rsqrt(hidden.float().square().mean(1, keepdim=True) + EPS)
    return (hidden.float() * scale * weight.float()).to(inputs.dtype), hidden


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("one_rounding", [True, False])
@pytest.mark.parametrize("M", [1, 300])
def test_right_norms_pass(world, dtype, one_rounding, M):
    inputs = MessageInputs(LAYER, 300, dtype, world, seed=1)
    case = Case(ALL_REDUCE_NORM, LAYER, M, str(dtype).removeprefix("torch."), 2)
    assert truth.Truth(inputs, M).wrong(normed(inputs, M, one_rounding), case, truth.ONCE) is None


def test_wrong_norms_are_stopped(world):
    inputs = MessageInputs(LAYER, 300, torch.bfloat16, world, seed=1)
    case, check = Case(ALL_REDUCE_NORM, LAYER, 300, "bfloat16", 2), truth.Truth(inputs, 300)
    y, new_residual = normed(inputs, 300, True)
    residual, weight = norm_operands(LAYER, 300, torch.bfloat16, torch.device("cpu"))
    one_wrong = [x.clone() for x in (y, new_residual)]
    for x in one_wrong:
        x[UNSAMPLED, 5] += 0.25
    for wrong, says in [
        ((one_wrong[0], new_residual), f"y: 1 of .* at row {UNSAMPLED}"),
        ((y, one_wrong[1]), f"new_residual: 1 of .* at row {UNSAMPLED}"),
        ((y, new_residual - residual), "new_residual: "),
        ((y / weight, new_residual), "y: "),
        ((y[:-1], new_residual), "y: got"),
        (new_residual, "got one tensor"),
    ]:
        assert re.search(says, check.wrong(wrong, case, truth.ONCE) or "")


@pytest.mark.parametrize("M, world_size", [(129, 2), (8192, 2), (8191, 8)])
def test_sampled_rows_hold_every_owners_edges(M, world_size):
    rows = truth.sample_rows(M, world_size)
    owned = -(-M // world_size)
    edges = {0, M - 1}.union(*({rank * owned - 1, rank * owned} for rank in range(1, world_size)))
    assert edges <= set(rows) and len(rows) >= 64 and rows == sorted(set(rows))


def test_checksum_sees_a_swap_and_a_sign_of_zero():
    x = torch.randn(1000, dtype=torch.float32).bfloat16()
    x[3], x[500], x[7] = 1.0, 2.0, 0.0
    swapped, negated = x.clone(), x.clone()
    swapped[3], swapped[500] = 2.0, 1.0
    negated[7] = -0.0
    assert len({truth.checksum(each) for each in (x, swapped, negated)}) == 3
    assert truth.checksum(x) == truth.checksum(x.clone())


@pytest.mark.parametrize(
    "weight_mb, free_gb, copies",
    [(17, 100, 11), (242, 100, 3), (1, 100, 64), (242, 2, 2), (242, 0.1, 1)],
    ids=[
        "more than the cache",
        "large ones still rotate",
        "small ones are bounded",
        "little memory",
        "hardly any memory",
    ],
)
def test_weight_copies_do_not_fit_in_the_cache(weight_mb, free_gb, copies):
    assert weight_copies(weight_mb << 20, 60 << 20, int(free_gb * (1 << 30))) == copies
