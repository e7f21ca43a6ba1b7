"""What this process and its device can do. Looks, never probes what the machine has switched off."""

import collections

import torch

from .. import native
from ..errors import UnsupportedTopology


def device_of(store: str) -> torch.device:
    """The device whose tensors the group's ops take: the current CUDA device, unless there is none or the store is shm.

    A gloo group with CUDA present still means CUDA: several ranks may share a device, which NCCL refuses.
    """
    if store == "shm":
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")


def check_device(device: torch.device, world_size: int) -> None:
    """Refuse a GPU that lacks instructions of the kernels: they are of compute capability 9.0.

    And one of AMD, whose numbers of that kind mean something else (an MI300 says 9.4).
    """
    if device.type != "cuda" or world_size == 1:
        return
    if torch.version.hip:
        raise UnsupportedTopology(
            f"init: {torch.cuda.get_device_name(device)} is an AMD GPU (torch is built for ROCm {torch.version.hip}). "
            "The kernels compile for gfx942 and have never run there (docs/support.md). Use RCCL here."
        )
    if torch.cuda.get_device_capability(device) < (9, 0):
        raise UnsupportedTopology(
            f"init: {torch.cuda.get_device_name(device)} has compute capability "
            f"{torch.cuda.get_device_capability(device)}, and the kernels need (9, 0) or above. Use NCCL here."
        )


def native_library(device: torch.device) -> bool:
    """Whether the CUDA kernels of csrc serve this device (sm_90 machine code)."""
    return device.type == "cuda" and native.available() and torch.cuda.get_device_capability(device) == (9, 0)


def ranks_on_same_device(cards: list[dict]) -> int:
    """How many ranks share the busiest device, by UUID: an index means nothing under CUDA_VISIBLE_DEVICES."""
    return max(collections.Counter(card["device_id"] for card in cards).values())
