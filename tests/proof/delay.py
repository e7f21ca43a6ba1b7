"""Delays between any two steps of the protocol: five points, each rank, three choices of CTAs, 2 to 1000 us.

    point         after data, before flag | after flag | before wait | after wait, before read | before exit
    who           all threads of the CTAs in half of the calls, all but the first warp (which signals) in the others
    mutants       builds whose order is broken in one place; a sweep must notice each, or it shows nothing

The delays are a table on the device that the stream rewrites between settings: one build serves all of them.
"""

from __future__ import annotations

import dataclasses
import itertools
import random
import time

import torch

from tests.proof import builds, payload, ranks
from tests.proof.report import Found

POINTS = ("after data", "after flag", "before wait", "before read", "before exit")
CTAS = ("first", "last", "odd")
DELAYS_US = (50, 2, 1000)
CALLS = {"cuda": {2: 2000, 50: 2000, 1000: 200}, "cpu": {2: 24, 50: 24, 1000: 24}}  # of a setting, by its delay
FIRST_WARP = 32  # threads
MUTANTS_ON = {"cuda": tuple(builds.MUTANTS), "cpu": ("one staging half", "no wait for done")}  # x86 needs no barrier


@dataclasses.dataclass(frozen=True)
class Setting:
    point: int
    rank: int
    ctas: int
    delay_us: int

    def __str__(self) -> str:
        return f"{self.delay_us} us {POINTS[self.point]}, rank {self.rank}, CTAs: {CTAS[self.ctas]}"


def settings(world_size: int, delays_us: tuple[int, ...] = DELAYS_US) -> list[Setting]:
    """All of them; with more than two ranks, the first and the last are delayed."""
    late = (0, world_size - 1)
    sweep = itertools.product(delays_us, range(len(POINTS)), late, range(len(CTAS)))
    return [Setting(point, rank, ctas, us) for us, point, rank, ctas in sweep]


def run(
    rank: int,
    world_size: int,
    machine: ranks.Machine,
    mutant: str | None,
    chosen: list[Setting],
    calls: dict[int, int],
    seed: int,
) -> Found:
    """What a rank of the pool does: the sweep. Of a mutant it ends with the first setting that any rank notices.

    calls: of one setting, by its delay.
    """
    begun = time.monotonic()
    rows_by_setting = []
    failures: list[str] = []
    made = noticed = 0
    with ranks.arena(rank, machine, max_M=512, max_N=1024) as arena:
        table = torch.zeros(len(POINTS), 3, dtype=torch.int64, device=arena.device)
        with builds.built((mutant or "clean").replace(" ", "_"), mutant, table.data_ptr()):
            rows = [row for row in payload.rows(payload.FEW_SIZES[machine.kind]) if builds.concerns(mutant, row.plan)]
            tables = payload.Tables(rank, world_size, arena.device, rows, max(calls.values()), seed)
            warm = payload.Eager(tables, rows, len(rows))
            with payload.reporting(failures, rank):
                for index in range(len(rows)):
                    warm.call(index)
                ranks.synchronise(arena.device)
            for number, setting in enumerate(chosen):
                eager = payload.Eager(tables, rows, calls[setting.delay_us])
                order = random.Random(seed + number).choices(range(len(rows)), k=calls[setting.delay_us])
                late = [list(_delayed(setting, rank, thread)) for thread in (0, FIRST_WARP)]
                late_rows = [torch.tensor(each, dtype=torch.int64).to(arena.device) for each in late]
                with payload.reporting(failures, rank):
                    for half, turn in enumerate((0, len(order) // 2)):
                        table.copy_(late_rows[half])
                        for index in order[turn : len(order) // 2 if half == 0 else None]:
                            eager.call(index)
                    table.zero_()
                    ranks.synchronise(arena.device)
                    arena.check()
                wrong = eager.mismatches()
                made += len(eager.chosen)
                everyone = ranks.gather((wrong, bool(failures), eager.failures(2)))
                wrong = sum(each for each, _, _ in everyone)
                noticed += wrong > 0
                if wrong:
                    rows_by_setting.append({"setting": str(setting), "mismatches": wrong})
                if mutant is None and wrong:
                    failures += [f"{setting}: {text}" for text in everyone[rank][2]]
                if any(failed for _, failed, _ in everyone) or (mutant is not None and wrong):
                    break  # the group is of no use any more, or nothing more is to be shown
            ranks.synchronise(arena.device)
    return Found(
        {
            "settings": number + 1,
            "calls": made,
            "mismatches": sum(row["mismatches"] for row in rows_by_setting),
            "settings that notice": noticed,
            "seconds": round(time.monotonic() - begun, 1),
            "seed": seed,
        },
        rows_by_setting,
        failures,
    )


def _delayed(setting: Setting, rank: int, thread: int):
    """The table's rows."""
    for point in range(len(POINTS)):
        late = point == setting.point and rank == setting.rank
        yield [1000 * setting.delay_us * late, setting.ctas, thread]


def judge(mutant: str | None, found: Found) -> tuple[dict, list[str]]:
    """A line of the table, and what is wrong. The library's own errors in a mutant are no violation: they notice it."""
    name = mutant or "as shipped"
    wrong = found.counts["mismatches"]
    first = found.rows[0]["setting"] if found.rows else (found.failures[0] if found.failures else "")
    line = {"build": name, **{key: found.counts[key] for key in ("settings", "calls", "mismatches", "seconds")}}
    line["first noticed by"] = first
    if mutant is None:
        return line, found.failures
    noticed = bool(wrong or found.failures)
    return line, [] if noticed else [f"mutant {mutant!r}: no setting notices it"]
