"""Memory with unreadable pages around it: what a kernel touches outside ends the process, and the test sees it die.

Pages are taken when touched, so tens of GiB cost nothing.
"""

from __future__ import annotations

import ctypes
import dataclasses
import mmap
import os

import torch

from tp_overlap_kernels.memory.layout import Layout, align_up, layout

PAGE = mmap.PAGESIZE
FAR = 1 << 31
_NONE, _READ_WRITE = 0, mmap.PROT_READ | mmap.PROT_WRITE
_FIXED, _NO_RESERVE, _SHARED, _PRIVATE, _ANONYMOUS = 0x10, 0x4000, 0x1, 0x2, 0x20

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]


def between_guards(nbytes: int, fd: int | None = None) -> int:
    """Address of `nbytes` (whole pages) of zeros, or of a file, with a guard page before and behind. Never freed."""
    assert nbytes % PAGE == 0
    whole = _map(None, nbytes + 2 * PAGE, _NONE, _PRIVATE | _ANONYMOUS | _NO_RESERVE, -1)
    flags = _FIXED | _NO_RESERVE | (_PRIVATE | _ANONYMOUS if fd is None else _SHARED)
    return _map(whole + PAGE, nbytes, _READ_WRITE, flags, -1 if fd is None else fd)


def _map(address: int | None, nbytes: int, protection: int, flags: int, fd: int) -> int:
    mapped = _libc.mmap(address, nbytes, protection, flags, fd, 0)
    if mapped == ctypes.c_void_p(-1).value:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return mapped


def forbid(start: int, end: int) -> None:
    """Make the whole pages between two addresses unreadable."""
    start, end = align_up(start, PAGE), end // PAGE * PAGE
    if end > start and _libc.mprotect(start, end - start, _NONE):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def over(address: int, nbytes: int) -> torch.Tensor:
    """uint8 tensor over bare memory."""
    return torch.frombuffer((ctypes.c_ubyte * nbytes).from_address(address), dtype=torch.uint8)


def at_the_edge(x: torch.Tensor, end: bool) -> torch.Tensor:
    """A contiguous copy of x that ends where a guard page begins, or begins where one ends."""
    nbytes = x.numel() * x.element_size()
    room = max(align_up(nbytes, PAGE), PAGE)
    skipped = room - nbytes if end else 0
    memory = over(between_guards(room), room)[skipped : skipped + nbytes]
    return memory.view(x.dtype).view(x.shape).copy_(x)


def in_far_rows(x: torch.Tensor, row_stride: int) -> torch.Tensor:
    """A copy of the matrix x whose rows lie `row_stride` elements apart; the last ends at a guard page."""
    rows, cols = x.shape
    elements = (rows - 1) * row_stride + cols
    room = align_up(elements * x.element_size(), PAGE)
    flat = over(between_guards(room), room).view(x.dtype)
    return flat[flat.numel() - elements :].as_strided((rows, cols), (row_stride, 1)).copy_(x)


# --- an arena with its regions, and the slots in them, far apart


def far_layout(max_M: int, max_N: int, itemsize: int, world_size: int) -> Layout:
    """The layout of a capacity with 2 GiB and more between all regions and slots; the pads stay where they are.

    No sentinel region: its CUDA kernel is not interpreted.
    """
    near = layout(max_M, max_N, itemsize, world_size)
    used, staged = used_bytes(near)
    slot, stage = FAR + used, FAR + staged
    one_shot = FAR + PAGE
    staging = one_shot + 2 * world_size * slot + PAGE
    result = staging + (world_size - 1) * stage + FAR
    return dataclasses.replace(
        near,
        sentinel=align_up(near.sentinel, PAGE),
        sentinel_bytes=0,
        one_shot=one_shot,
        one_shot_bytes=slot,
        staging=staging,
        staging_slot_bytes=stage,
        result=result,
        total_bytes=result + used,
    )


def used_bytes(room: Layout) -> tuple[int, int]:
    """Whole pages that a message of max_M rows takes in a one-shot slot or in the result, and in a staging slot."""
    row_bytes = align_up(room.max_N, 16) * room.itemsize
    rows = -(-room.max_M // room.world_size)
    assert room.max_M * row_bytes % PAGE == rows * row_bytes % PAGE == 0, "choose sizes that fill pages"
    return room.max_M * row_bytes, rows * row_bytes


def forbid_gaps(base: int, room: Layout) -> None:
    """In an arena of `far_layout`, make unreadable whatever lies between the pads, the slots and the result."""
    used, staged = used_bytes(room)
    kept = [(room.one_shot + i * room.one_shot_bytes, used) for i in range(2 * room.world_size)]
    kept += [(room.staging + i * room.staging_slot_bytes, staged) for i in range(room.world_size - 1)]
    kept += [(room.result, used)]
    end = room.sentinel
    for start, nbytes in kept:
        forbid(base + end, base + start)
        end = start + nbytes
    forbid(base + end, base + room.total_bytes)
