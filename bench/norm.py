"""Ops that end in a norm: what is added and normed, and whether a result is right.

new_residual is held against float64 with the bound of the sum and one rounding more; y against the norm, in float64, of
the new_residual beside it, on all rows:

    tol = (1 + 2**-6) * ( u * 2 * |y|                   the normed value, and that times weight
                        + 2 * (N + 8) * u32 * |y| )     N squares and their sum, mean, eps, root, inverse, products
"""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import NamedTuple

import torch

from .cases import Layer

EPS = 1e-5
ROWS_A_STEP = 1024


class NormOperands(NamedTuple):
    """What follows the sum, equal on all ranks: residual [M, N] and weight [N] of the norm."""

    residual: torch.Tensor
    weight: torch.Tensor


def norm_operands(layer: Layer, M: int, dtype: torch.dtype, device: torch.device) -> NormOperands:
    """Of a layer at one M; made anew at each call, the same everywhere."""
    generator = torch.Generator(device)
    generator.manual_seed(zlib.crc32(f"{layer} {M} norm".encode()))
    residual = torch.randn(M, layer.N, dtype=dtype, device=device, generator=generator)
    weight = torch.randn(layer.N, dtype=torch.float32, device=device, generator=generator).div_(4).add_(1).to(dtype)
    return NormOperands(residual, weight)


def wrong_norm(
    y: torch.Tensor, new_residual: torch.Tensor, weight: torch.Tensor, eps: float, outside: Callable
) -> str | None:
    """What is wrong with y [M, N] as the norm of new_residual, or None. outside: (got, want, bound, rows) -> reason."""
    u, u32 = torch.finfo(y.dtype).eps / 2, 2.0**-24
    relative = (1 + 2.0**-6) * (2 * u + 2 * (y.shape[1] + 8) * u32)
    smallest = torch.finfo(y.dtype).smallest_normal * torch.finfo(y.dtype).eps
    for start in range(0, y.shape[0], ROWS_A_STEP):
        rows = range(start, min(y.shape[0], start + ROWS_A_STEP))
        hidden = new_residual[rows.start : rows.stop].double()
        want = hidden * torch.rsqrt(hidden.square().mean(1, keepdim=True) + eps) * weight.double()
        reason = outside(y[rows.start : rows.stop].double(), want, relative * want.abs() + 2 * smallest, rows)
        if reason is not None:
            return f"y: {reason}"
    return None
