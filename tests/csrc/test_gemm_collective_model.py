"""The protocol of csrc/include/tpo/gemm_collective.cuh as processes that run at random speeds, with no GPU.

Each block has its consumers, its courier, with two staging buffers its fetcher and, for an all-reduce, its collector,
as the kernels have them. What the copy engine is asked to do happens later: it reads its source some time after it was
told, and what it writes is seen some time after that. Of phases of barriers parities alone are known. Every tile says
what it is, so that whoever takes another one for it is found out. Planted errors must be, too.
"""

from __future__ import annotations

import dataclasses
import itertools
import pathlib
import random
import shutil
import subprocess

import pytest

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
needs_nvcc = pytest.mark.skipif(not pathlib.Path(NVCC).exists(), reason="needs nvcc")

STEPS = 400_000  # of the scheduler, far more than any run takes


class Wrong(Exception):
    """Somebody read what was not there yet, or no longer; or nobody can go on."""


@dataclasses.dataclass
class Rank:
    """Words and memory of one rank's arena, and its control words."""

    partial_flags: dict = dataclasses.field(default_factory=dict)  # (tile, source) -> epoch
    result_flags: dict = dataclasses.field(default_factory=dict)  # (owner, tile) -> epoch
    done: dict = dataclasses.field(default_factory=dict)  # source -> epoch
    staging: dict = dataclasses.field(default_factory=dict)  # (source, tile) -> what
    result: dict = dataclasses.field(default_factory=dict)  # (owner, tile) -> what
    epoch: int = 0
    staged: int = 0
    left: int = 0
    turns_begun: int = 0
    turns_ended: int = 0


class Machine:
    """All ranks, the copies in flight, and who does what next."""

    def __init__(self, world: int, seed: int, error: str = ""):
        self.world, self.error = world, error
        self.random = random.Random(seed)
        self.ranks = [Rank() for _ in range(world)]
        self.copies: list = []  # generators: read, then write

    def copy(self, read, write, group: list) -> None:
        """Ask the copy engine. group: what has been asked and is not yet [read, written]."""
        state = [False, False]
        group.append(state)

        def later():
            yield
            value = read()
            state[0] = True
            yield
            write(value)
            state[1] = True

        self.copies.append(later())

    def run(self, processes: list) -> None:
        """Until all have ended. A process yields what it waits for (a function), or None."""
        waiting: dict = {process: None for process in processes}
        for _ in range(STEPS):
            if not waiting:
                return
            ready = [process for process, until in waiting.items() if until is None or until()]
            if self.copies and (not ready or self.random.random() < 0.3):
                copy = self.random.choice(self.copies)
                if next(copy, self) is self:
                    self.copies.remove(copy)
            elif ready:
                process = self.random.choice(ready)
                for _ in range(self.random.choice((1, 1, 3, 20))):
                    waiting[process] = next(process, self)
                    if waiting[process] is self:
                        del waiting[process]
                        break
                    if waiting[process] is not None and not waiting[process]():
                        break
            elif not self.copies:
                raise Wrong("nobody can go on")
        raise Wrong("too many steps")


def turn_of(step: int, run: int, world: int, lead: int, wave: int) -> tuple[int, int]:
    """The function of that name."""
    peers = world - 1
    if lead == 0 or lead >= run:
        return 1 + step // run, step % run
    order = [(turn, number) for number in range(lead) for turn in range(1, world)]
    for number in range(run - lead):
        of_round = [(turn, lead + number) for turn in range(1, world)] + [(world, number)]
        shift = number * world // wave % world if wave % world == 0 else 0
        order += of_round[shift:] + of_round[:shift]
    assert len(order) == lead * peers + (run - lead) * world
    order += [(world, number) for number in range(run - lead, run)]
    return order[step]


@dataclasses.dataclass(frozen=True)
class Call:
    op: str  # "scatter" or "sum"
    run: int  # of tiles that an owner has room for
    tiles: list[int]  # that each owner has
    lead: int
    stagings: int
    blocks: list[int]  # of each rank
    senders: int = 0


def is_over(phase: int, ended: int) -> bool:
    """What a wait for a phase finds, by its parity, where so many have ended."""
    return (ended - phase) % 2 == 0


class Block:
    """One block of one call. Barriers are counts of ended phases, lists of those of each staging buffer."""

    def __init__(self, machine: Machine, rank: int, call: Call, index: int):
        self.machine, self.rank, self.call = machine, rank, call
        self.index, self.blocks, self.world = index, call.blocks[rank], machine.world
        self.me = machine.ranks[rank]
        self.epoch = self.me.epoch + 1
        self.staging = [None] * call.stagings  # shared memory
        self.staged, self.arrived, self.free, self.partial = ([0] * call.stagings for _ in range(4))
        self.taken = self.takes = 0
        self.group: list = []  # of the courier's stores

    def itinerary(self):
        """Owner and tile, in which buffer, and how often that has been used before."""
        found = 0
        for step in range(self.index, self.world * self.call.run, self.blocks):
            turn, tile = turn_of(step, self.call.run, self.world, self.call.lead, self.blocks)
            owner = (self.rank + turn) % self.world
            if tile < self.call.tiles[owner]:
                yield owner, tile, found % self.call.stagings, found // self.call.stagings
                found += 1

    def peers(self):
        return [(self.rank + turn) % self.world for turn in range(1, self.world)]

    def what(self, kind: str, source: int, owner: int, tile: int) -> tuple:
        return kind, self.epoch, source, owner, tile

    # -- consumers

    def compute(self):
        partials = [0] * self.call.stagings
        for owner, tile, buffer, use in self.itinerary():
            yield None  # products
            if self.machine.error != "staging not waited for":
                yield lambda: is_over(use, self.free[buffer])  # noqa: B023  evaluated before the next turn of the loop
            if owner != self.rank:
                self.staging[buffer] = self.what("partial", self.rank, owner, tile)
            else:
                others = [source for source in range(self.world) if source != self.rank]
                for place, source in enumerate(others):
                    partials[buffer] += 1
                    yield lambda: is_over(partials[buffer], self.partial[buffer])  # noqa: B023
                    found = self.staging[buffer]
                    if found != self.what("partial", source, owner, tile):
                        raise Wrong(f"added {found} for the partial of {source}, tile {tile}, call {self.epoch}")
                    if place < len(others) - 1:
                        self.taken += 1
                self.staging[buffer] = self.what("sum", owner, owner, tile)
            self.arrive_staged(buffer)

    def arrive_staged(self, buffer: int) -> None:
        self.arrived[buffer] += 1
        has_one_party = self.call.stagings == 1 or self.machine.error == "free not counted"
        if has_one_party or self.arrived[buffer] % 2 == 0:
            self.staged[buffer] += 1

    # -- the courier and the fetcher

    def read(self):
        return all(read for read, _ in self.group)

    def written(self):
        return all(written for _, written in self.group)

    def store(self, buffer: int, memory: dict, key) -> None:
        self.machine.copy(lambda: self.staging[buffer], lambda value: memory.__setitem__(key, value), self.group)

    def fetch(self, buffer: int, tile: int, place: int):
        source = place + (place >= self.rank)
        yield lambda: self.me.partial_flags.get((tile, source), 0) >= self.epoch

        def arrive(value):
            self.staging[buffer] = value
            self.partial[buffer] += 1

        self.machine.copy(lambda: self.me.staging.get((source, tile)), arrive, [])

    def fetch_others(self, buffer: int, tile: int):
        for place in range(1, self.world - 1):
            self.takes += 1
            if self.machine.error != "partials not waited for":
                yield lambda: is_over(self.takes, self.taken)
            yield from self.fetch(buffer, tile, place)

    def fetch_all(self):
        """The fetcher."""
        for owner, tile, buffer, use in self.itinerary():
            if self.machine.error != "fetch before read":
                yield lambda: is_over(use, self.free[buffer])  # noqa: B023
            if owner == self.rank:
                yield from self.fetch(buffer, tile, 0)
                yield from self.fetch_others(buffer, tile)
            if self.machine.error != "free not counted":
                self.arrive_staged(buffer)

    def carry(self):
        error = self.machine.error
        if error != "done not waited for":
            staged = self.me.staged
            yield lambda: all(self.me.done.get(peer, 0) >= staged for peer in self.peers())
        works = list(self.itinerary())
        fetched = None
        for work, following in itertools.zip_longest(works, works[1:]):
            owner, tile, buffer, use = work
            own_follows = self.call.stagings == 1 and following is not None and following[0] == self.rank
            if owner != self.rank:
                yield lambda: is_over(use + 1, self.staged[buffer])  # noqa: B023
                yield from self.begin_turn()
                self.store(buffer, self.machine.ranks[owner].staging, (self.rank, tile))
                if error != "free before read":
                    yield self.read
                self.free[buffer] += 1
                if error != "turn not ended":
                    self.end_turn()
                if own_follows and (error == "fetch before the flag" or self.has_come(following[1])):
                    yield from self.fetch(buffer, following[1], 0)
                    fetched = following
                if error != "flag when read":
                    yield self.written
                self.machine.ranks[owner].partial_flags[tile, self.rank] = self.epoch
                continue
            if self.call.stagings == 1:
                if fetched != work:
                    yield from self.fetch(buffer, tile, 0)
                yield from self.fetch_others(buffer, tile)
            yield lambda: is_over(use + 1, self.staged[buffer])  # noqa: B023
            if self.staging[buffer] != self.what("sum", owner, owner, tile):
                raise Wrong(f"stored {self.staging[buffer]}")
            if self.call.op == "scatter":
                self.store(buffer, {}, None)
                yield self.read
                self.free[buffer] += 1
                continue
            yield from self.begin_turn()
            for peer in self.peers():
                self.store(buffer, self.machine.ranks[peer].result, (self.rank, tile))
            yield self.read
            self.free[buffer] += 1
            self.end_turn()
            if own_follows and self.has_come(following[1]):
                yield from self.fetch(buffer, following[1], 0)
                fetched = following
            if error != "flag when read":
                yield self.written
            for peer in self.peers():
                self.machine.ranks[peer].result_flags[self.rank, tile] = self.epoch
        if self.call.op == "scatter":
            yield from self.leave()

    def has_come(self, tile: int) -> bool:
        return self.me.partial_flags.get((tile, int(self.rank == 0)), 0) >= self.epoch

    def begin_turn(self):
        if self.call.senders:
            turn = self.me.turns_begun
            self.me.turns_begun += 1
            yield lambda: self.me.turns_ended + self.call.senders > turn

    def end_turn(self):
        self.me.turns_ended += self.call.senders > 0

    def leave(self):
        self.me.left += 1
        if self.me.left == self.blocks:
            self.me.left, self.me.staged = 0, self.epoch
            for peer in self.peers():
                yield None
                self.machine.ranks[peer].done[self.rank] = self.epoch

    # -- the collector

    def collect(self):
        total = (self.world - 1) * self.call.run
        for i in range(self.blocks - 1 - self.index, total, self.blocks):
            owner, tile = (self.rank + 1 + i % (self.world - 1)) % self.world, i // (self.world - 1)
            if tile >= self.call.tiles[owner]:
                continue
            if self.machine.error != "sums not waited for":
                yield lambda: self.me.result_flags.get((owner, tile), 0) >= self.epoch  # noqa: B023
            found, group = [], []
            self.machine.copy(lambda: self.me.result.get((owner, tile)), found.append, group)  # noqa: B023
            yield lambda: group[0][1]  # noqa: B023
            if found != [self.what("sum", owner, owner, tile)]:
                raise Wrong(f"took {found} for the sum of {owner}, tile {tile}, call {self.epoch}")


def calls_of(machine: Machine, rank: int, calls: list[Call]):
    """The stream of one rank: each call when the one before has ended. Its blocks run beside each other."""
    for call in calls:
        blocks = [Block(machine, rank, call, i) for i in range(call.blocks[rank])]
        roles = [role for block in blocks for role in (block.compute(), block.carry())]
        roles += [block.fetch_all() for block in blocks if call.stagings == 2]
        roles += [block.collect() for block in blocks if call.op == "sum"]
        waits: dict = {role: None for role in roles}
        while waits:
            able = [role for role, until in waits.items() if until is None or until()]
            if not able:
                yield lambda: any(until() for until in waits.values())  # noqa: B023
                continue
            role = machine.random.choice(able)
            waits[role] = next(role, machine)
            if waits[role] is machine:
                del waits[role]
            yield None
        machine.ranks[rank].epoch += 1


def play(world: int, seed: int, error: str = "", stagings: tuple[int, ...] = (1, 2)) -> None:
    """Six calls of both kinds, of changing sizes and grids, some with more blocks than tiles, or owners without any."""
    machine = Machine(world, seed, error)
    draw = random.Random(seed)
    calls = []
    for _ in range(6):
        op, run = draw.choice(("scatter", "sum")), draw.choice((1, 2, 3, 5))
        least = int(op == "scatter")  # an owner without rows has a tile all the same
        last = draw.choice((1, run, world * run, world * run))  # the whole has so many
        tiles = [max(least, min(run, last - rank * run)) for rank in range(world)]
        lead, blocks = draw.choice((0, 1, 2, 4)), [draw.choice((1, 2, 3, 16)) for _ in range(world)]
        calls.append(Call(op, run, tiles, lead, draw.choice(stagings), blocks, draw.choice((0, 1, 3))))
    machine.run([calls_of(machine, rank, calls) for rank in range(world)])
    assert all(rank.turns_begun == rank.turns_ended for rank in machine.ranks)


@needs_nvcc
def test_the_order_of_tiles_is_that_of_the_kernels(tmp_path):
    sizes = list(itertools.product((1, 2, 5), (2, 3, 8), (0, 1, 2, 4, 9), (1, 2, 4, 9, 66)))
    program = '#include <cstdio>\n#include "tpo/gemm_owners.cuh"\nint main() { int number;\n'
    for run, world, lead, wave in sizes:
        program += (
            f"for (int s = 0; s < {run * world}; ++s) {{ int turn = tpo::turn_of(s, {run}, {world}, {lead}, {wave}, "
        )
        program += '&number); printf("%d %d\\n", turn, number); }\n'
    source = tmp_path / "order.cu"
    source.write_text(program + "}\n")
    command = [NVCC, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    subprocess.run([*command, "-o", tmp_path / "order", source], check=True)
    printed = subprocess.check_output([tmp_path / "order"], text=True).split()
    pairs = iter(zip(map(int, printed[::2]), map(int, printed[1::2]), strict=True))
    for run, world, lead, wave in sizes:
        order = [next(pairs) for _ in range(run * world)]
        assert order == [turn_of(step, run, world, lead, wave) for step in range(run * world)]
        assert sorted(order) == [(turn, number) for turn in range(1, world + 1) for number in range(run)]
        for (turn, number), step in zip(order, itertools.count()):
            assert turn == world or step < order.index((world, number))


@pytest.mark.parametrize("stagings", [(1,), (2,), (1, 2)], ids=["one staging", "two stagings", "in turn"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_nobody_reads_too_early_or_waits_for_ever(world, stagings):
    for seed in range(240 // world):
        play(world, seed, stagings=stagings)


@pytest.mark.parametrize(
    ("error", "world", "stagings"),
    [
        ("flag when read", 2, 1),
        ("flag when read", 2, 2),
        ("free before read", 2, 1),
        ("free before read", 2, 2),
        ("staging not waited for", 2, 1),
        ("staging not waited for", 2, 2),
        ("done not waited for", 2, 1),
        ("fetch before the flag", 2, 1),
        ("fetch before read", 2, 2),
        ("free not counted", 2, 2),
        ("sums not waited for", 2, 1),
        ("partials not waited for", 3, 1),
        ("partials not waited for", 3, 2),
        ("turn not ended", 2, 1),
    ],
)
def test_a_planted_error_is_found(error, world, stagings):
    found = 0
    for seed in range(400):
        try:
            play(world, seed, error, (stagings,))
        except Wrong:
            found += 1
        if found == 3:
            return
    raise AssertionError(f"found in {found} of 400 runs")
