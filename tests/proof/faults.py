"""Faults put in on purpose, eager and in graphs: what the survivors raise, whom they name, and how soon.

    killed       the rank gets SIGKILL while the others are in the call
    stopped      the rank gets SIGSTOP; it is there and never arrives
    late         the rank makes the call after the others have given up
    mismatch     the rank makes another call
    exception    the rank raises before its call, makes none, and closes the group on its way out

Each fault is followed by a call that must be refused. Then the ranks that are left end by themselves, and every job
begins with calls that must be right, on devices where others have just failed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import os
import pathlib
import pickle
import signal
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

import torch

import tp_overlap_kernels as tpo
from tests.dist import RankFailed, RankPool
from tests.proof import builds, payload, ranks
from tests.proof.replay import Replayed
from tests.proof.report import Found

KINDS = ("killed", "stopped", "late", "mismatch", "exception")
DEADLY = ("killed", "stopped")
MODES = ("eager", "graph")
# What the others raise, and within how many seconds, the timeout included or not.
EXPECTED = {
    "killed": ("PeerDied", 1.0, False),
    "stopped": ("PeerTimeout", 2.0, True),
    "late": ("PeerTimeout", 2.0, True),
    "mismatch": ("CallMismatch", 1.0, False),
    "exception": ("PeerClosed", 1.0, False),
}
EXIT_S = 5.0


@dataclasses.dataclass(frozen=True)
class Fault:
    kind: str
    victim: int
    mode: str

    def __str__(self) -> str:
        return f"rank {self.victim} {self.kind}, {self.mode}"


def every_fault(world_size: int) -> list[Fault]:
    return [Fault(*each) for each in itertools.product(KINDS, (0, world_size - 1), MODES)]


@dataclasses.dataclass
class Story:
    """What a rank saw. seconds: from the fault, or from its call, to the error."""

    rank: int
    clean: bool
    error: str = ""
    text: str = ""
    seconds: float = 0.0
    nan: bool | None = None  # of the output, where the call returned one
    refused: str = ""  # the error of the next call
    call: str = ""  # op and plan


class Job(RankPool):
    """Ranks that end by themselves, also after one of them has died."""

    exits: list[float | None] = []  # noqa: RUF012  seconds to the end of each rank; None: it had to be killed

    def kill(self) -> None:
        started = time.monotonic()
        for pipe in self._pipes:
            with contextlib.suppress(OSError):
                pipe.send_bytes(pickle.dumps(None))
        self.exits = []
        for process in self._processes:
            process.join(max(0.0, EXIT_S + 1 - (time.monotonic() - started)))
            self.exits.append(None if process.is_alive() else time.monotonic() - started)
        super().kill()


def suffer(rank: int, world_size: int, machine: ranks.Machine, faults: list[Fault], timeout_s: float, folder: str):
    """What a rank of the pool does: the faults, one group each. Survivors leave their stories in the folder."""
    for fault in faults:
        with ranks.arena(rank, machine, max_M=512, max_N=1024, timeout_s=60.0) as arena:
            story = _suffer_one(rank, world_size, machine, arena, fault, timeout_s, pathlib.Path(folder))
            pathlib.Path(folder, f"{fault} {rank}").write_text(json.dumps(dataclasses.asdict(story)))
            ranks.synchronise(arena.device)
        if fault.kind == "stopped":
            _end_the_stopped(fault, world_size, pathlib.Path(folder))


def _end_the_stopped(fault: Fault, world_size: int, folder: pathlib.Path) -> None:
    """Once every survivor has told, since its death would be another fault."""
    told = [folder / f"{fault} {rank}" for rank in range(world_size) if rank != fault.victim]
    deadline = time.monotonic() + EXIT_S
    while not all(file.exists() for file in told) and time.monotonic() < deadline:
        time.sleep(0.01)
    with contextlib.suppress(ProcessLookupError):
        os.kill(int((folder / f"{fault} pid").read_text()), signal.SIGKILL)


def _suffer_one(
    rank: int, world_size: int, machine: ranks.Machine, arena, fault: Fault, timeout_s: float, folder: pathlib.Path
) -> Story:
    rows = payload.rows(payload.FEW_SIZES[machine.kind])
    row = rows[every_fault(world_size).index(fault) % len(rows)]  # every plan has its turn
    other = dataclasses.replace(row, N=row.N + 8) if row.op == "all_reduce" else dataclasses.replace(row, M=row.M + 8)
    tables = payload.Tables(rank, world_size, arena.device, [row, other], 16)
    good = payload.Eager(tables, [row, other], 4)
    for index in (0, 1, 1, 0):
        good.call(index)
    ranks.synchronise(arena.device)
    ranks.gather(None)
    arena.timeout_s = timeout_s  # short from here on, where nothing is compiled any more
    builds.forget()
    results: dict[payload.Row, torch.Tensor] = {}

    def body(row: payload.Row) -> None:
        results[row] = payload.invoke(row, tables.given(row, 0), tables.weight(row))

    calls = {each: (lambda each=each: body(each)) for each in (row, other)}
    if fault.mode == "graph":
        calls = {each: Replayed(call, arena.device).replay for each, call in calls.items()}
    ranks.synchronise(arena.device)
    arena.check()
    story = Story(rank, clean=good.mismatches() == 0, call=f"{row.op} {row.plan}")
    ranks.gather(None)
    began = time.time()
    if rank == fault.victim:
        if fault.kind in DEADLY:
            time.sleep(0.3)  # the others are in the call
            (folder / f"{fault} pid").write_text(str(os.getpid()))
            (folder / f"{fault} when").write_text(repr(time.time()))
            os.kill(os.getpid(), signal.SIGKILL if fault.kind == "killed" else signal.SIGSTOP)
        elif fault.kind == "late":
            time.sleep(arena.timeout_s + 1.0)
            began = time.time()
        elif fault.kind == "exception":
            tpo.close()
            return story
    results.clear() if fault.mode == "eager" else None
    mine = other if fault.kind == "mismatch" and rank == fault.victim else row
    story.error, story.text = _error_of(lambda: (calls[mine](), ranks.synchronise(arena.device), arena.check()))
    story.seconds = time.time() - began
    with contextlib.suppress(FileNotFoundError):
        story.seconds = time.time() - float((folder / f"{fault} when").read_text())
    if mine in results and arena.device.type == "cuda":
        story.nan = bool(results[mine].isnan().all())
    story.refused, _ = _error_of(lambda: payload.invoke(row, tables.given(row, 0), tables.weight(row)))
    return story


def _error_of(call) -> tuple[str, str]:
    try:
        call()
    except tpo.TpOverlapError as error:
        return type(error).__name__, str(error)
    return "", ""


def run(machine: ranks.Machine, faults: list[Fault], timeout_s: float, limit_s: float, at_once: int = 4) -> Found:
    """Deadly faults in ranks of their own, the others of one kind in the same ranks; `at_once` jobs side by side."""
    begun = time.monotonic()
    jobs = [[fault] for fault in faults if fault.kind in DEADLY]
    jobs += [same for kind in KINDS[2:] if (same := [fault for fault in faults if fault.kind == kind])]
    found = Found()
    with ThreadPoolExecutor(at_once) as side_by_side:
        for lines, failures in side_by_side.map(lambda job: _run_job(machine, job, timeout_s, limit_s), jobs):
            found.rows += lines
            found.failures += failures
    afterwards, failures = _run_job(machine, [Fault("mismatch", 0, "eager")], timeout_s, limit_s)
    found.failures += [f"after all faults: {text}" for text in failures]
    found.counts = {
        "faults": len(found.rows),
        "as promised": sum(line["as promised"] == "yes" for line in found.rows),
        "a job afterwards": "clean" if afterwards and not failures else "not clean",
        "timeout s": timeout_s,
        "seconds": round(time.monotonic() - begun, 1),
    }
    if len(found.rows) < len(faults):
        found.failures.append(f"{len(found.rows)} of {len(faults)} faults were put in")
    return found


def _run_job(machine: ranks.Machine, faults: list[Fault], timeout_s: float, limit_s: float):
    """The table's lines and the violations of one job."""
    pool = Job(machine.world_size)
    died = ""
    with tempfile.TemporaryDirectory(prefix="tpo-faults-") as folder:
        try:
            pool.run(suffer, machine, faults, timeout_s, folder, timeout=limit_s)
        except RankFailed as error:
            died = str(error)
        finally:
            pool.kill()
        stories = {
            fault: [
                Story(**json.loads(file.read_text()))
                for rank in range(machine.world_size)
                if (file := pathlib.Path(folder, f"{fault} {rank}")).exists()
            ]
            for fault in faults
        }
    lines, failures = [], []
    for fault, told in stories.items():
        wrong = judge(fault, told, machine.world_size, timeout_s)
        if fault.kind in DEADLY:
            survivors = [s for rank, s in enumerate(pool.exits) if rank != fault.victim]
            wrong += [f"a survivor had not ended after {EXIT_S} s" for s in survivors if s is None or s > EXIT_S]
        elif died:
            wrong.append(f"the job failed: {died}")
        survivors = [story for story in told if story.rank != fault.victim]
        worst = max(survivors, key=lambda story: story.seconds, default=Story(-1, False))
        lines.append(
            {
                "fault": str(fault),
                "call": worst.call,
                "raised": worst.error,
                "after s": round(worst.seconds, 2),
                "refused": worst.refused,
                "as promised": "no" if wrong else "yes",
            }
        )
        failures += [f"{fault}: {text}" for text in wrong]
    return lines, failures


def judge(fault: Fault, stories: list[Story], world_size: int, timeout_s: float) -> list[str]:
    """What is wrong with the stories of those who lived."""
    kind, limit_s, after_timeout = EXPECTED[fault.kind]
    limit_s += timeout_s if after_timeout else 0.0
    tellers = {story.rank for story in stories}
    lacking = set(range(world_size)) - tellers - ({fault.victim} if fault.kind in DEADLY else set())
    wrong = [f"rank {rank} left no story" for rank in sorted(lacking)]
    survivors = [story for story in stories if story.rank != fault.victim]
    if survivors and not any(f"rank {fault.victim}" in story.text for story in survivors):
        # Some may wait for another survivor, which itself waits for the victim.
        wrong.append(f"nobody names rank {fault.victim}: {[story.text for story in survivors]}")
    for story in stories:
        told = f"rank {story.rank} raised {story.error or 'nothing'} after {story.seconds:.2f} s: {story.text}"
        if not story.clean:
            wrong.append(f"rank {story.rank}: a call before the fault was wrong")
        if story.rank == fault.victim:
            if story.seconds > timeout_s + 2.0:
                wrong.append(f"the victim waited too long; {told}")
            if fault.kind == "mismatch" and story.error != kind:
                wrong.append(told)
            continue
        if story.error != kind or story.seconds > limit_s:
            wrong.append(f"{told}; expected {kind} within {limit_s:g} s")
        if story.nan is False:
            wrong.append(f"rank {story.rank}: the output is not NaN")
        if story.refused != kind:
            wrong.append(f"rank {story.rank}: the next call raised {story.refused or 'nothing'}")
    return wrong
