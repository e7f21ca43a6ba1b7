"""What is captured, replayed and timed of a step. No device: graph, clock and events are stand-ins with a diary."""

from __future__ import annotations

import contextlib
import types

import pytest
import torch

from tp_overlap_kernels.bench.timing import CudaClock

pytest.importorskip("transformers", "5.17", reason="needs transformers >= 5.17: pip install -e .[transformers]")


@pytest.fixture
def diary(monkeypatch):
    """What the stand-ins were asked, in order."""
    said: list[str] = []

    class Graph:
        def replay(self):
            said.append("replay")

    @contextlib.contextmanager
    def capture(graph, pool, capture_error_mode):
        assert isinstance(graph, Graph) and capture_error_mode == "thread_local"
        said.append(f"capture in {pool}")
        yield
        said.append("captured")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "the pool")
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: "mine")
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: said.append(f"stream {stream}"))
    return said


@pytest.fixture
def clock(diary):
    class Clock(CudaClock):
        def __init__(self):
            pass

        def idle(self):
            diary.append("idle")

        def start(self, blocker_us):
            diary.append("start")
            return types.SimpleNamespace(elapsed_time=lambda end: 6.0)

        def event(self):
            return types.SimpleNamespace(record=lambda: diary.append("end"))

    return Clock()


def test_a_step_is_captured_once_and_replayed(diary, clock):
    from tp_overlap_kernels.bench.models.steps import Recorder

    calls: list[int] = []
    step = Recorder(clock).step(lambda: calls.append(1) or "logits")
    assert diary == ["idle", "capture in the pool", "captured", "stream mine"] and calls == [1]
    assert [step(), step()] == ["logits", "logits"] and calls == [1], "a replay does not call"
    assert diary[4:] == ["replay", "replay"]


def test_a_capture_that_fails_leaves_the_stream_as_it_was(diary, clock):
    from tp_overlap_kernels.bench.models.steps import Recorder

    with pytest.raises(RuntimeError, match="no room"):
        Recorder(clock).step(lambda: (_ for _ in ()).throw(RuntimeError("no room")))
    assert diary[-1] == "stream mine"


def test_a_sample_is_the_time_of_its_steps_and_not_of_what_goes_before(diary, clock):
    from tp_overlap_kernels.bench.models.steps import StepTimed

    timed = StepTimed(clock, lambda: diary.append("step") or torch.ones(1), lambda: diary.append("before"), 3)
    read = timed.queue()
    assert diary == ["before", "start", "step", "step", "step", "end"]
    assert read() == 2000.0, "6 ms for 3 steps, in us"
