"""From a whole parameter to the part that this rank holds."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from ..errors import InvalidInput


@dataclasses.dataclass(frozen=True)
class ColumnLoader:
    """Cuts this rank's columns out of a whole weight. Set as `weight_loader` on parameters, where engines look for it.

    It holds numbers only, so that a parameter which carries it can be pickled and does not keep its module alive.
    """

    layer: str
    whole_shape: tuple[int, ...]  # (out_features, in_features)
    rank: int
    world_size: int

    def __call__(self, param: nn.Parameter, loaded_weight: Tensor, *, presharded: bool = False) -> None:
        """Copies `loaded_weight` into `param`: a weight (2-D) or a bias (1-D), whole unless `presharded`.

        A bias is whole on every rank and copied as it is. Device and dtype may differ; values are converted.
        Errors: InvalidInput for another shape than the one announced, and for a parameter on the meta device.
        """
        wanted = tuple(param.shape) if presharded or param.dim() == 1 else self.whole_shape
        if tuple(loaded_weight.shape) != wanted:
            raise InvalidInput(
                f"{self.layer}: weight_loader wants shape {wanted}, got {tuple(loaded_weight.shape)}. Give the whole "
                f"parameter, or with presharded=True the part of rank {self.rank} of {self.world_size}."
            )
        if param.is_meta:
            raise InvalidInput(f"{self.layer}: the parameter is on the meta device. Call to_empty(device=...) first.")
        with torch.no_grad():
            param.copy_(loaded_weight if loaded_weight.shape == param.shape else self.cut(loaded_weight))

    def is_whole(self, weight: object) -> bool:
        """Whether `weight` is a tensor of the whole layer's shape."""
        return isinstance(weight, Tensor) and tuple(weight.shape) == self.whole_shape

    def cut(self, whole: Tensor) -> Tensor:
        """This rank's columns, a view."""
        columns = whole.shape[1] // self.world_size
        return whole.narrow(1, self.rank * columns, columns)
