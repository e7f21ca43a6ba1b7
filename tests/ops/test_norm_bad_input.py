"""Wrong input of the ops that end in a norm, as one rank sees it: refused with values and fix, and nothing is sent."""

from __future__ import annotations

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.ops.norms import CPU_PLANS, EPS, GEMM, SUM

GROUP = "local"


def tensor(*shape, dtype=torch.bfloat16, **more):
    return torch.zeros(shape, dtype=dtype, **more)


A, B, X = tensor(5, 24), tensor(40, 24), tensor(5, 40)
FIRST = {SUM: (X,), GEMM: (A, B)}


@pytest.fixture(autouse=True)
def arena():
    tpo.init(max_M=32, max_N=64)
    yield
    tpo.close()


def call(op, *arguments, outs=(), first=None):
    given = FIRST[op] if first is None else first
    getattr(torch.ops.tp_overlap, op + "_out" * bool(outs))(*given, *arguments, GROUP, *outs)


WRONG = [
    ("residual of other rows", (tensor(4, 40), tensor(40), EPS), ["residual", "(5, 40)", "(4, 40)"]),
    ("residual of one row, to be broadcast", (tensor(40), tensor(40), EPS), ["residual", "(40,)", "Expand"]),
    ("weight of another width", (X, tensor(24), EPS), ["weight must be [H] with H=40", "(24,)"]),
    ("weight of two dimensions", (X, tensor(1, 40), EPS), ["weight must be [H]", "(1, 40)"]),
    ("weight in f32", (X, tensor(40, dtype=torch.float32), EPS), ["one dtype", "float32", "Convert"]),
    ("residual elsewhere", (tensor(5, 40, device="meta"), tensor(40), EPS), ["one device", "meta", "Move"]),
    ("negative eps", (X, tensor(40), -1e-5), ["eps must be a number of at least 0, got -1e-05"]),
    ("eps that is no number", (X, tensor(40), float("nan")), ["eps", "nan"]),
]


@pytest.mark.parametrize("op", CPU_PLANS)
@pytest.mark.parametrize("why, arguments, wanted", WRONG, ids=[row[0].replace(" ", "_") for row in WRONG])
def test_inputs(op, why, arguments, wanted):
    for outs in ((), (tensor(5, 40), tensor(5, 40))):
        with pytest.raises(tpo.InvalidInput) as caught:
            call(op, *arguments, outs=outs)
        text = str(caught.value)
        assert text.startswith(f"{op}: ") and [part for part in wanted if part not in text] == [], text


def test_x_without_a_row_and_too_many_columns():
    with pytest.raises(tpo.InvalidInput, match=rf"{SUM}: x must be \[\.\.\., H\], got shape \(\)"):
        call(SUM, tensor(), tensor(1), EPS, first=(tensor(),))
    with pytest.raises(tpo.InvalidInput, match=f"{GEMM}: N=65 exceeds max_N=64"):
        call(GEMM, tensor(5, 65), tensor(65), EPS, first=(A, tensor(65, 24)))


@pytest.mark.parametrize("op", CPU_PLANS)
def test_outputs(op):
    good, weight = tensor(5, 40), tensor(40)
    for wrong, text in ((tensor(4, 40), r"must have shape \(5, 40\)"), (tensor(40, 5).t(), "must be contiguous")):
        with pytest.raises(tpo.InvalidInput, match=f"{op}: y {text}"):
            call(op, X, weight, EPS, outs=(wrong, good))
        with pytest.raises(tpo.InvalidInput, match=f"{op}: new_residual {text}"):
            call(op, X, weight, EPS, outs=(good, wrong))


@pytest.mark.parametrize("op", CPU_PLANS)
def test_results_over_other_tensors(op):
    """y may be x, new_residual may be residual. As new calls, and where equal ones are known."""
    weight, results = tensor(40), (tensor(5, 40), tensor(5, 40))
    first, residual = tuple(x.clone() for x in FIRST[op]), tensor(5, 40)
    memory = tensor(240)
    early, late = memory[:200].view(5, 40), memory[8:208].view(5, 40)
    over_first = torch.as_strided(first[0], (5, 40), (40, 1)) if op == SUM else None
    refused = [
        (residual, weight, (residual, results[0]), "y must not overlap an input"),
        (residual, weight, (early, late), "y must not overlap new_residual"),
        (residual, weight, (early, early), "y must not overlap new_residual"),
        (early, weight, (results[0], late), "new_residual must not overlap an input"),
        (residual, memory[:40], (early, results[0]), "y must not overlap an input"),
        (residual, memory[:40], (results[0], early), "new_residual must not overlap an input"),
    ]
    if over_first is not None:
        refused.append((residual, weight, (results[0], over_first), "new_residual must not overlap an input"))
    for _ in range(2):
        call(op, residual, weight, EPS, outs=results, first=first)
        call(op, residual, weight, EPS, outs=(results[0], residual), first=first)
        if op == SUM:
            call(op, residual, weight, EPS, outs=(first[0], residual), first=first)
        for some_residual, some_weight, outs, text in refused:
            with pytest.raises(tpo.InvalidInput, match=f"{op}: {text}"):
                call(op, some_residual, some_weight, EPS, outs=outs, first=first)


@pytest.mark.parametrize("op", CPU_PLANS)
def test_gradients_are_refused(op):
    arguments = [*(x.clone() for x in FIRST[op]), tensor(5, 40), tensor(40)]
    function = getattr(torch.ops.tp_overlap, op)
    for x in arguments:
        with torch.no_grad():
            function(*arguments, EPS, GROUP)  # now it is known ...
        x.requires_grad_(True)
        with pytest.raises(tpo.InvalidInput, match="no backward"):
            function(*arguments, EPS, GROUP)  # ... and refused
        x.requires_grad_(False)


def test_another_eps_is_another_call():
    x, weight = tensor(1, 40) + 1, tensor(40) + 1
    for eps, wanted in ((0.0, 1.0), (3.0, 0.5), (0.0, 1.0)):
        y, _ = torch.ops.tp_overlap.all_reduce_add_rms_norm(x, tensor(1, 40), weight, eps, GROUP)
        assert y.eq(wanted).all()
