"""What one rank's interpreted kernels do to the words that ranks share, written down for replay.py.

    with tracing(arena) as trace:
        torch.ops.tp_overlap.all_reduce(x, group_name)
    return trace.events                                # picklable; addresses have become (owner, offset)

Watched are the arenas of all ranks and our own `control`. The operations of the interpreter's builder are patched while
a trace is taken, and the streams of the chunked plan are replaced by twins that write down who joins whom: on the CPU
the streams are one thread, whose order would hide what CUDA's do not promise. What torch itself copies and multiplies
there is seen by a dispatch mode. The package knows nothing of all this.

Not seen: the CUDA kernels of csrc, which cannot be interpreted (test_sentinel.py replays their protocol); the `ref`
backend, which follows x86's order; `close`, whose words order nothing; threads of one block among each other, and
whether the assembly has the order that its stand-in claims (tests/kernels).
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter as stock

from tp_overlap_kernels.lang import launch as lang_launch
from tp_overlap_kernels.lang import signal
from tp_overlap_kernels.lang.interpreter import program_state
from tp_overlap_kernels.lang.interpreter.operations import Builder
from tp_overlap_kernels.memory.arena import Arena
from tp_overlap_kernels.ops import chunked

GRAIN_BYTES = 2  # the smallest element that travels; offsets in an Access are counted in these
HOST = -1  # in the place of a program: torch, on a stream
SENTINEL = 0x80008000  # in a word of the sentinel region: nothing has come
CONTROL = -1  # in the place of an owner: the rank's own control words


class Begin(NamedTuple):
    """A launch: its programs know all that its stream knows."""

    stream: int
    programs: int
    kernel: str


class End(NamedTuple):
    """The stream knows all that the programs of its launch knew. epoch: of the call that it belonged to."""

    stream: int
    programs: int
    epoch: int


class After(NamedTuple):
    """`stream` knows all that `other` knows."""

    stream: int
    other: int


class Access(NamedTuple):
    """A plain load or store of `grains` (unique, rising) in the arena of `owner`, or in our control."""

    stream: int
    program: int
    is_store: bool
    owner: int
    grains: np.ndarray


class Atomic(NamedTuple):
    """A scalar atomic on the word at `offset` bytes. stored: None for a load. Orders wider than nothing are at system
    scope, or it is a word of control."""

    stream: int
    program: int
    owner: int
    offset: int
    seen: int
    stored: int | None
    acquires: bool
    releases: bool
    is_exchange: bool  # what is stored does not depend on what was seen


_ACQUIRING = (stock._ir.MEM_SEMANTIC.ACQUIRE, stock._ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_RELEASING = (stock._ir.MEM_SEMANTIC.RELEASE, stock._ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
_SYSTEM = stock._ir.MEM_SYNC_SCOPE.SYSTEM


class Trace:
    """The events of one rank, in an order that every program of it agrees with."""

    def __init__(self, arena: Arena):
        self.events: list[Any] = []
        self.stream = 0  # where the host puts what it launches
        self._arena = arena
        self._epoch = ctypes.c_int64.from_address(arena.control.data_ptr() + 8 * signal.EPOCH.value)
        total = arena.layout.total_bytes
        spans = [(base, base + total, owner) for owner, base in enumerate(arena.store.bases)]
        control = arena.control.data_ptr()
        spans.append((control, control + arena.control.nbytes, CONTROL))
        self._spans = spans
        # An atomic and its line in the log are one step: else a program that sees its result could be logged first.
        self._atomic = threading.Lock()
        self._last_poll = threading.local()

    # --- where

    def _place(self, address: int) -> tuple[int, int] | None:
        """(owner, offset in bytes), or None for memory that is not watched."""
        for start, end, owner in self._spans:
            if start <= address < end:
                return owner, address - start
        return None

    def _program(self) -> int:
        position = program_state().grid_position
        return HOST if position is None or threading.current_thread() is threading.main_thread() else position[0]

    # --- plain accesses

    def access(self, is_store: bool, addresses: np.ndarray, nbytes: int) -> None:
        """addresses: of elements of `nbytes`; those outside of what is watched do not count."""
        addresses = addresses.ravel().astype(np.int64)
        for start, end, owner in self._spans:
            inside = addresses[(addresses >= start) & (addresses < end)] - start
            if inside.size:
                steps = np.arange(0, nbytes, GRAIN_BYTES) if nbytes > GRAIN_BYTES else np.zeros(1, np.int64)
                grains = np.unique((inside[:, None] + steps) // GRAIN_BYTES)
                self.events.append(Access(self.stream, self._program(), is_store, owner, grains))

    def tensor(self, is_store: bool, x: torch.Tensor) -> None:
        """The same for a torch tensor, rows of which are contiguous."""
        if x.numel() == 0 or x.device.type != "cpu" or self._place(x.data_ptr()) is None:
            return
        offsets = torch.zeros((), dtype=torch.int64)
        for size, stride in zip(x.shape, x.stride(), strict=True):
            offsets = offsets[..., None] + torch.arange(size) * stride
        self.access(is_store, x.data_ptr() + offsets.numpy() * x.element_size(), x.element_size())

    # --- atomics

    def atomic(self, address: int, operation, stored_of, acquires: bool, releases: bool, is_exchange: bool) -> Any:
        """Runs `operation()`, which returns the old value's handle, and writes down what it did.

        stored_of: from the value seen to the one stored, or None where it stores nothing.
        """
        place = self._place(address)
        if place is None:
            return operation()
        with self._atomic:
            result = operation()
            seen = int(result.data.item())
            stored = stored_of(seen)
            poll = (*place, seen)
            if stored is None and getattr(self._last_poll, "value", None) == poll:
                return result  # one more turn of a waiting loop, which saw what the turn before saw
            self._last_poll.value = poll
            event = Atomic(self.stream, self._program(), *place, seen, stored, acquires, releases, is_exchange)
            self.events.append(event)
        return result

    # --- launches

    def launched(self, interpret, kernel, grid, *args, **kwargs) -> None:
        programs = grid[0]
        self.events.append(Begin(self.stream, programs, kernel.fn.__name__))
        try:
            interpret(kernel, grid, *args, **kwargs)
        finally:
            self.events.append(End(self.stream, programs, self._epoch.value))


def _ordered(semantic, scope, owner_is_control: bool) -> tuple[bool, bool]:
    """(acquires, releases); an order that ends at the device says nothing to another one."""
    if scope != _SYSTEM and not owner_is_control:
        return False, False
    return semantic in _ACQUIRING, semantic in _RELEASING


class _Streams:
    """chunked._Streams as it is on CUDA: two streams beside the call's own, and who waits for whom."""

    def __init__(self, trace: Trace):
        self._trace = trace
        for side in (1, 2):
            trace.events.append(After(side, 0))

    @contextlib.contextmanager
    def on(self, index: int, after_main: bool = False) -> Iterator[None]:
        side = index + 1
        if after_main:
            self._trace.events.append(After(side, 0))
        before, self._trace.stream = self._trace.stream, side
        try:
            yield
        finally:
            self._trace.stream = before

    def join(self) -> None:
        for side in (1, 2):
            self._trace.events.append(After(0, side))


class _TorchAccesses(TorchDispatchMode):
    """Loads and stores of torch's own operations, from their schemas."""

    def __init__(self, trace: Trace):
        super().__init__()
        self._trace = trace

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        names = [argument.name for argument in func._schema.arguments]
        values = {**dict(zip(names, args, strict=False)), **kwargs}
        touched = [
            (argument.alias_info, values[argument.name])
            for argument in func._schema.arguments
            if isinstance(values.get(argument.name), torch.Tensor)
        ]
        for alias, x in touched:
            if alias is None:  # a view aliases without writing, and touches nothing
                self._trace.tensor(False, x)
        result = func(*args, **kwargs)
        for alias, x in touched:
            if alias is not None and alias.is_write:
                self._trace.tensor(True, x)
        return result


@contextlib.contextmanager
def tracing(arena: Arena) -> Iterator[Trace]:
    """Everything that this rank's interpreted calls do inside, in `.events`."""
    trace = Trace(arena)
    load, store = Builder.create_masked_load, Builder.create_masked_store
    rmw, cas = Builder.create_atomic_rmw, Builder.create_atomic_cas
    interpret, poke = lang_launch.interpret, signal._poke

    def traced_load(self, ptrs, mask, *rest, **policy):
        trace.access(False, ptrs.data[mask.data], _itemsize(ptrs))
        return load(self, ptrs, mask, *rest, **policy)

    def traced_store(self, ptrs, value, mask, *rest, **policy):
        result = store(self, ptrs, value, mask, *rest, **policy)
        trace.access(True, ptrs.data[mask.data], _itemsize(ptrs))
        return result

    def traced_rmw(self, op, ptr, value, mask, semantic, scope):
        operation = lambda: rmw(self, op, ptr, value, mask, semantic, scope)
        address = _scalar_address(trace, ptr)
        if address is None:
            return operation()
        operand, kinds = int(value.data.item()), stock._ir.ATOMIC_OP
        if op not in (kinds.ADD, kinds.XCHG):
            raise NotImplementedError(f"trace: atomic {op} on a shared word")
        is_exchange = op == kinds.XCHG
        stored_of = lambda seen: operand if is_exchange else seen + operand if operand else None
        order = _ordered(semantic, scope, trace._place(address)[0] == CONTROL)
        return trace.atomic(address, operation, stored_of, *order, is_exchange)

    def traced_cas(self, ptr, expected, value, semantic, scope):
        operation = lambda: cas(self, ptr, expected, value, semantic, scope)
        address = _scalar_address(trace, ptr)
        if address is None:
            return operation()
        wanted, new = int(expected.data.item()), int(value.data.item())
        order = _ordered(semantic, scope, trace._place(address)[0] == CONTROL)
        return trace.atomic(address, operation, lambda seen: new if seen == wanted else None, *order, False)

    def traced_poke(address, value):
        poke(address, value)
        trace.access(True, np.array([address]), 8)

    def in_torch(run):
        def traced(*args, **kwargs):
            with _TorchAccesses(trace):
                return run(*args, **kwargs)

        return traced

    with contextlib.ExitStack() as patches:
        for target, name, value in (
            (Builder, "create_masked_load", traced_load),
            (Builder, "create_masked_store", traced_store),
            (Builder, "create_atomic_rmw", traced_rmw),
            (Builder, "create_atomic_cas", traced_cas),
            (signal, "_poke", traced_poke),
            (lang_launch, "interpret", lambda *a, **k: trace.launched(interpret, *a, **k)),
            (chunked, "_Streams", lambda arena: _Streams(trace)),
            (chunked, "gemm_all_reduce_chunked", in_torch(chunked.gemm_all_reduce_chunked)),
            (chunked, "gemm_reduce_scatter_chunked", in_torch(chunked.gemm_reduce_scatter_chunked)),
        ):
            patches.enter_context(mock.patch.object(target, name, value))
        yield trace


def _itemsize(ptrs) -> int:
    return max(ptrs.get_element_ty().primitive_bitwidth // 8, 1)


def _scalar_address(trace: Trace, ptr) -> int | None:
    """The address, if it is watched. A tile of atomics on shared words has no rule in replay.py."""
    addresses = ptr.data.ravel()
    if addresses.size == 1:
        address = int(addresses[0])
        return address if trace._place(address) else None
    if any(trace._place(int(address)) for address in addresses):
        raise NotImplementedError("trace: a tile of atomics on shared words")
    return None
