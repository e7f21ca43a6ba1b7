"""The same bits on every rank, in every repetition, eager and in a graph, under load, and after a new start.

Inputs are random, so that another order of adding shows. A hash stands for the bits of a result: the sum of its 16-bit
words, each times an odd random 64-bit number that belongs to its place, modulo 2^64.
"""

from __future__ import annotations

import time

import torch

from tests.proof import payload, ranks
from tests.proof.replay import Replayed
from tests.proof.report import Found

LOAD = 2048  # of the square products on another stream


def hashes(rank: int, world_size: int, machine: ranks.Machine, repeats: int, seed: int) -> list[dict]:
    """What a rank of the pool does: for every row its hashes, `repeats` eager ones and as many from a graph."""
    with ranks.arena(rank, machine, max_M=512, max_N=1024) as arena:
        found = []
        device = arena.device
        rows = payload.rows(payload.SIZES[machine.kind])
        longest = max(row.M * row.N for row in rows)
        weights = torch.randint(
            -(2**62), 2**62, (longest,), generator=torch.Generator().manual_seed(seed), dtype=torch.int64
        )
        weights = (2 * weights + 1).to(device)
        for row in rows:
            given, weight = _inputs(row, rank, seed, device)
            sums = torch.zeros(2 * repeats, dtype=torch.int64, device=device)
            turn = torch.zeros((), dtype=torch.int64, device=device)

            def call(row=row, given=given, weight=weight, sums=sums, turn=turn) -> None:
                words = payload.invoke(row, given, weight).view(-1).view(torch.int16)
                sums.index_add_(0, turn.view(1), (words * weights[: words.numel()]).sum().view(1))
                turn.add_(1)

            for number in range(repeats):
                if number == repeats // 2:
                    _load(device)
                call()
            graph = Replayed(call, device)  # runs it once
            for number in range(repeats - 1):
                if number == repeats // 2:
                    _load(device)
                graph.replay()
            ranks.synchronise(device)
            arena.check()
            found.append({"row": row, "eager": sums[:repeats].tolist(), "graph": sums[repeats:].tolist()})
    return found


def _inputs(row: payload.Row, rank: int, seed: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1009 * seed + 101 * rank + row.M + row.N)
    if row.op == "all_reduce":
        return torch.randn(row.N, generator=generator).to(device, row.dtype), None
    a, b = torch.randn(row.M, row.K, generator=generator), torch.randn(row.N, row.K, generator=generator)
    return a.to(device, row.dtype), b.to(device, row.dtype)


def _load(device: torch.device) -> None:
    """A millisecond of products beside the calls."""
    if device.type == "cuda":
        stream = torch.cuda.Stream(device)
        with torch.cuda.stream(stream):
            x = torch.zeros(LOAD, LOAD, dtype=torch.bfloat16, device=device)
            for _ in range(20):
                x = x @ x


def run(machine: ranks.Machine, starts: int, repeats: int, seed: int, limit_s: float) -> Found:
    """New processes for each start."""
    begun = time.monotonic()
    by_start = []
    for _ in range(starts):
        pool = machine.pool()
        try:
            left = limit_s - (time.monotonic() - begun)
            by_start.append(pool.run(hashes, machine, repeats, seed, timeout=max(1.0, left)))
        finally:
            pool.kill()
    found = judge(by_start)
    found.counts |= {"starts": starts, "repeats": repeats, "seconds": round(time.monotonic() - begun, 1), "seed": seed}
    return found


def judge(by_start: list[list[list[dict]]]) -> Found:
    """by_start[start][rank][row]. Equal hashes over all of it, but that a reduce-scatter's differ between ranks."""
    found = Found()
    calls = equal = 0
    lines: dict[tuple[str, str], list[int]] = {}
    for index, first in enumerate(by_start[0][0]):
        row = first["row"]
        line = lines.setdefault((row.op, row.plan), [0, 0])
        for rank in range(len(by_start[0])):
            wanted = by_start[0][rank if row.op == "gemm_reduce_scatter" else 0][index]["eager"][0]
            for start, by_rank in enumerate(by_start):
                for mode in ("eager", "graph"):
                    seen = by_rank[rank][index][mode]
                    others = sum(value != wanted for value in seen)
                    line[0], line[1] = line[0] + len(seen), line[1] + len(seen) - others
                    if others:
                        what = f"start {start}, rank {rank}, {mode}, {row}"
                        found.failures.append(f"{what}: {others} of {len(seen)} results have other bits")
    for (op, plan), (of_plan, same) in lines.items():
        calls, equal = calls + of_plan, equal + same
        found.rows.append({"op": op, "plan": plan, "calls": of_plan, "equal": same})
    found.counts |= {"calls": calls, "mismatches": calls - equal}
    return found
