"""What an op with a norm does behind its sum."""

from typing import NamedTuple

from torch import Tensor

from ..memory.arena import Arena
from . import reference
from .execute import backend_of


class Norm(NamedTuple):
    """What a norm takes and gives, 2-D: residual, y, new_residual [M, H]; weight [H]."""

    residual: Tensor
    weight: Tensor
    eps: float
    y: Tensor
    new_residual: Tensor


def add_rms_norm(arena: Arena, x: Tensor, norm: Norm) -> None:
    """Add the residual to the finished sum x [M, H], which may be y, and norm the rows."""
    if backend_of(arena) == "ref":
        reference.add_rms_norm(x, *norm)
        return
    from . import norm_launches

    norm_launches.add_rms_norm(arena, x, norm)
