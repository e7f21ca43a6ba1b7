"""Groups that have already made many calls: the epoch of every rank set to a number, as if so many had been."""

from __future__ import annotations

from collections.abc import Callable

from tests.ops.calls import group_name
from tp_overlap_kernels.lang import signal
from tp_overlap_kernels.memory import arena as arenas

STARTS = {"2^31": (1 << 31) - 5, "2^32": (1 << 32) - 5}


def start_at(epoch: int, barrier: Callable[[], None]) -> None:
    """All ranks call this between two calls of the group; no epoch may be set back. barrier: all ranks meet."""
    barrier()
    control = arenas.get(group_name()).control
    assert int(control[signal.EPOCH.value]) <= epoch
    control[signal.EPOCH.value] = epoch
    barrier()


def epoch() -> int:
    """The last call that this rank has entered."""
    return int(arenas.get(group_name()).control[signal.EPOCH.value])
