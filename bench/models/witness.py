"""Calls of the op in an arm of ours, shown as they are made.

A hook would not do where a layer is joined to the norm behind it: it would see the sum with the residual in it, and the
adapter takes a joint apart in which there are hooks (docs/transformers.md). So it is what stands between the model's
forwards and the op that is exchanged meanwhile.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import NamedTuple

from torch import Tensor

from tp_overlap_kernels.integrations.adoption import Adopted
from tp_overlap_kernels.integrations.transformers_forwards import RowForward

from .arms import Arms


class Joined(NamedTuple):
    """A call that was one with residual and norm: what the op was given on this rank, and what it gave."""

    x: Tensor  # [..., K]
    weight: Tensor  # [N, K]
    residual: Tensor  # [..., N]
    scale: Tensor  # [N]
    eps: float
    y: Tensor  # [..., N]
    new_residual: Tensor  # [..., N]


Saw = Callable[[Joined | None], None]  # None: a call that was the sum alone


@dataclasses.dataclass(frozen=True)
class Witnessed(Adopted):
    """A layer of ours as it was, but that each call of the op is shown."""

    saw: Saw

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = super().__call__(x, weight, bias)
        self.saw(None)
        return out

    def with_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        y, new_residual = super().with_norm(x, weight, bias, residual, scale, eps)
        self.saw(Joined(x, weight, residual, scale, eps, y, new_residual))
        return y, new_residual


@contextlib.contextmanager
def witnessed(arms: Arms, arm: str, saw: Callable[[str, Joined | None], None]) -> Iterator[None]:
    """Meanwhile `saw` is called, with the layer's name, after every call of the op in this arm."""
    before: list[tuple[RowForward, Adopted]] = []
    try:
        for name in arms.rows:
            row = arms.forwards[arm][name]
            if isinstance(row, RowForward):
                before.append((row, row.layer))
                _exchange(row, Witnessed(**vars(row.layer), saw=functools.partial(saw, name)))
        yield
    finally:
        for row, layer in before:
            _exchange(row, layer)


def _exchange(row: RowForward, layer: Adopted) -> None:
    row.layer = layer
    if row.joint is not None:
        row.joint.layer = layer
