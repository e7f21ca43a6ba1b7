"""A program is a thread: what it knows of itself, how it waits, and what is checked of it."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import os
import random
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any


class Aborted(RuntimeError):
    """Another program of the launch failed, and this one stopped waiting."""


class LintError(AssertionError):
    """The kernel breaks a rule that matters on a GPU only; here its result would have been right."""


@dataclasses.dataclass
class _Options:
    lint: bool = True
    jitter_s: float = 0.0


_options = _Options()


class ProgramState(threading.local):
    """One object, of which each thread sees its own values.

    grid_position, grid_size: (x, y, z). stop: set when another program of the launch has failed.
    dirty: a tile was stored since the block's last barrier. in_stand_in: Python runs in place of a device function.
    """

    grid_position: tuple[int, int, int] | None = None
    grid_size: tuple[int, int, int] | None = None
    stop: threading.Event = threading.Event()
    dirty: bool = False
    in_stand_in: bool = False

    def barrier(self) -> None:
        """For the stand-in of a primitive that synchronises the block."""
        self.dirty = False

    def check_release(self, what: str = "release") -> None:
        """For the stand-in of a primitive that releases: tiles stored before it need a barrier of the block in between.

        On a GPU all threads store the tile and one thread releases; before 3.9 Triton puts no barrier there by itself.
        """
        if self.dirty and _options.lint:
            raise LintError(
                f"{what} after a tile store, with no barrier of the block in between, in program {self.grid_position}: "
                "one thread releases what all of them stored. Call tl.debug_barrier() before it."
            )

    def check_stop(self) -> None:
        if self.stop.is_set():
            raise Aborted(f"program {self.grid_position} stops, since another program of the launch has failed")


_program = ProgramState()


def program_state() -> ProgramState:
    """The state of the program that runs in this thread."""
    return _program


def lint(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """`with lint(False)`: a release that a GPU could let overtake the stores before it does not raise LintError."""
    return _option("lint", enabled)


def jitter(max_seconds: float) -> contextlib.AbstractContextManager[None]:
    """`with jitter(0.002)`: random delays before and after every stand-in, so that programs meet in other orders."""
    return _option("jitter_s", max_seconds)


@contextlib.contextmanager
def _option(name: str, value: Any) -> Iterator[None]:
    before = getattr(_options, name)
    setattr(_options, name, value)
    try:
        yield
    finally:
        setattr(_options, name, before)


def maybe_delay() -> None:
    if _options.jitter_s and random.random() < 0.5:
        time.sleep(random.random() * _options.jitter_s)


def poll(condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
    """Waits until `condition()` holds: True. After `timeout_s`: False. Raises Aborted if another program fails."""
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for turn in itertools.count():
        if condition():
            return True
        _program.check_stop()
        if deadline is not None and time.monotonic() > deadline:
            return False
        pause(turn)
    raise AssertionError("unreachable")


def pause(turn: int) -> None:
    """What a waiting loop does in its turn 0, 1, ...: gives way, later sleeps.

    A thread that spins keeps Python's lock for 5 ms at a time from the thread it waits for.
    """
    if turn < 20:
        time.sleep(0)  # other threads of this process
        os.sched_yield()  # other processes
    else:
        time.sleep(1e-4 if turn < 2000 else 1e-3)
