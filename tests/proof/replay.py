"""Graphs of three and of four calls, replayed in random order, with eager calls between and ranks that are late.

A graph makes its own data: it advances a counter on the device, reads the tables where the counter points, makes its
calls and compares their results. So every replay has other data, and no replay costs more of the host than itself.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import torch

from tests.proof import payload, ranks
from tests.proof.report import Found

EAGER_EVERY, LATE_EVERY, LATEST_S = 8, 400, 20e-3


class Replayed:
    """`body` as a CUDA graph; on the CPU it is run again instead. `replay` makes its calls once."""

    def __init__(self, body: Callable[[], None], device: torch.device):
        body()  # compiles what the capture may not
        self.replay = body
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                body()
            self.replay = graph.replay


class Calls:
    """A row of calls whose data follow from a counter on the device."""

    def __init__(self, tables: payload.Tables, rows: list[payload.Row]):
        self.tables, self.rows = tables, rows
        device = tables.device
        self.turn = torch.zeros((), dtype=torch.int64, device=device)
        self.mismatches = torch.zeros((), dtype=torch.int64, device=device)  # calls with a wrong element
        self.first_wrong = torch.full((), 1 << 62, dtype=torch.int64, device=device)  # turn
        self._given = [torch.empty_like(tables.given(row, 0)) for row in rows]
        self._from = [_places(tables.given(row, 0)).to(device) for row in rows]
        self._wanted = [_places(tables.wanted(row, 0)).to(device) for row in rows]

    def __call__(self) -> None:
        tables = self.tables
        self.turn.add_(1)
        offset = self.turn * payload.STEP % tables.positions * payload.ALIGNED_ELEMS
        for row, given, places, wanted in zip(self.rows, self._given, self._from, self._wanted, strict=True):
            given.copy_(tables.mine[row.dtype][places + offset])
            out = payload.invoke(row, given, tables.weight(row))
            wrong = (out.view(wanted.shape) != tables.sums[row.dtype][wanted + offset]).any()
            self.mismatches.add_(wrong)
            torch.minimum(self.first_wrong, torch.where(wrong, self.turn, 1 << 62), out=self.first_wrong)


def _places(view: torch.Tensor) -> torch.Tensor:
    """Where in its table each element of a view lies."""
    places = torch.tensor(view.storage_offset())
    for size, stride in zip(view.shape, view.stride(), strict=True):
        places = places.unsqueeze(-1) + torch.arange(size) * stride
    return places


def run(rank: int, world_size: int, machine: ranks.Machine, count: int, seed: int) -> Found:
    """What a rank of the pool does. count: replays of the two graphs together."""
    with ranks.arena(rank, machine, max_M=512, max_N=1024) as arena:
        every = payload.rows(payload.SIZES[machine.kind])
        choose = random.Random(seed)
        shuffled = choose.sample(every, len(every))
        picked = _one_a_plan(shuffled)
        failures: list[str] = []
        replays = [0, 0]
        eager_count = count // EAGER_EVERY + 1
        tables = payload.Tables(rank, world_size, arena.device, every, count, seed)
        graphs = [Calls(tables, picked[:3]), Calls(tables, picked[3:7])]
        eager = payload.Eager(tables, picked[7:], eager_count + len(picked))
        started = time.monotonic()
        with payload.reporting(failures, rank):
            for index in range(len(eager.rows)):
                eager.call(index)
            recorded = [Replayed(calls, arena.device) for calls in graphs]
            ranks.synchronise(arena.device)
            ranks.gather(None)
            started = time.monotonic()
            for number in range(count):
                which, late, seconds = choose.randrange(2), choose.randrange(world_size), choose.uniform(0, LATEST_S)
                if number % LATE_EVERY == 0 and late == rank:
                    (ranks.be_late if number % (2 * LATE_EVERY) else _sleep)(arena.device, seconds)
                recorded[which].replay()
                replays[which] += 1
                if number % EAGER_EVERY == 0:
                    eager.call(number // EAGER_EVERY % len(eager.rows))
            ranks.synchronise(arena.device)
            arena.check()
        seconds = time.monotonic() - started
        failures += eager.failures()
        for calls, made in zip(graphs, replays, strict=True):
            if int(calls.mismatches):
                failures.append(
                    f"rank {rank}: {int(calls.mismatches)} wrong calls in a graph of {calls.rows}, first in turn "
                    f"{int(calls.first_wrong)}"
                )
            # One run before the capture; the capture itself runs nothing, where there is one.
            if int(calls.turn) != made + 1:
                failures.append(f"rank {rank}: {made} replays, but the counter says {int(calls.turn) - 1}")
    if sum(replays) < count:
        failures.append(f"rank {rank}: {sum(replays)} of {count} replays were made")
    wrong = sum(int(calls.mismatches) for calls in graphs) + eager.mismatches()
    return Found(
        {
            "replays": sum(replays),
            "calls in graphs": 3 * replays[0] + 4 * replays[1],
            "eager calls": len(eager.chosen),
            "mismatches": wrong,
            "seconds": round(seconds, 1),
            "seed": seed,
        },
        [
            {"graph": len(calls.rows), "op": row.op, "plan": row.plan, "M": row.M, "N": row.N, "K": row.K}
            for calls in graphs
            for row in calls.rows
        ],
        failures,
    )


def _one_a_plan(rows: list[payload.Row]) -> list[payload.Row]:
    """A row of each op and plan first, the others behind."""
    first = list({(row.op, row.plan): row for row in reversed(rows)}.values())
    return first + [row for row in rows if row not in first]


def _sleep(device: torch.device, seconds: float) -> None:
    time.sleep(seconds)  # the host itself
