"""The replay by itself, on logs written by hand: what is order, what is not, and what a race is called."""

from __future__ import annotations

import numpy as np
import pytest

from tests.order.replay import replay
from tests.order.trace import CONTROL, HOST, Access, After, Atomic, Begin, End

SLOT, DATA = 0, 1024


def begin(programs=1, stream=0):
    return Begin(stream, programs, "kernel")


def end(programs=1, stream=0, epoch=1):
    return End(stream, programs, epoch)


def load(owner=0, program=0, stream=0, at=DATA, n=4):
    return Access(stream, program, False, owner, at // 2 + np.arange(n))


def store(owner=0, program=0, stream=0, at=DATA, n=4):
    return Access(stream, program, True, owner, at // 2 + np.arange(n))


def release(value, owner=0, program=0, releases=True):
    return Atomic(0, program, owner, SLOT, 0, value, False, releases, True)


def acquire(value, owner=0, program=0, acquires=True):
    return Atomic(0, program, owner, SLOT, value, None, acquires, False, False)


def count(seen, program, owner=CONTROL, order=True):
    """One arrival at a counter."""
    return Atomic(0, program, owner, SLOT, seen, seen + 1, order, order, False)


def kinds(*logs):
    return sorted(race.kind for race in replay(logs).races)


PUBLISHED = [begin(), store(), release(7), end()]


def test_a_release_that_is_acquired_is_order():
    assert kinds(PUBLISHED, [begin(), acquire(7), load(), end()]) == []


@pytest.mark.parametrize(
    "writer, reader",
    [
        (PUBLISHED, [begin(), load(), acquire(7), end()]),  # acquired afterwards
        (PUBLISHED, [begin(), acquire(6), load(), end()]),  # another value
        (PUBLISHED, [begin(), acquire(7, acquires=False), load(), end()]),
        ([begin(), store(), release(7, releases=False), end()], [begin(), acquire(7), load(), end()]),
        ([begin(), release(7), store(), end()], [begin(), acquire(7), load(), end()]),  # published too early
        ([begin(2), store(program=1), release(7), end(2)], [begin(), acquire(7), load(), end()]),  # another program's
        (PUBLISHED, [begin(2), acquire(7, program=1), load(), end(2)]),  # acquired by another program
    ],
)
def test_a_load_of_what_is_not_yet_there_is_a_race(writer, reader):
    for logs in ((writer, reader), (reader, writer)):  # whoever comes first in the replay
        (race,) = replay(logs).races
        assert {race.later.rank, race.earlier.rank} == {0, 1} and race.nbytes == 8
        assert race.kind in ("load after store", "store after load")


def test_the_order_of_the_logs_decides_only_the_name():
    reader, writer = [begin(), load(), end()], [begin(), store(), end()]
    assert kinds(reader, writer) == ["store after load"] and kinds(writer, reader) == ["load after store"]


def test_two_stores_race_and_two_loads_do_not():
    assert kinds([begin(), store(), end()], [begin(), store(), end()]) == ["store after store"]
    assert kinds([begin(), load(), end()], [begin(), load(), end()]) == []


def test_only_bytes_that_overlap_count():
    far, near = store(at=DATA + 8), store(at=DATA + 4)
    assert kinds([begin(), store(), end()], [begin(), far, end()]) == []
    (race,) = replay([[begin(), store(), end()], [begin(), near, end()]]).races
    assert race.nbytes == 4
    assert kinds([begin(), store(owner=0), end()], [begin(), store(owner=1), end()]) == []  # another rank's arena


def test_launches_of_a_stream_follow_each_other():
    log = [begin(2), store(program=0), end(2), begin(2), load(program=1), end(2)]
    assert kinds(log) == []
    together = [begin(2), store(program=0), load(program=1), end(2)]
    assert kinds(together) == ["load after store"]


def test_a_release_speaks_for_the_launches_before_it():
    writer = [begin(3), store(program=2), end(3), begin(), release(7), end()]
    assert kinds(writer, [begin(), acquire(7), load(), end()]) == []


def test_streams_order_nothing_until_they_join():
    on_1 = [begin(stream=1), store(stream=1), end(stream=1)]
    assert kinds([*on_1, load(program=HOST)]) == ["load after store"]
    assert kinds([*on_1, After(0, 1), load(program=HOST)]) == []
    assert kinds([After(0, 1), *on_1, load(program=HOST)]) == ["load after store"]
    assert kinds([store(program=HOST), After(1, 0), store(program=HOST), begin(stream=1), load(stream=1)]) == [
        "load after store"  # the second store
    ]


def test_the_last_that_counts_knows_what_all_knew():
    """As `leave` does: whoever completes the count speaks for every program."""
    arrivals = [store(program=1), count(0, 1), store(program=0, at=2048), count(1, 0), release(7)]
    reader = [begin(), acquire(7), load(), load(at=2048), end()]
    assert kinds([begin(2), *arrivals, end(2)], reader) == []
    first = [store(program=1), count(0, 1), release(7, program=1), store(program=0, at=2048), count(1, 0)]
    assert kinds([begin(2), *first, end(2)], reader) == ["load after store"]
    relaxed = [store(program=1), count(0, 1, order=False), count(1, 0, order=False), release(7)]
    assert kinds([begin(2), *relaxed, end(2)], reader) == ["load after store"]


def test_a_chain_of_ranks_is_order():
    middle = [begin(), acquire(7), release(8, owner=1), end()]
    assert kinds(PUBLISHED, middle, [begin(), acquire(8, owner=1), load(), end()]) == []
    assert kinds([begin(), acquire(8, owner=1), load(), end()], middle, PUBLISHED) == []


def test_a_flag_is_no_place_for_data():
    for plain in (store(at=SLOT), load(at=SLOT)):
        assert len(kinds(PUBLISHED, [begin(), plain, end()])) == 1


def test_logs_that_contradict_each_other_are_refused():
    a = [begin(), acquire(2, owner=1), release(1), end()]
    b = [begin(), acquire(1), release(2, owner=1), end()]
    with pytest.raises(AssertionError, match="contradict"):
        replay([a, b])


def test_a_race_says_who_and_where():
    from tp_overlap_kernels.memory.layout import layout

    room = layout(64, 64, 2, 2)
    writer = [begin(), store(owner=1, at=room.staging + 64), end(epoch=5)]
    reader = [begin(2), load(owner=1, program=1, at=room.staging + 64), end(2, epoch=6)]
    (race,) = replay([writer, reader], room).races
    text = str(race)
    assert "load after store, not ordered: 8 bytes of staging" in text
    assert "rank 1 kernel program 1, epoch 6 against rank 0 kernel program 0, epoch 5" in text
