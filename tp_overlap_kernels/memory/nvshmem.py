"""NVSHMEM's symmetric heap as a store, through nvshmem4py (extra `[nvshmem]`): for those who already run it.

A process has one NVSHMEM, with one world of PEs. To allocate and to free are collective over that whole world, so a
group is served where it is the world: its ranks in any order, and nobody else. Where nobody has initialised NVSHMEM the
first store does, from a unique id of its rank 0, and the close of the last store finalises it. An application that
initialises NVSHMEM does so before `init` and finalises it after `close`; nothing here ends it.

    look       does the package load, is NVSHMEM up, which PE is this rank     no rank goes on alone
    start      the unique id of rank 0 goes to all, and NVSHMEM's init          collective in NVSHMEM
    allocate   the bytes, zeroed                                                collective in NVSHMEM
    map        a pointer to the bytes of each peer                              local
    close      have all come? then free, and finalise where it was the last     collective in NVSHMEM

A collective of NVSHMEM knows no timeout: a rank that enters one into which another does not follow hangs for good. So
`close` lets the ranks agree first (agreement.unanimous), and where one has failed, has ended or no longer waits, nobody
frees. What is left lies there until the ranks of that world meet again in a store, and free it together.

NVSHMEM takes device memory in pieces of 512 MiB (NVSHMEM_CUMEM_GRANULARITY), whatever a store asks for.
"""

import importlib
import importlib.metadata
import os
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..config import settings
from ..errors import UnsupportedTopology
from .agreement import exchange, raised_on_all, unanimous

WHEELS = ("nvshmem4py-cu12", "nvshmem4py-cu13")
VERSIONS = ">=0.4,<0.5"


@dataclass
class _Process:
    """NVSHMEM in this process, which has one at most, as the stores know it.

    world: the id of the world that a store has initialised; empty where none has. stores: that are open. left: memory
    that not every rank came to free, by the id of its store.
    """

    world: str = ""
    stores: int = 0
    left: dict[str, torch.Tensor] = field(default_factory=dict)


_here = _Process()


@dataclass(frozen=True)
class Card:
    """What a rank says before anybody calls NVSHMEM. pe, pes: -1 and 0 where it is not initialised.

    world, left: as of this process. id: names the store, if this is rank 0.
    """

    world: str
    pe: int
    pes: int
    left: tuple[str, ...]
    id: str


class NvshmemStore:
    """CUDA devices of one node, a rank each: one allocation of NVSHMEM's heap, peers through nvshmem_ptr.

    Collective over the group. pids: of all ranks, where they are known.
    Errors, on every rank: UnsupportedTopology where nvshmem4py is missing, is of another CUDA or does not load, where
    NVSHMEM is not initialised on all ranks alike or has other PEs than the group has ranks, and where it gives no
    memory, or no pointer to that of a peer.
    """

    name = "nvshmem"

    def __init__(
        self, nbytes: int, device: torch.device, group: dist.ProcessGroup, pids: Mapping[int, int] | None = None
    ):
        self.buffer = torch.empty(0, dtype=torch.uint8)
        self._views: list[torch.Tensor] = []
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._words = distributed_c10d._get_process_group_store(group)
        cards = exchange(group, _look, pids)
        check_worlds(cards)
        self._id, self._core = cards[0].id, _load()
        if cards[0].pes:
            pes = [card.pe for card in cards]
        else:
            pes = _start(self._core, self._id, device, group, pids)
        self._open = True
        _here.stores += 1
        try:
            exchange(group, lambda: self._allocate(nbytes, device, cards), pids)
            exchange(group, lambda: self._map(pes), pids)
        except BaseException as reason:
            self.close(together=raised_on_all(reason))
            raise
        self.bases = [view.data_ptr() for view in self._views]

    def _allocate(self, nbytes: int, device: torch.device, cards: Sequence[Card]) -> None:
        for left in cards[0].left:
            if all(left in card.left for card in cards):
                self._core.free_tensor(_here.left.pop(left))
        try:
            # What is left for good at the end of the process is no error of whoever collects it.
            self.buffer = self._core.bytetensor((nbytes,), except_on_del=False)
        except Exception as reason:
            raise UnsupportedTopology(
                f"init: NVSHMEM gives no {nbytes} bytes: {reason}. Ask for less max_M, or give NVSHMEM a larger heap "
                "(NVSHMEM_SYMMETRIC_SIZE, where NVSHMEM_DISABLE_CUDA_VMM=1). An NVSHMEM that was initialised without "
                "nvshmem4py must be made known to it: nvshmem.core.init, which counts one more."
            ) from reason
        self.buffer.zero_()
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def _map(self, pes: Sequence[int]) -> None:
        for peer, pe in enumerate(pes):
            # Not even of our own PE is a pointer asked for: nvshmem4py would count it as another use of the memory, and
            # not free it.
            self._views.append(self.buffer if peer == self._rank else self._peer(peer, pe, pes[self._rank]))

    def _peer(self, peer: int, pe: int, own_pe: int) -> torch.Tensor:
        try:
            return self._core.get_peer_tensor(self.buffer, pe)
        except self._core.NvshmemError as reason:
            raise UnsupportedTopology(
                f"init: NVSHMEM has no pointer from rank {self._rank} (PE {own_pe}) to the memory of rank {peer} "
                f"(PE {pe}): {reason}. Their devices must be on one node and reach each other (`nvidia-smi topo -p2p "
                "rw`). Make a group of ranks that do, or use store='symm_mem' or NCCL."
            ) from reason

    def peer_buffer(self, rank: int) -> torch.Tensor:
        return self._views[rank]

    def close(self, together: bool = False) -> None:
        """Once; further calls do nothing, since on several nodes two arenas have the store of this one."""
        if not self._open:
            return
        self._open = False
        buffer, self.buffer = self.buffer, torch.empty(0, dtype=torch.uint8)
        self._views = []
        name = f"tp_overlap/nvshmem/{self._id}"
        there = buffer.numel() > 0
        agreed = unanimous(self._words, name, self._world_size, together and there, settings().timeout_s)
        _here.stores -= 1
        if agreed:
            self._core.free_tensor(buffer)
        elif there:
            _here.left[self._id] = buffer
        if agreed and _here.world and not _here.stores and not _here.left:
            self._core.finalize()
            _here.world = ""


def _look() -> Card:
    """This rank's card. Errors: UnsupportedTopology where nvshmem4py cannot be used."""
    core = _load()
    if not _is_up(core):
        _here.world = ""
        _here.left.clear()  # gone with an NVSHMEM that the application has finalised
        return Card("", -1, 0, (), uuid.uuid4().hex)
    return Card(_here.world, core.my_pe(), core.n_pes(), tuple(_here.left), uuid.uuid4().hex)


def _load() -> Any:
    """nvshmem.core, and the library under it."""
    check_wheel(torch.version.cuda, [wheel for wheel in WHEELS if _is_installed(wheel)])
    try:
        core = importlib.import_module("nvshmem.core")
        core.get_unique_id(empty=True)  # loads the library, which init_status expects
    except Exception as reason:
        command = _install(torch.version.cuda)
        if isinstance(reason, ModuleNotFoundError) and reason.name in ("nvshmem", "nvshmem.core"):
            raise UnsupportedTopology(f"init: store 'nvshmem' needs the package nvshmem4py. {command}") from reason
        said = " ".join(str(reason).split())  # the loader's has lines
        raise UnsupportedTopology(f"init: nvshmem4py does not load: {said}. {command}") from reason
    return core


def check_wheel(cuda: str | None, installed: Sequence[str]) -> None:
    """Refuse a wheel of nvshmem4py for another CUDA than torch's. Pure.

    cuda: torch.version.cuda. installed: which of WHEELS there are; none is for the import to say.
    """
    if cuda is None or not installed:
        return
    right = f"nvshmem4py-cu{cuda.split('.')[0]}"
    if list(installed) != [right]:
        raise UnsupportedTopology(
            f"init: store 'nvshmem' needs {right}, since torch is built for CUDA {cuda}, and there is "
            f"{' and '.join(installed)}. pip uninstall {' '.join(installed)}; pip install '{right}{VERSIONS}'"
        )


def _install(cuda: str | None) -> str:
    """The command. The extra has the wheel for CUDA 13, that of torch's default wheels."""
    if cuda is not None and cuda.split(".")[0] == "12":
        return f"pip install 'nvshmem4py-cu12{VERSIONS}'"
    return "pip install 'tp-overlap-kernels[nvshmem]'"


def _is_installed(wheel: str) -> bool:
    try:
        importlib.metadata.version(wheel)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def _is_up(core: Any) -> bool:
    return core.init_status() >= core.InitStatus.STATUS_IS_INITIALIZED


def check_worlds(cards: Sequence[Card]) -> None:
    """Refuse, on every rank alike, a group that is not the whole world of NVSHMEM. Pure.

    Two worlds that the application has made, of equal sizes and met in part by the group, look like one: there NVSHMEM
    says too little, and the allocation would wait.
    """
    up = [rank for rank, card in enumerate(cards) if card.pes]
    if not up:
        return
    if len(up) < len(cards):
        down = [rank for rank, card in enumerate(cards) if not card.pes]
        raise UnsupportedTopology(
            f"init: NVSHMEM is initialised on ranks {up} of the group and not on ranks {down}. "
            "Initialise it on all of them before init, or on none."
        )
    pes, sizes = [card.pe for card in cards], [card.pes for card in cards]
    one_world = len({card.world for card in cards}) == 1
    if not one_world or set(sizes) != {len(cards)} or sorted(pes) != list(range(len(cards))):
        raise UnsupportedTopology(
            f"init: NVSHMEM allocates on all PEs of its world together, and the group is not such a world: its "
            f"{len(cards)} ranks are the PEs {pes} of {sizes} (by rank){'' if one_world else ', of several worlds'}. "
            "Give init a group of all PEs, or store='symm_mem'."
        )


def _start(
    core: Any, world: str, device: torch.device, group: dist.ProcessGroup, pids: Mapping[int, int] | None
) -> list[int]:
    """Initialise NVSHMEM with a PE for each rank, of its number; gives the PE of each. Collective."""
    rank, world_size = dist.get_rank(group), dist.get_world_size(group)

    def own_device() -> Any:
        return importlib.import_module("cuda.core").Device(device.index)  # one object for one device

    def prepare() -> Any:
        own_device().set_current()
        # Multicast has no part in what the kernels do, and to reserve it takes what others may want: NVSHMEM would, in
        # its init, for its own collectives. Who wants that sets the variable to 0.
        os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
        try:
            return core.get_unique_id() if rank == 0 else None
        except Exception as reason:
            raise UnsupportedTopology(
                f"init: NVSHMEM makes no unique id: {reason}. It needs a network interface for its start, which "
                "NVSHMEM_BOOTSTRAP_UID_SOCK_IFNAME names."
            ) from reason

    unique_id = exchange(group, prepare, pids)[0]  # no rank enters NVSHMEM's init alone

    def initialise() -> int:
        try:
            core.init(device=own_device(), uid=unique_id, rank=rank, nranks=world_size, initializer_method="uid")
            reason = None if _is_up(core) else "it came back without having done so"  # it keeps such failures to itself
        except Exception as error:
            reason = str(error)
        if reason is not None:
            raise UnsupportedTopology(
                f"init: NVSHMEM does not initialise with {world_size} PEs: {reason}. NVSHMEM_DEBUG=INFO says more. "
                "Start the processes anew, or use store='symm_mem'."
            )
        _here.world = world
        return core.my_pe()

    return exchange(group, initialise, pids)
