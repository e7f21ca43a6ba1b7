"""Many calls of every op, plan, shape and dtype in a row, with data of their own each, and no synchronisation.

A rank's stream is late now and then. Each result is compared on the device with what follows from the call's number;
the host looks once, at the end.
"""

from __future__ import annotations

import random
import time

from tests.proof import payload, ranks
from tests.proof.report import Found

LATE_EVERY, LATEST_S = 2000, 2e-3  # calls


def run(rank: int, world_size: int, machine: ranks.Machine, count: int, seed: int) -> Found:
    """What a rank of the pool does."""
    with ranks.arena(rank, machine, max_M=512, max_N=1024) as arena:
        rows = payload.rows(payload.SIZES[machine.kind], with_nccl=True)
        tables = payload.Tables(rank, world_size, arena.device, rows, count, seed)
        warm = payload.Eager(tables, rows, len(rows))
        calls = payload.Eager(tables, rows, count)
        order = payload.sequence(rows, count, seed)
        choose = random.Random(seed)
        failures: list[str] = []
        started = time.monotonic()
        with payload.reporting(failures, rank):
            for index in range(len(rows)):  # every kernel is compiled
                warm.call(index)
            ranks.synchronise(arena.device)
            ranks.gather(None)
            started = time.monotonic()
            for number, index in enumerate(order):
                if number % LATE_EVERY == 0:
                    late, by_s = choose.randrange(world_size), choose.uniform(0, LATEST_S)
                    if late == rank:
                        ranks.be_late(arena.device, by_s)
                calls.call(index)
            ranks.synchronise(arena.device)
            arena.check()
        seconds = time.monotonic() - started
        failures += warm.failures() + calls.failures()
    done = len(calls.chosen)
    if done < count:
        failures.append(f"rank {rank}: {done} of {count} calls were made")
    return Found(
        {
            "calls": done,
            "mismatches": calls.mismatches(),
            "kinds of calls": len(rows),
            "seconds": round(seconds, 1),
            "calls a second": round(done / max(seconds, 1e-9)),
            "seed": seed,
        },
        _by_plan(calls) if rank == 0 else [],
        failures,
    )


def _by_plan(calls: payload.Eager) -> list[dict]:
    numbers: dict[tuple[str, str], int] = {}
    for index in calls.chosen:
        row = calls.rows[index]
        numbers[row.op, row.plan] = numbers.get((row.op, row.plan), 0) + 1
    return [{"op": op, "plan": plan, "calls": number} for (op, plan), number in sorted(numbers.items())]
