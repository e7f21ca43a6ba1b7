"""Calls of a group take turns: threads by a lock, streams by edges. The streams here are stand-ins that keep edges."""

from __future__ import annotations

import contextlib
import threading
import time
import timeit

import pytest
import torch

import tp_overlap_kernels as tpo
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.memory import turn as turns
from tp_overlap_kernels.memory.turn import Turn

CPU = torch.device("cpu")


class Stream:
    """edges: the streams that this one has been told to wait for."""

    def __init__(self, handle, capturing=False):
        self.cuda_stream, self.capturing, self.edges = handle, capturing, []

    def wait_stream(self, other):
        assert self.capturing == other.capturing, "CUDA refuses an edge into or out of a capture"
        self.edges.append(other.cuda_stream)


class Device:
    """As much of torch.cuda as a turn looks at. asked: how often for a Stream object."""

    def __init__(self, monkeypatch):
        self.current, self.asked = Stream(0), 0
        monkeypatch.setattr(turns, "stream_of", lambda index: self.current.cuda_stream)
        monkeypatch.setattr(turns.torch, "cuda", self)

    def current_stream(self, device):
        self.asked += 1
        return self.current

    def is_current_stream_capturing(self):
        assert self.current.cuda_stream != 0 or not self.current.capturing
        return self.current.capturing

    @contextlib.contextmanager
    def stream(self, stream):
        before, self.current = self.current, stream
        yield
        self.current = before


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


@pytest.fixture
def call(device):
    turn = Turn(torch.device("cuda", 0))

    def call_on(stream):
        device.current = stream
        with turn:
            pass
        return stream.edges

    return call_on


def test_one_stream_needs_no_edge_and_is_asked_for_once(device, call):
    stream = Stream(0)
    for _ in range(5):
        assert call(stream) == []
    assert device.asked == 1


def test_another_stream_waits_for_the_last_one(call):
    first, second = Stream(0), Stream(5)
    call(first)
    assert call(second) == [0]
    assert call(second) == [0], "once"
    assert call(first) == [5]


def test_in_a_capture_streams_wait_for_each_other_and_for_none_outside(call):
    eager, captured, forked = Stream(0), Stream(5, capturing=True), Stream(6, capturing=True)
    call(eager)
    assert call(captured) == []
    assert call(forked) == [5]
    assert call(captured) == [6]


def test_an_eager_call_after_a_capture_waits_for_the_eager_one_before_it(call):
    eager, stream, other = Stream(3), Stream(5, capturing=True), Stream(6)
    call(eager)
    call(stream)
    stream.capturing = False  # the capture has ended; the same stream is used again
    assert call(stream) == [3]
    assert call(other) == [5]


def test_a_capture_on_the_stream_of_the_last_call_is_seen_by_a_fork(call):
    stream, forked = Stream(5), Stream(6, capturing=True)
    call(stream)
    stream.capturing = True
    assert call(stream) == []
    assert call(forked) == [5]


def test_an_eager_call_beside_a_capture_touches_neither(call):
    eager, captured = Stream(3), Stream(5, capturing=True)
    call(captured)
    assert call(eager) == [] and captured.edges == []


def test_a_stream_that_cannot_be_ordered_leaves_the_turn_free(device, monkeypatch):
    turn = Turn(torch.device("cuda", 0))
    monkeypatch.setattr(device, "current_stream", lambda index: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError), turn:
            pass


def test_threads_take_turns():
    turn, inside, most = Turn(CPU), [], []

    def work():
        for _ in range(20):
            with turn:
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.0005)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert max(most) == 1 and len(most) == 80


def test_every_form_of_an_op_takes_a_turn():
    """First calls and known ones."""
    tpo.init(max_M=8, max_N=24)
    try:
        arena, taken = arenas.get("local"), []

        class Counted:
            def __enter__(self):
                taken.append(1)

            def __exit__(self, *raised):
                pass

        arena.turn = Counted()
        a, b = torch.ones(4, 16, dtype=torch.bfloat16), torch.ones(24, 16, dtype=torch.bfloat16)
        out, total = torch.empty(4, 24, dtype=torch.bfloat16), torch.empty(4, 16, dtype=torch.bfloat16)
        ops = torch.ops.tp_overlap
        for function, arguments in (
            (ops.gemm_all_reduce, (a, b, "local")),
            (ops.gemm_all_reduce_out, (a, b, "local", out)),
            (ops.gemm_reduce_scatter, (a, b, "local")),
            (ops.gemm_reduce_scatter_out, (a, b, "local", out)),
            (ops.all_reduce, (a, "local")),
            (ops.all_reduce_out, (a, "local", total)),
        ):
            for time_called in ("first", "known"):
                taken.clear()
                function(*arguments)
                assert taken == [1], (function, time_called)
    finally:
        tpo.close()


def test_a_turn_costs_less_than_a_microsecond(device):
    """With the stream unchanged; the best of many, since others use this machine."""
    turn = Turn(torch.device("cuda", 0))

    def take():
        with turn:
            pass

    assert min(timeit.repeat(take, number=2000, repeat=15)) / 2000 < 1e-6
