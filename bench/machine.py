"""What this machine can run when the user said nothing, and a sentence about it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from . import launch
from .cases import CPU_M_GRID, GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, M_GRID
from .launch import Topology

ONE_GPU_M_GRID = (1, 64, 1024)


@dataclass(frozen=True)
class Defaults:
    """What `run` does where no option says otherwise."""

    topology: Topology
    preset: str
    grid: tuple[int, ...]
    mode: str
    ops: tuple[str, ...]
    say: str


def defaults(device: str, ranks: int | None, ranks_per_device: int) -> Defaults:
    """What to run on this machine. device: "auto", "cuda" or "cpu"; ranks None takes two, or all of torchrun's.

    Errors: ValueError where the machine has not what was asked for.
    """
    if launch.under_torchrun():
        ranks = launch.torchrun_world_size()
    gpus = torch.cuda.device_count() if device != "cpu" and torch.cuda.is_available() else 0
    if device == "cuda" and gpus == 0:
        raise ValueError("--device cuda: torch sees no GPU here")
    ops = (GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER)
    if gpus == 0:
        say = "No GPU: CPU ranks. Times say nothing about GPUs; every result is checked."
        return Defaults(Topology(ranks or 2, "cpu"), "cpu", CPU_M_GRID, "eager", ops, say)
    alone = ranks is None and (gpus == 1 or not _reachable(gpus))
    world_size = ranks or (ranks_per_device if alone else 2 * ranks_per_device)
    if world_size > gpus * ranks_per_device and not launch.under_torchrun():
        raise ValueError(
            f"{world_size} ranks need {-(-world_size // ranks_per_device)} GPUs, torch sees {gpus}. "
            f"Give fewer --ranks, or --ranks-per-device {-(-world_size // gpus)}."
        )
    topology = Topology(world_size, "cuda", ranks_per_device)
    if alone:
        what = "one GPU" if gpus == 1 else f"{gpus} GPUs that cannot reach each other"
        say = (
            f"{what}: one rank checks and times the GEMM and the ops with nobody to send to. "
            "--ranks 2 --ranks-per-device 2 puts two ranks on one GPU (right results, times without meaning)."
        )
        return Defaults(topology, "h200_baseline", ONE_GPU_M_GRID, "graph", ops, say)
    shared = f", {ranks_per_device} on each GPU: times say little" if ranks_per_device > 1 else ""
    grid = M_GRID if ranks_per_device == 1 else ONE_GPU_M_GRID
    return Defaults(topology, "h200_baseline", grid, "graph", ops, f"{world_size} GPU ranks{shared}.")


def _reachable(gpus: int) -> bool:
    return all(torch.cuda.can_device_access_peer(0, other) for other in range(1, gpus))


def device_name(topology: Topology) -> str:
    return torch.cuda.get_device_name() if topology.device_type == "cuda" else "cpu"
