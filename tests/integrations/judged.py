"""The sums of row-parallel layers against float64, from the inputs that the ranks have handed back.

And of a whole model what can be said: whether its tokens are decided, and whether its errors grew.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from tests.integrations.loaded import Seen
from tests.ops.norms import check_norm
from tests.tolerance import U32, check, check_bites, tolerance
from tests.truth import Truth

SLACK = 1 + 2.0**-6


def check_rows(model: Any, seen: list[Seen]) -> None:
    """Every output of o_proj and down_proj, on every rank, is the sum that the whole `model`'s weights give.

    The ranks hold the same bits, and the bound would notice that a rank's partial is missing.
    """
    for calls in zip(*(each.rows for each in seen), strict=True):
        name, outputs = calls[0][0], [output for _, _, output in calls]
        truth, tol = _truth(model.get_submodule(name), [x for _, x, _ in calls])
        check(outputs[0].reshape(truth.ref.shape), truth, tol, name)
        check_bites(truth, tol)
        assert all(torch.equal(output, outputs[0]) for output in outputs), f"{name}: the ranks differ"


def check_joined(model: Any, seen: list[Seen], rounded_before: bool = False) -> None:
    """Every call of a layer that was one with residual and norm: as `check_rows`, with the residual in the sum.

    rounded_before: the plans may be such as round the sum before the residual is added, too. The `ref` backend rounds
    once, with the residual in it. y is the norm of new_residual. EPS of the norms is 1e-5.
    """
    for calls in zip(*(each.joined for each in seen), strict=True):
        first = calls[0]
        truth, tol = _truth(model.get_submodule(first.name), [call.x for call in calls])
        residual = first.residual.double().reshape(truth.ref.shape)
        u = torch.finfo(truth.dtype).eps / 2
        smallest = torch.finfo(torch.float16).smallest_normal * 2 * u if truth.dtype == torch.float16 else 0.0
        if not rounded_before:
            tol = tol - SLACK * u * truth.ref.abs()
        tol = tol + SLACK * (u + U32) * (truth.ref + residual).abs() + smallest
        truth = dataclasses.replace(truth, ref=truth.ref + residual)
        check(first.new_residual.reshape(truth.ref.shape), truth, tol, first.name)
        check_bites(truth, tol)
        assert (residual.abs() > tol).double().mean() > 0.5, "a result without the residual would pass"
        check_norm(first.y, first.new_residual, first.scale, first.name)
        for call in calls[1:]:
            same = torch.equal(call.y, first.y) and torch.equal(call.new_residual, first.new_residual)
            assert same and torch.equal(call.residual, first.residual), f"{first.name}: the ranks differ"


def ties(model: Any, finer: Any, prompt: torch.Tensor, tokens: list[int]) -> list[int]:
    """The steps at which the model may choose either of two tokens: there, other tokens would show no error.

    Two logits may come nearer by the errors of both; those of the ranks are at most twice the whole model's.
    """
    sequence = torch.cat([prompt, prompt.new_tensor([tokens])], dim=1)
    steps = slice(prompt.shape[1] - 1, -1)
    logits, exact = (each(sequence).logits[0, steps].float() for each in (model, finer))
    first, second = exact.topk(2).values.unbind(-1)
    error = (logits - exact).abs().amax(-1)
    return (first - second <= 2 * 2 * error).nonzero().flatten().tolist()


def no_worse(parts: torch.Tensor, whole: torch.Tensor, exact: torch.Tensor, growth: float, what: str) -> None:
    """A token's error against f32 is that of the whole model in its dtype, up to what more roundings may add.

    A row-parallel sum is rounded world_size + 1 times where the whole layer rounds once. Were that all of the error,
    and each rounding of one size and independent, it would grow by sqrt(world_size + 1). Medians over tokens: SmolLM2's
    first token has values of 27000, one rounding of which outweighs the errors of all others.
    """
    exact = exact.float()
    ours, allowed = (
        factor * (x.float() - exact).reshape(exact.shape[-2], -1).norm(dim=-1).median().item()
        for factor, x in ((1.0, parts), (growth, whole))
    )
    assert ours <= allowed, f"{what}: error {ours:.4g}, allowed {allowed:.4g}"


def _truth(linear: Any, inputs: list[torch.Tensor]) -> tuple[Truth, torch.Tensor]:
    """The sum, and by how much the `ref` backend may miss it."""
    world_size, K = len(inputs), linear.in_features // len(inputs)
    if inputs[0].shape[-1] != K:  # each rank was given the whole input
        inputs = [x.chunk(world_size, dim=-1)[rank] for rank, x in enumerate(inputs)]
    weights = linear.weight.detach().double().chunk(world_size, dim=1)
    columns = [x.reshape(-1, K).double() for x in inputs]
    partials = torch.stack([x @ weight.T for x, weight in zip(columns, weights, strict=True)])
    magnitude = sum(x.abs() @ weight.abs().T for x, weight in zip(columns, weights, strict=True))
    product = torch.zeros(())
    if linear.bias is not None:  # enters rank 0's partial; torch.addmm may round the product before
        product = partials[0].abs().clone()
        partials[0] += linear.bias.detach().double()
    truth = Truth(partials.sum(0), partials, magnitude, linear.weight.dtype, K)
    u = torch.finfo(truth.dtype).eps / 2
    return truth, tolerance(truth) + SLACK * u * product
