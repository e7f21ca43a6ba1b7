"""The notice board: what a rank says is read by the watch of every peer, and changes what they raise."""

from __future__ import annotations

import os
import time

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.dist import barrier
from tp_overlap_kernels.memory.board import CLOSED, FAILED, Board, Notice
from tp_overlap_kernels.memory.record import ABORTED, MISMATCH, TIMEOUT, FailedWait, Record, cause_of
from tp_overlap_kernels.memory.watch import Watch

WAIT = FailedWait(TIMEOUT, "all_reduce", 0, 2, 2**31, (1 << 62) | 7, 3)


def test_what_is_posted_is_read_by_all(ranks):
    for read in ranks(3).run(post):
        assert read == [Notice(FAILED, WAIT, (1, 2)), Notice(CLOSED, None, ()), None]


def post(rank, world_size):
    tpo.close()  # what an earlier test may have left
    board = Board(dist.group.WORLD, {})
    if rank == 0:
        board.post(FAILED, WAIT, (1, 2))
    if rank == 1:
        board.post(CLOSED)
    barrier()
    read = [board.read(peer) for peer in range(world_size)]
    barrier()
    board.close()
    with open("/proc/self/maps") as lines:
        assert "tp_overlap_board" not in lines.read()
    return read


def test_the_watch_tells_and_is_told(ranks):
    """Rank 0 fails, rank 1 closes, rank 2 does nothing."""
    (failed_0, *_), (failed_1, told_1, _, _), (failed_2, told_2, closed_2, word_2) = ranks(3).run(watch_each_other)
    assert failed_0 and failed_1 and failed_2
    assert told_1 == told_2 == {0: Notice(FAILED, WAIT, ())}
    assert closed_2 == {1} and word_2 == 1 | 1 << (8 + 1)


def watch_each_other(rank, world_size):
    board, record = Board(dist.group.WORLD, {}), Record(torch.device("cpu"))
    watch = Watch(record, {}, lambda: "", board)
    barrier()
    if rank == 0:
        record.write(WAIT)
    if rank == 1:
        watch.post_end()
    started = time.monotonic()
    wanted = {0: [1], 1: [0], 2: [0, 1]}[rank]
    while not set(wanted) <= {*watch.told, *watch.closed} and time.monotonic() - started < 1:
        time.sleep(0.005)
    seen = record.failed, dict(watch.told), set(watch.closed), int(record.words[0])
    barrier()
    watch.close()
    return seen


def test_a_closed_peer_is_no_failure_until_one_waits_for_it():
    record = Record(torch.device("cpu"))
    record.close_peer(3)
    assert not record.failed and record.is_hopeless(3) and not record.is_hopeless(2)
    record.abort()
    assert record.failed and record.is_hopeless(2)


def test_the_best_cause_is_given():
    """Who saw a death knows more than who ran out of time, and that one more than who was merely told."""
    aborted = Notice(FAILED, FailedWait(ABORTED, "all_reduce", 1, 0, 0, 1 << 16, 0), ())
    late, other = Notice(FAILED, WAIT, ()), Notice(FAILED, FailedWait(MISMATCH, "all_reduce", 0, 2, 0, 1, 2), ())
    death, nothing = Notice(FAILED, WAIT, (2,)), Notice(FAILED, None, ())
    assert cause_of({1: aborted}) == (tpo.GroupFailed, f"rank 1 had failed ({aborted.wait})")
    assert cause_of({1: nothing}) == (tpo.GroupFailed, "rank 1 has failed")
    assert cause_of({1: aborted, 0: late})[0] is tpo.PeerTimeout
    assert cause_of({1: aborted, 0: other})[0] is tpo.CallMismatch
    kind, text = cause_of({1: late, 0: death})
    assert kind is tpo.PeerDied and text == "rank 0 has seen the process of rank 2 end"


def test_the_error_says_what_others_said():
    aborted = FailedWait(ABORTED, "all_reduce", 1, 0, 0, 5 << 16, 4 << 16)
    raised = aborted.error("tp", 1.0, {}, {0: Notice(FAILED, WAIT, ())})
    assert type(raised) is tpo.PeerTimeout and "rank 0 had given up (all_reduce: rank 0 waited for rank 2" in str(
        raised
    )
    raised = aborted.error("tp", 1.0, {}, {}, [0])
    assert type(raised) is tpo.PeerClosed and "in vain: rank 0 closed the group" in str(raised)
    raised = WAIT.error("tp", 1.0, {}, absent=[1, 2])
    assert type(raised) is tpo.PeerTimeout and "Not in this call yet: rank 1, rank 2." in str(raised)
    assert type(aborted.error("tp", 1.0, {4: os.getpid()}, {}, [0])) is tpo.PeerDied
