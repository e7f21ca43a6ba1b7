"""The plan decode: csrc/kernels/gemm_all_reduce_one_shot_sentinel.cu, from tensors to a launch.

The kernel may load the weight while the kernel before it on the stream still runs. That one may be what writes it, so
a weight is loaded ahead only where it is known to be at rest: the same tensor as in an earlier call, and torch has
counted no write to it since (`Tensor._version`). A write that torch does not count (through `.data`, or by a kernel of
the user's own through a bare pointer) must not be the last thing on the stream before the call.
"""

import weakref
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

_MAX_WEIGHTS = 4096  # that an arena remembers


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
    if b_map.base is b:
        issued.see(b)
    issued.launch(issued.a_ptr, issued.b_ptr, bias.data_ptr() if bias is not None else 0, out.data_ptr())
    return issued


def is_at_rest(arena: Arena, b: Tensor) -> bool:
    """Whether this tensor was seen in an earlier call and has not been written since, as far as torch knows."""
    if b.is_inference():
        return False  # its writes are not counted
    seen: dict[int, tuple[weakref.ref[Tensor], tuple[int, int]]] = arena.cache.setdefault("weights seen", {})
    before, now = seen.get(id(b)), (b._version, b.data_ptr())
    if before is not None and before[1] == now and before[0]() is b:
        return True
    if len(seen) >= _MAX_WEIGHTS:
        seen.clear()
    seen[id(b)] = (weakref.ref(b), now)
    return False


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
    start: Start = Start.LAUNCHED_AHEAD  # of the next launch

    def see(self, b: Tensor) -> None:
        """To be called before each launch with the weight that it reads."""
        self.start = Start.WEIGHTS_AHEAD if is_at_rest(self.arena, b) else Start.LAUNCHED_AHEAD

    def launch(self, a_ptr: int, b_ptr: int, bias_ptr: int, out_ptr: int) -> bool:
        """Launch on the device's current stream. bias_ptr: not looked at where there is no bias."""
        arena, start = self.arena, self.start
        launcher = arena.cache.get("decode") or _launcher(arena)
        if arena.topology.ranks_per_device > 1:
            start = Start.IN_ORDER  # blocks that wait for this rank's would take the room of another rank's
        bias_ptr = bias_ptr if self.has_bias else 0
        stream = stream_of(arena.device.index)
        launcher(a_ptr, b_ptr, bias_ptr, out_ptr, *self.sizes, *self.shape, start, self.word, stream)
        return True

    def again(self, a_desc: int, b_desc: int, bias_ptr: int, out_ptr: int) -> Callable[..., Any] | None:
        """The same with other addresses, all multiples of 16; None if a or b had to be copied."""
        return self.launch if a_desc == self.a_ptr and b_desc == self.b_ptr else None


def _launcher(arena: Arena) -> DecodeLauncher:
    launcher = arena.cache["decode"] = DecodeLauncher(**of_sentinels(arena))
    return launcher
