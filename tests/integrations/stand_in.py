"""What the stand-ins of both engines share. They let adapters run where the engine itself is not installed.

A stand-in does what the engine's sources say of the few names that an adapter uses, in a few lines of ours; it shows
that an adapter does right by those sources, not that the sources are what they were. `make engines` asks the engine.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.nn import functional as F


class Group:
    """GroupCoordinator of either engine. sums: how often this rank has asked it for one."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.device_group = group
        self.world_size, self.rank_in_group = dist.get_world_size(group), dist.get_rank(group)
        self.sums = 0

    def all_reduce(self, partial: torch.Tensor) -> torch.Tensor:
        if self.world_size == 1:
            return partial
        self.sums += 1
        total = partial.detach().clone()
        dist.all_reduce(total, group=self.device_group)
        return total


class UnquantizedLinearMethod:
    """Makes and applies the plain weight [N, K] of a rank."""

    def create_weights(self, layer: nn.Module, N: int, K: int, dtype: torch.dtype) -> None:
        layer.register_parameter("weight", nn.Parameter(torch.empty(N, K, dtype=dtype), requires_grad=False))

    def apply(self, layer: Any, x: Any, bias: torch.Tensor | None = None) -> torch.Tensor:
        x = x.values if isinstance(x, QuantizedActivation) else x
        weight = layer.packed if hasattr(layer, "packed") else layer.weight
        return F.linear(x, weight, bias)


class Int8LinearMethod(UnquantizedLinearMethod):
    """Any other method: here the weight is of int8."""

    def create_weights(self, layer: nn.Module, N: int, K: int, dtype: torch.dtype) -> None:
        super().create_weights(layer, N, K, torch.int8)

    def apply(self, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        return F.linear(x, layer.weight.to(x.dtype), bias)


class QuantizedActivation:
    """What vLLM's fused activations hand to a layer in place of a tensor."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values = values


def pack(layer: Any) -> None:
    """As engines do for some CPUs and GPUs: the weight goes where only the engine finds it, and an empty one stays."""
    if not hasattr(layer, "packed"):
        layer.packed = layer.weight.data
        layer.weight = nn.Parameter(torch.empty(0, dtype=layer.packed.dtype), requires_grad=False)


def transpose_in_memory(layer: Any) -> None:
    if not hasattr(layer, "packed"):
        layer.weight.data = layer.weight.data.t().contiguous().t()


def remove(layer: Any) -> None:
    pack(layer)
    del layer.weight


@contextlib.contextmanager
def installed(modules: dict[str, dict[str, Any]]) -> Iterator[None]:
    """Modules of these names, and packages above them, are importable meanwhile: {name: {attribute: value}}."""
    made: dict[str, types.ModuleType] = {}
    for name in modules:
        parts = name.split(".")
        for end in range(1, len(parts) + 1):
            path = ".".join(parts[:end])
            if path not in made:
                made[path] = types.ModuleType(path)
                made[path].__path__ = []  # a package: imports below it are looked up in sys.modules
                if end > 1:
                    setattr(made[path.rpartition(".")[0]], parts[end - 1], made[path])
    for name, attributes in modules.items():
        vars(made[name]).update(attributes)
    before = {name: sys.modules.get(name) for name in made}
    sys.modules.update(made)
    try:
        yield
    finally:
        for name, module in before.items():
            if module is None:
                sys.modules.pop(name, None)
            else:
                sys.modules[name] = module
