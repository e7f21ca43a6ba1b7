"""What ranks do in a fault: one of them goes wrong, the others call, and each says what it saw.

In a pool the rank that goes wrong stays alive, so after the fault every rank makes the group anew and calls again. In a
job of its own it may end: then the others must come to their own end by themselves.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import multiprocessing
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.dist import barrier, fork_server
from tests.ops.calls import Call, Setup, group_name, invoke, operands, out_shape, prepare_arena
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.memory import reach
from tp_overlap_kernels.memory import store as stores

TIMEOUT_S = 1.0  # of a wait, where it is what must end it
LONG_TIMEOUT_S = 30.0  # where something else must
LATER_S = 0.3  # after the others have begun to call
JOB_LIMIT_S = 60


REF = Setup("ref")


@dataclasses.dataclass
class Outcome:
    error: str  # name of the exception's class; "" for none
    text: str
    seconds: float
    out: torch.Tensor | None = None

    @classmethod
    def of(cls, function, *arguments):
        started = time.monotonic()
        try:
            out, error, text = function(*arguments), "", ""
        except Exception as raised:
            out, error, text = None, type(raised).__name__, str(raised)
        return cls(error, text, time.monotonic() - started, out)


@dataclasses.dataclass
class Story:
    """What a rank saw: its call, what it wrote, the next call, and a call after close() and init()."""

    first: Outcome
    out: torch.Tensor
    second: Outcome
    after: torch.Tensor | None = None


@dataclasses.dataclass(frozen=True)
class Fault:
    """One injected fault, and what it must come to.

    kind: what the victim does. theirs: the call that it makes. step: of init, where it happens there. error: class that
    every other rank raises; also the victim, where it lives and calls. named: what each text says; "peer" is the other
    rank's number. limit_s: from the call to the error. patient: ranks whose own
    timeout is long.
    """

    why: str
    kind: str
    error: str
    limit_s: float
    call: Call
    setup: Setup = REF
    theirs: Call | None = None
    step: Any = None
    named: str = "rank 1"
    victims: tuple[int, ...] = (1,)
    patient: tuple[int, ...] = ()

    def __str__(self) -> str:
        return f"{self.kind}-{self.why}".replace(" ", "_")

    @property
    def world_size(self) -> int:
        return self.call.case.world_size


def attempt(rank, setup, call):
    """The call into a tensor that was zero, so that a NaN is the op's own; None makes no call."""
    if call is None:
        return Outcome("", "", 0.0), torch.empty(0)
    tensors = operands(call, rank)
    fixed = 1 if call.op == "all_reduce" else 2
    out = torch.zeros(out_shape(call, rank), dtype=call.case.dtype)
    function = getattr(torch.ops.tp_overlap, call.op + "_out")
    return Outcome.of(function, *tensors[:fixed], group_name(), out, *tensors[fixed:]), out


def recover(rank, setup, good):
    """close() and init() on every rank, then a call."""
    tpo.close()
    prepare_arena(setup)
    return invoke(good, operands(good, rank), rank)


def in_force(setup: Setup):
    """The contexts of a setup, as one."""
    stack = contextlib.ExitStack()
    stack.enter_context(tpo.cpu_backend(setup.backend))
    stack.enter_context(tpo.force_plan(setup.plan))
    stack.enter_context(torch.inference_mode())
    return stack


# --- the victim lives


def suffer(rank: int, world_size: int, fault: Fault, good: Call) -> Story:
    """One rank of a pool."""
    arena = prepare_arena(fault.setup)
    pids: list = [None] * world_size
    dist.all_gather_object(pids, os.getpid())
    with in_force(fault.setup):
        invoke(fault.call, operands(fault.call, rank), rank)  # what a first call prepares is not what is timed
        arena.timeout_s = LONG_TIMEOUT_S if rank in fault.patient or fault.error != "PeerTimeout" else TIMEOUT_S
        barrier()
        if rank in fault.victims:
            first, out = IN_POOL[fault.kind](rank, fault)
        else:
            first, out = attempt(rank, fault.setup, fault.call)
            if fault.kind == "SIGSTOP":
                for victim in fault.victims:
                    os.kill(pids[victim], signal.SIGCONT)
        second = Outcome.of(invoke, good, operands(good, rank), rank) if first.error and first.out is None else first
        barrier()
        return Story(first, out, second, recover(rank, fault.setup, good))


def call_something_else(rank: int, fault: Fault):
    return attempt(rank, fault.setup, fault.theirs)


def call_with_another_plan(rank: int, fault: Fault):
    with tpo.force_plan(fault.step):
        return attempt(rank, fault.setup, fault.call)


def never_arrive(rank: int, fault: Fault):
    return attempt(rank, fault.setup, None)


def close_the_group(rank: int, fault: Fault):
    time.sleep(LATER_S)
    tpo.close()
    return attempt(rank, fault.setup, None)


def raise_and_close(rank: int, fault: Fault):
    """As an engine's loop does that closes what it has opened."""
    try:
        try:
            time.sleep(LATER_S)
            raise KeyError("something of the engine's")
        finally:
            tpo.close()
    except KeyError:
        return attempt(rank, fault.setup, None)


def stop(rank: int, fault: Fault):
    os.kill(os.getpid(), signal.SIGSTOP)  # until a survivor says SIGCONT
    return attempt(rank, fault.setup, None)


IN_POOL: dict[str, Callable[[int, Fault], tuple[Outcome, torch.Tensor]]] = {
    "another call": call_something_else,
    "another plan": call_with_another_plan,
    "never arrives": never_arrive,
    "closes": close_the_group,
    "exception": raise_and_close,
    "SIGSTOP": stop,
}


def fork_and_call(rank: int, world_size: int, fault: Fault, good: Call) -> Story:
    """Every rank forks a child that calls, and then calls itself."""
    prepare_arena(fault.setup)
    with in_force(fault.setup):
        ours, theirs = multiprocessing.Pipe()
        child = os.fork()
        if child == 0:
            try:
                theirs.send(attempt(rank, fault.setup, fault.call)[0])
            finally:
                os._exit(0)
        answered = ours.poll(20)
        outcome = ours.recv() if answered else Outcome("", "the child did not answer", 20.0)
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        after = invoke(good, operands(good, rank), rank)
    return Story(outcome, torch.empty(0), outcome, after)


# --- init goes wrong on one rank


def _refuse(*arguments: Any, **more: Any) -> Any:
    raise OSError(errno.EMFILE, "Too many open files")


def _refuse_to_open(path: str, *arguments: Any) -> int:
    raise PermissionError(errno.EACCES, "Permission denied")


def _second_time(function: Callable) -> Callable:
    calls: list[int] = []

    def run(*arguments: Any, **more: Any) -> Any:
        calls.append(1)
        return function(*arguments, **more) if len(calls) == 1 else _refuse()

    return run


def _elsewhere(store: stores.Store, owner: int, offset: int, world_size: int) -> torch.Tensor:
    return torch.zeros(world_size, dtype=torch.int64)


def _out_of_memory(*arguments: Any) -> Any:
    raise RuntimeError("CUDA out of memory")


STEPS: dict[str, Callable[[], Any]] = {
    "sizes": lambda: mock.patch.object(arenas, "Wish", lambda M, N, *more: _bad_sizes()),
    "table": lambda: mock.patch.object(
        arenas, "settings", lambda: dataclasses.replace(_settings(), table="/no/such/table.json")
    ),
    "memory": lambda: mock.patch.object(os, "memfd_create", _refuse),
    "mapping": lambda: mock.patch.object(stores.os, "open", _refuse_to_open),
    "reach": lambda: mock.patch.object(reach, "_words", _elsewhere),
    "board": lambda: mock.patch.object(os, "memfd_create", _second_time(os.memfd_create)),
    "device": lambda: mock.patch.object(arenas, "_furnish", _out_of_memory),
}
_settings = arenas.settings


def _bad_sizes() -> None:
    raise tpo.InvalidInput("init: max_M and max_N must be at least 1, got max_M=0, max_N=64.")


def init_and_suffer(rank: int, world_size: int, fault: Fault, good: Call) -> Story:
    """init with a step that goes wrong on the victims; then as it should be."""
    tpo.close()
    patch = STEPS[fault.step]() if rank in fault.victims else mock.patch.object(arenas, "LOCAL_GROUP", "local")
    with patch:
        first = Outcome.of(lambda: tpo.init(max_M=fault.setup.max_M, max_N=fault.setup.max_N))
    with open("/proc/self/maps") as lines:
        left = [line for line in lines if "memfd:tp_overlap" in line]
    assert left == [], left
    second = Outcome.of(invoke, good, operands(good, rank), rank)
    barrier()
    with in_force(fault.setup):
        return Story(first, torch.empty(0), second, recover(rank, fault.setup, good))


# --- the victim ends, in a job of its own


def run_job(world_size: int, folder: Path, task: Callable, *arguments: Any) -> tuple[list[int | None], list[Any]]:
    """`task(rank, world_size, *arguments)` in new processes: their exit codes, and what each returned, if it did."""
    context = fork_server()
    processes = []
    for rank in range(world_size):
        more = (rank, world_size, str(folder), task, arguments)
        processes.append(context.Process(target=_in_job, args=more, daemon=True, name=f"rank {rank} of a job"))
        processes[-1].start()
    deadline = time.monotonic() + JOB_LIMIT_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
        process.join()
    files = [folder / f"rank_{rank}" for rank in range(world_size)]
    return codes, [pickle.loads(file.read_bytes()) if file.exists() else None for file in files]


def _in_job(rank: int, world_size: int, folder: str, task: Callable, arguments: tuple) -> None:
    torch.set_num_threads(1)
    store = dist.FileStore(os.path.join(folder, "store"), world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=30))
    dist.barrier()  # all are connected, whoever ends next
    answer = task(rank, world_size, *arguments)
    Path(folder, f"rank_{rank}").write_bytes(pickle.dumps(answer))


def end_by_signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def end_by_exception() -> None:
    raise KeyError("nobody catches this")


ENDS = {
    "SIGKILL": end_by_signal(signal.SIGKILL),
    "SIGABRT": end_by_signal(signal.SIGABRT),
    "sys.exit": lambda: sys.exit(3),
    "uncaught exception": end_by_exception,
}


def die_in_a_call(rank: int, world_size: int, fault: Fault) -> Story:
    """The victims end when the others have begun to call (step "in"), or before."""
    setup = fault.setup
    tpo.init(max_M=setup.max_M, max_N=setup.max_N)
    with in_force(setup):
        invoke(fault.call, operands(fault.call, rank), rank)  # what a first call prepares is not what is timed
    dist.barrier()
    if rank in fault.victims:
        time.sleep(LATER_S if fault.step == "in" else 0.0)
        ENDS[fault.kind]()
    time.sleep(LATER_S if fault.step == "before" else 0.0)
    with in_force(setup):
        first, out = attempt(rank, setup, fault.call)
        second, _ = attempt(rank, setup, fault.call)
        tpo.close()
    return Story(first, out, second)


def die_in_init(rank: int, world_size: int, fault: Fault) -> Story:
    """The victims are killed where they would exchange for the time `step`."""
    exchange, exchanges = dist.all_gather_object, []

    def exchange_or_die(*arguments: Any, **more: Any) -> None:
        if len(exchanges) == fault.step:
            os.kill(os.getpid(), signal.SIGKILL)
        exchanges.append(1)
        exchange(*arguments, **more)

    with mock.patch.object(dist, "all_gather_object", exchange_or_die if rank in fault.victims else exchange):
        first = Outcome.of(lambda: tpo.init(max_M=fault.setup.max_M, max_N=fault.setup.max_N))
    return Story(first, torch.empty(0), Outcome.of(invoke, fault.call, operands(fault.call, rank), rank))


def succeed(rank: int, world_size: int, call: Call) -> torch.Tensor:
    """A job without a fault."""
    tpo.init(max_M=256, max_N=1024)
    out = invoke(call, operands(call, rank), rank)
    tpo.close()
    return out
