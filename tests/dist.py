"""Ranks for tests: processes that stay up, so that a case costs milliseconds and not a start of Python.

    def sums_over_ranks(rank, world_size, value):          # at module level, in any module of tests
        x = torch.full((4,), float(value + rank))
        dist.all_reduce(x)                                  # torch.distributed is up, with gloo
        return x

    def test_sum(ranks):
        results = ranks(2).run(sums_over_ranks, 10)         # [result of rank 0, result of rank 1]

A rank that raises, dies or hangs fails the call with what is known of every rank (tracebacks; for a hang, where each
thread stood), and the pool starts afresh at its next call. What a task leaves behind in its process (an initialised
group, a cache) is there for the next task: ranks are as long-lived as those of an engine.
"""

from __future__ import annotations

import contextlib
import faulthandler
import importlib
import multiprocessing
import os
import pickle
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PRELOADED = ["torch", "torch.distributed", "numpy", "triton", "triton.language", "pytest", "tp_overlap_kernels"]
START_TIMEOUT_S = 120
AFTER_FIRST_FAILURE_S = 1.0


class RankFailed(AssertionError):
    """A rank raised; the text holds the tracebacks of all that did."""


class RankDied(RankFailed):
    """The process of a rank ended."""


class RankTimeout(RankFailed):
    """Ranks gave no answer; the text holds the stacks of their threads."""


class RankPool:
    """`world_size` processes with a default process group of `backend`. Starts at the first `run`."""

    def __init__(self, world_size: int, backend: str = "gloo") -> None:
        self.world_size, self.backend = world_size, backend
        self._processes: list[Any] = []
        self._pipes: list[Connection] = []
        self._folder: tempfile.TemporaryDirectory | None = None
        self._barrier: Any = None

    def run(self, task: Callable | str, *args: Any, timeout: float = 60) -> list[Any]:
        """`task(rank, world_size, *args)` on every rank; the results by rank.

        task: a function at the top level of an importable module, or "module:function". Arguments and results are
        pickled.
        timeout: seconds for the slowest rank.
        """
        name = task if isinstance(task, str) else f"{task.__module__}:{task.__qualname__}"
        try:
            if not self._processes:
                self._start()
            message = pickle.dumps((name, args))
            for pipe in self._pipes:
                with contextlib.suppress(BrokenPipeError):  # died between two calls: `_gather` says so
                    pipe.send_bytes(message)
            return self._gather(f"{name} with {self.world_size} ranks", timeout)
        except BaseException:
            self.kill()
            raise

    def _start(self) -> None:
        context = fork_server()
        self._folder = tempfile.TemporaryDirectory(prefix="tpo-ranks-")
        # Kept, since its memory would else be given to the next pool's barrier.
        self._barrier = barrier = context.Barrier(self.world_size)
        for rank in range(self.world_size):
            ours, theirs = context.Pipe()
            arguments = (rank, self.world_size, theirs, barrier, self._folder.name, self.backend)
            process = context.Process(target=_serve, args=arguments, daemon=True, name=f"rank {rank}")
            process.start()
            theirs.close()  # so that a rank's death ends the pipe
            self._processes.append(process)
            self._pipes.append(ours)
        self._gather(f"start of {self.world_size} ranks", START_TIMEOUT_S)

    def _gather(self, what: str, timeout: float) -> list[Any]:
        results: list[Any] = [None] * self.world_size
        errors: dict[int, str] = {}
        died = False
        pending = {pipe: rank for rank, pipe in enumerate(self._pipes)}
        deadline = time.monotonic() + timeout
        while pending:
            ready = wait(list(pending), max(0.0, deadline - time.monotonic()))
            if not ready:
                break
            for pipe in ready:
                rank = pending.pop(pipe)
                try:
                    ok, answer = pickle.loads(pipe.recv_bytes())
                except (EOFError, ConnectionResetError):
                    self._processes[rank].join(1)
                    ok, answer, died = False, f"the process ended, exit code {self._processes[rank].exitcode}", True
                if ok:
                    results[rank] = answer
                else:
                    errors[rank] = answer
                    # The others may wait for this one: hear what they have to say, but not for long.
                    deadline = min(deadline, time.monotonic() + AFTER_FIRST_FAILURE_S)
        if not pending and not errors:
            return results
        errors |= {rank: f"no answer; its threads:\n{self._stacks(rank)}" for rank in pending.values()}
        text = "\n".join(f"-- rank {rank}: {errors[rank]}" for rank in sorted(errors))
        if died:
            raise RankDied(f"{what}: a rank died\n{text}")
        if len(errors) == len(pending):
            raise RankTimeout(f"{what}: ranks {sorted(errors)} gave no answer in {timeout} s\n{text}")
        raise RankFailed(f"{what}: failed\n{text}")

    def _stacks(self, rank: int) -> str:
        process = self._processes[rank]
        file = Path(self._folder.name, f"stacks_{rank}")
        if process.pid is None or not process.is_alive() or not file.exists():
            return "(none)"
        os.kill(process.pid, signal.SIGUSR1)
        time.sleep(0.1)
        return file.read_text() or "(none: it does not respond)"

    def kill(self) -> None:
        """Ends the processes at once; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
        self._forget()

    def close(self) -> None:
        """Lets the processes end by themselves."""
        for pipe in self._pipes:
            with contextlib.suppress(BrokenPipeError):
                pipe.send_bytes(pickle.dumps(None))
        for process in self._processes:
            process.join(5)
        self.kill()

    def _forget(self) -> None:
        for process, pipe in zip(self._processes, self._pipes, strict=False):
            process.join(5)
            pipe.close()
        if self._folder is not None:
            self._folder.cleanup()
        self._processes, self._pipes, self._folder = [], [], None


# --- in the process of a rank

_barrier: Any = None


def barrier() -> None:
    """All ranks of the pool meet, without torch.distributed."""
    _barrier.wait(60)


def _serve(rank: int, world_size: int, pipe: Connection, meeting: Any, folder: str, backend: str) -> None:
    global _barrier
    _barrier = meeting
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # an interrupt is for pytest, which ends the ranks
    stacks = open(Path(folder, f"stacks_{rank}"), "w")
    faulthandler.register(signal.SIGUSR1, stacks, all_threads=True)
    _answer(pipe, _join_group, rank, world_size, folder, backend)
    while True:
        try:
            message = pickle.loads(pipe.recv_bytes())
        except EOFError:  # pytest is gone
            return
        if message is None:
            return
        _answer(pipe, _call, rank, world_size, *message)


def _answer(pipe: Connection, function: Callable, *args: Any) -> None:
    try:
        answer = pickle.dumps((True, function(*args)))
    except BaseException:
        answer = pickle.dumps((False, traceback.format_exc()))
    pipe.send_bytes(answer)


def _join_group(rank: int, world_size: int, folder: str, backend: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    store = dist.FileStore(str(Path(folder, "store")), world_size)
    dist.init_process_group(backend, store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))


def _call(rank: int, world_size: int, name: str, args: tuple) -> Any:
    module, function = name.split(":")
    task = importlib.import_module(module)
    for part in function.split("."):
        task = getattr(task, part)
    return task(rank, world_size, *args)


# --- the server that ranks are forked from: it has imported everything, and has run nothing

_server_lock = threading.Lock()


def fork_server() -> Any:
    """The multiprocessing context of ranks."""
    context = multiprocessing.get_context("forkserver")
    with (
        _server_lock,
        _environment(
            OMP_NUM_THREADS="1",
            OPENBLAS_NUM_THREADS="1",
            GLOO_SOCKET_IFNAME="lo",
            PYTHONPATH=os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
        ),
    ):
        context.set_forkserver_preload(PRELOADED)
        multiprocessing.forkserver.ensure_running()
    return context


@contextlib.contextmanager
def _environment(**values: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
