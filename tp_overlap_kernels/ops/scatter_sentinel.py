"""The second half of the plan unfused_sentinel of gemm_reduce_scatter: a product's rows to their owners.

csrc/kernels/reduce_scatter_one_shot_sentinel.cu, from tensors to a launch.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..kernels.reduce_scatter_one_shot_sentinel import ReduceScatterLauncher
from ..memory.arena import Arena
from ..memory.layout import rows_per_rank
from ..memory.turn import stream_of
from .arena_words import DTYPE_CODES, of_sentinels


def rows_that_fit(arena: Arena, N: int, itemsize: int) -> int:
    """The most rows M of a call, of which an owner's share goes through a slot."""
    return arena.layout.sentinel_bytes // (N * itemsize) * arena.world_size


def run(arena: Arena, x: Tensor, out: Tensor, word: int) -> "IssuedScatter":
    """x: [M, N] contiguous, out: our rows of the sum, contiguous; they fit."""
    M, N = x.shape
    part = rows_per_rank(M, arena.world_size) * N
    issued = IssuedScatter(arena, x.data_ptr(), M * N, part, DTYPE_CODES[x.dtype], word)
    issued.launch(x.data_ptr(), out.data_ptr())
    return issued


@dataclass(slots=True)
class IssuedScatter:
    """The counterpart of lang.launch.Issued: a launch of one size, dtype and call hash."""

    arena: Arena
    x_ptr: int
    n_elems: int
    part: int
    dtype_code: int
    word: int

    def launch(self, x_ptr: int, out_ptr: int) -> bool:
        """Launch on the device's current stream; any addresses."""
        launcher = self.arena.cache.get("scatter sentinel") or _launcher(self.arena)
        stream = stream_of(self.arena.device.index)
        launcher(x_ptr, out_ptr, self.n_elems, self.part, self.dtype_code, self.word, stream)
        return True

    def again(self, x_ptr: int, out_ptr: int) -> Callable[[int, int], bool] | None:
        """The same with other addresses; None if x had to be copied."""
        return self.launch if x_ptr == self.x_ptr else None


def _launcher(arena: Arena) -> ReduceScatterLauncher:
    alone = arena.topology.ranks_per_device == 1
    launcher = arena.cache["scatter sentinel"] = ReduceScatterLauncher(**of_sentinels(arena), launched_ahead=alone)
    return launcher
