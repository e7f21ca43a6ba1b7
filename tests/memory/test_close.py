"""close() returns when every rank has come to it: until then a peer may still read what would be freed."""

from __future__ import annotations

import time

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.dist import barrier
from tests.ops import calls as rank_side
from tests.ops.calls import Setup

LATE_S = 0.4


@pytest.mark.parametrize("late_rank", [0, 1, 2])
def test_close_waits_for_the_last_rank(ranks, late_rank):
    times = ranks(3).run(close_late, late_rank)
    last_began = max(began for began, _ in times)
    assert [ended for _, ended in times if ended < last_began] == [], times


def close_late(rank, world_size, late_rank):
    """When this rank called close() and when it came back, on the host's one clock; it reads a peer just before."""
    arena = rank_side.prepare_arena(Setup())
    barrier()
    if rank == late_rank:
        time.sleep(LATE_S)
        arena.view((rank + 1) % world_size, arena.layout.result, (64,), torch.bfloat16).sum()
    began = time.monotonic()
    tpo.close()
    return began, time.monotonic()
