"""The parts of the proof, as the process sees them that starts the ranks: how much, for how long, what comes of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tests.dist import RankFailed
from tests.proof import bits, delay, faults, fuzzed, hog, replay, sanitizer, soak
from tests.proof.ranks import Machine
from tests.proof.report import Found, merged

STARTS = 5  # of processes, for equal bits
FUZZ_JOBS = {"cuda": 4, "cpu": 1}  # side by side: most of the time goes into compiling
# In nanoseconds the hog's is a number of 64 bits, as the usual one: else kernels would be compiled anew for it, and
# what is compiled beside a hog cannot be loaded before the hog ends.
TIMEOUT_S = {"faults": 3.0, "hog": 2.5}


@dataclasses.dataclass(frozen=True)
class Part:
    """run(machine, count, seed, limit_s). counts: how much by default, by kind of machine."""

    run: Callable[[Machine, int, int, float], Found]
    what: str
    counts: dict[str, int]
    limit_s: float


def _in_a_pool(machine: Machine, task: Callable, *args, limit_s: float) -> list[Found]:
    pool = machine.pool()
    try:
        return pool.run(task, machine, *args, timeout=limit_s)
    finally:
        pool.kill()


def _soak(machine: Machine, count: int, seed: int, limit_s: float) -> Found:
    return merged(_in_a_pool(machine, soak.run, count, seed, limit_s=limit_s), "mismatches")


def _replay(machine: Machine, count: int, seed: int, limit_s: float) -> Found:
    return merged(_in_a_pool(machine, replay.run, count, seed, limit_s=limit_s), "mismatches")


def _bits(machine: Machine, count: int, seed: int, limit_s: float) -> Found:
    return bits.run(machine, STARTS, count, seed, limit_s)


def _fuzz(machine: Machine, count: int, seed: int, limit_s: float) -> Found:
    """Several jobs side by side, each with seeds of its own."""
    jobs = FUZZ_JOBS[machine.kind]
    share = -(-count // jobs)

    def job(number: int) -> Found:
        own = min(share, count - number * share)
        return merged(_in_a_pool(machine, fuzzed.run, own, seed + number * share, 0.8 * limit_s, limit_s=limit_s))

    with ThreadPoolExecutor(jobs) as side_by_side:
        found = list(side_by_side.map(job, range(-(-count // share))))
    whole = merged(found, "cases")
    whole.counts |= {"seed": seed, "jobs": jobs, "seconds": max(one.counts["seconds"] for one in found)}
    return whole


def _delay(machine: Machine, count: int, seed: int, limit_s: float) -> Found:
    """The build as it is shipped, then each mutant. count: settings of a sweep."""
    whole = Found()
    for mutant in (None, *delay.MUTANTS_ON[machine.kind]):
        settings = delay.settings(machine.world_size)[:count]
        swept = _in_a_pool(machine, delay.run, mutant, settings, delay.CALLS[machine.kind], seed, limit_s=limit_s / 2)
        found = merged(swept, "calls")
        line, failures = delay.judge(mutant, found)
        whole.rows.append(line)
        whole.failures += failures
        if mutant is None:
            whole.counts = found.counts
    whole.counts["mutants noticed"] = len(whole.rows) - 1 - sum(text.startswith("mutant") for text in whole.failures)
    return whole


def _faults(machine: Machine, count: int, seed: int, limit_s: float) -> Found:
    chosen = faults.every_fault(machine.world_size)[:count]
    return faults.run(machine, chosen, TIMEOUT_S["faults"], limit_s / 2)


def _hog(machine: Machine, count: int, seed: int, limit_s: float) -> Found:
    return merged(_in_a_pool(machine, hog.run, count, TIMEOUT_S["hog"], seed, limit_s=limit_s))


def _sanitizer(machine: Machine, count: int, seed: int, limit_s: float) -> Found:
    return sanitizer.run(machine, sanitizer.TOOLS[:count], limit_s / count)


PARTS = {
    "soak": Part(_soak, "calls in a row", {"cuda": 1_000_000, "cpu": 400}, 290),
    "replay": Part(_replay, "replays of two graphs", {"cuda": 100_000, "cpu": 100}, 200),
    "bits": Part(_bits, "repetitions, eager and in a graph", {"cuda": 20, "cpu": 3}, 200),
    "fuzz": Part(_fuzz, "random cases", {"cuda": 2000, "cpu": 200}, 240),
    "delay": Part(_delay, "settings of a sweep", {"cuda": 90, "cpu": 12}, 300),
    "faults": Part(_faults, "faults", {"cuda": 20, "cpu": 20}, 240),
    "hog": Part(_hog, "calls a trial", {"cuda": 4, "cpu": 2}, 400),
    "sanitizer": Part(_sanitizer, "tools", {"cuda": 3, "cpu": 3}, 400),
}


def run(name: str, machine: Machine, count: int | None, seed: int, limit_s: float | None) -> Found:
    """One part. Ranks that fail, die or hang are a violation."""
    part = PARTS[name]
    try:
        return part.run(machine, count or part.counts[machine.kind], seed, limit_s or part.limit_s)
    except RankFailed as error:
        return Found(failures=[str(error)])
