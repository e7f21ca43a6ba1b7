"""The sums of row-parallel layers against float64, from the inputs that the ranks have handed back."""

from __future__ import annotations

from typing import Any

import torch

from tests.integrations.loaded import Seen
from tests.tolerance import check, check_bites, tolerance
from tests.truth import Truth


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
    return truth, tolerance(truth) + (1 + 2.0**-6) * u * product
