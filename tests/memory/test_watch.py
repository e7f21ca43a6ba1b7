"""The watch: a peer's death ends our waits, a failed wait is said once on stderr, and closing leaves nothing."""

from __future__ import annotations

import os
import subprocess
import threading
import time

import pytest
import torch

from tp_overlap_kernels.memory.record import TIMEOUT, FailedWait, Record
from tp_overlap_kernels.memory.watch import Watch


@pytest.fixture
def peers():
    running = [subprocess.Popen(["sleep", "60"]) for _ in range(2)]
    yield running
    for process in running:
        process.kill()
        process.wait()


def wait_until(condition, limit_s=2.0):
    started = time.monotonic()
    while not condition() and time.monotonic() - started < limit_s:
        time.sleep(0.005)
    return time.monotonic() - started


def test_a_death_is_noticed_and_only_that_one(peers):
    record = Record(torch.device("cpu"))
    watch = Watch(record, {1: peers[0].pid, 3: peers[1].pid}, lambda: "")
    try:
        time.sleep(0.2)
        assert watch.dead == {} and not record.failed
        peers[1].kill()
        assert wait_until(lambda: record.failed) < 0.8
        assert watch.dead == {3: peers[1].pid}
        peers[0].kill()
        wait_until(lambda: len(watch.dead) == 2)
        assert watch.dead == {1: peers[0].pid, 3: peers[1].pid}
    finally:
        watch.close()


def test_a_peer_that_is_gone_already_or_cannot_be_seen_is_no_error(peers):
    peers[0].kill()
    peers[0].wait()
    record = Record(torch.device("cpu"))
    watch = Watch(record, {1: peers[0].pid, 2: peers[1].pid}, lambda: "")
    time.sleep(0.15)
    watch.close()
    assert 2 not in watch.dead


def test_a_failure_is_said_once(capfd):
    record = Record(torch.device("cpu"))
    watch = Watch(record, {}, lambda: f"rank {record.read().peer} did not come")
    record.write(FailedWait(TIMEOUT, "all_reduce", 0, 7, 0, 1 << 16, 0))
    time.sleep(0.3)
    watch.close()
    assert capfd.readouterr().err == "tp_overlap_kernels: rank 7 did not come\n"


def test_closing_leaves_neither_thread_nor_descriptor(peers):
    def descriptors():
        return len(os.listdir("/proc/self/fd"))

    before = descriptors(), threading.active_count()
    watches = [Watch(Record(torch.device("cpu")), {1: peers[0].pid, 2: peers[1].pid}, lambda: "") for _ in range(5)]
    assert descriptors() == before[0] + 10
    peers[0].kill()  # also after a death
    time.sleep(0.15)
    started = time.monotonic()
    for watch in watches:
        watch.close()
    assert (descriptors(), threading.active_count()) == before
    assert time.monotonic() - started < 1
