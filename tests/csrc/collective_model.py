"""The kernels that sum products over ranks, csrc/kernels/gemm_*_push*.cu, as processes, and calls of them in a row.

Each block has the roles that its kernel gives it: consumers and a courier, and as the case may be a fetcher, a keeper,
a collector. Of copies, barriers and planted errors: collective_block.py.
"""

from __future__ import annotations

import itertools
import random

from tests.csrc.collective_block import Block, Call, Machine, Wrong, is_over


class Scatter(Block):
    """gemm_reduce_scatter_push.cu"""

    def roles(self) -> list:
        return [self.compute(), self.carry(), *([self.fetch_all()] if self.fetches() else [])]

    def right_out(self) -> dict:
        mine = range(self.call.tiles[self.rank])
        return {(self.rank, tile): [self.what("sum", self.rank, self.rank, tile)] for tile in mine}

    def carry(self):
        yield from self.begin()
        yield from self.await_done()
        self.let_others_begin()
        works = list(self.itinerary())
        fetched = False
        for (owner, tile, buffer, use), following in itertools.zip_longest(works, works[1:]):
            if owner == self.rank and not self.fetches():
                if not fetched:
                    yield from self.fetch(buffer, tile, 0)
                yield from self.fetch_others(buffer, tile)
            yield lambda: is_over(use + 1, self.staged[buffer])  # noqa: B023
            if owner == self.rank:
                self.store_to_out(buffer, owner, tile, self.courier)
                yield from self.free_staging(buffer, self.courier)
                fetched = False
            else:
                yield from self.push_partial(owner, tile, buffer)
                fetched = yield from self.fetch_early(following)
                yield from self.publish_partial(owner, tile)
        yield from self.leave()


class TwoShotSum(Block):
    """gemm_all_reduce_two_shot_push.cu"""

    def roles(self) -> list:
        return [self.compute(), self.carry(), self.collect(), *([self.fetch_all()] if self.fetches() else [])]

    def right_out(self) -> dict:
        tiles = [(owner, tile) for owner in range(self.world) for tile in range(self.call.tiles[owner])]
        return {(owner, tile): [self.what("sum", owner, owner, tile)] for owner, tile in tiles}

    def result_place(self, at: int, owner: int, tile: int) -> int:
        return (owner - (owner > at)) * self.call.run + tile

    def carry(self):
        yield from self.begin()
        yield from self.await_done()
        self.let_others_begin()
        works = list(self.itinerary())
        fetched = False
        for (owner, tile, buffer, use), following in itertools.zip_longest(works, works[1:]):
            if owner == self.rank and not self.fetches():
                if not fetched:
                    yield from self.fetch(buffer, tile, 0)
                yield from self.fetch_others(buffer, tile)
            yield lambda: is_over(use + 1, self.staged[buffer])  # noqa: B023
            if owner == self.rank:
                yield from self.push_sum(tile, buffer)
            else:
                yield from self.push_partial(owner, tile, buffer)
            fetched = yield from self.fetch_early(following)
            if owner == self.rank:
                yield from self.publish_sum(tile)
            else:
                yield from self.publish_partial(owner, tile)

    def push_sum(self, tile: int, buffer: int):
        yield from self.begin_turn()
        for peer in self.peers():
            self.store(buffer, self.ranks[peer].result, self.result_place(peer, self.rank, tile), self.courier)
        self.store_to_out(buffer, self.rank, tile, self.courier)
        yield from self.free_staging(buffer, self.courier)
        self.end_turn()

    def publish_sum(self, tile: int):
        if self.error != "flag when read":
            yield self.courier.written
        for peer in self.peers():
            self.ranks[peer].result_flags[self.rank * self.call.run + tile] = self.epoch

    def collect(self):
        yield lambda: self.begun
        total = (self.world - 1) * self.call.run
        for i in range(self.blocks - 1 - self.index, total, self.blocks):
            owner, tile = (self.rank + 1 + i % (self.world - 1)) % self.world, i // (self.world - 1)
            if tile >= self.call.tiles[owner]:
                continue
            if self.error != "sums not waited for":
                flag = owner * self.call.run + tile
                yield lambda: self.me.result_flags.get(flag, 0) >= self.epoch  # noqa: B023
            place = self.result_place(self.rank, owner, tile)
            yield from self.bring(self.me.result, place, self.what("sum", owner, owner, tile), owner, tile)


class OneShotSum(Block):
    """gemm_all_reduce_one_shot_push.cu"""

    tma_adds = True

    def roles(self) -> list:
        return [self.compute(), self.carry(), self.collect()]

    def right_out(self) -> dict:
        return {
            (0, tile): [self.what("partial", source, 0, tile) for source in (self.rank, 1 - self.rank)]
            for tile in range(sum(self.call.tiles))
        }

    def itinerary(self):
        for found, tile in enumerate(range(self.index, sum(self.call.tiles), self.blocks)):
            yield 0, tile, found % self.call.stagings, found // self.call.stagings

    def carry(self):
        (peer,) = self.peers()
        yield from self.begin()
        yield from self.await_begun()
        self.let_others_begin()
        for owner, tile, buffer, use in self.itinerary():
            yield lambda: is_over(use + 1, self.staged[buffer])  # noqa: B023
            self.store_to_out(buffer, owner, tile, self.courier)
            yield from self.begin_turn()
            self.store(buffer, self.ranks[peer].result, tile, self.courier)
            yield from self.free_staging(buffer, self.courier)
            self.end_turn()
            if self.error == "flag when read":
                self.ranks[peer].result_flags[tile] = self.epoch
            if self.error != "kept when read":
                yield self.courier.written
            self.kept += 1
            yield self.courier.written
            self.ranks[peer].result_flags[tile] = self.epoch

    def collect(self):
        yield lambda: self.begun
        for kept, (owner, tile, _, _) in enumerate(self.itinerary(), 1):
            yield from self.add_peers_tile(kept, self.me.result_flags, tile, self.me.result, tile, owner, tile)


class AddingScatter(Block):
    """gemm_reduce_scatter_push_add.cu"""

    tma_adds = True

    def roles(self) -> list:
        return [self.compute(), self.carry(), self.keep(), self.collect()]

    def right_out(self) -> dict:
        return {
            (self.rank, tile): [self.what("partial", source, self.rank, tile) for source in (self.rank, 1 - self.rank)]
            for tile in range(self.call.tiles[self.rank])
        }

    def await_tile(self, buffer: int, use: int):
        if self.error != "carried not waited for":
            yield lambda: self.carried[buffer] >= use
        yield lambda: is_over(use + 1, self.staged[buffer])

    def carry(self):
        yield from self.begin()
        yield from self.await_done()
        self.let_others_begin()
        for owner, tile, buffer, use in self.itinerary():
            if owner == self.rank:
                continue
            yield from self.await_tile(buffer, use)
            yield from self.push_partial(owner, tile, buffer)
            self.carried[buffer] = use + 1
            yield from self.publish_partial(owner, tile)

    def keep(self):
        """The keeper."""
        for owner, tile, buffer, use in self.itinerary():
            if owner != self.rank:
                continue
            yield from self.await_tile(buffer, use)
            self.store_to_out(buffer, owner, tile, self.keeper)
            yield from self.free_staging(buffer, self.keeper)
            self.carried[buffer] = use + 1
            if self.error != "kept when read":
                yield self.keeper.written
            self.kept += 1

    def collect(self):
        (peer,) = self.peers()
        yield lambda: self.begun
        if self.error == "left before read":
            yield from self.leave()
        own = [tile for owner, tile, _, _ in self.itinerary() if owner == self.rank]
        for kept, tile in enumerate(own, 1):
            flags, staging = self.me.partial_flags, self.me.staging
            yield from self.add_peers_tile(kept, flags, (tile, peer), staging, (peer, tile), self.rank, tile)
        if self.error != "left before read":
            yield from self.leave()


# ---- a run ----------------------------------------------------------------------------------------------------------


def calls_of(machine: Machine, rank: int, calls: list[Call]):
    """The stream of one rank: each call when the one before has ended. Its blocks run beside each other."""
    for call in calls:
        out: dict = {}
        blocks = [call.kernel(machine, rank, call, i, out) for i in range(call.blocks[rank])]
        waits: dict = {role: None for block in blocks for role in block.roles()}
        slow = machine.random.choice([*waits, *[None] * len(waits)])  # in half of the calls one thread is far behind
        able: list = []

        def somebody_can():
            able[:] = [role for role, until in waits.items() if until is None or until()]  # noqa: B023
            return bool(able)  # noqa: B023

        while waits:
            yield somebody_can
            role = machine.random.choice(able)
            if role is slow and machine.random.random() > 0.03:
                continue
            waits[role] = next(role, machine)
            if waits[role] is machine:
                del waits[role]
        yield lambda: all(thread.written() for block in blocks for thread in block.threads)  # noqa: B023
        if out != blocks[0].right_out():
            raise Wrong(f"{out} at the end of call {blocks[0].epoch}")
        machine.ranks[rank].epoch += 1


OF_ANY_WORLD = (Scatter, TwoShotSum)
OF_TWO_RANKS = (*OF_ANY_WORLD, OneShotSum, AddingScatter)


def play(
    world: int,
    seed: int,
    error: str = "",
    stagings: tuple[int, ...] = (1, 2),
    kernels: tuple[type[Block], ...] = (),
) -> None:
    """Six calls of all kinds, of changing sizes and grids, some with more blocks than tiles, or owners without any."""
    machine = Machine(world, seed, error)
    draw = random.Random(seed)
    kernels = kernels or (OF_TWO_RANKS if world == 2 else OF_ANY_WORLD)
    calls = []
    for _ in range(6):
        kernel, run = draw.choice(kernels), draw.choice((1, 2, 3, 5))
        least = int(kernel in (Scatter, AddingScatter))  # an owner without rows has a tile all the same
        last = draw.choice((1, run, world * run, world * run))  # the whole has so many
        tiles = [max(least, min(run, last - rank * run)) for rank in range(world)]
        lead, blocks = draw.choice((0, 1, 2, 4)), [draw.choice((1, 2, 3, 16)) for _ in range(world)]
        calls.append(Call(kernel, run, tiles, lead, draw.choice(stagings), blocks, draw.choice((0, 1, 3))))
    machine.run([calls_of(machine, rank, calls) for rank in range(world)])
    if any(rank.turns_begun != rank.turns_ended for rank in machine.ranks):
        raise Wrong("a turn to send was not ended")
