"""What kernels that sum over ranks share, csrc/include/tpo/gemm_collective.cuh, as processes that run at random speeds.

What the copy engine is asked to do happens later: it reads its source some time after it was told, and what it writes
is seen some time after that. Of phases of barriers parities alone are known. Every tile says what it is, so that
whoever takes another one for it is found out. `error` names a wait that is left out, or something told too early.
"""

from __future__ import annotations

import dataclasses
import random

STEPS = 400_000  # of the scheduler, far more than any run takes


class Wrong(Exception):
    """Somebody read what was not there yet, or no longer; or nobody can go on."""


# ---- the machine ----------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Rank:
    """Words and memory of one rank's arena, which kernels share: places are those of the arena. And control words."""

    header: dict = dataclasses.field(default_factory=dict)  # (epoch % 2, source) -> epoch
    partial_flags: dict = dataclasses.field(default_factory=dict)  # (tile, source) -> epoch
    result_flags: dict = dataclasses.field(default_factory=dict)  # place -> epoch
    done: dict = dataclasses.field(default_factory=dict)  # source -> epoch
    staging: dict = dataclasses.field(default_factory=dict)  # (source, tile) -> what
    result: dict = dataclasses.field(default_factory=dict)  # place -> what
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

    def copy(self, read, write, copies: Copies) -> None:
        """Ask the copy engine."""
        state = [False, False]  # has been read, has been written
        copies.states.append(state)

        def later():
            yield
            value = read()
            state[0] = True
            yield
            write(value)
            state[1] = True

        self.copies.append(later())

    def run(self, processes: list) -> None:
        """Until all have ended. A process yields what it waits for, a function that is asked right before, or None."""
        waiting: dict = {process: None for process in processes}
        for _ in range(STEPS):
            if not waiting:
                return
            process = None
            if not self.copies or self.random.random() > 0.3:
                order = list(waiting)
                self.random.shuffle(order)
                process = next((one for one in order if waiting[one] is None or waiting[one]()), None)
            if process is not None:
                for _ in range(self.random.choice((1, 1, 3, 20))):
                    waiting[process] = next(process, self)
                    if waiting[process] is self:
                        del waiting[process]
                        break
                    if waiting[process] is not None and not waiting[process]():
                        break
            elif self.copies:
                copy = self.random.choice(self.copies)
                if next(copy, self) is self:
                    self.copies.remove(copy)
            else:
                raise Wrong("nobody can go on")
        raise Wrong("too many steps")


class Copies:
    """Those that one thread has asked for."""

    def __init__(self):
        self.states: list = []

    def read(self) -> bool:
        return all(read for read, _ in self.states)

    def written(self) -> bool:
        self.states = [state for state in self.states if not state[1]]
        return not self.states


# ---- what all kernels have ------------------------------------------------------------------------------------------


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
    kernel: type[Block]
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

    tma_adds = False

    def __init__(self, machine: Machine, rank: int, call: Call, index: int, out: dict):
        self.machine, self.rank, self.call, self.error = machine, rank, call, machine.error
        self.index, self.blocks, self.world = index, call.blocks[rank], machine.world
        self.me, self.ranks = machine.ranks[rank], machine.ranks
        self.epoch = self.me.epoch + 1
        self.out = out  # of this call, (owner, tile) -> list of what is summed there
        self.staging = [None] * call.stagings  # shared memory
        self.staged, self.arrived, self.free, self.partial = ([0] * call.stagings for _ in range(4))
        self.carried, self.kept, self.begun = [0] * call.stagings, 0, False
        self.taken = self.takes = 0
        self.courier, self.keeper, self.collector = self.threads = Copies(), Copies(), Copies()

    def fetches(self) -> bool:
        return self.call.stagings == 2 and not self.tma_adds

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
            if self.error != "staging not waited for":
                yield lambda: is_over(use, self.free[buffer])  # noqa: B023  evaluated before the next turn of the loop
            if owner != self.rank or self.tma_adds:
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
        has_one_party = not self.fetches() or self.error == "free not counted"
        if has_one_party or self.arrived[buffer] % 2 == 0:
            self.staged[buffer] += 1

    # -- phases of the courier and the fetcher

    def begin(self):
        self.begun = self.error == "begun before done was awaited"
        yield None
        if self.index == 0:
            for peer in self.peers():
                self.ranks[peer].header[self.epoch % 2, self.rank] = self.epoch
                yield None

    def await_done(self):
        staged = self.me.staged
        if self.error != "done not waited for":
            yield lambda: all(self.me.done.get(peer, 0) >= staged for peer in self.peers())

    def await_begun(self):
        if self.error != "begin not waited for":
            of_call = self.epoch % 2
            yield lambda: all(self.me.header.get((of_call, peer), 0) >= self.epoch for peer in self.peers())

    def store(self, buffer: int, memory: dict, place, copies: Copies) -> None:
        self.machine.copy(lambda: self.staging[buffer], lambda value: memory.__setitem__(place, value), copies)

    def store_to_out(self, buffer: int, owner: int, tile: int, copies: Copies) -> None:
        def write(value):
            self.out[owner, tile] = [value]

        self.machine.copy(lambda: self.staging[buffer], write, copies)

    def free_staging(self, buffer: int, copies: Copies):
        if self.error != "free before read":
            yield copies.read
        self.free[buffer] += 1

    def push_partial(self, owner: int, tile: int, buffer: int):
        yield from self.begin_turn()
        self.store(buffer, self.ranks[owner].staging, (self.rank, tile), self.courier)
        yield from self.free_staging(buffer, self.courier)
        self.end_turn()

    def publish_partial(self, owner: int, tile: int):
        if self.error != "flag when read":
            yield self.courier.written
        self.ranks[owner].partial_flags[tile, self.rank] = self.epoch

    def begin_turn(self):
        if self.call.senders:
            turn = self.me.turns_begun
            self.me.turns_begun += 1
            yield lambda: self.me.turns_ended + self.call.senders > turn

    def end_turn(self) -> None:
        self.me.turns_ended += self.call.senders > 0 and self.error != "turn not ended"

    def leave(self):
        self.me.left += 1
        if self.me.left == self.blocks:
            self.me.left, self.me.staged = 0, self.epoch
            for peer in self.peers():
                yield None
                self.ranks[peer].done[self.rank] = self.epoch

    def let_others_begin(self) -> None:
        self.begun = True

    def fetch(self, buffer: int, tile: int, place: int):
        source = place + (place >= self.rank)
        yield lambda: self.me.partial_flags.get((tile, source), 0) >= self.epoch

        def arrive(value):
            self.staging[buffer] = value
            self.partial[buffer] += 1

        self.machine.copy(lambda: self.me.staging.get((source, tile)), arrive, Copies())

    def fetch_early(self, following):
        """With one buffer. Whether the first partial of the next tile is on its way."""
        if self.fetches() or following is None or following[0] != self.rank:
            return False
        _, tile, buffer, _ = following
        has_come = self.me.partial_flags.get((tile, int(self.rank == 0)), 0) >= self.epoch
        if not has_come and self.error != "fetch before the flag":
            return False
        yield from self.fetch(buffer, tile, 0)
        return True

    def fetch_others(self, buffer: int, tile: int):
        for place in range(1, self.world - 1):
            self.takes += 1
            if self.error != "partials not waited for":
                yield lambda: is_over(self.takes, self.taken)
            yield from self.fetch(buffer, tile, place)

    def fetch_all(self):
        """The fetcher."""
        yield lambda: self.begun
        for owner, tile, buffer, use in self.itinerary():
            if self.error != "fetch before read":
                yield lambda: is_over(use, self.free[buffer])  # noqa: B023
            if owner == self.rank:
                yield from self.fetch(buffer, tile, 0)
                yield from self.fetch_others(buffer, tile)
            if self.error != "free not counted":
                self.arrive_staged(buffer)

    # -- the collector

    def bring(self, memory: dict, place, wanted: tuple, owner: int, tile: int):
        """From the arena to out, or added to what must lie there."""
        transit: list = []
        load = Copies()
        self.machine.copy(lambda: memory.get(place), transit.append, load)
        yield load.written
        if transit != [wanted]:
            raise Wrong(f"took {transit} for the {wanted[0]} of {wanted[2]}, tile {tile}, call {self.epoch}")

        def to_out(value):
            if self.tma_adds and self.out.get((owner, tile)) != [self.what("partial", self.rank, owner, tile)]:
                raise Wrong(f"added to {self.out.get((owner, tile))}, tile {tile}, call {self.epoch}")
            self.out[owner, tile] = [*self.out.get((owner, tile), []), value] if self.tma_adds else [value]

        self.machine.copy(lambda: transit[0], to_out, self.collector)
        yield self.collector.read

    def add_peers_tile(self, tiles_kept: int, flags: dict, flag, memory: dict, place, owner: int, tile: int):
        (peer,) = self.peers()
        if self.error != "kept not waited for":
            yield lambda: self.kept >= tiles_kept
        if self.error != "sums not waited for":
            yield lambda: flags.get(flag, 0) >= self.epoch
        yield from self.bring(memory, place, self.what("partial", peer, owner, tile), owner, tile)
