"""Random calls (tests/fuzz.py) against float64 with the bound that follows from what each plan rounds."""

from __future__ import annotations

import dataclasses
import time

from tests import fuzz
from tests.ops.calls import Call
from tests.proof import ranks
from tests.proof.report import Found

# Sizes whose float64 truth is cheap, and few kinds of tiles, since each is compiled; some M exceed the arena.
MEDIUM = dataclasses.replace(
    fuzz.MODELS,
    M=(0, 1, 2, 3, 7, 8, 15, 16, 17, 31, 63, 64, 65, 127, 128, 129, 255, 513, 1000, 1025),
    N=(8, 72, 128, 1024),
    K=(16, 64, 100, 1024),
    elements=(0, 1, 7, 8, 1000, 4099, 8192, 65_537, 131_072, 524_288),
    max_M=1024,
    max_N=1024,
)
DOMAINS = {"cuda": MEDIUM, "cpu": fuzz.SMALL}
TOGETHER = 20  # calls without a pause between them


def run(rank: int, world_size: int, machine: ranks.Machine, count: int, seed: int, budget_s: float) -> Found:
    """What a rank of the pool does. Seeds from `seed` on; after `budget_s` no more are begun."""
    begun = time.monotonic()
    found, made = Found(), 0
    domain = DOMAINS[machine.kind]
    with ranks.arena(rank, machine, domain.max_M, domain.max_N) as arena:
        device = arena.device.type

        def plans(call: Call) -> list[str]:
            case = call.case
            return ranks.plans(call.op, case.M, case.N, case.K, case.dtype, with_nccl=True)

        for start in range(seed, seed + count, TOGETHER):
            if ranks.gather(time.monotonic() - begun > budget_s)[0]:
                break
            calls = [
                fuzz.case(each, world_size, plans, domain) for each in range(start, min(start + TOGETHER, seed + count))
            ]
            verdict = fuzz.run(calls, rank, device)
            made += len(calls)
            if verdict is not None:
                report = fuzz.report(calls, verdict, lambda some: fuzz.run(some, rank, device))
                found.failures.append(f"seeds from {start}: {report}")
                break
    if made < count and not found.failures:
        found.failures.append(f"{made} of {count} cases within {budget_s:g} s")
    if rank:
        found.failures = []  # every rank has found the same
    found.counts = {"cases": made, "seed": seed, "seconds": round(time.monotonic() - begun, 1)}
    return found
