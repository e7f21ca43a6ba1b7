"""The plan decode: csrc/kernels/gemm_all_reduce_one_shot_sentinel.cu, from tensors to a launch.

The kernel may load the weight while the kernel before it on the stream still runs, where start.py says so.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from ..dispatch import Plan
from ..errors import InvalidInput
from ..kernels.gemm_all_reduce_one_shot_sentinel import MAX_ROWS, SPLITS, DecodeLauncher
from ..kernels.gemm_all_reduce_one_shot_sentinel import rows_that_fit as rows_of_tiles
from ..kernels.start import Start
from ..memory.arena import Arena
from ..memory.turn import stream_of
from .arena_words import DTYPE_CODES, of_sentinels
from .operands import describe
from .start import start_with


def rows_that_fit(arena: Arena, plan: Plan, N: int) -> int:
    """The most rows that one launch can take. Errors: InvalidInput where the plan's numbers cannot be."""
    if plan["block_n"] not in MAX_ROWS or plan["splits"] not in SPLITS:
        raise InvalidInput(
            f"plan {str(plan)!r}: block_n must be one of {', '.join(map(str, MAX_ROWS))}, "
            f"splits one of {', '.join(map(str, SPLITS))}."
        )
    rows = rows_of_tiles(N, plan["block_n"], arena.layout.sentinel_bytes)
    if rows < 1:
        raise InvalidInput(f"plan {str(plan)!r} has no room for one row of N={N}. Call init with a larger max_M.")
    return rows


def run(arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int) -> "IssuedDecode":
    """a, b 2-D, out contiguous; they fit."""
    a_map, b_map = describe(a, 1, 1), describe(b, 1, 1)
    issued = IssuedDecode(
        arena,
        a_map.base.data_ptr(),
        b_map.base.data_ptr(),
        bias is not None,
        (a.shape[0], b.shape[0], b.shape[1], a_map.strides[0], b_map.strides[0], DTYPE_CODES[a.dtype]),
        (plan["block_n"], plan["splits"], plan.get("num_stages") or 0),
        word,
    )
    issued.see(b if b_map.base is b else None)
    issued.launch(issued.a_ptr, issued.b_ptr, bias.data_ptr() if bias is not None else 0, out.data_ptr())
    return issued


@dataclass(slots=True)
class IssuedDecode:
    """The counterpart of lang.launch.Issued: a launch of one shape, dtype, plan and call hash."""

    arena: Arena
    a_ptr: int
    b_ptr: int
    has_bias: bool
    sizes: tuple[int, int, int, int, int, int]  # M, N, K, strides of a and b, code of the dtype
    shape: tuple[int, int, int]  # rows of a tile, splits, stages
    word: int
    start: Start = Start.IN_ORDER  # of the next launch

    def see(self, b: Tensor | None) -> None:
        """To be called before each launch with the weight that it reads; None: a copy of it."""
        self.start = start_with(self.arena, b)

    def launch(self, a_ptr: int, b_ptr: int, bias_ptr: int, out_ptr: int) -> bool:
        """Launch on the device's current stream. bias_ptr: not looked at where there is no bias."""
        arena = self.arena
        launcher = arena.cache.get("decode") or _launcher(arena)
        bias_ptr = bias_ptr if self.has_bias else 0
        stream = stream_of(arena.device.index)
        launcher(a_ptr, b_ptr, bias_ptr, out_ptr, *self.sizes, *self.shape, self.start, self.word, stream)
        return True

    def again(self, a_desc: int, b_desc: int, bias_ptr: int, out_ptr: int) -> Callable[..., Any] | None:
        """The same with other addresses, all multiples of 16; None if a or b had to be copied."""
        return self.launch if a_desc == self.a_ptr and b_desc == self.b_ptr else None


def _launcher(arena: Arena) -> DecodeLauncher:
    launcher = arena.cache["decode"] = DecodeLauncher(**of_sentinels(arena))
    return launcher
