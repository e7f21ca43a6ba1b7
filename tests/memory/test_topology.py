"""GPUs that the kernels are not made for are refused in a sentence, before anything is allocated."""

from __future__ import annotations

import pytest
import torch

from tp_overlap_kernels.errors import UnsupportedTopology
from tp_overlap_kernels.memory.topology import check_device

GPU = torch.device("cuda", 0)


def pretend(monkeypatch, name: str, capability: tuple[int, int], hip: str | None) -> None:
    monkeypatch.setattr(torch.version, "hip", hip)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)


@pytest.mark.parametrize(
    "name, capability, hip, text",
    [
        ("AMD Instinct MI300X", (9, 4), "7.1", r"MI300X is an AMD GPU .*ROCm 7\.1.*never run there.*Use RCCL"),
        ("NVIDIA A100", (8, 0), None, r"A100 has compute capability \(8, 0\).*need \(9, 0\).*Use NCCL"),
    ],
)
def test_it_is_refused(monkeypatch, name, capability, hip, text):
    pretend(monkeypatch, name, capability, hip)
    with pytest.raises(UnsupportedTopology, match=text):
        check_device(GPU, world_size=2)
    check_device(GPU, world_size=1)  # no kernel of ours is needed


def test_it_is_taken(monkeypatch):
    pretend(monkeypatch, "NVIDIA H200", (9, 0), None)
    check_device(GPU, world_size=2)
    monkeypatch.setattr(torch.version, "hip", "7.1")
    check_device(torch.device("cpu"), world_size=2)
