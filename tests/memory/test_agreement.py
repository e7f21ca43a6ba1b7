"""Steps that ranks take together: everyone has everyone's value, or the same error."""

from __future__ import annotations

import pytest
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tp_overlap_kernels.memory.agreement import exchange


def test_values_come_by_rank(ranks):
    assert ranks(3).run(say_rank) == [[0, 10, 20]] * 3


def say_rank(rank, world_size):
    return exchange(dist.group.WORLD, lambda: 10 * rank)


@pytest.mark.parametrize("guilty", [(1,), (0, 2)], ids=str)
def test_an_error_of_one_is_raised_on_all(ranks, guilty):
    for rank, (kind, text, next_time) in enumerate(ranks(3).run(refuse, guilty)):
        if rank in guilty:
            assert (kind, text) == ("UnsupportedTopology", f"init: rank {rank} cannot")
        else:
            assert (kind, text) == (
                "UnsupportedTopology",
                f"init: on rank {guilty[0]}: rank {guilty[0]} cannot",
            )
        assert next_time == [0, 10, 20], "the ranks are in step"


def refuse(rank, world_size, guilty):
    def step():
        if rank in guilty:
            raise tpo.UnsupportedTopology(f"init: rank {rank} cannot")

    with pytest.raises(tpo.TpOverlapError) as raised:
        exchange(dist.group.WORLD, step)
    return type(raised.value).__name__, str(raised.value), say_rank(rank, world_size)


def test_an_error_of_another_library_says_which(ranks):
    (own, _), (other, text) = ranks(2).run(run_out_of_memory)
    assert own == "MemoryError" and other == "TpOverlapError" and text == "init: rank 0 raised MemoryError: no more"


def run_out_of_memory(rank, world_size):
    def step():
        if rank == 0:
            raise MemoryError("no more")

    with pytest.raises((tpo.TpOverlapError, MemoryError)) as raised:
        exchange(dist.group.WORLD, step)
    return type(raised.value).__name__, str(raised.value)


def test_one_rank_asks_nobody():
    assert exchange(None, lambda: 7) == [7]
