"""Ranks: starts one process a rank where nobody else did, binds each to its device, and lets them agree.

Under torchrun the ranks exist already and are used as they are. A rank that dies takes the others with it after a
short grace, so that a crash is an exit code and not a hang.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

GRACE_S = 20.0  # how long the others may go on after one rank has ended badly
CRASHED = 3  # exit code of a rank that raised
INTERRUPTED = 130
SETUP_TIMEOUT_S = 180.0  # collectives of the process group: wide enough for a peer that is compiling


@dataclass(frozen=True)
class Topology:
    """What to start. device_type is "cuda" or "cpu"; ranks_per_device > 1 puts neighbouring ranks on one GPU."""

    world_size: int
    device_type: str
    ranks_per_device: int = 1


@dataclass
class World:
    """One rank's view of the ranks that measure together. `agreement` is a gloo group over the same ranks."""

    rank: int
    topology: Topology
    device: torch.device
    group_name: str
    agreement: Any

    @property
    def world_size(self) -> int:
        return self.topology.world_size

    @property
    def has_nccl(self) -> bool:
        return self.device.type == "cuda" and self.topology.ranks_per_device == 1

    def gather(self, value: Any) -> list[Any]:
        """The value of every rank, in rank order. All ranks must call it."""
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value, group=self.agreement)
        return values

    def from_rank_0(self, value: Any) -> Any:
        return self.gather(value if self.rank == 0 else None)[0]

    def agree(self, reason: str | None) -> str | None:
        """The first reason any rank has, with the rank it came from, or None where all ranks have none."""
        for rank, each in enumerate(self.gather(reason)):
            if each is not None:
                return each if self.world_size == 1 else f"rank {rank}: {each}"
        return None

    def barrier(self) -> None:
        self.gather(None)


class TimeBudget:
    """Seconds of a run from now on; None is no end."""

    def __init__(self, world: World, seconds: float | None) -> None:
        self.world = world
        self.deadline = None if seconds is None else time.monotonic() + seconds

    def spent(self) -> bool:
        """Whether they have passed, by rank 0's clock. All ranks must call it."""
        late = self.deadline is not None and time.monotonic() > self.deadline
        return bool(self.world.from_rank_0(late))


def under_torchrun() -> bool:
    return dist.is_torchelastic_launched()


def torchrun_world_size() -> int:
    return int(os.environ["WORLD_SIZE"])


def prints_here() -> bool:
    """Whether this process is the one that talks: the launcher, or rank 0 of torchrun."""
    return not under_torchrun() or os.environ["RANK"] == "0"


def run_ranks(target: Callable[[World, Any], int], argument: Any, topology: Topology) -> int:
    """Runs target(world, argument) on every rank and returns the largest exit code.

    target and argument must be picklable by name: the ranks are fresh processes.
    """
    if under_torchrun():
        return _rank_main(target, argument, topology, int(os.environ["RANK"]), "env://")
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory(prefix="tpo-bench-") as folder:
        init_method = f"file://{folder}/store"
        ranks = [
            context.Process(target=_child, args=(target, argument, topology, rank, init_method))
            for rank in range(topology.world_size)
        ]
        for process in ranks:
            process.start()
        try:
            return _join(ranks)
        finally:
            _end(ranks)


def _join(ranks: list[Any]) -> int:
    """Waits for all; once one has ended badly, the others get GRACE_S."""
    deadline = None
    while any(process.is_alive() for process in ranks):
        for process in ranks:
            process.join(0.1)
            if process.exitcode not in (None, 0) and deadline is None:
                deadline = time.monotonic() + GRACE_S
        if deadline is not None and time.monotonic() > deadline:
            break
    codes = [process.exitcode for process in ranks]
    # A rank ended by a signal has a negative code; one still alive after the grace has none.
    return max(CRASHED if code is None or code < 0 else code for code in codes)


def _end(ranks: list[Any]) -> None:
    for end in ("terminate", "kill"):
        for process in ranks:
            if process.is_alive():
                getattr(process, end)()
                process.join(5)


def _child(target: Callable[[World, Any], int], argument: Any, topology: Topology, rank: int, init_method: str) -> None:
    raise SystemExit(_rank_main(target, argument, topology, rank, init_method))


def _rank_main(
    target: Callable[[World, Any], int], argument: Any, topology: Topology, rank: int, init_method: str
) -> int:
    code = CRASHED
    try:
        world = _join_world(topology, rank, init_method)
        code = target(world, argument)
        world.barrier()  # nobody leaves while another rank still prints or needs its memory
    except KeyboardInterrupt:
        code = INTERRUPTED
    except Exception:
        traceback.print_exc()
    if code in (CRASHED, INTERRUPTED) or topology.device_type == "cuda":
        # Destroying a group whose peers are gone can block for ever, and memory that is registered with a communicator
        # does not say in which order the two want to end. The system takes everything back.
        sys.stdout.flush()
        os._exit(code)
    dist.destroy_process_group()
    return code


def _join_world(topology: Topology, rank: int, init_method: str) -> World:
    if topology.device_type == "cuda":
        device = torch.device("cuda", _local_rank(rank) // topology.ranks_per_device)
        torch.cuda.set_device(device)
        if topology.ranks_per_device > 1:
            # Read by torch when symmetric memory is set up in this process, which this launcher made for the purpose.
            os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    else:
        device = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // topology.world_size))
    shared = topology.device_type == "cuda" and topology.ranks_per_device > 1
    nccl = topology.device_type == "cuda" and not shared  # NCCL refuses two ranks on one GPU
    options: dict[str, Any] = {"device_id": device} if nccl else {}
    if init_method != "env://":
        options |= {"rank": rank, "world_size": topology.world_size}
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if nccl else "gloo",
        init_method=init_method,
        timeout=timedelta(seconds=SETUP_TIMEOUT_S),
        **options,
    )
    agreement = dist.new_group(backend="gloo")
    group = dist.group.WORLD
    assert group is not None  # set by init_process_group
    return World(rank, topology, device, group.group_name, agreement)


def _local_rank(rank: int) -> int:
    return int(os.environ["LOCAL_RANK"]) if under_torchrun() else rank
