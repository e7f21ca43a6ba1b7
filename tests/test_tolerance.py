"""The bound lets every honest rounding pass and no mistake; the helpers say where it is."""

from __future__ import annotations

import dataclasses
import math
import re

import pytest
import torch

from tests import inputs, truth
from tests.cases import ALL_REDUCE_CASES, CASES, GPU_CASES, Case
from tests.tolerance import Rounding, check, check_bites, check_bits, tolerance, two_level

BIG = Case(64, 96, 512, torch.bfloat16, 4, "big")


def rounded_sum(case, rounding=Rounding.WIRE, kind="normal", swap=lambda partials: partials, accumulate=torch.float32):
    """(M, N): what a kernel that obeys `rounding` gives."""
    partials = []
    for rank in range(case.world_size):
        a, b = inputs.operands(case, rank, kind)
        if accumulate == torch.float32:
            partials.append(a.float() @ b.float().T)
        else:  # the mistake of summing K in the narrow type
            p = torch.zeros(case.M, case.N, dtype=accumulate)
            for k in range(case.K):
                p += torch.outer(a[:, k], b[:, k])
            partials.append(p.float())
    total = torch.zeros(case.M, case.N)
    for rank, p in enumerate(swap(partials)):
        if rounding is Rounding.OWNER_F32:
            own = torch.zeros(case.M, dtype=torch.bool)
            own[case.rows_of(rank)] = True
            p = torch.where(own[:, None], p, p.to(case.dtype).float())
        elif rounding is not Rounding.F32:
            p = p.to(case.dtype).float()
        total += p
        if rounding is Rounding.EACH_HOP:
            total = total.to(case.dtype).float()
    return total.to(case.dtype)


def bound(case, rounding):
    t = truth.gemm_all_reduce(case)
    owner = torch.arange(case.M) // max(1, math.ceil(case.M / case.world_size))
    return t, tolerance(t, rounding, owner=owner)


@pytest.mark.parametrize("rounding", Rounding, ids=lambda r: r.name)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_honest_rounding_passes_and_the_bound_bites(case, rounding):
    t, tol = bound(case, rounding)
    assert check(rounded_sum(case, rounding), t, tol) <= 1
    check_bites(t, tol)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_bound_is_near_what_it_bounds(case):
    """A bound a hundred times too wide would pass the test above."""
    t, tol = bound(case, Rounding.WIRE)
    if t.ref.numel() > 1000:
        assert check(rounded_sum(case), t, tol) > 0.25


@pytest.mark.parametrize(
    "mistake",
    [
        pytest.param(dict(swap=lambda p: p[:-1]), id="last rank missing"),
        pytest.param(dict(swap=lambda p: p + p[:1]), id="first rank twice"),
        pytest.param(dict(swap=lambda p: [p[0] / 2, *p[1:]]), id="one rank at half weight"),
        pytest.param(dict(swap=lambda p: [p[0].T.reshape(p[0].shape), *p[1:]]), id="one rank in another order"),
        pytest.param(dict(accumulate=torch.bfloat16), id="K summed in bf16"),
    ],
)
def test_a_mistake_fails(mistake):
    t, tol = bound(BIG, Rounding.WIRE)
    with pytest.raises(AssertionError, match="elements are wrong"):
        check(rounded_sum(BIG, **mistake), t, tol)


def test_the_rules_are_ordered_and_told_apart():
    """A kernel that rounds more than it says does not pass."""
    bounds = {rounding: bound(BIG, rounding)[1] for rounding in Rounding}
    assert (bounds[Rounding.F32] < bounds[Rounding.OWNER_F32]).all()
    assert (bounds[Rounding.OWNER_F32] < bounds[Rounding.WIRE]).all()
    assert (bounds[Rounding.WIRE] < bounds[Rounding.EACH_HOP]).all()
    t = truth.gemm_all_reduce(BIG)
    with pytest.raises(AssertionError, match="elements are wrong"):
        check(rounded_sum(BIG, Rounding.WIRE), t, bounds[Rounding.F32])


def test_one_wrong_element_is_named():
    t, tol = bound(BIG, Rounding.WIRE)
    out = rounded_sum(BIG)
    out[63, 95] += 1
    with pytest.raises(
        AssertionError, match=re.escape("1 of 6144 elements are wrong, 0 of them NaN; first at [63, 95]")
    ):
        check(out, t, tol)


def test_nan_never_passes():
    t, tol = bound(BIG, Rounding.WIRE)
    out = rounded_sum(BIG)
    out[5, 7] = float("nan")
    with pytest.raises(AssertionError, match=re.escape("1 of them NaN; first at [5, 7]")):
        check(out, t, tol)
    with pytest.raises(AssertionError):
        check(out, t, torch.full_like(tol, float("inf")))
    with pytest.raises(AssertionError):
        check(rounded_sum(BIG), t, torch.full_like(tol, float("nan")))


def test_shape_and_dtype_are_checked():
    t, tol = bound(BIG, Rounding.WIRE)
    with pytest.raises(AssertionError, match="shape"):
        check(rounded_sum(BIG)[:1], t, tol)
    with pytest.raises(AssertionError, match="float32"):
        check(rounded_sum(BIG).float(), t, tol)


def test_a_bound_that_does_not_bite_is_noticed():
    t, tol = bound(BIG, Rounding.WIRE)
    with pytest.raises(AssertionError, match="without rank 0"):
        check_bites(t, tol * 1000)


@pytest.mark.parametrize("kind", ["integer", "tagged"])
@pytest.mark.parametrize("case", [*CASES, *(c for c in GPU_CASES if c.M * c.N * c.K < 2**30)], ids=str)
def test_exact_inputs_are_exact_and_not_all_zero(case, kind):
    t = truth.gemm_all_reduce(case, kind)
    assert all(p.count_nonzero() > 0 for p in t.partials) or t.ref.numel() < 16
    if case in CASES:
        check_bits(rounded_sum(case, kind=kind), t)
    else:
        t.exact()


def test_bits_are_compared():
    out = rounded_sum(BIG, kind="integer")
    out[0, 0] = torch.nextafter(out[0, 0], torch.tensor(torch.inf, dtype=out.dtype))
    with pytest.raises(AssertionError, match=re.escape("first at [0, 0]")):
        check_bits(out, truth.gemm_all_reduce(BIG, "integer"))


def test_tags_tell_who_is_missing():
    case = BIG
    good = rounded_sum(case, kind="tagged")
    other = truth.gemm_all_reduce(case, "tagged", call=1).ref
    assert not torch.equal(other.abs(), other) and not torch.equal(other, truth.gemm_all_reduce(case, "tagged").ref)

    def told(swap):
        return inputs.read_tags((rounded_sum(case, kind="tagged", swap=swap) * good.sign())[0, 0].item(), 4)

    assert told(lambda p: p) == "every rank once"
    assert told(lambda p: [p[0], p[1], p[3]]) == "rank 2 is missing"
    assert told(lambda p: [*p, p[1]]) == "rank 1 is there twice"
    assert told(lambda p: [p[0], p[0], p[2], p[3]]) == "rank 0 is there in place of rank 1"
    assert told(lambda p: [p[0], -p[1], p[2], p[3]]) == "the partial of rank 1 is of another call"


@pytest.mark.parametrize("case", ALL_REDUCE_CASES, ids=str)
def test_all_reduce_rounds_once(case):
    t = truth.all_reduce(case)
    total = sum(inputs.message(case, rank).float() for rank in range(case.world_size))
    check(total.to(case.dtype), t, tolerance(t))
    check_bites(t, tolerance(t))
    exact = truth.all_reduce(case, "integer")
    check_bits(sum(inputs.message(case, r, "integer").float() for r in range(case.world_size)).to(case.dtype), exact)


def test_rows_of_cover_every_row_once():
    for case in CASES:
        rows = [r for rank in range(case.world_size) for r in range(case.M)[case.rows_of(rank)]]
        assert rows == list(range(case.M))


def test_inputs_repeat_and_differ_where_they_should():
    a, b = inputs.operands(BIG, 1)
    again, _ = inputs.operands(BIG, 1)
    assert torch.equal(a, again)
    assert not torch.equal(a, inputs.operands(BIG, 2)[0])
    assert not torch.equal(a, inputs.operands(BIG, 1, call=1)[0])
    assert a.shape == (64, 512) and b.shape == (96, 512) and a.dtype == torch.bfloat16


# --- a sum in nodes, and then between them


def summed_by_node(case, ranks_per_node, rounding, bias=0.0, owner_of=None, hops=True, once=True):
    """(M, N): what two levels give: each node's sum by `rounding`, with the bias on the first, then node after node."""
    total = torch.zeros(case.M, case.N)
    for first in range(0, case.world_size, ranks_per_node):
        node = torch.zeros(case.M, case.N)
        for place in range(ranks_per_node):
            a, b = inputs.operands(case, first + place)
            p = a.float() @ b.float().T
            travels = p.to(case.dtype).float()
            if rounding is Rounding.F32:
                travels = p
            elif rounding is Rounding.OWNER_F32:
                travels = torch.where((owner_of == place)[:, None], p, travels)
            node += travels
        node += bias if first == 0 or not once else 0.0
        total += node.to(case.dtype).float()
        total = total.to(case.dtype).float() if hops else total
    return total.to(case.dtype)


@pytest.mark.parametrize("rounding", [Rounding.WIRE, Rounding.OWNER_F32, Rounding.F32], ids=lambda r: r.name)
@pytest.mark.parametrize("ranks_per_node", [1, 2, 4])
def test_two_levels_pass_and_their_bound_bites(ranks_per_node, rounding):
    case, call = dataclasses.replace(BIG, world_size=4), 0
    owner = torch.arange(case.M) % ranks_per_node
    t = truth.gemm_all_reduce(case, call=call, with_bias=True)
    bias = inputs.bias(case, call).float()
    tol = two_level(t, rounding, ranks_per_node, owner=owner)
    error = check(summed_by_node(case, ranks_per_node, rounding, bias, owner), t, tol)
    assert 0.2 < error <= 1, "neither missed nor a hundred times too wide"
    check_bites(t, tol)
    if ranks_per_node < 4:
        with pytest.raises(AssertionError, match="elements are wrong"):
            check(summed_by_node(case, ranks_per_node, rounding, bias, owner, once=False), t, tol)


def test_the_bound_of_two_levels_counts_what_is_rounded():
    """Fewer nodes, and an owner that keeps its own: less."""
    t = truth.gemm_all_reduce(BIG)
    owner = torch.arange(BIG.M) % 2
    four, two = (two_level(t, Rounding.WIRE, n) for n in (1, 2))
    assert (two < four).double().mean() > 0.8
    assert (two_level(t, Rounding.OWNER_F32, 2, owner=owner) < two).all()
    assert (two_level(t, Rounding.F32, 1) < four).all()
    one = two_level(t, Rounding.WIRE, 4)
    assert torch.allclose(one, tolerance(t, Rounding.WIRE), rtol=1e-12)
