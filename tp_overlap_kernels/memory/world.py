"""A world: symmetric tensors of a group for kernels of one's own, and the table by which lang.distributed finds peers.

    world = World(1 << 20)                        # bytes of symmetric memory on each rank; collective
    x = world.empty(1024, dtype=torch.bfloat16)   # the same calls in the same order on every rank
    world.barrier()
    kernel[grid](x, world=world)                  # a kernel under lang.distributed.jit
    world.check()                                 # raises if a wait of it has ended in vain

It has nothing to do with the arena of the ops: neither sees the other's bytes. Worlds of different groups may live side
by side in a process.
"""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from ..config import settings
from ..errors import InvalidInput, PeerTimeout
from ..lang import distributed as words
from . import store as stores
from .topology import device_of

ALIGNMENT = 256  # bytes, of each tensor and of the distance between heaps


class World:
    """Symmetric memory of one group, as this rank sees it.

    nbytes: on each rank; equal on all. group: None is the default group, or one rank by itself where
    torch.distributed is not initialised. store: as of `init`. timeout_s: how long a wait lasts, 0 for ever; None is
    the setting TP_OVERLAP_TIMEOUT. Collective, as are `barrier` and `close`. The memory begins as zeros.
    """

    def __init__(
        self,
        nbytes: int,
        group: dist.ProcessGroup | None = None,
        *,
        store: str = "auto",
        timeout_s: float | None = None,
    ) -> None:
        if group is None and dist.is_initialized():
            group = dist.group.WORLD
        self._group = group
        self.rank: int = dist.get_rank(group) if group else 0
        self.num_ranks: int = dist.get_world_size(group) if group else 1
        self.device = device_of(store)
        self._nbytes, self._used = -(-nbytes // ALIGNMENT) * ALIGNMENT, 0
        self._store = stores.create(stores.pick(store, self.device, self.num_ranks), self._nbytes, self.device, group)
        bases = self._store.bases
        if any((base - bases[0]) % ALIGNMENT for base in bases):
            raise InvalidInput(f"World: heaps are not aligned alike: {[hex(base) for base in bases]}.")
        timeout_s = settings().timeout_s if timeout_s is None else timeout_s
        table = [0] * words.BASES.value + bases
        table[words.RANK.value], table[words.NUM_RANKS.value] = self.rank, self.num_ranks
        table[words.TIMEOUT_NS.value] = int(timeout_s * 1e9)
        self.table = torch.tensor(table, dtype=torch.int64, device=self.device)
        self._store.buffer.zero_()
        self.barrier()

    def empty(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        """A symmetric tensor of this rank, valid until `close`. Not collective, but of the same place only where every
        rank has asked for the same tensors in the same order.

        Errors: InvalidInput where the world has no room left.
        """
        nbytes = math.prod(shape) * dtype.itemsize
        begin, self._used = self._used, self._used + -(-nbytes // ALIGNMENT) * ALIGNMENT
        if self._used > self._nbytes:
            raise InvalidInput(
                f"World.empty: {nbytes} bytes for {shape}, of which {max(0, self._nbytes - begin)} are left of "
                f"{self._nbytes}. Make a World of {self._used} bytes."
            )
        return self._store.buffer[begin : begin + nbytes].view(dtype).view(shape)

    def barrier(self) -> None:
        """Every rank's kernels on the current stream have ended, and its stores are seen by all."""
        if self.device.type == "cuda":
            torch.cuda.current_stream().synchronize()
        if self._group:
            dist.barrier(self._group)

    def check(self) -> None:
        """Raise if a wait has ended in vain. Waits for the kernels of the current stream.

        Errors: PeerTimeout, with the place of the word, the value wanted and the one seen last. The world is then of no
        use: close it on every rank and make another.
        """
        table = self.table.tolist()
        if not table[words.FAILED.value]:
            return
        address = table[words.ADDRESS.value]
        place = f"the address {address:#x}"
        for owner, base in enumerate(self._store.bases):
            if base <= address < base + self._nbytes:
                place = f"byte {address - base} of rank {owner}'s heap"
        raise PeerTimeout(
            f"wait: rank {self.rank} waited for {place} for {table[words.TIMEOUT_NS.value] / 1e9:g} s, value wanted "
            f"{table[words.WANTED.value]}, seen {table[words.SEEN.value]}. What the kernel has stored is worth nothing."
            " TP_OVERLAP_TIMEOUT sets the limit in seconds; close() and another World begin again."
        )

    def close(self) -> None:
        """Give the memory back; tensors and tables from here are dead then."""
        self.barrier()
        self._store.close(together=True)
