"""Which store serves whom, and what a store gives."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.dist import barrier
from tp_overlap_kernels.memory import store as stores

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(
    "named, device, world_size, picked",
    [
        ("auto", CPU, 1, "local"),
        ("auto", CPU, 2, "shm"),
        ("auto", CUDA, 1, "local"),
        ("auto", CUDA, 8, "symm_mem"),
        ("shm", CPU, 4, "shm"),
        ("symm_mem", CUDA, 2, "symm_mem"),
        ("nvshmem", CUDA, 2, "nvshmem"),
        ("shm", CPU, 1, "local"),
        ("symm_mem", CUDA, 1, "local"),
        ("nvshmem", CUDA, 1, "local"),
        ("local", CPU, 1, "local"),
    ],
)
def test_the_store_that_serves(named, device, world_size, picked):
    assert stores.pick(named, device, world_size) == picked


@pytest.mark.parametrize(
    "named, device, world_size, instead",
    [
        ("symm_mem", CPU, 2, "shm"),
        ("nvshmem", CPU, 2, "shm"),
        ("nvshmem", CPU, 1, "local"),
        ("local", CPU, 2, "shm"),
        ("shm", CUDA, 2, "symm_mem"),
        ("symm_mem", CPU, 1, "local"),
    ],
)
def test_a_store_that_cannot_serve_is_refused_and_another_named(named, device, world_size, instead):
    with pytest.raises(tpo.UnsupportedTopology, match=f"init: store '{named}' cannot .* on {device.type}.*'{instead}'"):
        stores.pick(named, device, world_size)


def test_an_unknown_store_is_told_the_names():
    with pytest.raises(tpo.UnsupportedTopology, match=r"unknown store 'cuda'.* auto, symm_mem, nvshmem, shm"):
        stores.pick("cuda", CUDA, 2)


def test_local_memory():
    store = stores.create("local", 4096, CPU, None)
    assert store.buffer.numel() == 4096 and store.bases == [store.buffer.data_ptr()]
    assert store.peer_buffer(0) is store.buffer and not store.buffer.any()
    store.close()
    assert store.buffer.numel() == 0


def test_shared_memory(ranks):
    for left in ranks(3).run(share):
        assert left == []


def share(rank, world_size):
    tpo.close()  # what an earlier test may have left
    store = stores.create("shm", 5000, CPU, dist.group.WORLD)
    assert store.buffer.numel() == 5000 and not store.buffer.any(), "pages come zeroed"
    assert len(set(store.bases)) == world_size and store.bases[rank] == store.buffer.data_ptr()
    barrier()
    for peer in range(world_size):
        store.peer_buffer(peer)[rank] = 10 + rank
    barrier()
    assert store.buffer[:world_size].tolist() == [10 + source for source in range(world_size)]
    barrier()
    store.close()
    with open("/proc/self/maps") as lines:
        return [line for line in lines if "memfd:tp_overlap_kernels" in line]


def test_memory_that_cannot_be_opened_names_the_rank(monkeypatch):
    store = object.__new__(stores.SharedMemoryStore)
    with pytest.raises(
        tpo.UnsupportedTopology, match=r"shared memory of rank 1 \(/proc/0/fd/3\).*one host, in one PID"
    ):
        store._map(0, 3, 4096, 1)
