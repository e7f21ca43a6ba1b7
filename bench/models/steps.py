"""The two steps of a model that generates: prefill and decode, as calls without arguments, eager or captured.

A step reads and writes tensors that stay where they are (slots.py), so it can be captured in a CUDA graph and replayed
with other tokens, slots and lengths. Greedy choice of the next token is a part of it; reading it on the host is not.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..timing import Clock, CudaClock, captured
from .slots import SlotCache

Step = Callable[[], Any]
BLOCKER_US = 5000.0  # covers the launch of one graph of thousands of kernels


class Prefill:
    """Reads `ids` [batch, tokens] into the slots that `filling` names, and makes each slot's next token.

    last: int64 [1], the place of the last token that counts, less than `tokens` where prompts are padded at their end.
    """

    def __init__(self, cache: SlotCache, batch: int, tokens: int) -> None:
        device = cache.positions.device
        self.cache = cache
        self.ids = torch.zeros((batch, tokens), dtype=torch.int64, device=device)
        self.filling = torch.arange(batch, device=device)
        self.last = torch.full((1,), tokens - 1, dtype=torch.int64, device=device)
        self._places = torch.arange(tokens, device=device)[None]

    def __call__(self, model: Any) -> Tensor:
        """Logits [batch, vocabulary] at the last token."""
        self.cache.filling = self.filling
        logits = model(
            input_ids=self.ids, position_ids=self._places, past_key_values=self.cache, logits_to_keep=self.last
        ).logits[:, -1]
        self.cache.tokens.index_copy_(0, self.filling, logits.argmax(-1))
        self.cache.positions.index_copy_(0, self.filling, (self.last + 1).expand(len(self.filling)))
        return logits


class Decode:
    """One more token for every slot, whether or not it is in use: the step's time does not depend on it."""

    def __init__(self, cache: SlotCache) -> None:
        self.cache = cache

    def __call__(self, model: Any) -> Tensor:
        """Logits [slots, vocabulary]."""
        cache = self.cache
        cache.filling = None
        logits = model(
            input_ids=cache.tokens[:, None],
            position_ids=cache.positions[:, None],
            attention_mask=cache.mask(),
            past_key_values=cache,
        ).logits[:, -1]
        cache.tokens.copy_(logits.argmax(-1))
        cache.positions.add_(1).clamp_(max=cache.length - 1)
        return logits


class Recorder:
    """Makes steps of a device: captured on a GPU, in one pool of memory that graphs share, eager on a CPU.

    Graphs that share a pool must not run at the same time, and what a graph returned is valid until another one runs.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._pool = torch.cuda.graph_pool_handle() if isinstance(clock, CudaClock) else None

    def step(self, call: Step) -> Step:
        """`call`, which has run at least once, so that nothing is compiled or allocated for good under the capture."""
        if not isinstance(self.clock, CudaClock):
            return call
        graph, out = captured(self.clock, call, self._pool)

        def replay() -> Any:
            graph.replay()
            return out

        replay.call = call  # type: ignore[attr-defined]  # what it holds from outside of the capture is written anew
        return replay


@dataclass
class StepTimed:
    """A sample: `before`, then `calls` steps in a row, timed together. See timing.Timed."""

    clock: Clock
    step: Step
    before: Step
    calls: int
    out: Tensor = field(default_factory=lambda: torch.empty(0))
    host_us: list[float] = field(default_factory=list)

    def queue(self) -> Callable[[], float]:
        self.before()
        if isinstance(self.clock, CudaClock):
            begin = self.clock.start(BLOCKER_US)
            self._run()
            end = self.clock.event()
            end.record()
            return lambda: begin.elapsed_time(end) * 1e3 / self.calls
        self.clock.world.barrier()
        started = time.perf_counter()
        self._run()
        elapsed_us = (time.perf_counter() - started) * 1e6 / self.calls
        return lambda: elapsed_us

    def _run(self) -> None:
        for _ in range(self.calls):
            self.out = self.step()
