"""compute-sanitizer over small calls of every op and plan, each rank in a process of its own under the tool.

initcheck sees what this process's kernels store, and neither what a peer does nor what the copy engine of an SM brings,
cuBLAS's included: for it the arena is filled first, and so is what torch's allocator hands out. Of a result that was
not written it then says nothing; the comparison does, since what fills it is NaN.
A tool that is not there, or refuses the machine, is a violation: nothing was checked. The same program runs without a
tool before: it compiles the kernels for all of them, which under a tool takes minutes.
"""

from __future__ import annotations

import dataclasses
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from tests.proof import payload, ranks
from tests.proof.report import Found

TOOLS = ("memcheck", "synccheck", "initcheck")
NO_TOOL = "no tool"
# What torch asks of the driver may be refused, and it copes: memory accesses are what is looked for.
# After some reports the rest tell nothing new, and each costs time.
OPTIONS = {"memcheck": ("--report-api-errors", "no"), "initcheck": ("--print-limit", "20")}
SANITIZER = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
SUMMARY = re.compile(r"ERROR SUMMARY: (\d+) error")
FILLED_BYTES = 1 << 29
PATIENCE_S = 300.0  # of a wait in a kernel, many times slower than usual
OURS = re.compile(r"\bcalls ([0-9]+), wrong ([0-9]+)\b")


@dataclasses.dataclass
class Checked:
    """What one rank's process said."""

    tool: str
    rank: int
    exit_code: int | None
    output: str


def run(machine: ranks.Machine, tools: tuple[str, ...], limit_s: float, sanitizer: str = SANITIZER) -> Found:
    """One tool after the other, each bounded: processes that share a GPU and wait for each other across GPUs would wait
    for their slices of time above all."""
    begun = time.monotonic()
    if shutil.which(sanitizer) is None:
        return Found(failures=[f"there is no {sanitizer}: nothing was checked"])
    plain = [failure for one in _ranks(machine, NO_TOOL, limit_s, sanitizer) for failure in judge(one)[1]]
    if plain:
        return Found(counts={"processes": machine.world_size}, failures=plain)
    found = Found()
    for tool in tools:
        started = time.monotonic()
        for one in _ranks(machine, tool, limit_s, sanitizer):
            line, failures = judge(one)
            found.rows.append(line | {"s": round(time.monotonic() - started, 1)})
            found.failures += failures
    found.counts = {
        "processes": len(found.rows),
        "errors": sum(line["errors"] or 0 for line in found.rows),
        "calls": sum(line["calls"] or 0 for line in found.rows),
        "seconds": round(time.monotonic() - begun, 1),
    }
    return found


def judge(one: Checked) -> tuple[dict, list[str]]:
    """A line of the table, and the violations."""
    summary, ours = SUMMARY.search(one.output), OURS.search(one.output)
    errors = int(summary[1]) if summary else None
    calls, wrong = (int(ours[1]), int(ours[2])) if ours else (None, None)
    what = f"{one.tool}, rank {one.rank}"
    tail = "\n".join(one.output.strip().split("\n")[-25:])
    first = one.output[max(0, one.output.find("=========")) :][:2000]
    failures = []
    if one.exit_code is None:
        failures.append(f"{what}: not done within its time\n{first}\n...\n{tail}")
    elif (errors is None and one.tool != NO_TOOL) or not calls or one.exit_code:
        failures.append(f"{what}: nothing was checked, or it ended badly, exit code {one.exit_code}\n{tail}")
    if errors:
        failures.append(f"{what}: {errors} errors\n{first}")
    if wrong:
        failures.append(f"{what}: {wrong} wrong results")
    return {"tool": one.tool, "rank": one.rank, "errors": errors, "calls": calls, "wrong": wrong}, failures


def _ranks(machine: ranks.Machine, tool: str, limit_s: float, sanitizer: str) -> list[Checked]:
    with tempfile.TemporaryDirectory(prefix="tpo-sanitizer-") as folder:
        files = [Path(folder, f"rank_{rank}") for rank in range(machine.world_size)]
        processes = []
        env = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}  # as the ranks of tests/dist.py
        for rank, file in enumerate(files):
            arguments = (tool, str(rank), str(machine.world_size), machine.kind, str(Path(folder, "store")))
            python = (sys.executable, "-m", "tests.proof.sanitizer", *arguments)
            command = [*python] if tool == NO_TOOL else [sanitizer, "--tool", tool, *OPTIONS.get(tool, ()), *python]
            with file.open("w") as output:
                processes.append(subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=env))
        deadline = time.monotonic() + limit_s
        codes: list[int | None] = []
        for process in processes:
            try:
                codes.append(process.wait(max(0.1, deadline - time.monotonic())))
            except subprocess.TimeoutExpired:
                codes.append(None)
        for process in processes:
            process.kill()
            process.wait()
        return [Checked(tool, rank, code, files[rank].read_text()) for rank, code in enumerate(codes)]


def _fill_allocator(device: torch.device) -> None:
    """The blocks that torch's allocator will give the current stream hold NaN: large ones, and those up to 1 MiB."""
    if device.type == "cuda":
        sizes = [FILLED_BYTES, *[1 << 20] * 64]
        held = [torch.full((size // 4,), torch.nan, device=device) for size in sizes]
        torch.cuda.synchronize(device)
        del held  # to the allocator, not to the driver


def _rank(tool: str, rank: int, machine: ranks.Machine, store: str) -> None:
    """One process: every kind of call, twice."""
    ranks.take_device(rank, machine)
    files = dist.FileStore(store, machine.world_size)
    dist.init_process_group(
        "gloo", store=files, rank=rank, world_size=machine.world_size, timeout=timedelta(seconds=PATIENCE_S)
    )
    with ranks.arena(rank, machine, max_M=512, max_N=1024, timeout_s=PATIENCE_S) as arena:
        if tool == "initcheck":
            arena.store.buffer[arena.layout.one_shot :].zero_()
            _fill_allocator(arena.device)
            ranks.synchronise(arena.device)
            ranks.gather(None)
        rows = payload.rows(payload.FEW_SIZES[machine.kind])
        tables = payload.Tables(rank, machine.world_size, arena.device, rows, 2 * len(rows))
        eager = payload.Eager(tables, rows, 2 * len(rows))
        for index in [*range(len(rows)), *reversed(range(len(rows)))]:
            eager.call(index)
        ranks.synchronise(arena.device)
        arena.check()
        print(f"calls {len(eager.chosen)}, wrong {eager.mismatches()}", flush=True)
        ranks.gather(None)
    os._exit(0)  # nothing of the end is looked at


if __name__ == "__main__":
    _rank(sys.argv[1], int(sys.argv[2]), ranks.Machine(int(sys.argv[3]), sys.argv[4]), sys.argv[5])
