"""A rank's world for the benchmark of models, and the tiny model over it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
import torch.distributed as dist

from tests.integrations.loaded import quiet
from tp_overlap_kernels.bench.launch import Topology, World
from tp_overlap_kernels.bench.models.arms import Arms
from tp_overlap_kernels.bench.models.configs import ModelSizes, sizes_of
from tp_overlap_kernels.bench.models.sharded import sharded

DTYPE = torch.bfloat16


def world(rank: int, world_size: int) -> World:
    """As launch.py makes it, over the process group that the pool's ranks have."""
    group = dist.group.WORLD
    assert group is not None
    return World(rank, Topology(world_size, "cpu"), torch.device("cpu"), group.group_name, group)


@contextlib.contextmanager
def arms(here: World, sizes: ModelSizes | None = None) -> Iterator[Arms]:
    """The arms of a model, `tiny` unless said otherwise; afterwards the arena is given back."""
    quiet()
    model, mesh = sharded(sizes or sizes_of("tiny"), here, DTYPE)
    made = Arms(model, mesh, max_tokens=64)
    try:
        with torch.inference_mode():
            yield made
    finally:
        made.close()
