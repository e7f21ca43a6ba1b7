"""How long a call takes: graphs or eager calls, queued behind a blocker, started together; the slowest rank counts.

One *sample* is a run of calls with rotating weights. Its time is taken between two events on the stream, after a kernel
that blocks the stream while the host queues (so that no launch gap is measured) and a device-side barrier over the
ranks (so that no rank waits for a late one). Providers take turns, sample by sample, so that a drift of clocks meets
all of them alike. Or each has its samples in a row, behind some milliseconds of its own load: at the limit of power the
clock of a GPU follows what a call takes, and in a model the same products go on for long. A collective takes as long as
its slowest rank: the maximum over ranks is taken for each sample, then median, p10 and p90 over the samples.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeAlias, TypeVar

import numpy as np
import torch

from .launch import World

T = TypeVar("T")
Result: TypeAlias = torch.Tensor | tuple[torch.Tensor, torch.Tensor]  # or (y, new_residual)
Call = Callable[[torch.Tensor | None], Result]  # weight -> result; everything else is bound
CALLS_A_SAMPLE = 10
BLOCKER_US = 60.0  # covers the launch of one graph


@dataclass(frozen=True)
class Times:
    """Microseconds a call, over samples of the slowest rank."""

    us: float
    p10_us: float
    p90_us: float
    samples: int
    host_us: float | None = None  # median time to enqueue a call; eager alone


def quantiles(samples: list[float]) -> tuple[float, float, float]:
    """(median, p10, p90), interpolated between neighbours."""
    median, p10, p90 = np.percentile(samples, [50, 10, 90])
    return float(median), float(p10), float(p90)


def slowest_rank(by_rank: list[list[float]]) -> list[float]:
    """Sample by sample, the maximum over ranks. A rank that has fewer samples (its provider failed) cuts the others."""
    return [max(sample) for sample in zip(*by_rank)]  # noqa: B905 - the cut is meant


def rotation(calls: int, copies: int) -> list[int]:
    """Which weight copy each call uses; the last call always uses copy 0, whose result can be checked."""
    return [(calls - 1 - call) % copies for call in range(calls)]


def rounds_for(sample_us: float, target_ms: float, least: int, most: int) -> int:
    """Samples that fit the target, within bounds."""
    return int(min(most, max(least, target_ms * 1e3 / max(sample_us, 1e-3))))


class Timed(Protocol):
    """Something a sample can be taken of. `queue` starts a sample; the function it returns reads the time in us and
    may be called once the device is idle. `out` is the result of the last call, made with weight copy 0."""

    out: Result
    host_us: list[float]

    @property
    def calls(self) -> int: ...

    def queue(self) -> Callable[[], float]: ...


class CudaClock:
    """Blocker, barrier and events of one rank's device."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.cycles_per_us = self._calibrate()
        self._pad = self._make_pad()

    def _calibrate(self) -> float:
        cycles = 2_000_000
        for _ in range(2):
            begin, end = self.event(), self.event()
            begin.record()
            torch.cuda._sleep(cycles)
            end.record()
            end.synchronize()
        return cycles / (begin.elapsed_time(end) * 1e3)

    def _make_pad(self) -> tuple[torch.Tensor, Any] | None:
        if self.world.world_size == 1:
            return None
        import torch.distributed._symmetric_memory as symmetric_memory

        word = symmetric_memory.empty(256, dtype=torch.uint8, device=self.world.device)
        return word, symmetric_memory.rendezvous(word, self.world.group_name)

    def event(self) -> torch.cuda.Event:
        return torch.cuda.Event(enable_timing=True)

    def start(self, blocker_us: float) -> torch.cuda.Event:
        """Blocks the stream for a while, lines the ranks up, and marks the beginning."""
        torch.cuda._sleep(int(blocker_us * self.cycles_per_us))
        if self._pad is not None:
            self._pad[1].barrier(channel=0)
        begin = self.event()
        begin.record()
        return begin

    def idle(self) -> None:
        torch.cuda.synchronize(self.world.device)


def captured(clock: CudaClock, run: Callable[[], T], pool: Any = None) -> tuple[torch.cuda.CUDAGraph, T]:
    """A graph of what `run` launches, and what it returned, which replays write anew. pool: of memory, shared."""
    graph = torch.cuda.CUDAGraph()
    stream = torch.cuda.current_stream()
    clock.idle()
    try:
        # Threads of the communication library ask for the state of events meanwhile; only this thread captures.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            out = run()
    finally:
        torch.cuda.set_stream(stream)  # a capture that fails leaves its own stream behind
    return graph, out


@dataclass
class GraphTimed:
    """Calls captured once in a CUDA graph and replayed.

    call: kept although it is not called again. What it holds from outside of the capture, a buffer say, is written by
    every replay, and would be another's memory once it is freed.
    """

    clock: CudaClock
    graph: torch.cuda.CUDAGraph
    call: Call
    calls: int
    out: Result
    host_us: list[float] = field(default_factory=list)

    @classmethod
    def capture(cls, clock: CudaClock, call: Call, weights: list[torch.Tensor]) -> GraphTimed:
        order = rotation(max(CALLS_A_SAMPLE, len(weights)), max(1, len(weights)))

        def calls() -> torch.Tensor:
            for copy in order:
                out = call(weights[copy] if weights else None)
            return out

        graph, out = captured(clock, calls)
        return cls(clock, graph, call, len(order), out)

    def queue(self) -> Callable[[], float]:
        begin = self.clock.start(BLOCKER_US)
        self.graph.replay()
        end = self.clock.event()
        end.record()
        return lambda: begin.elapsed_time(end) * 1e3 / self.calls


@dataclass
class EagerTimed:
    """Calls launched one by one while a blocker holds the stream; the host's time to launch them is kept beside."""

    clock: CudaClock
    call: Call
    weights: list[torch.Tensor]
    out: Result
    host_us: list[float] = field(default_factory=list)

    @property
    def calls(self) -> int:
        return max(CALLS_A_SAMPLE, len(self.weights))

    def queue(self) -> Callable[[], float]:
        known_us = max(self.host_us[-3:], default=300.0)
        begin = self.clock.start(1.3 * known_us * self.calls + BLOCKER_US)
        order = rotation(self.calls, max(1, len(self.weights)))
        host = time.perf_counter()
        for copy in order:
            self.out = self.call(self.weights[copy] if self.weights else None)
        self.host_us.append((time.perf_counter() - host) * 1e6 / self.calls)
        end = self.clock.event()
        end.record()
        return lambda: begin.elapsed_time(end) * 1e3 / self.calls


class CpuClock:
    """Wall time, since CPU calls return when they are done."""

    def __init__(self, world: World) -> None:
        self.world = world

    def idle(self) -> None:
        pass


@dataclass
class WallTimed:
    clock: CpuClock
    call: Call
    weights: list[torch.Tensor]
    out: Result
    calls: int = 1
    host_us: list[float] = field(default_factory=list)

    def queue(self) -> Callable[[], float]:
        self.clock.world.barrier()
        begin = time.perf_counter()
        for copy in rotation(self.calls, max(1, len(self.weights))):
            self.out = self.call(self.weights[copy] if self.weights else None)
        elapsed_us = (time.perf_counter() - begin) * 1e6 / self.calls
        return lambda: elapsed_us


Clock = CudaClock | CpuClock


@dataclass(frozen=True)
class Effort:
    """How long to measure one provider of one case. load_ms: of its own load before its samples, one behind the other;
    0: turns."""

    target_ms: float = 60.0
    least: int = 10
    most: int = 50
    load_ms: float = 0.0


@dataclass
class Turn:
    """One provider's share of the turns: what to sample, inside which context, how to ask the device whether it went
    well, and what came of it."""

    timed: Timed
    active: Callable[[], AbstractContextManager[object]]
    check: Callable[[], None]
    samples: list[float] = field(default_factory=list)
    failure: str | None = None

    def sample(self, clock: Clock) -> None:
        try:
            with self.active():
                read = self.timed.queue()
            clock.idle()
            self.check()
            self.samples.append(read())
        except Exception as error:
            self.failure = one_line(error)


def measure(turns: dict[str, Turn], clock: Clock, effort: Effort) -> Iterator[tuple[str, Times | None, str | None]]:
    """(name, times, failure) of each. All ranks must call it with the same names in the same order."""
    world = clock.world
    for turn in turns.values():
        for _ in range(2):  # the first replay uploads the graph
            turn.sample(clock)
    estimates = world.gather(
        {name: (turn.failure, turn.samples[-1:], turn.timed.calls) for name, turn in turns.items()}
    )
    rounds, under_load = {}, {}
    for name, turn in turns.items():
        seen = [each[name] for each in estimates]
        failed = any(failure for failure, _, _ in seen)
        slowest_us = max((us[0] * calls for _, us, calls in seen if us), default=0.0)
        rounds[name] = 0 if failed else rounds_for(slowest_us, effort.target_ms, effort.least, effort.most)
        under_load[name] = math.ceil(effort.load_ms * 1e3 / max(slowest_us, 1.0))
        turn.samples.clear()
        turn.timed.host_us.clear()
    if effort.load_ms:
        order = [name for name in turns if rounds[name] for _ in range(under_load[name] + rounds[name])]
    else:
        order = [name for step in range(max(rounds.values(), default=0)) for name in turns if step < rounds[name]]
    for name in order:
        if turns[name].failure is None:
            turns[name].sample(clock)
    for name, turn in turns.items():
        del turn.samples[: under_load[name]], turn.timed.host_us[: under_load[name]]
    gathered = world.gather({name: (turn.failure, turn.samples, turn.timed.host_us) for name, turn in turns.items()})
    for name in turns:
        yield name, *_combine([each[name] for each in gathered])


def _combine(by_rank: list[tuple[str | None, list[float], list[float]]]) -> tuple[Times | None, str | None]:
    failure = next((f"rank {rank}: {each[0]}" for rank, each in enumerate(by_rank) if each[0]), None)
    slowest = slowest_rank([samples for _, samples, _ in by_rank])
    if failure or not slowest:
        return None, failure or "no sample was taken"
    hosts = [float(np.median(host)) for _, _, host in by_rank if host]
    return Times(*quantiles(slowest), samples=len(slowest), host_us=max(hosts, default=None)), None


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split()) or "no message"
    return f"{type(error).__name__}: {text[:300]}"
