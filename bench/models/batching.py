"""Continuous batching: requests come, take a slot as soon as one is free, and leave it with their last token.

Prefills come first: while a request waits and a slot is free it is read in, alone; then one decode step makes a token
for every slot in use. The loop knows neither model nor device: it asks an Engine for steps and a Timer for the time.
"""

from __future__ import annotations

import math
import random
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class Request:
    """number: its place in the workload. arrival_s: since the beginning of the run."""

    number: int
    arrival_s: float
    input_len: int
    output_len: int


@dataclass
class Served:
    """sent_s: when a place was free for it and it had come, which is when a client with bounded concurrency sends it.
    times_s, tokens: of each token made; seconds since the beginning of the run."""

    request: Request
    sent_s: float
    times_s: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.request.output_len


@dataclass(frozen=True)
class Workload:
    """Lengths are uniform between range_ratio times the length and the length. request_rate: a second; infinite: all
    come at once; else the times between them are exponential."""

    num_prompts: int = 100
    max_concurrency: int = 20
    input_len: int = 1024
    output_len: int = 128
    range_ratio: float = 0.5
    request_rate: float = math.inf

    def __post_init__(self) -> None:
        if not 0.0 <= self.range_ratio <= 1.0:
            raise ValueError(f"--random-range-ratio is between 0 and 1, got {self.range_ratio}")
        if not self.request_rate > 0:
            raise ValueError(
                f"--request-rate is a positive number of requests a second, or inf; got {self.request_rate}"
            )

    def requests(self, seed: int) -> list[Request]:
        """The same for the same seed, in order of arrival."""
        draw = random.Random(seed)
        longest = (self.input_len, self.output_len)
        at, made = 0.0, []
        for number in range(self.num_prompts):
            lengths = [draw.randint(max(1, int(most * self.range_ratio)), most) for most in longest]
            made.append(Request(number, at, *lengths))
            at += 0.0 if math.isinf(self.request_rate) else draw.expovariate(self.request_rate)
        return made

    def check_fits(self, model: str, positions: int) -> None:
        """Errors: ValueError where a request may have more tokens than the model has positions."""
        if self.input_len + self.output_len > positions:
            raise ValueError(
                f"requests of up to {self.input_len} + {self.output_len} tokens are more than {model}'s {positions} "
                "positions. Lower --random-input-len or --random-output-len."
            )


class Engine(Protocol):
    """What runs the steps. Both return when the token is on the host."""

    slots: int

    def prefill(self, slot: int, request: Request) -> int:
        """Reads a request into a slot; its first token."""

    def decode(self) -> list[int]:
        """One more token for every slot."""


class Timer(Protocol):
    """Time of a run. Ranks that run the loop together must get equal answers from `arrived`."""

    def now(self) -> float: ...

    def arrived(self, waiting: Sequence[Request]) -> int:
        """How many of the waiting ones, who are in order, have come by now."""

    def wait_for(self, request: Request) -> None:
        """Returns when the request may have come."""


def serve(requests: Sequence[Request], engine: Engine, timer: Timer) -> list[Served]:
    """Serves all requests, which are in order of arrival; what became of each, in that order."""
    waiting = deque(requests)
    free = deque((slot, 0.0) for slot in range(engine.slots))  # and since when
    running: dict[int, Served] = {}
    served: list[Served] = []

    def take(slot: int, token: int, now: float) -> None:
        running[slot].tokens.append(token)
        running[slot].times_s.append(now)
        if running[slot].done:
            del running[slot]
            free.append((slot, now))

    while waiting or running:
        arrived = timer.arrived(waiting)
        while arrived and free:
            slot, since = free.popleft()
            request = waiting.popleft()
            arrived -= 1
            served.append(Served(request, max(since, request.arrival_s)))
            running[slot] = served[-1]
            take(slot, engine.prefill(slot, request), timer.now())
        if running:
            tokens = engine.decode()
            now = timer.now()
            for slot in list(running):
                take(slot, tokens[slot], now)
        elif waiting:
            timer.wait_for(waiting[0])
    return served
