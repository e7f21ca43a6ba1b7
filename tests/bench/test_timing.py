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


class Counted:
    """Says in `order` when it is sampled; a sample takes 20 us."""

    calls, out = 10, torch.zeros(1)

    def __init__(self, name: str, order: list[str]) -> None:
        self.name, self.order, self.host_us = name, order, []

    def queue(self):
        self.order.append(self.name)
        return lambda: 2.0


def sampled(effort: timing.Effort) -> tuple[list[str], dict[str, timing.Times]]:
    """The order of samples behind the first two of each, and the times."""
    order: list[str] = []
    clock = types.SimpleNamespace(idle=lambda: None, world=types.SimpleNamespace(gather=lambda value: [value]))
    turns = {name: timing.Turn(Counted(name, order), contextlib.nullcontext, lambda: None) for name in "ab"}
    times = {name: times for name, times, _ in timing.measure(turns, clock, effort)}
    return order[4:], times


def test_providers_take_turns():
    order, times = sampled(timing.Effort(target_ms=0.1, least=1, most=9))
    assert "".join(order) == "ab" * 5
    assert times["a"].samples == times["b"].samples == 5


def test_or_each_is_sampled_behind_its_own_load_which_is_not_counted():
    order, times = sampled(timing.Effort(target_ms=0.1, least=1, most=9, load_ms=0.05))
    assert "".join(order) == "a" * (3 + 5) + "b" * (3 + 5)
    assert times["a"].samples == times["b"].samples == 5
