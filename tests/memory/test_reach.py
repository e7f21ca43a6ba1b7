"""Reach is seen with data: a pair that does not reach each other is named on every rank."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tp_overlap_kernels.memory import reach
from tp_overlap_kernels.memory import store as stores

CPU, OFFSET = torch.device("cpu"), 512


def into_nowhere(rank):
    """Rank 0's stores to rank 2 are lost."""
    return {2: torch.zeros(4096, dtype=torch.uint8)} if rank == 0 else {}


def mixed_up(rank):
    """What rank 1 takes for the memory of rank 0 is that of rank 2."""
    return {0: 2} if rank == 1 else {}


@pytest.mark.parametrize(
    "fault, lost",
    [
        (into_nowhere, ["rank 0 -> rank 2 (nothing came)"]),
        (mixed_up, ["rank 1 -> rank 0 (nothing came)"]),
        (None, []),
    ],
    ids=["stores are lost", "another rank's memory", "well"],
)
def test_a_pair_that_does_not_reach_is_named(ranks, fault, lost):
    for text, clean in ranks(3).run(look, fault and fault.__name__):
        assert [pair for pair in lost if pair not in text] == [], text
        assert bool(text) == bool(lost) and (not lost or "one PID namespace" in text)
        assert clean, "the words are left"


def look(rank, world_size, fault):
    store = stores.create("shm", 4096, CPU, dist.group.WORLD)
    wrong = globals()[fault](rank) if fault else {}

    def seen(peer):
        other = wrong.get(peer, peer)
        return other if isinstance(other, torch.Tensor) else stores.SharedMemoryStore.peer_buffer(store, other)

    try:
        with mock.patch.object(store, "peer_buffer", seen):
            reach.check_reach(store, OFFSET, CPU, dist.group.WORLD, {})
        text = ""
    except tpo.UnsupportedTopology as error:
        text = str(error)
    clean = not store.buffer.any()
    dist.barrier()
    store.close()
    return text, clean


def test_a_wrong_word_is_read():
    assert reach._describe(reach.tag(3, 5)) == "there is what rank 3 wrote to rank 5"
    assert reach._describe(-1) == "there is -0x1" and len({reach.tag(s, o) for s in range(8) for o in range(8)}) == 64
