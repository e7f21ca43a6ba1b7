"""What the launchers of the CUDA kernels are told of an arena, and how they number dtypes: csrc/api.h in Python."""

import torch

from ..memory.arena import Arena

DTYPE_CODES = {torch.bfloat16: 0, torch.float16: 1}


def of_arena(arena: Arena) -> dict[str, int]:
    """Pointers as the device sees them, offsets in bytes, and who we are: the arguments that every launcher takes."""
    room = arena.layout
    return {
        "base_table_ptr": arena.heap.data_ptr(),
        "control_ptr": arena.control.data_ptr(),
        "record_ptr": arena.record.words.data_ptr(),
        "header_offset": room.header,
        "done_offset": room.done,
        "rank": arena.rank,
        "world_size": arena.world_size,
        "timeout_ns": arena.timeout_ns,
    }


def of_sentinels(arena: Arena) -> dict[str, int]:
    """`of_arena`, and the region of the kernels whose data are their own flags."""
    room = arena.layout
    return of_arena(arena) | {"sentinel_offset": room.sentinel, "sentinel_bytes": room.sentinel_bytes}
