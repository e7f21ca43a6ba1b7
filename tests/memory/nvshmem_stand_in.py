"""Stands for nvshmem.core in a rank without a GPU: what the store asks of nvshmem4py 0.4.1, and what it may not do.

    with stand_in() as core:                # nvshmem.core, and cuda.core, are this until the end of the block
        core.init(uid=..., rank=..., nranks=..., initializer_method="uid")

Its symmetric memory is a file of each PE that the others map. A collective is one here too: each PE says which it has
entered, and one that another has not entered, or that another of them has, is an error where NVSHMEM would hang.
`calls` is what this PE was asked to do, in order.
"""

from __future__ import annotations

import contextlib
import enum
import mmap
import os
import sys
import types
import uuid
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

PATIENCE = timedelta(seconds=8)  # after which a collective would have hung
GARBAGE = 0xAB  # nvshmem_malloc does not clear


class InitStatus(enum.IntEnum):
    STATUS_NOT_INITIALIZED = 0
    STATUS_IS_BOOTSTRAPPED = 1
    STATUS_IS_INITIALIZED = 2


class NvshmemError(Exception):
    pass


class NvshmemInvalid(Exception):
    pass


class BrokenContract(AssertionError):
    """NVSHMEM would have hung, crashed or corrupted memory."""


class Core(types.ModuleType):
    """One process's nvshmem.core. faults: names of functions that go wrong here, as each says."""

    InitStatus, NvshmemError, NvshmemInvalid = InitStatus, NvshmemError, NvshmemInvalid

    def __init__(self, faults: tuple[str, ...] = (), unreachable: tuple[tuple[int, int], ...] = ()):
        super().__init__("nvshmem.core")
        self.faults, self.unreachable = faults, unreachable
        self.calls: list[str] = []
        self.loaded = False
        self._status = InitStatus.STATUS_NOT_INITIALIZED
        self.current: Device | None = None
        self._devices: dict[int, Device] = {}
        self._live: dict[int, list] = {}  # by address: [number of the allocation, uses, maps of all PEs]
        self._kept: list[Any] = []  # maps are never taken back here: a stale pointer reads what was freed

    # --- what it is

    def get_unique_id(self, empty: bool = False) -> str:
        if "load" in self.faults:
            raise RuntimeError("Failed to dlopen libnvshmem\n(no such file)\n")
        self.loaded = True
        if "get_unique_id" in self.faults and not empty:
            raise NvshmemError("no socket interface")
        return "" if empty else uuid.uuid4().hex

    def init_status(self) -> int:
        if not self.loaded:
            raise RuntimeError("Failed to dlopen libnvshmem (libnvshmem_host.so.3: cannot open shared object file)")
        return int(self._status)

    def my_pe(self) -> int:
        return self._pe

    def n_pes(self) -> int:
        return self._pes

    def init(self, device: Any = None, uid: str = "", rank: int = -1, nranks: int = 0, initializer_method: str = ""):
        self.calls.append("init")
        if self._status != InitStatus.STATUS_NOT_INITIALIZED:
            raise BrokenContract("init of what is initialised")
        if initializer_method != "uid" or not uid or not 0 <= rank < nranks:
            raise NvshmemInvalid("Invalid init method requested")
        if device is None or device is not self.current:
            raise BrokenContract("the device of the process is not the current one")
        self._words = dist.PrefixStore(f"stand_in/{uid}", distributed_c10d._get_default_store())
        self._pe, self._pes, self._met, self._made = rank, nranks, 0, 0
        self.disable_nvls = os.environ.get("NVSHMEM_DISABLE_NVLS")
        self._status = InitStatus.STATUS_IS_BOOTSTRAPPED
        if "init_silently" not in self.faults:
            self._status = InitStatus.STATUS_IS_INITIALIZED
        self._meet("init")
        if "init" in self.faults:
            self._status = InitStatus.STATUS_IS_BOOTSTRAPPED
            raise NvshmemError("no heap")

    def finalize(self) -> None:
        self.calls.append("finalize")
        self._check_up("finalize")
        if self._live:
            raise BrokenContract(f"finalize with {len(self._live)} live tensors")
        self._meet("finalize")
        self._status = InitStatus.STATUS_NOT_INITIALIZED

    def device(self, index: int | None = None) -> Device:
        return self._devices.setdefault(index or 0, Device(self, index or 0))

    # --- memory

    def bytetensor(self, shape: tuple[int, ...], dtype=None, release=False, morder="C", except_on_del=True):
        (nbytes,) = shape
        self.calls.append("malloc")
        if self._status != InitStatus.STATUS_IS_INITIALIZED:
            raise NvshmemInvalid("NVSHMEM Library is not initialized")
        self._made += 1
        self._meet(f"malloc {nbytes}")
        fd = os.memfd_create("stand_in")
        os.ftruncate(fd, nbytes)
        where = f"memory {self._made} of "
        self._words.set(f"{where}{self._pe}", f"/proc/{os.getpid()}/fd/{fd}")
        views = []
        for pe in range(self._pes):
            with open(self._words.get(f"{where}{pe}").decode(), "r+b") as file:
                self._kept.append(mmap.mmap(file.fileno(), nbytes))
                views.append(torch.frombuffer(self._kept[-1], dtype=torch.uint8))
        self._meet("mapped")
        os.close(fd)
        own = views[self._pe]
        own.fill_(GARBAGE)
        self._meet("filled")
        if "malloc" in self.faults:
            raise NvshmemError(f"Failed to allocate memory of bytes {nbytes}")
        self._live[own.data_ptr()] = [self._made, 1, views]
        return own

    def get_peer_tensor(self, tensor: torch.Tensor, peer_pe: int) -> torch.Tensor:
        _, _, views = self._live[tensor.data_ptr()]
        if (self._pe, peer_pe) in self.unreachable:
            raise NvshmemError("Failed to retrieve peer buffer")
        if peer_pe == self._pe:
            self._live[tensor.data_ptr()][1] += 1  # nvshmem4py finds the tensor itself among what it tracks
        return views[peer_pe]

    def free_tensor(self, tensor: torch.Tensor) -> None:
        self.calls.append("free")
        self._check_up("free")
        found = self._live.get(tensor.data_ptr())
        if found is None:
            raise BrokenContract("free of what is not live: freed twice, or never allocated")
        found[1] -= 1
        if found[1] == 0:
            self._meet(f"free {found[0]}")
            del self._live[tensor.data_ptr()]

    @property
    def live(self) -> int:
        """How many tensors are allocated."""
        return len(self._live)

    # --- contracts

    def _check_up(self, what: str) -> None:
        if self._status != InitStatus.STATUS_IS_INITIALIZED:
            raise BrokenContract(f"{what} of what is not initialised")

    def _meet(self, what: str) -> None:
        """All PEs of the world have entered the same collective, their n-th."""
        self._met += 1
        self._words.set(f"{self._met} of {self._pe}", what)
        for pe in range(self._pes):
            name = f"{self._met} of {pe}"
            try:
                self._words.wait([name], PATIENCE)
            except RuntimeError:
                raise BrokenContract(f"{what} would hang: PE {pe} does not come") from None
            if self._words.get(name).decode() != what:
                raise BrokenContract(f"{what} met {self._words.get(name).decode()} of PE {pe}")


class Device:
    """cuda.core.Device, of which Core knows whether it was made current. One object for one device, as there."""

    def __init__(self, core: Core, index: int):
        self._core, self.device_id = core, index

    def set_current(self) -> None:
        self._core.current = self


@contextlib.contextmanager
def stand_in(**faults: Any) -> Iterator[Core]:
    """While it lasts, `import nvshmem.core` gives this, and so does `import cuda.core` its Device."""
    core = Core(**faults)
    cuda_core = types.ModuleType("cuda.core")
    cuda_core.Device = core.device
    modules = {"nvshmem": types.ModuleType("nvshmem"), "nvshmem.core": core, "cuda.core": cuda_core}
    if "absent" in core.faults:
        modules = {"nvshmem": None}
    if "cuda" not in sys.modules:
        modules["cuda"] = types.ModuleType("cuda")
    with mock.patch.dict(sys.modules, modules):
        yield core


def start(core: Core, rank: int, world_size: int, pe: int | None = None) -> None:
    """As an application initialises NVSHMEM: a unique id from rank 0, PE `pe` on this rank."""
    unique_id = [core.get_unique_id() if rank == 0 else core.get_unique_id(empty=True)]
    dist.broadcast_object_list(unique_id, src=0)
    core.device().set_current()
    number = rank if pe is None else pe
    core.init(core.device(), unique_id[0], number, world_size, initializer_method="uid")
