"""The `ref` backend: what a laptop runs. torch.mm, then a sum over the symmetric memory of CPU ranks.

Each rank writes its partial into its own arena, raises its header slot there, waits for the headers of its peers, adds
all partials in rank order in f32, and waits until all have read. Fresh: a header is written after the data (x86-64
keeps the order of stores, and of loads; elsewhere use `interp`, whose signals are atomics). Reuse: a call ends when
every rank has read, so the next one, of either backend, may write anywhere. Live: each rank raises its header before
it waits, and says that it has read before it waits for the others to say so.
"""

import ctypes
import platform
import time

import torch
from torch import Tensor

from ..errors import UnsupportedTopology
from ..memory.arena import Arena
from ..memory.layout import rows_per_rank
from ..memory.record import ABORTED, MISMATCH, TIMEOUT, FailedWait

EPOCH = 0  # word of arena.control, as in lang.signal
LAST_EPOCH = (1 << 47) - 1  # likewise: the sign bit of a word begins there


def all_reduce(arena: Arena, x: Tensor, out: Tensor, word: int, op: str = "all_reduce") -> None:
    """out = the sum of x over the ranks; flat, contiguous; out may be x, or f32. op: whose call it is, for errors."""
    for start in range(0, x.numel(), _capacity(arena, x)):
        piece = slice(start, start + _capacity(arena, x))
        _exchange(arena, x[piece], out[piece], 0, op, word)


def reduce_scatter(arena: Arena, partial: Tensor, out: Tensor, word: int) -> None:
    """out = our rows of the sum of partial [M, N] over the ranks."""
    M, N = partial.shape
    c = rows_per_rank(M, arena.world_size)
    height = max(_capacity(arena, partial) // N // arena.world_size, 1)
    for start in range(0, c, height):
        # the same rows of every owner's block, so that one exchange serves all owners
        owners = range(arena.world_size)
        parts = [partial[r * c + start : min(M, (r + 1) * c, r * c + start + height)] for r in owners]
        before = sum(part.shape[0] for part in parts[: arena.rank])
        target = out[start : start + height]
        _exchange(arena, torch.cat(parts).view(-1), target.view(-1), before * N, "gemm_reduce_scatter", word)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, y: Tensor, new_residual: Tensor) -> None:
    """kernels/add_rms_norm.py in torch, with its rounding. x: of any float dtype; y may be x, new_residual residual."""
    new_residual.copy_(x.float() + residual.float())
    hidden = new_residual.float()
    scale = torch.rsqrt(hidden.square().mean(-1, keepdim=True) + eps)
    y.copy_(hidden * scale * weight.float())


def _capacity(arena: Arena, x: Tensor) -> int:
    """Elements of a partial: everything behind the pads, since no region is in use between two calls of `ref`."""
    room = arena.layout
    return (room.total_bytes - room.one_shot) // x.element_size()


def _exchange(arena: Arena, x: Tensor, out: Tensor, first: int, op: str, word: int) -> None:
    """out = the sum over the ranks of x[first : first + out.numel()]; every rank gives all of its x."""
    if platform.machine() not in ("x86_64", "AMD64"):
        raise UnsupportedTopology(f"{op}: the ref backend relies on x86-64's memory order. Use cpu_backend('interp').")
    epoch = int(arena.control[EPOCH]) + 1
    if epoch > LAST_EPOCH:
        raise OverflowError(f"{op}: epoch {epoch} exceeds {LAST_EPOCH}. close() and init() begin again at 0.")
    arena.control[EPOCH] = epoch
    start = arena.layout.one_shot
    arena.view(arena.rank, start, tuple(x.shape), x.dtype).copy_(x)
    header = arena.layout.header + ((epoch & 1) * arena.world_size) * 8
    ctypes.c_int64.from_address(arena.store.bases[arena.rank] + header + arena.rank * 8).value = epoch << 16 | word
    total = torch.zeros(out.shape, dtype=torch.float32)
    for rank in range(arena.world_size):
        if not _wait(arena, rank, arena.store.bases[rank] + header + rank * 8, epoch << 16 | word, op):
            out.fill_(float("nan"))
            return
        total += arena.view(rank, start, tuple(x.shape), x.dtype)[first : first + out.numel()]
    if not _all_have_read(arena, epoch, op):
        out.fill_(float("nan"))
        return
    out.copy_(total)


def _all_have_read(arena: Arena, epoch: int, op: str) -> bool:
    """Tell every peer that our reads are over, and hear it from all: what follows may use the same bytes."""
    done, rank = arena.layout.done, arena.rank
    for base in arena.store.bases:
        ctypes.c_int64.from_address(base + done + rank * 8).value = epoch << 16
    own = arena.store.bases[rank] + done
    return all(_wait(arena, peer, own + peer * 8, epoch << 16, op) for peer in range(arena.world_size))


def _wait(arena: Arena, peer: int, address: int, wanted: int, op: str) -> bool:
    slot, started, polls = ctypes.c_int64.from_address(address), time.monotonic(), 0
    while (seen := slot.value) >> 16 < wanted >> 16:
        polls += 1
        time.sleep(0 if polls < 200 else 1e-4)
        late = arena.timeout_s and time.monotonic() - started > arena.timeout_s
        if late or arena.record.is_hopeless(peer):
            seen = slot.value  # what a peer sent before it closed
            if seen >> 16 >= wanted >> 16:
                break
            code = TIMEOUT if late else ABORTED
            arena.record.write(FailedWait(code, op, arena.rank, peer, 0, wanted, seen))
            return False
    if seen >> 16 == wanted >> 16 and seen != wanted:
        arena.record.write(FailedWait(MISMATCH, op, arena.rank, peer, 0, wanted, seen))
        return False
    return True
