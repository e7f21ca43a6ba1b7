"""The ranks of a proof run: the pool of tests/dist.py, on GPUs where there are some."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import time
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.dist import RankPool
from tests.ops.calls import group_name
from tests.ops.judge import count_in_f32
from tp_overlap_kernels.dispatch import Plan, Problem
from tp_overlap_kernels.dispatch.problem import PLAN_NAMES
from tp_overlap_kernels.dispatch.select import why_not
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.ops import execute

CYCLES_A_MS = 1_800_000  # of torch.cuda._sleep, about


@dataclasses.dataclass(frozen=True)
class Machine:
    """Where ranks run. More ranks than GPUs share them, without NCCL."""

    world_size: int
    kind: str  # "cuda" or "cpu"

    @classmethod
    def found(cls, world_size: int, device: str) -> Machine:
        kind = device if device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
        return cls(world_size, kind)

    def pool(self) -> RankPool:
        shared = self.kind == "cpu" or torch.cuda.device_count() < self.world_size
        return RankPool(self.world_size, "gloo" if shared else "cpu:gloo,cuda:nccl")


def take_device(rank: int, machine: Machine) -> torch.device:
    """This rank's device, current from now on."""
    if machine.kind == "cpu":
        return torch.device("cpu")
    devices = torch.cuda.device_count()
    if devices < machine.world_size:
        # Read by torch when symmetric memory is set up in this process, which was started for the purpose.
        os.environ["TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES"] = "1"
    device = torch.device("cuda", rank % devices)
    torch.cuda.set_device(device)
    count_in_f32()
    return device


@contextlib.contextmanager
def arena(rank: int, machine: Machine, max_M: int, max_N: int, timeout_s: float = 20.0) -> Iterator[arenas.Arena]:
    """A fresh arena of this capacity; CPU ranks interpret the kernels. No results inside need gradients."""
    take_device(rank, machine)
    tpo.close()
    tpo.init(max_M=max_M, max_N=max_N)
    made = arenas.get(group_name())
    made.timeout_s = timeout_s
    with tpo.cpu_backend("interp"), torch.inference_mode():
        gather(None)
        yield made


def gather(value: Any) -> list[Any]:
    """The value of every rank, on every rank."""
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def plans(op: str, M: int, N: int, K: int, dtype: torch.dtype, with_nccl: bool = False) -> list[str]:
    """The plans that can run a call here; equal on all ranks."""
    made = arenas.get(group_name())
    problem = Problem(op, M, N, K, str(dtype).split(".")[1], made.world_size)
    names = [name for name in PLAN_NAMES[op] if why_not(Plan(name), problem, execute.topology_of(made)) is None]
    return [name for name in names if with_nccl or "nccl" not in name]


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def be_late(device: torch.device, seconds: float) -> None:
    """The stream is, and on the CPU the caller."""
    if device.type == "cuda":
        torch.cuda._sleep(int(seconds * 1000 * CYCLES_A_MS))
    else:
        time.sleep(seconds)
