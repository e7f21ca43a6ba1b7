"""The plans sm90 and sm90_add: the CUDA kernels of csrc for Hopper, in the arena of the Triton ones.

They read a and b and write out through the copy engine, whose rows start at multiples of 16 bytes: N is a multiple of
8 (dispatch sees to that), and an operand that lies otherwise is copied once, as in operands.py.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Plan
from ..kernels.gemm import Schedule
from ..kernels.gemm_collectives import SCHEDULES, TRACE_ROLES, TRACE_WORDS, GemmCollectiveLauncher
from ..kernels.start import Start
from ..memory.arena import Arena
from ..memory.turn import stream_of
from .arena_words import DTYPE_CODES, of_arena
from .operands import describe


def run(
    arena: Arena, op: str, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int
) -> "IssuedSm90 | None":
    """a, b 2-D, out contiguous; they fit. None if it can't be had again with other addresses."""
    if out.data_ptr() % 16:
        fresh = torch.empty_like(out)
        run(arena, op, plan, a, b, bias, fresh, word)
        out.copy_(fresh)
        return None
    if bias is not None and bias.data_ptr() % 4:
        bias = bias.clone()
    a_map, b_map = describe(a, 1, 1), describe(b, 1, 1)
    cut, kernels = (plan["block_n"], plan["stagings"], plan["cluster_m"], plan["cluster_n"]), (plan.name, op)
    numbers = (plan["group_m"], plan["lead"], plan["piece"], plan["senders"])
    # Blocks that wait for this rank's would take the room of another rank's.
    start = Start.IN_ORDER if arena.topology.ranks_per_device > 1 else Start.LAUNCHED_AHEAD
    issued = IssuedSm90(
        arena,
        kernels,
        a_map.base.data_ptr(),
        b_map.base.data_ptr(),
        bias.data_ptr() if bias is not None else 0,
        (a.shape[0], b.shape[0], b.shape[1], a_map.strides[0], b_map.strides[0], DTYPE_CODES[a.dtype]),
        (SCHEDULES[kernels][cut], *numbers, word, start),
    )
    issued.launch(issued.a_ptr, issued.b_ptr, issued.bias_ptr, out.data_ptr())
    return issued


@contextlib.contextmanager
def traced(arena: Arena, plan: str, op: str, intervals: int) -> Iterator[Tensor]:
    """While the context lasts, calls of this plan and op write what their threads did to the tensor it gives.

    The tensor: int32 (blocks, len(TRACE_ROLES), intervals, TRACE_WORDS) on the device, zeros where nothing was; it
    holds the last call, and is to be read when that has ended. bf16 alone. Traced calls take longer by a few stores a
    tile.
    """
    launcher = arena.cache.get((plan, op)) or _launcher(arena, (plan, op))
    shape = (arena.programs, len(TRACE_ROLES), intervals, TRACE_WORDS)
    trace = torch.zeros(shape, dtype=torch.int32, device=arena.device)
    launcher.trace(trace.data_ptr(), intervals)
    try:
        yield trace
    finally:
        launcher.trace(0, 0)


@dataclass(slots=True)
class IssuedSm90:
    """The counterpart of lang.launch.Issued: a launch of one shape, dtype, schedule and call hash."""

    arena: Arena
    kernels: tuple[str, str]  # plan and op
    a_ptr: int
    b_ptr: int
    bias_ptr: int  # 0: none
    sizes: tuple[int, int, int, int, int, int]  # M, N, K, strides of a and b, code of the dtype
    rest: tuple[Schedule, int, int, int, int, int, int]  # schedule, group_m, lead, piece, senders, call hash, start

    def launch(self, a_ptr: int, b_ptr: int, bias_ptr: int, out_ptr: int) -> bool:
        """Launch on the device's current stream. bias_ptr: not looked at where there is no bias."""
        launcher = self.arena.cache.get(self.kernels) or _launcher(self.arena, self.kernels)
        bias_ptr = bias_ptr if self.bias_ptr else 0
        numbers = (*self.sizes, *self.rest, stream_of(self.arena.device.index))
        launcher(a_ptr, b_ptr, bias_ptr, out_ptr, *numbers)
        return True

    def again(self, a_desc: int, b_desc: int, bias_ptr: int, out_ptr: int) -> Any:
        """The same with other addresses, all multiples of 16; None if a, b or the bias had to be copied."""
        copied = a_desc != self.a_ptr or b_desc != self.b_ptr or (self.bias_ptr and bias_ptr != self.bias_ptr)
        return None if copied else self.launch


def _launcher(arena: Arena, kernels: tuple[str, str]) -> GemmCollectiveLauncher:
    room = arena.layout
    launcher = arena.cache[kernels] = GemmCollectiveLauncher(
        *kernels,
        **of_arena(arena),
        partial_flags_offset=room.partial_flags,
        result_flags_offset=room.result_flags,
        tile_slots=room.tile_slots,
        staging_offset=room.staging,
        staging_slot_bytes=room.staging_slot_bytes,
        result_offset=room.result,
        result_bytes=room.total_bytes - room.result,
        blocks=arena.programs,
    )
    return launcher
