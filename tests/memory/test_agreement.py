"""Steps that ranks take together: everyone has everyone's value, or the same error."""

from __future__ import annotations

import time
import uuid

import pytest
import torch.distributed as dist
from torch.distributed import distributed_c10d

import tp_overlap_kernels as tpo
from tests.dist import barrier
from tp_overlap_kernels.memory.agreement import exchange, raised_on_all, unanimous


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


def test_what_every_rank_meets():
    assert raised_on_all(tpo.UnsupportedTopology("")) and raised_on_all(MemoryError())
    assert not raised_on_all(tpo.PeerDied("")) and not raised_on_all(tpo.PeerTimeout(""))
    assert not raised_on_all(KeyboardInterrupt())


# --- unanimous


@pytest.mark.parametrize(
    "says, answer",
    [("yyy", True), ("yny", False), ("nnn", False), ("yy-", False), ("-yy", False)],
    ids=["all yes", "one no", "all no", "the last never comes", "the first never comes"],
)
def test_all_get_one_answer(ranks, says, answer):
    """A rank of "-" comes when the others have given up, and says yes then."""
    for rank, (agreed, seconds) in enumerate(ranks(3).run(vote, says)):
        assert agreed is answer
        if says[rank] == "n" or says == "yyy":
            assert seconds < 0.5, "it waits"


def vote(rank, world_size, says):
    words = distributed_c10d._get_process_group_store(dist.group.WORLD)
    name = [f"test/{uuid.uuid4()}"]  # a name serves one question
    dist.broadcast_object_list(name, src=0)
    late = says[rank] == "-"
    if late:
        barrier()
    began = time.monotonic()
    agreed = unanimous(words, name[0], world_size, says[rank] != "n", 0.2)
    seconds = time.monotonic() - began
    if not late and "-" in says:
        barrier()
    return agreed, seconds


def test_a_store_that_is_gone_says_no():
    class Gone:
        def add(self, *arguments):
            raise RuntimeError("Connection reset by peer")

        compare_set = wait = add

    assert unanimous(Gone(), "question", 2, True, 1.0) is False
    assert unanimous(Gone(), "question", 2, False, 1.0) is False
