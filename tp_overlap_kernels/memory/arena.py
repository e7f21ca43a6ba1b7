"""The arena: all symmetric memory and all state of one process group, shared by every layer and op.

Nothing here grows by itself: a call with M above max_M runs in row chunks. A larger arena is another `init`,
outside graph capture.
"""

import logging
import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist

from ..config import settings
from ..dispatch import Table, Topology, load
from ..errors import GroupFailed, InvalidInput, NotInitialised, PeerDied, UnsupportedTopology
from . import nodes as on_nodes
from . import store as stores
from .agreement import exchange, raised_on_all
from .board import Board
from .layout import Layout, layout
from .nodes import Nodes
from .reach import check_reach
from .record import Record, cause_of, ended
from .topology import check_device, device_of, native_library, ranks_on_same_device
from .turn import Turn
from .watch import Watch

log = logging.getLogger(__name__)

LOCAL_GROUP = "local"  # name of the group of one rank, where torch.distributed is not initialised
CONTROL_WORDS = 64
SENTINEL_WORD = -0x7FFF8000  # 0x80008000: two negative zeros, which no sender sends


@dataclass(frozen=True)
class Span:
    """What the arena of a group on several nodes has beside the memory of its own node.

    node: number of ours. inside: the arena of the ranks of this node, all the memory there is; its ranks are places
    within the node. across: the group of the ranks that have our place on their nodes. order: int64 [W] on the device,
    the ranks by place, and of a place as they are in `across`.
    """

    nodes: Nodes
    node: int
    inside: "Arena"
    across: dist.ProcessGroup
    order: torch.Tensor


@dataclass
class Arena:
    """One group's memory and state, as this rank sees it.

    On several nodes (`span`) memory, layout and record are those of this rank's node; rank and world_size those of the
    whole group.
    heap: int64 [3 W] on the device, the arena bases of all ranks (`heap_of`). control: int64 [64] on the device, local
    (words in lang.signal).
    """

    group_name: str
    group: dist.ProcessGroup | None
    rank: int
    world_size: int
    device: torch.device
    layout: Layout
    store: stores.Store
    heap: torch.Tensor
    control: torch.Tensor
    record: Record
    timeout_s: float
    topology: Topology
    table: Table | None
    turn: Turn
    watch: Watch | None = None
    programs: int = 3  # most programs of a grid: one an SM; a few threads where kernels are interpreted
    side_streams: list[Any] = field(default_factory=list)  # made at init: capture may not create them
    cache: dict[Any, Any] = field(default_factory=dict)  # plans and compiled kernels; dies with the arena
    prepared: dict[Any, Any] = field(default_factory=dict)  # calls checked and planned before (ops.prepared); likewise
    span: Span | None = None

    @property
    def timeout_ns(self) -> int:
        return int(self.timeout_s * 1e9)

    def check(self) -> None:
        """Raise if the group has failed; costs a look at one word of host memory."""
        if self.record.failed:
            self.fail()

    def fail(self) -> None:
        """Raise what the record says, or what the watch has seen."""
        raise self.error()

    def error(self, look: bool = True) -> GroupFailed:
        """Why the group has failed. look: also at the headers of the ranks."""
        if self.span:
            return self.span.inside.error(look)
        watch, wait = self.watch, self.record.read()
        dead, told, closed = (watch.dead, watch.told, watch.closed) if watch else ({}, {}, set())
        if wait is not None:
            absent = self._absent(wait.wanted >> 16) if look else []
            return wait.error(self.group_name, self.timeout_s, dead, told, closed, absent)
        place = f"group {self.group_name!r} of rank {self.rank}"
        if dead:
            return PeerDied(
                f"{place}: {ended(dead)}. close() and init() over the ranks that are left make a new group."
            )
        if told:
            kind, cause = cause_of(told)
            return kind(f"{place}: {cause}. close() and init() on every rank make a new one.")
        return GroupFailed(f"{place} was aborted. close() and init() on every rank make a new one.")

    def _absent(self, epoch: int) -> list[int]:
        """The ranks that have not entered this call, by their headers; on a device they are not looked at."""
        if self.device.type != "cpu":
            return []
        first = self.layout.header + 8 * (epoch & 1) * self.world_size
        # The kernels write a header into the arenas of the peers, `ref` into the rank's own.
        return [
            peer
            for peer in range(self.world_size)
            if peer != self.rank
            and all(
                int(self.view(owner, first + 8 * peer, (1,), torch.int64)) >> 16 < epoch for owner in (self.rank, peer)
            )
        ]

    def address(self, offset: int) -> int:
        """Address of the byte `offset` of our own arena."""
        return self.store.bases[self.rank] + offset

    def view(self, rank: int, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """A tensor over a peer's (or our own) arena."""
        nbytes = dtype.itemsize
        for size in shape:
            nbytes *= size
        return self.store.peer_buffer(rank)[offset : offset + nbytes].view(dtype).view(shape)

    def part(self) -> bool:
        """Tell the peers that this rank has closed; unless the group has failed, wait until they have, too.

        Gives whether they have, as far as this rank knows, without a failure of its own.
        Words of the arena and no collective of torch's: a rank whose wait has failed leaves at once, its peers need not
        know of it, and their next collectives must match all the same. On several nodes: the peers of our own.
        """
        if self.span:
            return self.span.inside.part()
        if self.watch:
            self.watch.post_end()
        for peer in range(self.world_size):
            self.view(peer, self.layout.closed + 8 * self.rank, (1,), torch.int64).fill_(1)
        closed = self.view(self.rank, self.layout.closed, (self.world_size,), torch.int64)
        started = time.monotonic()
        while not self.record.failed and not closed.all():
            if self.timeout_s and time.monotonic() - started > self.timeout_s:
                log.warning(
                    "close: not every rank of group %r has closed it within %g s.", self.group_name, self.timeout_s
                )
                return False
            time.sleep(0.001)
        return not self.record.failed

    def release(self, together: bool = False) -> None:
        """Give everything back. together: what `part` gave; without it nobody is waited for: a peer may be gone."""
        if self.span:
            if self.record.failed and self.group is not None:
                on_nodes.forget(self.group)
            self.span.inside.release(together)
        elif self.watch:
            self.watch.close()
        self.cache.clear()
        self.prepared.clear()
        self.store.close(together)


_arenas: dict[str, Arena] = {}
_inherited: list[Arena] = []  # of the parent process: neither used nor freed here, since they are in use there
_lock = threading.Lock()


def _forget_after_fork() -> None:
    global _lock
    _lock = threading.Lock()
    _inherited.extend(_arenas.values())
    _arenas.clear()


os.register_at_fork(after_in_child=_forget_after_fork)


def get(group_name: str, op: str = "tp_overlap") -> Arena:
    """The arena of a group. Errors: NotInitialised gives the call to make."""
    arena = _arenas.get(group_name)
    if arena is None:
        known = ", ".join(repr(name) for name in _arenas) or "none"
        fork = " A forked process does not inherit its parent's." if _inherited else ""
        raise NotInitialised(
            f"{op}: group {group_name!r} has no arena (initialised: {known}).{fork} "
            "Call tp_overlap_kernels.init(group, max_M=..., max_N=...) on every rank of it first."
        )
    return arena


def find(group_name: str) -> Arena | None:
    """The arena of a group, or None."""
    return _arenas.get(group_name)


def all_arenas() -> list[Arena]:
    """Every arena of this process."""
    return list(_arenas.values())


def name_of(group: dist.ProcessGroup | None) -> str:
    """The name by which ops find the group."""
    if group is None:
        return dist.group.WORLD.group_name if dist.is_initialized() else LOCAL_GROUP
    return group.group_name


@dataclass(frozen=True)
class Wish:
    """What a rank asks of `init`, checked."""

    max_M: int
    max_N: int
    dtype: torch.dtype
    store: str


@torch.inference_mode(False)  # tensors made under the caller's could never be written outside it
def obtain(group: dist.ProcessGroup | None, wish: Callable[[], Wish], backend: str) -> Arena:
    """The arena of a group: the one there is, if every rank has it and it is large enough; else a new one.

    Collective; every rank must wish for equal sizes. Which of the two it is follows from what all ranks say: one may
    have closed its arena after a failure of which the others know nothing.
    Errors, on every rank: InvalidInput where ranks disagree (each rank's values are shown), or where one of them has
    wished for what cannot be; UnsupportedTopology where the store cannot serve; PeerDied where a rank ends meanwhile.
    """
    if group is None and dist.is_initialized():
        group = dist.group.WORLD
    ids, pids = zip(*exchange(group, lambda: (on_nodes.node_id(), os.getpid())), strict=True)
    nodes = on_nodes.partition(list(ids))
    node, _ = nodes.find(dist.get_rank(group) if group else 0)
    beside = {rank: pids[rank] for rank in nodes.ranks[node]}  # of other hosts they would say nothing here
    world_size = nodes.ranks_per_node  # of those that share an arena
    old = find(name_of(group))
    found: dict[str, Any] = {}

    def look_here() -> dict[str, Any]:
        asked = wish()
        device = device_of(asked.store)
        check_device(device, world_size)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        table = load(settings().table, name, world_size)
        store = stores.pick(asked.store, device, world_size)
        found.update(asked=asked, device=device, table=table)
        return {
            "max_M": asked.max_M,
            "max_N": asked.max_N,
            "itemsize": asked.dtype.itemsize,
            "store": store,
            "device": device.type,
            "subgroups": on_nodes.known(group, nodes) and not (old and old.record.failed),
            "groups": on_nodes.groups_of_this_process(),
            "table": table.digest() if table else None,
            "plan": settings().plan,
            "native": native_library(device),
            "arena": _capacity(old, nodes, None if asked.store == "auto" else store),
            "pid": os.getpid(),
            "device_id": _device_id(device),
        }

    cards = exchange(group, look_here, beside)
    _check_agreement(cards)
    asked = found["asked"]
    there = [card["arena"] for card in cards]
    if old is not None and all(M >= asked.max_M and N >= asked.max_N for M, N in there):
        return old
    if old is not None:
        destroy(old)
    max_M, max_N = (max(sizes) for sizes in zip((asked.max_M, asked.max_N), *there, strict=True))
    plan = layout(max_M, max_N, asked.dtype.itemsize, world_size)

    def make(name: str, group: dist.ProcessGroup | None, cards: list[Any]) -> Arena:
        return _make(name, group, plan, cards[0]["store"], found["device"], found["table"], cards, backend)

    if len(nodes.ranks) == 1:
        arena = make(name_of(group), group, cards)
    else:
        assert group is not None
        arena = _make_spanning(group, nodes, cards, make)
    with _lock:
        _arenas[arena.group_name] = arena
    if arena.rank == 0:
        log.info(
            "%s: %d bytes of %s memory, topology %s",
            *(arena.group_name, plan.total_bytes, arena.store.name, arena.topology),
        )
    return arena


def _capacity(arena: Arena | None, nodes: Nodes, store: str | None) -> tuple[int, int]:
    """(max_M, max_N) of an arena that may stay; it has no room if it has failed, or lies on other nodes.

    store: the one that was named; an arena of another has no room either. None where any will do.
    """
    on = arena.span.nodes if arena is not None and arena.span else None
    if arena is None or arena.record.failed or on != (nodes if len(nodes.ranks) > 1 else None):
        return 0, 0
    if store not in (None, arena.store.name):
        return 0, 0
    return arena.layout.max_M, arena.layout.max_N


def _make_spanning(
    group: dist.ProcessGroup,
    nodes: Nodes,
    cards: list[Any],
    make: Callable[[str, dist.ProcessGroup, list[Any]], Arena],
) -> Arena:
    """The arena of a group on several nodes: that of our node, and the group between the nodes. Collective."""
    if len(cards) < dist.get_world_size():
        on_nodes.check_names([card["groups"] for card in cards])
    subgroups = on_nodes.subgroups(group, nodes, again=all(card["subgroups"] for card in cards))
    rank = dist.get_rank(group)
    node, _ = nodes.find(rank)
    ranks, name = nodes.ranks[node], group.group_name
    label = f"{name}, node {node}, where rank i is rank {list(ranks)}[i] of the group"
    beside = {rank: cards[rank]["pid"] for rank in ranks}
    made: list[Arena] = []
    try:
        exchange(group, lambda: made.append(make(label, subgroups.inside, [cards[rank] for rank in ranks])), beside)
    except BaseException as reason:  # another node has failed
        for arena in made:
            arena.release(raised_on_all(reason))
        raise
    inside = made[0]
    # Ranks of other nodes too: nodes that are parts of one host may share its devices.
    inside.topology = replace(inside.topology, ranks_per_device=ranks_on_same_device(cards))
    order = [rank for place in nodes.places() for rank in place]
    return replace(
        inside,
        group_name=name,
        group=group,
        rank=rank,
        world_size=len(cards),
        topology=replace(inside.topology, world_size=len(cards), inside=inside.topology),
        turn=Turn(inside.device),
        cache={},
        prepared={},
        span=Span(nodes, node, inside, subgroups.across, torch.tensor(order, device=inside.device)),
    )


def _make(
    name: str,
    group: dist.ProcessGroup | None,
    plan: Layout,
    kind: str,
    device: torch.device,
    table: Table | None,
    cards: list[Any],
    backend: str,
) -> Arena:
    """A new arena. Collective. cards: what every rank has said of itself."""
    pids = {rank: card["pid"] for rank, card in enumerate(cards)}
    symmetric = stores.create(kind, plan.total_bytes, device, group, pids)
    board = None
    try:
        if group is not None and plan.world_size > 1:
            check_reach(symmetric, plan.header, device, group, pids)
            board = _board(group, pids, device)
        made: list[Arena] = []
        # No rank signals before every rank's pads are zero, and it has all else that may fail to be had.
        exchange(
            group, lambda: made.append(_furnish(name, group, plan, symmetric, device, table, cards, backend)), pids
        )
    except BaseException as reason:
        if board is not None:
            board.close()
        symmetric.close(raised_on_all(reason))
        raise
    arena = made[0]
    if plan.world_size > 1:
        peers = {peer: pid for peer, pid in pids.items() if peer != arena.rank}
        arena.watch = Watch(arena.record, peers, lambda: str(arena.error(look=False)), board)
    return arena


def _furnish(
    name: str,
    group: dist.ProcessGroup | None,
    plan: Layout,
    symmetric: stores.Store,
    device: torch.device,
    table: Table | None,
    cards: list[Any],
    backend: str,
) -> Arena:
    """Bytes become an arena, emptied; this rank's part of it."""
    rank, world_size = dist.get_rank(group) if group else 0, plan.world_size
    symmetric.buffer[: plan.pads_bytes].zero_()
    _fill_sentinel(symmetric.buffer, plan)
    topology = Topology(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        backend="cuda" if device.type == "cuda" else backend,
        world_size=world_size,
        ranks_per_device=ranks_on_same_device(cards),
        native=all(card["native"] for card in cards),
        **plan.limits(),
    )
    arena = Arena(
        group_name=name,
        group=group,
        rank=rank,
        world_size=world_size,
        device=device,
        layout=plan,
        store=symmetric,
        heap=heap_of(symmetric.bases, rank, device),
        control=_control(symmetric.bases[rank] + plan.header, world_size, device),
        record=Record(device),
        timeout_s=settings().timeout_s,
        topology=topology,
        table=table,
        turn=Turn(device),
        programs=torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 3,
        side_streams=[torch.cuda.Stream(device) for _ in range(2)] if device.type == "cuda" else [],
    )
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return arena


def _board(group: dist.ProcessGroup, pids: dict[int, int], device: torch.device) -> Board | None:
    """Where processes cannot see each other's memory a device still can: then a failed peer is met by the timeout."""
    try:
        return Board(group, pids)
    except UnsupportedTopology as reason:
        if device.type == "cpu":
            raise
        log.info("failures are not told between the ranks: %s", reason)
        return None


def destroy(arena: Arena) -> None:
    """Unregister and free an arena. Every rank does so; where the group has failed, nobody is waited for."""
    with _lock:
        _arenas.pop(arena.group_name, None)
    if arena.device.type == "cuda":
        torch.cuda.synchronize(arena.device)
    arena.release(arena.part())


def _check_agreement(cards: list[Any]) -> None:
    """Refuse, on every rank alike, what all ranks must share and do not."""
    for key in ("max_M", "max_N", "itemsize", "store", "device", "table", "plan"):
        values = [card[key] for card in cards]
        if any(value != values[0] for value in values):
            raise InvalidInput(
                f"init: all ranks must agree on {key}, got {values} (by rank). "
                "Call init with equal arguments and settings on every rank of the group."
            )


def _device_id(device: torch.device) -> str:
    if device.type == "cpu":
        return f"cpu:{os.getpid()}"  # CPU ranks share no SMs
    return str(torch.cuda.get_device_properties(device).uuid)


def heap_of(bases: list[int], rank: int, device: torch.device) -> torch.Tensor:
    """The table of bases, and behind it twice our own in the place of each: lang.signal.reachable."""
    return torch.tensor([*bases, *[bases[rank]] * (2 * len(bases))], dtype=torch.int64, device=device)


def _control(headers: int, world_size: int, device: torch.device) -> torch.Tensor:
    words = torch.zeros(CONTROL_WORDS, dtype=torch.int64)
    words[8], words[9] = headers, world_size * 8  # lang.signal.HEADERS, HEADERS_BYTES
    return words.to(device)


def _fill_sentinel(buffer: torch.Tensor, plan: Layout) -> None:
    if plan.sentinel_bytes:
        buffer[plan.sentinel : plan.one_shot].view(torch.int32).fill_(SENTINEL_WORD)
