"""The rank pool itself: a harness that hides a failure is worse than none."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from tests.dist import RankDied, RankFailed, RankPool, RankTimeout, barrier


def all_reduced(rank, world_size, start):
    x = torch.full((3,), float(start + rank))
    dist.all_reduce(x)
    barrier()
    return x


def process_id(rank, world_size):
    return os.getpid()


def fails_on(rank, world_size, bad_rank, how):
    if rank == bad_rank and how == "raise":
        raise ValueError("wrong on purpose")
    if rank == bad_rank and how == "exit":
        os._exit(3)
    if how == "hang" or rank == bad_rank:
        time.sleep(30)
    dist.barrier()


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_results_come_by_rank_and_the_group_works(ranks, world_size):
    results = ranks(world_size).run(all_reduced, 10)
    total = sum(10 + r for r in range(world_size))
    assert [r.tolist() for r in results] == [[total] * 3] * world_size


def test_processes_stay_for_the_next_case(ranks):
    first = ranks(2).run(process_id)
    assert len(set(first)) == 2
    assert ranks(2).run("tests.test_dist:process_id") == first


@pytest.mark.parametrize(
    "how, error, text",
    [
        ("raise", RankFailed, "ValueError: wrong on purpose"),
        ("exit", RankDied, "rank 1: the process ended, exit code 3"),
        ("hang", RankTimeout, "in fails_on"),
    ],
)
def test_a_bad_rank_fails_the_call_and_not_the_next(ranks, how, error, text):
    pool = ranks(2)
    before = pool.run(process_id)
    started = time.monotonic()
    with pytest.raises(error, match="rank 1") as caught:
        pool.run(fails_on, 1, how, timeout=2)
    assert text in str(caught.value)
    assert time.monotonic() - started < 5
    assert not set(before) & set(pool.run(process_id))  # new processes
    assert pool.run(all_reduced, 0)[0].tolist() == [1.0] * 3


def test_an_unpicklable_result_is_named():
    pool = RankPool(1)
    try:
        with pytest.raises(RankFailed, match="returns_a_function"):
            pool.run(returns_a_function)
    finally:
        pool.close()


def returns_a_function(rank, world_size):
    return lambda: rank
