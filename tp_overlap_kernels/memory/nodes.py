"""How the ranks of a group lie on nodes: which of them can map each other's memory, and the groups to either side.

Ranks of one host share memory, ranks of different hosts do not. A group on several hosts has two levels: the ranks of
each node, who share an arena, and for every place within a node the ranks that have it, one of each node, between which
torch.distributed carries what the nodes have summed.
"""

import socket
import weakref
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed import distributed_c10d

from ..config import settings
from ..errors import UnsupportedTopology
from .layout import MAX_WORLD_SIZE


@dataclass(frozen=True)
class Nodes:
    """ranks: of the group, by node and by place within the node, ascending in each; as many in one as in another."""

    ranks: tuple[tuple[int, ...], ...]

    @property
    def ranks_per_node(self) -> int:
        return len(self.ranks[0])

    def find(self, rank: int) -> tuple[int, int]:
        """(node, place within it) of a rank of the group."""
        return next((node, ranks.index(rank)) for node, ranks in enumerate(self.ranks) if rank in ranks)

    def places(self) -> list[tuple[int, ...]]:
        """The ranks of each place within a node, ascending: nodes need not come in the same order in each."""
        return [tuple(sorted(ranks)) for ranks in zip(*self.ranks, strict=True)]


@dataclass(frozen=True)
class Subgroups:
    """What a rank of a spanning group has of its own. inside: the ranks of its node; across: those of its place."""

    nodes: Nodes
    inside: dist.ProcessGroup
    across: dist.ProcessGroup


def node_id() -> str:
    """What names the node of this process: its host, and a part of that where TP_OVERLAP_RANKS_PER_NODE makes some."""
    part = settings().ranks_per_node
    if not part or not dist.is_initialized():
        return socket.gethostname()
    return f"{socket.gethostname()}/{dist.get_rank() // part}"


def partition(ids: list[str]) -> Nodes:
    """The nodes of a group. ids: `node_id` of each rank. Pure; nodes come in the order of their first ranks.

    Errors: UnsupportedTopology where a node has more ranks than an arena serves, or nodes differ in their numbers.
    """
    ranks = {node: tuple(rank for rank, at in enumerate(ids) if at == node) for node in dict.fromkeys(ids)}
    sizes = {node: len(of_node) for node, of_node in ranks.items()}
    if max(sizes.values()) > MAX_WORLD_SIZE:
        where = f" on {len(sizes)} nodes" if len(sizes) > 1 else ""
        raise UnsupportedTopology(
            f"init: 1 to {MAX_WORLD_SIZE} ranks of a group on a node are supported, got {max(sizes.values())}{where}. "
            "Make smaller groups."
        )
    if len(set(sizes.values())) > 1:
        raise UnsupportedTopology(
            f"init: a group that spans nodes must have equally many ranks on each, got {sizes}. Make a group of equal "
            "parts, or one of the ranks of each node."
        )
    return Nodes(tuple(ranks.values()))


def groups_of_this_process() -> int:
    """How many process groups torch knows here."""
    return len(distributed_c10d._world.pg_names) if dist.is_initialized() else 0


def check_names(groups: list[int]) -> None:
    """Torch names a group that only its members make by how many they know; under two names it would wait in vain.

    groups: `groups_of_this_process` of each rank. Errors: UnsupportedTopology where they differ.
    """
    if len(set(groups)) > 1:
        raise UnsupportedTopology(
            "init: the ranks of a group that spans nodes and is a part of the world must be members of equally many "
            f"process groups, got {groups} (by rank). Call init before groups are made that only some of them join."
        )


# Kept from one arena of a group to the next: torch makes each subgroup once more under the same name, and under that
# would find what the last one has left in its store.
_made: "weakref.WeakKeyDictionary[dist.ProcessGroup, Subgroups]" = weakref.WeakKeyDictionary()


def known(group: dist.ProcessGroup | None, nodes: Nodes) -> bool:
    """Whether this process has subgroups of the group, in which nothing has failed."""
    found = _made.get(group) if group is not None else None
    return found is not None and found.nodes == nodes


def forget(group: dist.ProcessGroup) -> None:
    """After a failure: a peer may still be in a collective of the subgroups, and the next of ours must not meet it."""
    _made.pop(group, None)


def subgroups(group: dist.ProcessGroup, nodes: Nodes, again: bool) -> Subgroups:
    """This rank's subgroups. Collective over the group; over all of torch.distributed where the group is the world.

    again: take those that there are; equal on all ranks.
    They have the group's backends and its timeout, and live as long as the group. Ranks are in them as in the group.
    Errors: UnsupportedTopology for a group whose ranks are not in the order of torch.distributed's.
    """
    if again:
        return _made[group]
    global_ranks = dist.get_process_group_ranks(group)
    if global_ranks != sorted(global_ranks):
        raise UnsupportedTopology(
            f"init: the ranks of a group that spans nodes must be in ascending order, got {global_ranks}. "
            "Make the group with sort_ranks=True."
        )
    rank = dist.get_rank(group)
    node, place = nodes.find(rank)
    inside = _new_group_of(group, global_ranks, list(nodes.ranks), node)
    across = _new_group_of(group, global_ranks, nodes.places(), place)
    made = _made[group] = Subgroups(nodes, inside, across)
    return made


def _new_group_of(
    group: dist.ProcessGroup, global_ranks: list[int], parts: list[tuple[int, ...]], own: int
) -> dist.ProcessGroup:
    """The group of our part. Ranks outside of `group` take no part, so theirs are made by their own members alone."""
    is_world = len(global_ranks) == dist.get_world_size()
    made = None
    for part, ranks in enumerate(parts):
        if part == own or is_world:
            new = dist.new_group(
                [global_ranks[rank] for rank in ranks],
                timeout=_timeout_of(group),
                backend=distributed_c10d.get_backend_config(group),
                use_local_synchronization=not is_world,
            )
            made = new if part == own else made
    assert made is not None
    return made


def _timeout_of(group: dist.ProcessGroup) -> timedelta | None:
    """How long a collective of the group may take; None is torch's default."""
    options = getattr(group._get_backend(group._device_types[0]), "options", None)
    return getattr(options, "_timeout", None)
