"""Running one provider in one case up to the point where it can be timed: prepared, checked, captured.

Every step is tried on all ranks and its outcome agreed on, so that a provider which fails on one rank is dropped on
all. The agreement is a gloo exchange between calls; a failure inside a collective is ended by that collective's own
time limit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from .cases import GEMM_REDUCE_SCATTER, Case
from .inputs import LayerInputs
from .launch import World
from .provider import Declined, Provider
from .timing import Call, Clock, CpuClock, EagerTimed, GraphTimed, Result, Timed, Turn, WallTimed, one_line
from .truth import Truth, checksum

T = TypeVar("T")


@dataclass(frozen=True)
class Outcome:
    """Why a provider has no time: it declined, failed, or gave a wrong result."""

    kind: str  # "declined", "failed" or "wrong"
    reason: str


class Dropped(Exception):
    """Raised on every rank alike once all have agreed on the outcome."""

    def __init__(self, outcome: Outcome) -> None:
        super().__init__(outcome.reason)
        self.outcome = outcome


def together(world: World, step: Callable[[], T], refuses: Callable[[Exception], bool] = lambda error: False) -> T:
    """The result of `step` on this rank, or Dropped on all ranks when any rank could not do it.

    refuses: tells errors that mean "not this case" from failures.
    """
    mine: tuple[str, str] | None = None
    result: T | None = None
    try:
        result = step()
    except Declined as reason:
        mine = "declined", str(reason)
    except Exception as error:
        mine = ("declined", str(error)) if refuses(error) else ("failed", one_line(error))
    outcomes = world.gather(mine)
    for kind in ("failed", "declined"):
        for rank, each in enumerate(outcomes):
            if each is not None and each[0] == kind:
                where = f"rank {rank}: " if kind == "failed" and world.world_size > 1 else ""
                raise Dropped(Outcome(kind, where + each[1]))
    return result  # type: ignore[return-value]


@dataclass
class Attempt:
    """A provider in a case. `inputs` and `truth` belong to the case's layer and M."""

    provider: Provider
    case: Case
    inputs: LayerInputs
    truth: Truth
    clock: Clock

    @property
    def world(self) -> World:
        return self.inputs.world

    def prepared(self) -> Call:
        """A call that has given the right result twice, with another weight between; Dropped otherwise."""
        a = self.inputs.a[: self.case.M]

        def prepare() -> Call:
            with self.provider.active():
                return self.provider.prepare(self.case, a)

        call = together(self.world, prepare, self.provider.refuses)
        weights = self.inputs.weights

        def run() -> list[Result]:
            with self.provider.active():
                first = call(weights[0] if weights else None)
                call(weights[-1] if weights else None)
                again = call(weights[0] if weights else None)
            self.clock.idle()
            self.provider.check()
            return [first, again]

        for out in together(self.world, run, self.provider.refuses):
            self.verify(out)
        return call

    def verify(self, out: Result) -> None:
        """Holds a result against the truth on every rank, and the ranks against each other where equal bits are
        promised; Dropped when it is wrong on any."""
        everywhere = self.case.op != GEMM_REDUCE_SCATTER and self.provider.equal_bits

        def check() -> tuple[str | None, tuple[int, ...] | None]:
            reason = self.truth.wrong(out, self.case, self.provider.rounding)
            return reason, checksum(out) if everywhere and reason is None else None

        verdicts = self.world.gather(together(self.world, check))
        for rank, (reason, _) in enumerate(verdicts):
            if reason is not None:
                raise Dropped(Outcome("wrong", f"rank {rank}: {reason}"))
        if len({bits for _, bits in verdicts}) > 1:
            raise Dropped(Outcome("wrong", "ranks hold different bits"))

    def timed(self, call: Call, mode: str) -> Timed:
        """What samples are taken of, its result verified after a first run; Dropped when that fails."""

        def make() -> Timed:
            with self.provider.active():
                return self._timed(call, mode)

        timed = together(self.world, make)
        self.sample_and_verify(self.turn(timed))
        return timed

    def turn(self, timed: Timed) -> Turn:
        return Turn(timed, self.provider.active, self.provider.check)

    def sample_and_verify(self, turn: Turn) -> None:
        """One more sample, and a look at its result: memory that providers share may hold another's by now."""

        def sample() -> None:
            turn.sample(self.clock)
            if turn.failure is not None:
                raise RuntimeError(turn.failure)

        together(self.world, sample)
        self.verify(turn.timed.out)

    def _timed(self, call: Call, mode: str) -> Timed:
        weights = self.inputs.weights
        if mode == "graph":
            assert not isinstance(self.clock, CpuClock)
            return GraphTimed.capture(self.clock, call, weights)
        placeholder = self.inputs.a[:0]
        if isinstance(self.clock, CpuClock):
            return WallTimed(self.clock, call, weights, placeholder)
        return EagerTimed(self.clock, call, weights, placeholder)
