"""Groups made and closed again and again leave no descriptor, no mapping, no thread and no byte behind.

`make cycles` does it 10,000 times, as long as CI has no time for.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.dist import RankPool, barrier
from tests.ops.calls import group_name

FIRST = 40  # cycles after which what torch and Python keep is there
DRIFT_KIB = 2048  # of resident memory, whatever the count: an arena of this size has 4 MiB
# torch keeps 0.13 KiB of every all_gather_object over gloo (20,000 of them alone: 2.7 MiB), and init makes eight.
TORCH_KIB_A_CYCLE = 1.1


@pytest.fixture
def count(request):
    return request.config.getoption("--cycles")


def standing() -> dict[str, int]:
    """What a process holds: descriptors, mappings, threads, resident KiB, live tensors."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # glibc keeps an arena's worth or not, by what the tests before have freed
    with open("/proc/self/maps") as maps, open("/proc/self/status") as status:
        # what an allocator maps for itself comes and goes: named mappings only
        named = sum(len(line.split()) > 5 for line in maps)
        resident = next(int(line.split()[1]) for line in status if line.startswith("VmRSS"))
    tensors = sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())
    return {
        "descriptors": len(os.listdir("/proc/self/fd")),
        "mappings": named,
        "threads": threading.active_count(),
        "tensors": tensors,
        "resident_kib": resident,
    }


def check(before: dict[str, int], after: dict[str, int], allowed_kib: float = DRIFT_KIB) -> None:
    drift = after.pop("resident_kib") - before.pop("resident_kib")
    assert before == after
    assert drift < allowed_kib, f"{drift} KiB more than {FIRST} cycles took"


def cycle(group: str) -> None:
    tpo.init(max_M=64, max_N=64)
    x = torch.ones(64, dtype=torch.bfloat16)
    for _ in range(2):  # planned, then known
        torch.ops.tp_overlap.all_reduce(x, group)
    tpo.close()


def test_one_rank_by_itself(count):
    for number in range(count + FIRST):
        if number == FIRST:
            before = standing()
        cycle("local")
    check(before, standing())


def test_two_ranks(count):
    pool = RankPool(2)
    try:
        for before, after in pool.run(make_and_close, count, timeout=60 + count):
            check(before, after, DRIFT_KIB + TORCH_KIB_A_CYCLE * count)
    finally:
        pool.close()


def make_and_close(rank: int, world_size: int, count: int):
    for number in range(count + FIRST):
        if number == FIRST:
            barrier()
            before = standing()
        cycle(group_name())
    barrier()
    return before, standing()
