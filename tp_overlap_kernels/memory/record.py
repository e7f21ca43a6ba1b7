"""What a failed device wait leaves behind: sixteen 64-bit words in pinned host memory, read without a CUDA call.

[0] abort   see below                            [5] peer    rank that did not arrive
[1] state   0 nothing, 2 written                 [6] tile    slot index within its pad
[2] code    1 timeout, 2 mismatch, 3 aborted     [7] wanted  epoch << 16 | call hash
[3] op      index into OPS, from 1               [8] seen    likewise
[4] rank    the one that waited

The host writes the abort word, and every wait that lasts looks at it. Bit 0: all waits are to end. Bit 8 + r: rank r
has closed the group, so a wait for it will not be met, unless what it sent before has arrived.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

from ..errors import CallMismatch, GroupFailed, PeerClosed, PeerDied, PeerTimeout

if TYPE_CHECKING:
    from .board import Notice

WORDS = 16
OPS = (
    "gemm_all_reduce",
    "gemm_reduce_scatter",
    "all_reduce",
    "gemm_all_reduce_add_rms_norm",
    "all_reduce_add_rms_norm",
)
TIMEOUT, MISMATCH, ABORTED = 1, 2, 3
AFTER = " The output is NaN and the group refuses further calls; close() and init() on every rank make a new one."


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

    def words(self) -> tuple[int, ...]:
        """Words 2 to 8 of a record."""
        return self.code, op_code(self.op), self.rank, self.peer, self.tile, self.wanted, self.seen

    @classmethod
    def of_words(cls, words: Iterable[int]) -> "FailedWait | None":
        """From words 2 to 8 of a record; None where there was no wait."""
        code, op, rank, peer, tile, wanted, seen = (int(word) for word in words)
        return cls(code, OPS[op - 1], rank, peer, tile, wanted, seen) if code else None

    def __str__(self) -> str:
        return (
            f"{self.op}: rank {self.rank} waited for rank {self.peer} (tile {self.tile}, "
            f"epoch wanted {self.wanted >> 16}, seen {self.seen >> 16})"
        )

    def error(
        self,
        group_name: str,
        timeout_s: float,
        dead: Mapping[int, int],
        told: "Mapping[int, Notice] | None" = None,
        closed: Collection[int] = (),
        absent: Iterable[int] = (),
    ) -> GroupFailed:
        """The exception that says what happened.

        dead: pid by rank of the peers whose processes have ended. told: what peers that had failed before have said.
        closed: the peers that have closed the group. absent: those that have not entered this call, if that is known.
        """
        place = f"{self} in group {group_name!r}"
        if dead:
            return PeerDied(f"{place}; {ended(dead)}.{AFTER}")
        if self.code == MISMATCH:
            return CallMismatch(
                f"{place}, which made another call: hash wanted {self.wanted & 0xFFFF:#06x}, "
                f"seen {self.seen & 0xFFFF:#06x}. "
                "All ranks must make the same calls in the same order, with equal M, N, K, dtype, bias and plan."
                f"{AFTER}"
            )
        if self.code == TIMEOUT:
            missing = ", ".join(f"rank {rank}" for rank in absent)
            return PeerTimeout(
                f"{place} for {timeout_s:g} s. {f'Not in this call yet: {missing}. ' if missing else ''}"
                f"Is that rank late, gone, or in another call? "
                f"TP_OVERLAP_TIMEOUT sets the limit in seconds.{AFTER}"
            )
        kind, cause = cause_of(told) if told else (GroupFailed, "")
        if kind is GroupFailed and closed:  # whoever told us had met the same, at the latest
            gone = " and ".join(f"rank {rank}" for rank in sorted(closed))
            return PeerClosed(f"{place} in vain: {gone} closed the group.{AFTER}")
        return kind(f"{place} until the wait was aborted{cause and f': {cause}'}.{AFTER}")


def ended(dead: Mapping[int, int]) -> str:
    """Who has died. dead: pid by rank."""
    who = ", ".join(f"rank {rank} (pid {pid})" for rank, pid in sorted(dead.items()))
    return f"the process of {who} has ended"


def cause_of(told: "Mapping[int, Notice]") -> tuple[type[GroupFailed], str]:
    """Why peers have failed, from what they say: the class of the error, and the words.

    One that was merely told by another knows less than that other.
    """
    rank, notice = min(told.items(), key=lambda item: _rank_of(item[1]))
    if notice.dead:
        gone = " and ".join(f"rank {dead}" for dead in notice.dead)
        return PeerDied, f"rank {rank} has seen the process of {gone} end"
    if notice.wait is None:
        return GroupFailed, f"rank {rank} has failed"
    if notice.wait.code == TIMEOUT:
        return PeerTimeout, f"rank {rank} had given up ({notice.wait}, longer than its timeout)"
    if notice.wait.code == MISMATCH:
        return CallMismatch, f"rank {rank} had met another call ({notice.wait})"
    return GroupFailed, f"rank {rank} had failed ({notice.wait})"


def _rank_of(notice: "Notice") -> int:
    if notice.dead:
        return 0
    return 2 if notice.wait is None or notice.wait.code == ABORTED else 1


class Record:
    """The words and their reader. One a group; `words.data_ptr()` is what the device writes to.

    calls: op by call hash. A kernel may serve more than one op, and knows itself alone.
    """

    def __init__(self, device: torch.device):
        self.words = torch.zeros(WORDS, dtype=torch.int64, pin_memory=device.type == "cuda")
        self.calls: dict[int, str] = {}
        self._view = self.words.numpy()
        self._words = memoryview(self._view)  # the same bytes, read as Python ints: half the time of numpy's scalars

    @property
    def failed(self) -> bool:
        """Whether a wait of this rank has failed or was asked to end."""
        words = self._words
        return words[1] != 0 or words[0] & 1 != 0

    def abort(self) -> None:
        """Ask every wait of this rank to end."""
        self._view[0] |= 1

    def close_peer(self, rank: int) -> None:
        """Ask every wait for this peer to end, unless what it waits for is there."""
        self._view[0] |= 1 << (8 + rank)

    def is_hopeless(self, peer: int) -> bool:
        """Whether a wait for this peer is to end."""
        return bool(self._words[0] & (1 | 1 << (8 + peer))) or self._words[1] != 0

    def read(self) -> FailedWait | None:
        """The failed wait, or None while nothing complete is written."""
        if self._view[1] != 2:
            return None
        wait = FailedWait.of_words(self._view[2:9])
        return wait and replace(wait, op=self.calls.get(wait.wanted & 0xFFFF, wait.op))

    def write(self, wait: FailedWait) -> None:
        """For a waiter on the host (the ref backend)."""
        self._view[2:9] = wait.words()
        self._view[1] = 2
