"""Whether every rank reaches every other, seen with data: peer access may be granted and yet deliver nothing."""

from collections.abc import Mapping

import torch
import torch.distributed as dist

from ..errors import UnsupportedTopology
from .agreement import exchange
from .store import Store

MARK = 0x7470_6F00 << 32
_LOOK = (
    "and it does not work: look at `nvidia-smi topo -p2p rw`, at IOMMU and ACS settings, and at the isolation of the "
    "containers. Until then use NCCL here."
)
ADVICE = {
    "shm": "The ranks must run on one host, in one PID namespace and as one user.",
    "symm_mem": f"The driver grants access between these devices, {_LOOK}",
    "nvshmem": f"NVSHMEM has mapped these devices to each other, {_LOOK}",
}


def tag(source: int, owner: int) -> int:
    """The word that `source` writes into the memory of `owner`."""
    return MARK | source << 8 | owner


def check_reach(
    store: Store, offset: int, device: torch.device, group: dist.ProcessGroup, pids: Mapping[int, int]
) -> None:
    """Each rank writes its word into every arena, and looks for the words of all in its own. Collective.

    offset: of W words in the arena that nobody uses yet; they are zero before and afterwards.
    Errors: UnsupportedTopology, on every rank, names each pair that failed and what to do.
    """
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)

    def write() -> None:
        for owner in range(world_size):
            _words(store, owner, offset, world_size)[rank] = tag(rank, owner)
        _finish(device)

    def look() -> list[int]:
        own = _words(store, rank, offset, world_size)
        found = own.tolist()
        own.zero_()
        _finish(device)
        return found

    exchange(group, write, pids)
    found_by = exchange(group, look, pids)
    lost = [
        f"rank {source} -> rank {owner} ({_describe(found_by[owner][source])})"
        for owner in range(world_size)
        for source in range(world_size)
        if found_by[owner][source] != tag(source, owner)
    ]
    if lost:
        raise UnsupportedTopology(
            f"init: what one rank writes into the memory of another does not arrive there: {', '.join(lost)}. "
            f"{ADVICE.get(store.name, '')}"
        )


def _words(store: Store, owner: int, offset: int, world_size: int) -> torch.Tensor:
    return store.peer_buffer(owner)[offset : offset + 8 * world_size].view(torch.int64)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _describe(word: int) -> str:
    if word == 0:
        return "nothing came"
    if word & ~0xFFFF == MARK:
        return f"there is what rank {word >> 8 & 255} wrote to rank {word & 255}"
    return f"there is {word:#x}"
