"""The protocol of csrc/kernels/all_reduce_one_shot_sentinel.cu, which no interpreter runs, as logs written by hand.

A call of each rank: push to every peer's buffer i % buffers, fill with sentinels what the call before left in our own,
load what the peers have pushed. Three buffers are enough and two are not; nor are three if the ranks' calls overlap.
"""

from __future__ import annotations

import pytest

from tests.order.replay import replay
from tests.order.trace import SENTINEL, Atomic, Begin, End
from tp_overlap_kernels.memory.layout import layout

CALLS = 8


def logs(world_size: int, buffers: int, programs: int, clear_by: int | None = None, boundaries: bool = True) -> list:
    """One log a rank; a word a program, source and buffer. clear_by: the program that clears for all (None: each its
    own). boundaries: whether a call ends before the next begins."""
    room = layout(64, 64, 2, world_size)

    def word(buffer: int, source: int, program: int) -> int:
        return room.sentinel + (buffer * world_size + source) * room.sentinel_bytes + 8 * program

    def access(program, owner, at, seen, stored):
        return Atomic(0, program, owner, at, seen, stored, False, False, True)

    def call(rank: int, i: int) -> list:
        peers = [(rank + turn) % world_size for turn in range(1, world_size)]
        data = lambda source, program: 1 + source + 10 * program + 100 * i
        here, stale = i % buffers, (i - 1) % buffers
        events = []
        for p in range(programs):
            events += [access(p, peer, word(here, rank, p), SENTINEL, data(rank, p)) for peer in peers]
            for q in range(programs):
                if i > 0 and p == (q if clear_by is None else clear_by):
                    old = [(peer, data(peer, q) - 100) for peer in peers]
                    events += [access(p, rank, word(stale, peer, q), value, SENTINEL) for peer, value in old]
            events += [access(p, rank, word(here, peer, p), SENTINEL, None) for peer in peers]  # not there yet
            events += [access(p, rank, word(here, peer, p), data(peer, p), None) for peer in peers]
        return events

    result = []
    for rank in range(world_size):
        log = [] if boundaries else [Begin(0, programs, "sentinel")]
        for i in range(CALLS):
            events = call(rank, i)
            log += [Begin(0, programs, "sentinel"), *events, End(0, programs, i)] if boundaries else events
        result.append(log if boundaries else [*log, End(0, programs, CALLS)])
    return [result, room]


@pytest.mark.parametrize("world_size", [2, 3, 4])
@pytest.mark.parametrize("programs, clear_by", [(1, None), (3, None), (3, 2), (3, 0)])
def test_three_buffers_are_enough(world_size, programs, clear_by):
    found = replay(*logs(world_size, 3, programs, clear_by))
    found.raise_if_any()
    assert found.joined["sentinel"] == CALLS * world_size * (world_size - 1) * programs


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_two_are_not(world_size):
    """A peer in call i + 2 may write while we still clear in call i + 1."""
    found = replay(*logs(world_size, 2, 3))
    assert {(race.kind, race.region) for race in found.races} == {("store after store", "sentinel")}


def test_without_kernel_boundaries_three_are_not_enough():
    """Data says that it came, and nothing about what its sender did before in the same launch."""
    assert replay(*logs(2, 3, 3, boundaries=False)).races
