"""Where symmetric bytes come from: one interface, four stores.

| store         | ranks are                  | memory                                                            |
| ------------- | -------------------------- | ----------------------------------------------------------------- |
| LocalStore    | one rank alone             | a plain tensor                                                     |
| SharedMemory  | processes on CPUs          | an unnamed file (memfd, mode 0600) that each peer maps             |
| SymmetricMemory | processes on CUDA devices | torch.distributed._symmetric_memory, peers through NVLink or PCIe  |
| Nvshmem       | processes on CUDA devices  | NVSHMEM's heap, chosen by name: memory/nvshmem.py                  |

A store gives `buffer` (uint8 tensor: our own arena), `bases` (address of every rank's arena as seen from here),
`peer_buffer(rank)` and `close(together)`. Creating and closing are collective over the group; nothing named is left
behind by a crash.
"""

import errno
import mmap
import os
from collections.abc import Mapping
from typing import Protocol

import torch
import torch.distributed as dist

from ..errors import UnsupportedTopology
from .agreement import exchange
from .nvshmem import NvshmemStore


class Store(Protocol):
    """Symmetric bytes of one group, as one rank sees them."""

    name: str
    buffer: torch.Tensor
    bases: list[int]

    def peer_buffer(self, rank: int) -> torch.Tensor:
        """uint8 view of a peer's arena; valid until close()."""
        ...

    def close(self, together: bool = False) -> None:
        """Give up this rank's mappings. The caller has made sure that no peer is still using them.

        together: nothing has failed here, and every rank closes: a store whose memory is freed by all ranks in concert
        may wait for them.
        """
        ...


class LocalStore:
    """One rank, nothing to share."""

    name = "local"

    def __init__(self, nbytes: int, device: torch.device):
        self.buffer = torch.zeros(nbytes, dtype=torch.uint8, device=device)
        self.bases = [self.buffer.data_ptr()]

    def peer_buffer(self, rank: int) -> torch.Tensor:
        return self.buffer

    def close(self, together: bool = False) -> None:
        self.buffer = torch.empty(0, dtype=torch.uint8)


class SharedMemoryStore:
    """CPU processes of one host: each rank makes an unnamed file and maps those of its peers.

    The files are found as /proc/<pid>/fd/<fd>, which only the same user may open; they vanish with the last process
    that maps them. Pages are taken when touched, so a large arena costs a small test nothing.
    """

    name = "shm"

    def __init__(
        self,
        nbytes: int,
        group: dist.ProcessGroup,
        pids: Mapping[int, int] | None = None,
        label: str = "tp_overlap_kernels",
    ):
        self._views: list[torch.Tensor] = []
        self._maps: list[mmap.mmap] = []
        self._fd = -1
        try:
            cards = exchange(group, lambda: self._make(nbytes, label), pids)
            # Every rank has mapped every file when this ends: the descriptors may go.
            exchange(group, lambda: self._map_all(cards, nbytes), pids)
        except BaseException:
            self._maps = []
            raise
        finally:
            if self._fd >= 0:
                os.close(self._fd)
        self._views = [torch.frombuffer(m, dtype=torch.uint8) for m in self._maps]
        self.buffer = self._views[dist.get_rank(group)]
        self.bases = [view.data_ptr() for view in self._views]

    def _make(self, nbytes: int, label: str) -> tuple[int, int]:
        """Our own file: (pid, descriptor), by which the peers find it."""
        try:
            self._fd = os.memfd_create(label, os.MFD_CLOEXEC)
            os.fchmod(self._fd, 0o600)
            os.ftruncate(self._fd, nbytes)
        except OSError as reason:
            raise UnsupportedTopology(
                f"init: cannot make {nbytes} bytes of shared memory (memfd): {reason.strerror}. "
                "Look at the limits of this process (ulimit -n, -f, -v) and of its cgroup, or ask for less max_M."
            ) from reason
        return os.getpid(), self._fd

    def _map_all(self, cards: list[tuple[int, int]], nbytes: int) -> None:
        for rank, (pid, fd) in enumerate(cards):
            self._maps.append(self._map(pid, fd, nbytes, rank))

    def _map(self, pid: int, fd: int, nbytes: int, rank: int) -> mmap.mmap:
        path = f"/proc/{pid}/fd/{fd}"
        try:
            opened = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as reason:
            fix = "The ranks must run on one host, in one PID namespace and as one user."
            if reason.errno in (errno.EMFILE, errno.ENFILE):
                fix = "Raise the limit on descriptors (ulimit -n)."
            raise UnsupportedTopology(
                f"init: cannot open the shared memory of rank {rank} ({path}): {reason.strerror}. {fix}"
            ) from reason
        try:
            return mmap.mmap(opened, nbytes)
        except OSError as reason:
            raise UnsupportedTopology(
                f"init: cannot map {nbytes} bytes of rank {rank}: {reason.strerror}. "
                "Look at the limits of this process (ulimit -n, -v), or ask for less max_M."
            ) from reason
        finally:
            os.close(opened)

    def peer_buffer(self, rank: int) -> torch.Tensor:
        return self._views[rank]

    def close(self, together: bool = False) -> None:
        # A mapping goes when the last tensor over it does: results never alias it, so that is here.
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self._views, self._maps = [], []


class SymmetricMemoryStore:
    """CUDA devices that reach each other: torch symmetric memory, one allocation and one rendezvous."""

    name = "symm_mem"

    def __init__(
        self, nbytes: int, device: torch.device, group: dist.ProcessGroup, pids: Mapping[int, int] | None = None
    ):
        import torch.distributed._symmetric_memory as symm_mem

        def allocate() -> None:
            self.buffer = symm_mem.empty(nbytes, dtype=torch.uint8, device=device)

        exchange(group, allocate, pids)  # no rank enters the rendezvous alone
        self._handle = symm_mem.rendezvous(self.buffer, group.group_name)
        self.bases = [int(p) for p in self._handle.buffer_ptrs]
        self._nbytes = nbytes

    def peer_buffer(self, rank: int) -> torch.Tensor:
        return self._handle.get_buffer(rank, (self._nbytes,), torch.uint8, 0)

    def close(self, together: bool = False) -> None:
        self._handle = None
        self.buffer = torch.empty(0, dtype=torch.uint8)


def pick(store: str, device: torch.device, world_size: int) -> str:
    """The store that `auto` means here, or the one named, if it can serve.

    Errors: UnsupportedTopology says which store serves instead.
    """
    default = "local" if world_size == 1 else ("symm_mem" if device.type == "cuda" else "shm")
    if store in ("auto", default):
        return default
    if store not in ("symm_mem", "nvshmem", "shm", "local"):
        raise UnsupportedTopology(f"init: unknown store {store!r}. Give auto, symm_mem, nvshmem, shm or local.")
    needs_cuda = store in ("symm_mem", "nvshmem")
    if world_size == 1 and not (needs_cuda and device.type == "cpu"):
        return "local"
    if store == "nvshmem" and device.type == "cuda":
        return "nvshmem"
    raise UnsupportedTopology(
        f"init: store {store!r} cannot serve {world_size} ranks on {device.type}. Use store={default!r} or 'auto'."
    )


def create(
    store: str,
    nbytes: int,
    device: torch.device,
    group: dist.ProcessGroup | None,
    pids: Mapping[int, int] | None = None,
) -> Store:
    """Make the store named by `pick`. Collective over `group`. pids: of all ranks, where they are known."""
    if store == "local" or group is None:
        return LocalStore(nbytes, device)
    if store == "shm":
        return SharedMemoryStore(nbytes, group, pids)
    if store == "nvshmem":
        return NvshmemStore(nbytes, device, group, pids)
    return SymmetricMemoryStore(nbytes, device, group, pids)
