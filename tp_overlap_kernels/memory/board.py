"""The notice board: what has become of each rank, where the hosts of its peers can read it while devices hang.

One page of host memory a rank, written by that rank and mapped by its peers:

    [0] state   0 takes part, 1 has closed the group, 2 has failed
    [1] dead    the ranks whose processes it has seen end, a bit each
    [2..8]      its failed wait, as in memory.record; code 0 where it failed without one

It is a rank's watch that looks, so a notice costs no device, no kernel and no call anything.
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist

from .record import FailedWait
from .store import SharedMemoryStore

PAGE_BYTES = 4096
CLOSED, FAILED = 1, 2


@dataclass(frozen=True)
class Notice:
    """What a rank has said. wait: why it failed, if it was a wait. dead: the ranks that it has seen end."""

    state: int
    wait: FailedWait | None
    dead: tuple[int, ...]


class Board:
    """The pages of one group, as one rank sees them. Made and mapped together (collective); closed alone."""

    def __init__(self, group: dist.ProcessGroup, pids: dict[int, int]):
        self.rank = dist.get_rank(group)
        self._store = SharedMemoryStore(PAGE_BYTES, group, pids, "tp_overlap_board")
        self._pages = [
            self._store.peer_buffer(rank).view(torch.int64).numpy() for rank in range(dist.get_world_size(group))
        ]

    def post(self, state: int, wait: FailedWait | None = None, dead: tuple[int, ...] = ()) -> None:
        """Say it to all; the state last."""
        page = self._pages[self.rank]
        page[1] = sum(1 << rank for rank in dead)
        if wait is not None:
            page[2:9] = wait.words()
        page[0] = state

    def read(self, rank: int) -> Notice | None:
        """What a peer has said, if anything."""
        page = self._pages[rank]
        if page[0] == 0:
            return None
        dead = tuple(peer for peer in range(len(self._pages)) if page[1] >> peer & 1)
        return Notice(int(page[0]), FailedWait.of_words(page[2:9]), dead)

    def peers(self) -> list[int]:
        """The other ranks."""
        return [rank for rank in range(len(self._pages)) if rank != self.rank]

    def close(self) -> None:
        """Give up the mappings. Peers still read what we have said."""
        self._pages = []
        self._store.close()
