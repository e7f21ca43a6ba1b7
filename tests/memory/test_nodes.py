"""Groups on several nodes: who is where, what `init` makes of it, and what is left of it."""

from __future__ import annotations

import inspect
import os
from datetime import timedelta
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.dist import barrier
from tests.ops.calls import group_name, nodes_of
from tests.ops.faults import Outcome
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.memory import nodes as on_nodes
from tp_overlap_kernels.memory.nodes import Nodes, partition


@pytest.mark.parametrize(
    ("ids", "ranks"),
    [
        ("a", ((0,),)),
        ("aaaa", ((0, 1, 2, 3),)),
        ("aabb", ((0, 1), (2, 3))),
        ("bbaa", ((0, 1), (2, 3))),
        ("abab", ((0, 2), (1, 3))),
        ("abba", ((0, 3), (1, 2))),
        ("abc", ((0,), (1,), (2,))),
        ("aaaaaaaabbbbbbbb", (tuple(range(8)), tuple(range(8, 16)))),
    ],
)
def test_partition(ids, ranks):
    nodes = partition(list(ids))
    assert nodes.ranks == ranks
    for rank in range(len(ids)):
        node, place = nodes.find(rank)
        assert nodes.ranks[node][place] == rank and rank in nodes.places()[place]
    assert all(list(place) == sorted(place) for place in nodes.places())


@pytest.mark.parametrize(
    ("ids", "text"),
    [
        ("aab", r"equally many ranks on each, got \{'a': 2, 'b': 1\}"),
        ("a" * 9, r"1 to 8 ranks of a group on a node are supported, got 9\."),
        ("a" * 9 + "b" * 9, r"1 to 8 ranks of a group on a node are supported, got 9 on 2 nodes"),
    ],
)
def test_nodes_that_cannot_serve(ids, text):
    with pytest.raises(tpo.UnsupportedTopology, match=text):
        partition(list(ids))


def test_ranks_of_one_host_are_one_node(ranks):
    for info, span in ranks(2).run(look_around):
        assert (info.world_size, span) == (2, None)


def look_around(rank, world_size):
    tpo.close()
    info, span = tpo.init(max_M=16, max_N=16), arenas.get(group_name()).span
    tpo.close()
    return info, span


def test_a_node_takes_the_memory_of_its_ranks(ranks):
    for rank, (info, report, nodes, files) in enumerate(ranks(4).run(measure)):
        assert (info.rank, info.world_size, info.nodes, info.store) == (rank, 4, 2, "shm")
        assert info.bytes == report.total_bytes == tpo.bytes_needed(32, 64, world_size=2)
        assert nodes == Nodes(((0, 1), (2, 3)))
        assert files == 2, "of the two ranks of a node"


def measure(rank, world_size):
    tpo.close()
    with nodes_of(2):
        info = tpo.init(max_M=32, max_N=64)
    with open("/proc/self/maps") as lines:
        files = sum("memfd:tp_overlap_kernels" in line for line in lines)
    report, nodes = tpo.memory_report(), arenas.get(group_name()).span.nodes
    tpo.close()
    return info, report, nodes, files


def test_ranks_on_one_device_are_counted_over_all_nodes(ranks):
    """Of four ranks on two devices, no two of a node on one: a flat collective of NCCL's would refuse them."""
    assert ranks(4).run(share_devices) == [(2, 2)] * 4


def share_devices(rank, world_size):
    tpo.close()
    with nodes_of(2), mock.patch.object(arenas, "_device_id", lambda device: f"device {(rank + rank // 2) % 2}"):
        tpo.init(max_M=16, max_N=16)
    topology = arenas.get(group_name()).topology
    tpo.close()
    return topology.ranks_per_device, topology.inside.ranks_per_device


def test_arenas_that_follow_each_other_share_their_groups(ranks):
    """Larger arenas, others after close, and one that stays; a failed one leaves its groups."""
    for stays, same, fresh, on_one_node, total in ranks(4).run(come_and_go):
        assert stays and same and fresh and on_one_node
        assert total == 10.0


def come_and_go(rank, world_size):
    tpo.close()
    acrosses = []

    def init(M):
        tpo.init(max_M=M, max_N=16)
        arena = arenas.get(group_name())
        acrosses.append(arena.span.across if arena.span else None)
        return arena

    with nodes_of(2):
        first = init(16)
        stays = init(8) is first
        init(32)
        tpo.close()
        init(16)
        for closes in (True, False):
            if rank == 3:
                arenas.get(group_name()).record.abort()
            barrier()
            if closes:
                tpo.close()
            init(16)
        x = torch.full((5,), float(rank + 1), dtype=torch.bfloat16)
        total = torch.ops.tp_overlap.all_reduce(x, group_name())
    on_one_node = tpo.init(max_M=1, max_N=1).world_size == 4 and arenas.get(group_name()).span is None
    tpo.close()
    same = all(across is acrosses[0] for across in acrosses[:4])
    fresh = len({id(across) for across in acrosses[3:6]}) == 3
    return stays, same, fresh, on_one_node, float(total[0])


def test_a_part_of_the_world_may_span_nodes(ranks):
    """Ranks 0, 1 and 3, on nodes of one rank each; rank 2 takes no part, and groups of the world can still be made."""
    for rank, (outcome, afterwards) in enumerate(ranks(4).run(init_a_part)):
        if rank != 2:
            assert outcome.error == "" and outcome.out.tolist() == [7.0] * 3, outcome.text
        assert afterwards == 10.0


def init_a_part(rank, world_size):
    group = dist.new_group([0, 1, 3])

    def run():
        with nodes_of(1):
            tpo.init(group, max_M=16, max_N=16)
        x = torch.full((3,), float(rank + 1), dtype=torch.bfloat16)
        out = torch.ops.tp_overlap.all_reduce(x, group.group_name)
        tpo.close(group)
        return out

    outcome = Outcome.of(run) if rank != 2 else None
    afterwards = torch.tensor([rank + 1.0])
    dist.all_reduce(afterwards, group=dist.new_group(timeout=timedelta(seconds=10)))
    return outcome, float(afterwards)


def test_groups_that_torch_would_name_differently_are_refused(ranks):
    for rank, outcome in enumerate(ranks(4).run(join_another_first)):
        if rank != 2:
            assert outcome.error == "UnsupportedTopology" and "members of equally many process groups" in outcome.text


def join_another_first(rank, world_size):
    other, group = dist.new_group([0, 2]), dist.new_group([0, 1, 3])
    try:
        with nodes_of(1):
            return Outcome.of(lambda: tpo.init(group, max_M=16, max_N=16)) if rank != 2 else Outcome("", "", 0.0)
    finally:
        for joined, members in ((group, (0, 1, 3)), (other, (0, 2))):
            if rank in members:
                dist.destroy_process_group(joined)


def test_what_one_node_cannot_have_is_raised_on_all(ranks):
    for rank, (first, left, second) in enumerate(ranks(4).run(refuse_memory)):
        assert first.error == "UnsupportedTopology" and "cannot make" in first.text, rank
        assert "init: on rank 2: " in first.text or rank >= 2
        assert not left, "the node that had its arena has given it back"
        assert second.error == "" and second.out.world_size == 4


def refuse_memory(rank, world_size):
    tpo.close()
    refused = mock.patch.object(os, "memfd_create", side_effect=OSError(12, "Cannot allocate memory"))
    with nodes_of(2):
        if rank == 3:
            with refused:
                first = Outcome.of(lambda: tpo.init(max_M=16, max_N=16))
        else:
            first = Outcome.of(lambda: tpo.init(max_M=16, max_N=16))
        with open("/proc/self/maps") as lines:
            left = [line for line in lines if "memfd:tp_overlap" in line]
        second = Outcome.of(lambda: tpo.init(max_M=16, max_N=16))
        tpo.close()
    return first, left, second


def test_the_setting_makes_nodes_of_ranks(ranks):
    """TP_OVERLAP_RANKS_PER_NODE, read as every other setting."""
    assert ranks(4).run(name_nodes) == [[0, 0], [0, 1], [1, 2], [1, 3]]


def name_nodes(rank, world_size):
    from tp_overlap_kernels.config import settings

    found = []
    for ranks_per_node in ("2", "1"):
        with mock.patch.dict(os.environ, TP_OVERLAP_RANKS_PER_NODE=ranks_per_node):
            settings.cache_clear()
            found.append(int(on_nodes.node_id().rpartition("/")[2]))
    settings.cache_clear()
    return found


@pytest.mark.skipif(
    "sort_ranks" not in inspect.signature(dist.new_group).parameters, reason="needs a torch that can make such groups"
)
def test_ranks_in_another_order_are_refused(ranks):
    """torch would sort them in the groups to either side."""
    for outcome in ranks(2).run(init_backwards):
        assert outcome.error == "UnsupportedTopology" and "must be in ascending order, got [1, 0]" in outcome.text


def init_backwards(rank, world_size):
    group = dist.new_group([1, 0], sort_ranks=False)
    with nodes_of(1):
        return Outcome.of(lambda: tpo.init(group, max_M=16, max_N=16))
