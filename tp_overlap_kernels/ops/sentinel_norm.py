"""The plan sentinel_norm: csrc/kernels/all_reduce_one_shot_sentinel_add_rms_norm.cu, from tensors to a launch."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..kernels.all_reduce_one_shot_sentinel_add_rms_norm import SentinelNormLauncher
from ..memory.arena import Arena
from ..memory.turn import stream_of
from .arena_words import DTYPE_CODES, of_sentinels
from .norm import Norm


def run(arena: Arena, x: Tensor, norm: Norm, word: int) -> "IssuedSentinelNorm":
    """x [M, H]; it fits. Addresses may be any: this kernel adds squares in an order that does not depend on them."""
    x, residual, weight = x.contiguous(), norm.residual.contiguous(), norm.weight.contiguous()
    pointers = x.data_ptr(), residual.data_ptr(), weight.data_ptr()
    issued = IssuedSentinelNorm(arena, pointers, (x.shape[0], x.shape[1], norm.eps, DTYPE_CODES[x.dtype], word))
    issued.launch(*pointers, norm.y.data_ptr(), norm.new_residual.data_ptr())
    return issued


@dataclass(slots=True)
class IssuedSentinelNorm:
    """The counterpart of lang.launch.Issued: a launch of one shape, eps, dtype and call hash."""

    arena: Arena
    pointers: tuple[int, int, int]  # x, residual, weight
    shape: tuple[int, int, float, int, int]  # M, H, eps, code of the dtype, call hash

    def launch(self, x_ptr: int, residual_ptr: int, weight_ptr: int, y_ptr: int, new_residual_ptr: int) -> bool:
        """Launch on the device's current stream; any addresses."""
        arena = self.arena
        launcher = arena.cache.get("sentinel norm") or _launcher(arena)
        launcher(x_ptr, residual_ptr, weight_ptr, y_ptr, new_residual_ptr, *self.shape, stream_of(arena.device.index))
        return True

    def again(
        self, x_ptr: int, residual_ptr: int, weight_ptr: int, y_ptr: int, new_residual_ptr: int
    ) -> Callable[..., bool] | None:
        """The same with other addresses; None if an input had to be copied."""
        return self.launch if (x_ptr, residual_ptr, weight_ptr) == self.pointers else None


def _launcher(arena: Arena) -> SentinelNormLauncher:
    ahead = arena.topology.ranks_per_device == 1
    launcher = arena.cache["sentinel norm"] = SentinelNormLauncher(**of_sentinels(arena), launched_ahead=ahead)
    return launcher
