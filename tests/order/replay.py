"""Finds accesses of shared words that nothing orders, from the logs that every rank has written (trace.py).

A clock is a vector, one number for each program of each rank and for each stream. A launch begins with what its
stream knows, and its stream knows at the end what its programs knew: kernel boundaries are the only order within a
rank. A release publishes its program's clock under (word, value), and whoever acquires that value of that word joins
it; a read-modify-write passes on what it has seen published. Two accesses of the same bytes race if one of them is a
store, they are not both atomic, and the clock of the later does not hold the earlier: load after store (read too
early), store after load and store after store (overwritten too early).

The order in the logs decides nothing but which of the two is called the later one: a race is found, though the values
came out right. What was not acquired in this run is not known, so an arrival that only a fast peer has sent is not
taken for granted; a schedule in which a *different* branch is taken is another run.

Words that are their own signal have a rule of their own. The header (`SELF_SIGNALLING`) says which call this is; it is
atomic, orders nothing, and no data is loaded because of it. In the sentinel region (`DATA_AS_FLAG`) a word that holds
data says by that alone that it came: loading it orders nothing of what its sender did beside it in that launch, since
both are relaxed, but all that came before the launch, since a launch starts after the one before it has ended and is
visible. A load that finds the sentinel has seen nothing. Stores there, of data or of sentinels, must be ordered like
plain ones, but for the one whose value was loaded.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence

import numpy as np

from tests.order.trace import CONTROL, GRAIN_BYTES, HOST, SENTINEL, Access, After, Atomic, Begin, End
from tp_overlap_kernels.memory.layout import Layout

SELF_SIGNALLING = ("header",)
DATA_AS_FLAG = "sentinel"
CONFLICTS = {
    "load": ("store", "atomic store"),
    "store": ("store", "load", "atomic store", "atomic load"),
    "atomic load": ("store",),
    "atomic store": ("store", "load"),
}
_REGIONS = ("done", "header", "closed", "one_shot_flags", "partial_flags", "result_flags")
_REGIONS += ("sentinel", "one_shot", "staging", "result")


@dataclasses.dataclass(frozen=True)
class Who:
    """One side of a race. program: -1 is torch, on the stream."""

    rank: int
    kernel: str
    epoch: int | None
    program: int
    stream: int

    def __str__(self) -> str:
        what = "torch" if self.program == HOST else f"{self.kernel} program {self.program}"
        return f"rank {self.rank} {what}, epoch {self.epoch}" + f", stream {self.stream}" * (self.stream > 0)


@dataclasses.dataclass(frozen=True)
class Race:
    """kind: "load after store", "store after load", "store after store"."""

    kind: str
    later: Who
    earlier: Who
    region: str
    nbytes: int

    def __str__(self) -> str:
        return f"{self.kind}, not ordered: {self.nbytes} bytes of {self.region}: {self.later} against {self.earlier}"


@dataclasses.dataclass(frozen=True)
class Found:
    """races, and what was looked at: bytes accessed by (kernel, "load" or "store"), acquires that joined a clock."""

    races: list[Race]
    nbytes: Counter
    joined: Counter

    def raise_if_any(self) -> None:
        if self.races:
            shown = "\n".join(str(race) for race in self.races[:20])
            raise AssertionError(f"{len(self.races)} pairs of accesses race:\n{shown}")


def replay(logs: Sequence[list], layout: Layout | None = None) -> Found:
    """logs: the events of each rank."""
    return _Replay(logs, layout).run()


class _Replay:
    def __init__(self, logs: Sequence[list], layout: Layout | None):
        self.logs = logs
        self.regions = sorted((getattr(layout, name), name) for name in _REGIONS) if layout else []
        self.actors: dict[tuple[int, int, int], int] = {}  # (rank, stream, program) -> index
        self._number_actors()
        self._number_words()
        count = len(self.actors)
        self.clocks = np.zeros((count, count), np.int32)
        np.fill_diagonal(self.clocks, 1)
        # by kind of access and actor: the actor's time of its last access to each word
        self.last = {kind: np.zeros((count, self.words), np.int32) for kind in CONFLICTS}
        self.published: dict[tuple, np.ndarray] = {}
        self.sent: dict[tuple, tuple[int, np.ndarray]] = {}  # data that is its own flag: its sender, and what that knew
        self.at_begin: dict[int, np.ndarray] = {}  # actor -> its clock at the beginning of its launch
        self.will_publish: dict[tuple, set[int]] = {}
        for rank, log in enumerate(self.logs):
            for event in log:
                if isinstance(event, Atomic) and event.stored is not None and self._publishes(rank, event):
                    self.will_publish.setdefault(self._word(rank, event, event.stored), set()).add(rank)
        self.running: dict[tuple[int, int], list] = {}  # (rank, stream) -> [kernel, epoch], the running launch
        self.launch_at: dict[tuple[int, int], list] = {}  # (actor, time) -> the same
        self.races: dict[tuple, int] = {}
        self.nbytes, self.joined = Counter(), Counter()

    # --- numbering

    def _number_actors(self) -> None:
        for rank, log in enumerate(self.logs):
            for event in log:
                streams = (event.stream, event.other) if isinstance(event, After) else (event.stream,)
                for stream in streams:
                    self.actors.setdefault((rank, stream, HOST), len(self.actors))
                if isinstance(event, Begin):
                    for program in range(event.programs):
                        self.actors.setdefault((rank, event.stream, program), len(self.actors))
        self.names = list(self.actors)

    def _number_words(self) -> None:
        """Only grains that somebody touches get a place; `self.first` is where an owner's begin."""
        touched: dict[tuple, list[np.ndarray]] = {}
        for rank, log in enumerate(self.logs):
            for event in log:
                if isinstance(event, Access):
                    touched.setdefault(self._space(rank, event), []).append(event.grains)
                elif isinstance(event, Atomic):
                    touched.setdefault(self._space(rank, event), []).append(_grains_of_word(event.offset))
        self.grains = {space: np.unique(np.concatenate(parts)) for space, parts in touched.items()}
        self.first, self.words = {}, 0
        for space, grains in self.grains.items():
            self.first[space], self.words = self.words, self.words + len(grains)

    @staticmethod
    def _space(rank: int, event: Access | Atomic) -> tuple:
        return ("control", rank) if event.owner == CONTROL else ("arena", event.owner)

    def _places(self, rank: int, event: Access | Atomic) -> np.ndarray:
        space = self._space(rank, event)
        grains = event.grains if isinstance(event, Access) else _grains_of_word(event.offset)
        return self.first[space] + np.searchsorted(self.grains[space], grains)

    def _word(self, rank: int, event: Atomic, value: int) -> tuple:
        return (*self._space(rank, event), event.offset, value)

    def _region(self, rank: int, event: Access | Atomic) -> str:
        if event.owner == CONTROL:
            return "control"
        offset = event.offset if isinstance(event, Atomic) else int(event.grains[0]) * GRAIN_BYTES
        return next((name for start, name in reversed(self.regions) if start <= offset), "arena")

    # --- the run

    def run(self) -> Found:
        at = [0] * len(self.logs)
        while any(at[rank] < len(log) for rank, log in enumerate(self.logs)):
            before = list(at)
            for rank, log in enumerate(self.logs):
                while at[rank] < len(log) and self._step(rank, log[at[rank]]):
                    at[rank] += 1
            assert at != before, "the logs contradict each other: every rank waits for what another one publishes"
        races = [self._race(*key, count * GRAIN_BYTES) for key, count in self.races.items()]
        return Found(races, self.nbytes, self.joined)

    def _race(self, kind: str, later: tuple, earlier: tuple, region: str, nbytes: int) -> Race:
        return Race(kind, self._who(*later), self._who(*earlier), region, nbytes)

    def _who(self, actor: int, time: int) -> Who:
        rank, stream, program = self.names[actor]
        kernel, epoch = self.launch_at.get((actor, time), ("", None))
        return Who(rank, kernel, epoch, program, stream)

    def _step(self, rank: int, event) -> bool:
        """Take one event in; False if it must wait for another rank's."""
        if isinstance(event, Begin):
            self._begin(rank, event)
        elif isinstance(event, End):
            self._end(rank, event)
        elif isinstance(event, After):
            self._join(self.actors[rank, event.stream, HOST], self.clocks[self.actors[rank, event.other, HOST]])
            self._tick(self.actors[rank, event.other, HOST])
        elif isinstance(event, Access):
            self._access(rank, event, "store" if event.is_store else "load")
        else:
            return self._atomic(rank, event)
        return True

    def _join(self, actor: int, clock: np.ndarray) -> None:
        np.maximum(self.clocks[actor], clock, out=self.clocks[actor])

    def _tick(self, actor: int) -> None:
        before = int(self.clocks[actor, actor])
        self.clocks[actor, actor] += 1
        if (actor, before) in self.launch_at:
            self.launch_at[actor, before + 1] = self.launch_at[actor, before]

    def _begin(self, rank: int, event: Begin) -> None:
        launch = self.running[rank, event.stream] = [event.kernel, None]
        host = self.actors[rank, event.stream, HOST]
        for program in range(event.programs):
            actor = self.actors[rank, event.stream, program]
            self._join(actor, self.clocks[host])
            self.clocks[actor, actor] += 1
            self.launch_at[actor, int(self.clocks[actor, actor])] = launch
            self.at_begin[actor] = self.clocks[host].copy()
        self._tick(host)

    def _end(self, rank: int, event: End) -> None:
        self.running[rank, event.stream][1] = event.epoch
        host = self.actors[rank, event.stream, HOST]
        for program in range(event.programs):
            self._join(host, self.clocks[self.actors[rank, event.stream, program]])
        self._tick(host)
        self.launch_at[host, int(self.clocks[host, host])] = self.running[rank, event.stream]

    def _access(self, rank: int, event: Access, kind: str) -> None:
        actor = self.actors[rank, event.stream, event.program]
        region, places = self._region(rank, event), self._places(rank, event)
        if region in SELF_SIGNALLING:
            kind = f"atomic {kind}"
        self._check(actor, kind, region, places)
        self.last[kind][actor, places] = self.clocks[actor, actor]
        kernel = self.running.get((rank, event.stream), [""])[0] if event.program != HOST else "torch"
        self.nbytes[kernel, kind] += len(places) * GRAIN_BYTES

    def _check(self, actor: int, kind: str, region: str, places: np.ndarray) -> None:
        for other in CONFLICTS[kind]:
            times = self.last[other][:, places]
            unordered = times > self.clocks[actor][:, None]
            label = f"{kind.split()[-1]} after {other.split()[-1]}"
            now = (actor, int(self.clocks[actor, actor]))
            for earlier in np.nonzero(unordered.any(axis=1))[0]:
                found, counts = np.unique(times[earlier][unordered[earlier]], return_counts=True)
                for time, count in zip(found.tolist(), counts.tolist(), strict=True):
                    key = (label, now, (int(earlier), time), region)
                    self.races[key] = self.races.get(key, 0) + count

    def _publishes(self, rank: int, event: Atomic) -> bool:
        return event.releases or self._region(rank, event) == DATA_AS_FLAG

    def _data_as_flag(self, rank: int, event: Atomic, actor: int) -> bool:
        """The sentinel region's rule; False if the data seen is not yet there."""
        kind, sender = "load" if event.stored is None else "store", None
        if event.stored is None and event.seen == SENTINEL:
            return True
        if event.stored is None:
            seen = self._word(rank, event, event.seen)
            if seen not in self.sent and seen in self.will_publish:
                return False
            sender, known = self.sent[seen]
            self._join(actor, known)
            self.joined[self.running[rank, event.stream][0]] += 1
        else:
            self.sent[self._word(rank, event, event.stored)] = actor, self.at_begin[actor]
        places = self._places(rank, event)
        if sender is not None:  # seen, hence before us in this word's own order; our load stands for it from here on
            self.last["store"][sender, places] = 0
        self._check(actor, kind, DATA_AS_FLAG, places)
        self.last[kind][actor, places] = self.clocks[actor, actor]
        return True

    def _atomic(self, rank: int, event: Atomic) -> bool:
        actor = self.actors[rank, event.stream, event.program]
        if self._region(rank, event) == DATA_AS_FLAG:
            return self._data_as_flag(rank, event, actor)
        seen = self._word(rank, event, event.seen)
        clock = self.published.get(seen)
        if event.acquires:
            publishers = self.will_publish.get(seen, set())
            if clock is None and publishers and rank not in publishers:
                return False
            if clock is not None:
                self._join(actor, clock)
                self.joined[self.running[rank, event.stream][0]] += 1
        places, kind = self._places(rank, event), "atomic load" if event.stored is None else "atomic store"
        self._check(actor, kind, self._region(rank, event), places)
        self.last[kind][actor, places] = self.clocks[actor, actor]
        if event.stored is not None:
            self._publish(rank, event, actor, None if event.is_exchange else clock)
        return True

    def _publish(self, rank: int, event: Atomic, actor: int, passed_on: np.ndarray | None) -> None:
        stored = self._word(rank, event, event.stored)
        known = [passed_on] if passed_on is not None else []
        known += [self.clocks[actor].copy()] if event.releases else []
        if known:
            self.published[stored] = np.maximum.reduce(known)
        else:
            self.published.pop(stored, None)
        if event.releases:
            self._tick(actor)


def _grains_of_word(offset: int) -> np.ndarray:
    return offset // GRAIN_BYTES + np.arange(8 // GRAIN_BYTES)
