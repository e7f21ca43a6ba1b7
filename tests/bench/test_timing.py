"""What is timed lives as long as it can be replayed. No device: the capture is a stand-in."""

import contextlib
import gc
import types
import weakref

import torch

from tp_overlap_kernels.bench import timing


def test_a_graph_keeps_what_its_calls_hold(monkeypatch):
    """A provider's buffer from outside of the capture: every replay writes it."""
    monkeypatch.setattr(torch.cuda, "CUDAGraph", object)
    monkeypatch.setattr(torch.cuda, "graph", lambda graph, **options: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: None)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda stream: None)
    buffer = torch.zeros(4)
    held = weakref.ref(buffer)
    clock = types.SimpleNamespace(idle=lambda: None)
    timed = timing.GraphTimed.capture(clock, lambda w, buffer=buffer: w + buffer, [torch.ones(4)])
    del buffer
    gc.collect()
    assert held() is not None
    del timed
    gc.collect()
    assert held() is None
