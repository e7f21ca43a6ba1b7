"""Inputs that every rank can make again for every other rank, so that each can compute the whole truth by itself.

Values come from a seed of layer, rank and tensor. A device's generator gives equal values on equal devices; ranks on
unlike devices would not agree, and the check would say so.
"""

from __future__ import annotations

import zlib

import torch

from .cases import Layer
from .launch import World

MIN_WEIGHT_COPIES = 3
MAX_WEIGHT_COPIES = 64
L2_MULTIPLE = 3  # the copies together are this many times the L2 cache: no call finds its weight there


def weight_copies(weight_bytes: int, l2_bytes: int, free_bytes: int) -> int:
    """Copies of a weight to rotate, so that each call reads it from memory as in a model. At most a quarter of what
    is free is spent on them, but never fewer than one copy."""
    wanted = min(MAX_WEIGHT_COPIES, max(MIN_WEIGHT_COPIES, -(-L2_MULTIPLE * l2_bytes // weight_bytes)))
    return max(1, min(wanted, free_bytes // 4 // weight_bytes))


class LayerInputs:
    """a[M_max, K_local] and the rotated weights w[N, K_local] of this rank, and on demand those of the others.

    Calls with a smaller M use the first rows of a. The first weight is the one that results are checked with.
    """

    def __init__(self, layer: Layer, M_max: int, dtype: torch.dtype, world: World, seed: int) -> None:
        self.layer, self.M_max, self.dtype, self.world, self.seed = layer, M_max, dtype, world, seed
        self.a = self.activation(world.rank)
        self.weights = [self.weight(world.rank, 0)]
        self.weights += [self.weight(world.rank, copy) for copy in range(1, self._copies())]

    def activation(self, rank: int) -> torch.Tensor:
        """a[M_max, K_local] of a rank, as that rank has it: contiguous, made anew at each call."""
        return self._normal((self.M_max, self.layer.K_local), f"{rank} a")

    def weight(self, rank: int, copy: int) -> torch.Tensor:
        weight = self._normal((self.layer.N, self.layer.K_local), f"{rank} w {copy}")
        return weight.mul_(self.layer.K_local**-0.5)  # products of order 1

    def _normal(self, shape: tuple[int, int], what: str) -> torch.Tensor:
        generator = torch.Generator(self.world.device)
        generator.manual_seed(zlib.crc32(f"{self.seed} {self.layer} {what}".encode()))
        return torch.randn(shape, dtype=self.dtype, device=self.world.device, generator=generator)

    def _copies(self) -> int:
        weight = self.weights[0]
        if self.world.device.type != "cuda":
            return MIN_WEIGHT_COPIES
        l2_bytes = torch.cuda.get_device_properties(self.world.device).L2_cache_size
        free_bytes, _ = torch.cuda.mem_get_info(self.world.device)
        copies = weight_copies(weight.numel() * weight.element_size(), l2_bytes, free_bytes)
        return min(self.world.gather(copies))


class MessageInputs(LayerInputs):
    """x[M_max, N] of an all-reduce alone: `a` is x itself, and there is no weight."""

    def __init__(self, layer: Layer, M_max: int, dtype: torch.dtype, world: World, seed: int) -> None:
        self.layer, self.M_max, self.dtype, self.world, self.seed = layer, M_max, dtype, world, seed
        self.a = self.activation(world.rank)
        self.weights = []

    def activation(self, rank: int) -> torch.Tensor:
        return self._normal((self.M_max, self.layer.N), f"{rank} x")
