"""Steps that the ranks of a group take together in `init`: what one of them finds wrong is raised on every one.

torch.distributed knows no such thing: a rank that raises between two collectives leaves the others in the second,
until its timeout, which is half an hour by default.
"""

import contextlib
import os
import select
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import TypeVar

import torch.distributed as dist

from .. import errors
from ..errors import PeerDied, PeerTimeout, TpOverlapError

T = TypeVar("T")
DEATH_SHOWS_MS = 500  # a connection may end before the process that held it
FOR_EVER = timedelta(days=365)


def exchange(group: dist.ProcessGroup | None, step: Callable[[], T], pids: Mapping[int, int] | None = None) -> list[T]:
    """Run `step` on this rank and give the values of all ranks, by rank. Collective, and ends as a barrier does.

    Values are pickled. pids: of the ranks, where they are known, so that one that has ended can be named. group: None
    is one rank by itself.
    Errors: this rank's own, as raised; else the first of another rank, of its class, with that rank's number; PeerDied
    and PeerTimeout where torch.distributed cannot reach a rank.
    """
    if group is None:
        return [step()]
    value, failure = None, None
    try:
        value = step()
    except Exception as error:
        failure = error
    text = None if failure is None else (type(failure).__name__, str(failure))
    answers: list = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(answers, (value, text), group=group)
    except RuntimeError as reason:
        raise _unreachable(reason, pids or {}, failure) from reason
    if failure is not None:
        raise failure
    for rank, (_, text) in enumerate(answers):
        if text is not None:
            raise _of_another(rank, *text)
    return [answer[0] for answer in answers]


def raised_on_all(reason: BaseException) -> bool:
    """Whether what `exchange` has raised on this rank it has raised on every one: none has ended, none never came."""
    return isinstance(reason, Exception) and not isinstance(reason, (PeerDied, PeerTimeout))


def unanimous(words: dist.Store, name: str, world_size: int, yes: bool, timeout_s: float) -> bool:
    """Whether all ranks have said yes under this name, which no other question has. Every rank gets the same answer.

    words: the key-value store of the ranks' group. A rank that says no waits for nobody. One that says yes waits for
    the others, at most timeout_s seconds (0: for ever), and then says no for all. What counts is written once: nobody
    acts on a yes on which another has given up. Where the store is gone, with the process that served it: no.
    """
    verdict = f"{name}/verdict"
    with contextlib.suppress(RuntimeError):
        if not yes:
            return _settle(words, verdict, "no")
        if words.add(f"{name}/yes", 1) == world_size:
            return _settle(words, verdict, "yes")
        with contextlib.suppress(RuntimeError):  # torch.distributed has no class for a timeout of all its stores
            words.wait([verdict], timedelta(seconds=timeout_s) if timeout_s else FOR_EVER)
        return _settle(words, verdict, "no")
    return False


def _settle(words: dist.Store, verdict: str, proposal: str) -> bool:
    """Write the verdict if there is none; whether the one there is says yes."""
    return words.compare_set(verdict, "", proposal) == b"yes"


def _of_another(rank: int, kind: str, text: str) -> TpOverlapError:
    known = getattr(errors, kind, None)
    if known is None:
        return TpOverlapError(f"init: rank {rank} raised {kind}: {text}")
    return known(f"init: on rank {rank}: {text.removeprefix('init: ')}")


def _unreachable(reason: RuntimeError, pids: Mapping[int, int], own: Exception | None) -> Exception:
    """own: what this rank has met in the step, perhaps because another rank has ended."""
    said = str(reason).split("\n")[0]
    ended = [f"rank {rank} (pid {pid})" for rank, pid in sorted(pids.items()) if _has_ended(pid)]
    if ended:
        return PeerDied(f"init: the process of {', '.join(ended)} has ended before init was over ({said}).")
    if own is not None:
        return own
    if "imed out" in said or "imeout" in said:
        return PeerTimeout(f"init: a rank of the group has not called init in the time that torch gives it ({said}).")
    return PeerDied(f"init: a rank of the group has ended, or left it, before init was over ({said}).")


def _has_ended(pid: int) -> bool:
    if pid == os.getpid():
        return False
    try:
        watched = os.pidfd_open(pid)
    except OSError:
        return True
    try:
        poll = select.poll()
        poll.register(watched, select.POLLIN)
        return bool(poll.poll(DEATH_SHOWS_MS))
    finally:
        os.close(watched)
