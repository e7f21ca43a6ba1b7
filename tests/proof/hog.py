"""Calls beside a kernel that leaves them few SMs: each call is right, or the group fails within its timeout.

The hog has one CTA of 1024 threads an SM that fill its registers, so that nothing else runs there, and stays until the
host ends it or its own time is over. A persistent kernel then finds fewer CTAs resident than it has launched: what its
`Live` argument rests on does not hold, and the bound of its waits must do. A kernel of clusters, ours or cuBLAS's, does
not start while fewer SMs than a cluster are free, as it would behind any kernel: then the call must end once they are.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import time
from collections.abc import Iterator

import torch
import triton
import triton.language as tl

import tp_overlap_kernels as tpo
from tests.proof import payload, ranks
from tests.proof.report import Found

FREE_SMS = (1, 66)
CLUSTERED = (
    "sm90",
    "sm90_add",
    "chunked",
    "unfused_push",
    "unfused_sentinel",
)  # plans that need more than one SM to start
HELD = tl.constexpr(65536)  # f32 values a CTA keeps in registers: 64 a thread
WARPS = 32
HOG_S = 8.0  # its own limit, longer than any timeout here


@triton.jit
def hold(values_ptr, ended_ptr, started_ptr, limit_ns):
    """Keep an SM busy until *ended_ptr is not 0. values: HELD f32. started: [CTAs] int64, the SM of each."""
    index = tl.arange(0, HELD)
    value = tl.load(values_ptr + index)
    sm = tl.inline_asm_elementwise("mov.u32 $0, %smid;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.store(started_ptr + tl.program_id(0), sm.to(tl.int64) + 1)
    begun = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
    now = begun
    ended = tl.load(ended_ptr, volatile=True)
    while (ended == 0) & (now - begun < limit_ns):
        value = value * 1.0001 + 1.0
        tl.inline_asm_elementwise("nanosleep.u32 1000; mov.u32 $0, 0;", "=r", [], dtype=tl.int32, is_pure=False, pack=1)
        now = tl.inline_asm_elementwise("mov.u64 $0, %globaltimer;", "=l", [], dtype=tl.int64, is_pure=False, pack=1)
        ended = tl.load(ended_ptr, volatile=True)
    tl.store(values_ptr + index, value)


UNFINISHED, COMPLETED = "unfinished", "completed"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A rank's: what the calls came to beside the hog, and in the end; an error's name, or one of the two above."""

    beside: str
    after: str
    wrong: int
    seconds: float
    taken: int  # SMs, by the hog


class Hog:
    """On a stream of its own. On the CPU, where threads share what there is, it is a name and no more."""

    def __init__(self, device: torch.device):
        self.device = device
        if device.type == "cuda":
            self.sms = torch.cuda.get_device_properties(device).multi_processor_count
            self._stream, self._ending = torch.cuda.Stream(device), torch.cuda.Stream(device)
            self._values = torch.zeros(HELD.value, device=device)
            self._ended = torch.zeros(1, dtype=torch.int64, device=device)  # not the host's: 131 CTAs look at it
            self._true = torch.ones(1, dtype=torch.int64, pin_memory=True)
            self._started = torch.zeros(self.sms, dtype=torch.int64, pin_memory=True)
            with self.holding(self.sms - 1):  # compiled before it matters
                pass

    @contextlib.contextmanager
    def holding(self, free_sms: int) -> Iterator[int]:
        """All SMs but these are taken while the context lasts. Gives the number that were taken."""
        if self.device.type == "cpu":
            yield 0
            return
        ctas = self.sms - free_sms
        self._ended.zero_()
        self._started.zero_()
        torch.cuda.synchronize(self.device)
        with torch.cuda.stream(self._stream):
            hold[(ctas,)](self._values, self._ended, self._started, int(HOG_S * 1e9), num_warps=WARPS)
        try:
            deadline = time.monotonic() + 30
            while int((self._started != 0).sum()) < ctas and time.monotonic() < deadline:
                time.sleep(1e-4)
            taken = self._started[self._started != 0].unique().numel()
            yield taken
        finally:
            with torch.cuda.stream(self._ending):
                self._ended.copy_(self._true, non_blocking=True)  # by the copy engine, which needs no SM
            self._stream.synchronize()


def run(rank: int, world_size: int, machine: ranks.Machine, calls: int, timeout_s: float, seed: int) -> Found:
    """What a rank of the pool does: for each number of free SMs, hog on rank 0 or everywhere, each row."""
    begun = time.monotonic()
    found = Found(counts={"trials": 0, "completed": 0, "raised": 0, "mismatches": 0})
    hog = Hog(ranks.take_device(rank, machine))
    with ranks.arena(rank, machine, max_M=512, max_N=1024):
        rows = payload.rows(payload.FEW_SIZES[machine.kind])
        picked = list({(row.op, row.plan): row for row in rows if not is_twofold(row)}.values())  # the largest of each
        tables = payload.Tables(rank, world_size, hog.device, rows, calls, seed)
        for index in range(len(picked)):
            payload.Eager(tables, picked, 1).call(index)
        ranks.synchronise(hog.device)
    everywhere = tuple(range(min(world_size, torch.cuda.device_count() or world_size)))  # one hog a GPU
    for free_sms, hogs, row in itertools.product(FREE_SMS, ((0,), everywhere), picked):
        with ranks.arena(rank, machine, max_M=512, max_N=1024, timeout_s=timeout_s) as arena:
            eager = payload.Eager(tables, [row], calls)
            with hog.holding(free_sms) if rank in hogs else contextlib.nullcontext(0) as taken:
                ranks.gather(None)
                started = time.monotonic()
                outcome = _outcome(arena, timeout_s + 2.0, lambda eager=eager: [eager.call(0) for _ in range(calls)])
                seconds = time.monotonic() - started
                ranks.gather(None)  # the hog stays until all have ended
            afterwards = _outcome(arena, timeout_s + 2.0) if outcome == UNFINISHED else outcome
            ranks.synchronise(arena.device)
            wrong = eager.mismatches() if afterwards == COMPLETED else 0
            everyone = ranks.gather(Trial(outcome, afterwards, wrong, seconds, taken))
        line = judge(free_sms, hogs, row, everyone, timeout_s, hog)
        found.counts["trials"] += 1
        found.counts["completed" if line["outcome"] == COMPLETED else "raised"] += 1
        found.counts["mismatches"] += line.pop("mismatches")
        if rank == 0:
            found.failures += line.pop("failures")
            found.rows.append(line)
            print(line, flush=True)
    found.counts |= {"calls a trial": calls, "timeout s": timeout_s, "seconds": round(time.monotonic() - begun, 1)}
    return found


def is_twofold(row: payload.Row) -> bool:
    """cuBLAS, which waits for nobody, and then an all-reduce, which has trials of its own. A trial takes seconds."""
    return row.op == "gemm_all_reduce" and row.plan.startswith("unfused")


def _outcome(arena, limit_s: float, calls=lambda: None) -> str:
    """What has become of the calls, and of those before them, within the limit. Never waits for the device."""
    try:
        calls()
        if arena.device.type == "cuda":
            event = torch.cuda.Event()
            event.record()
            deadline = time.monotonic() + limit_s
            while not event.query():
                arena.check()
                if time.monotonic() > deadline:
                    return UNFINISHED
                time.sleep(1e-4)
        arena.check()
    except tpo.GroupFailed as failure:
        return type(failure).__name__
    return COMPLETED


def judge(
    free_sms: int, hogs: tuple[int, ...], row: payload.Row, everyone: list[Trial], timeout_s: float, hog: Hog
) -> dict:
    """A line of the table. everyone: by rank."""
    slowest = max(one.seconds for one in everyone)
    wrong = sum(one.wrong for one in everyone)
    what = f"{free_sms} SMs free on ranks {list(hogs)}, {row}"
    failures = []
    if wrong:
        failures.append(f"{what}: {wrong} wrong calls")
    unfinished = [rank for rank, one in enumerate(everyone) if one.beside == UNFINISHED]
    may_not_start = free_sms == 1 and row.plan in CLUSTERED
    if unfinished and not may_not_start:
        failures.append(f"{what}: ranks {unfinished} neither complete nor raise beside it")
    if any(one.after == UNFINISHED for one in everyone):
        failures.append(f"{what}: neither complete nor raise when it has ended")
    if slowest > timeout_s + 2.5:
        failures.append(f"{what}: the host was held for {slowest:.1f} s")
    if hog.device.type == "cuda":
        for rank in hogs:
            if everyone[rank].taken != hog.sms - free_sms:
                failures.append(f"{what}: rank {rank} had {everyone[rank].taken} SMs taken")
    return {
        "free SMs": free_sms,
        "hog on": "rank 0" if len(hogs) == 1 else "all ranks",
        "op": row.op,
        "plan": row.plan,
        "outcome": ", ".join(sorted({one.after for one in everyone} - {COMPLETED})) or COMPLETED,
        "when": "once SMs were free" if unfinished else "beside it",
        "s": round(slowest, 3),
        "mismatches": wrong,
        "failures": failures,
    }
