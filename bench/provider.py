"""What a provider is: a named way to compute an op, and the session that providers share."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from .cases import GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, Case
from .launch import World
from .timing import Call
from .truth import AT_EACH_HOP


class Declined(Exception):
    """This provider does not run this case, for a reason that is not a fault."""


T = TypeVar("T")


@dataclass
class Session:
    """What providers share: the ranks, the largest sizes of the run, and what was made once for all of it.

    store: where our arena lies, as of `tpo.init`.
    """

    world: World
    max_M: int
    max_N: int
    dtype: torch.dtype
    store: str = "auto"
    made: dict[str, Any] = field(default_factory=dict)

    def once(self, what: str, make: Callable[[], T]) -> T:
        """What `make` returned at the first call for `what`. Where it is collective, all ranks come here alike."""
        if what not in self.made:
            self.made[what] = make()
        return self.made[what]

    @property
    def max_elems(self) -> int:
        """Of a message, rows padded so that they divide over the ranks."""
        W = self.world.world_size
        return -(-self.max_M // W) * W * self.max_N


class Provider:
    """Base: how a way is named, which ops it knows, where it rounds and whether it promises equal bits."""

    ops: tuple[str, ...] = (GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER)
    rounding = AT_EACH_HOP
    equal_bits = False
    fused = False  # one of ours: a failure is a failure of the run

    def __init__(self, name: str, session: Session) -> None:
        self.name, self.session, self.world = name, session, session.world

    def active(self) -> AbstractContextManager[Any]:
        """Entered around every use of the calls that `prepare` returned."""
        return nullcontext()

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        """A call of this case: weight -> result. `a` is a[M, K_local] (x[M, N] for all_reduce)."""
        raise NotImplementedError

    def plan(self, case: Case) -> str | None:
        """What the provider chose, where it can say so."""
        return None

    def check(self) -> None:
        """Raises where the device, idle by now, has noted that a call went wrong."""

    def refuses(self, error: Exception) -> bool:
        """Whether an error means that this provider does not run the case, rather than that it is broken."""
        return False

    def decline_unless(self, condition: bool, reason: str) -> None:
        if not condition:
            raise Declined(reason)


def weight_of(w: torch.Tensor | None) -> torch.Tensor:
    assert w is not None, "every op but all_reduce has a weight"
    return w
