"""What a failed device wait leaves behind: sixteen 64-bit words in pinned host memory, read without a CUDA call.

[0] abort   the host asks all waits to end       [5] peer    rank that did not arrive
[1] state   0 nothing, 2 written                 [6] tile    slot index within its pad
[2] code    1 timeout, 2 mismatch, 3 aborted     [7] wanted  epoch << 16 | call hash
[3] op      index into OPS, from 1               [8] seen    likewise
[4] rank    the one that waited
"""

from dataclasses import dataclass

import torch

from ..errors import CallMismatch, GroupFailed, PeerDied, PeerTimeout

WORDS = 16
OPS = ("gemm_all_reduce", "gemm_reduce_scatter", "all_reduce")
TIMEOUT, MISMATCH, ABORTED = 1, 2, 3


def op_code(op: str) -> int:
    """The number by which a device names the op."""
    return OPS.index(op) + 1


@dataclass(frozen=True)
class FailedWait:
    """The record, decoded."""

    code: int
    op: str
    rank: int
    peer: int
    tile: int
    wanted: int
    seen: int

    def error(self, group_name: str, timeout_s: float, dead: dict[int, int]) -> GroupFailed:
        """The exception that says what happened. dead: pid by rank of the peers whose processes have ended."""
        place = (
            f"{self.op}: rank {self.rank} waited for rank {self.peer} (tile {self.tile}, "
            f"epoch wanted {self.wanted >> 16}, seen {self.seen >> 16}) in group {group_name!r}"
        )
        after = (
            " The output is NaN and the group refuses further calls; close() and init() on every rank make a new one."
        )
        if dead:
            who = ", ".join(f"rank {rank} (pid {pid})" for rank, pid in sorted(dead.items()))
            return PeerDied(f"{place}; the process of {who} has ended.{after}")
        if self.code == MISMATCH:
            return CallMismatch(
                f"{place}, which made another call: hash wanted {self.wanted & 0xFFFF:#06x}, "
                f"seen {self.seen & 0xFFFF:#06x}. "
                "All ranks must make the same calls in the same order, with equal M, N, K, dtype, bias and plan."
                f"{after}"
            )
        if self.code == TIMEOUT:
            return PeerTimeout(
                f"{place} for {timeout_s:g} s. Is that rank late, gone, or in another call? "
                f"TP_OVERLAP_TIMEOUT sets the limit in seconds.{after}"
            )
        return GroupFailed(f"{place} until the wait was aborted.{after}")


class Record:
    """The words and their reader. One a group; `words.data_ptr()` is what the device writes to."""

    def __init__(self, device: torch.device):
        self.words = torch.zeros(WORDS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self._view = self.words.numpy()
        self._words = memoryview(self._view)  # the same bytes, read as Python ints: half the time of numpy's scalars

    @property
    def failed(self) -> bool:
        """Whether a wait of this rank has failed or was asked to end."""
        words = self._words
        return words[1] != 0 or words[0] != 0

    def abort(self) -> None:
        """Ask every wait of this rank to end."""
        self._view[0] = 1

    def read(self) -> FailedWait | None:
        """The failed wait, or None while nothing complete is written."""
        if self._view[1] != 2:
            return None
        code, op, rank, peer, tile, wanted, seen = (int(word) for word in self._view[2:9])
        return FailedWait(code, OPS[op - 1], rank, peer, tile, wanted, seen)

    def write(self, wait: FailedWait) -> None:
        """For a waiter on the host (the ref backend)."""
        self._view[2:9] = (wait.code, op_code(wait.op), wait.rank, wait.peer, wait.tile, wait.wanted, wait.seen)
        self._view[1] = 2
