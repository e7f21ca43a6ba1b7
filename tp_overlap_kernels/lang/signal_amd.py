"""The words of signal.py for AMD GPUs, which give them these bodies there: same arguments, meanings and record.

A wait loads the slot past the caches until the epoch is there, and then invalidates them. An arrival is written by an
atomic exchange, relaxed, behind a release of every wave and a barrier: a scalar's atomic is what Triton has one thread
do at system scope.
"""

import triton
import triton.language as tl

from . import gcn
from .control import ABORTED, ENTERED, EPOCH, FAILED, HEADERS, HEADERS_BYTES, MISMATCH, OK, REPORTER, TIMEOUT


@triton.jit
def count_in(control_ptr, epoch):
    """Of signal.py; the thread that Triton picks for scalars counts."""
    gcn.join()
    entered = tl.atomic_add(control_ptr + ENTERED, 1, sem="acq_rel", scope="gpu")
    if entered == tl.num_programs(0) - 1:
        tl.store(control_ptr + ENTERED, 0)
        tl.store(control_ptr + EPOCH, epoch)


@triton.jit
def notify(slot, word):
    """Of signal.py."""
    gcn.release()
    tl.debug_barrier()
    tl.atomic_xchg(slot.to(tl.pointer_type(tl.int64)), word, sem="relaxed", scope="sys")


@triton.jit
def notify_add(slot, addend):
    """As `notify`, but the slot is added to."""
    gcn.release()
    tl.debug_barrier()
    tl.atomic_add(slot.to(tl.pointer_type(tl.int64)), addend, sem="relaxed", scope="sys")


@triton.jit
def wait(slot, word, timeout_ns, control_ptr, record_ptr, who):
    """Of signal.py. It looks around, at the host's word too, after 512 polls and then every 1024."""
    wanted = word >> 16
    status = tl.full((), OK, tl.int32)
    polls = tl.full((), 0, tl.int32)
    started = tl.full((), 0, tl.int64)
    seen = gcn.word_at(slot)
    while (status == OK) & (seen >> 16 < wanted):
        polls += 1
        if polls % 1024 == 512:
            status, seen, started = look_around(slot, seen, word, timeout_ns, control_ptr, record_ptr, who, started)
        if (status == OK) & (seen >> 16 < wanted):
            seen = gcn.word_at(slot)
    status = tl.where((status == OK) & (seen >> 16 == wanted) & (seen != word), MISMATCH, status)
    if status != OK:
        report(control_ptr, record_ptr, status, word, seen, who)
    gcn.acquire()
    return status


@triton.jit
def look_around(slot, seen, word, timeout_ns, control_ptr, record_ptr, who, started):
    """Why a wait that lasts should end: (status, what the slot or the peer's header holds, start of the clock).

    The weightiest reason comes last: the clock, another call of the peer, a peer that has closed and sent nothing
    before, all waits told to end, another wait that has failed. The words: memory.record, and control.py.
    """
    now = gcn.clock_ns()
    started = tl.where(started == 0, now, started)
    late = (timeout_ns != 0) & (now - started > timeout_ns)
    status = tl.where(late, TIMEOUT, tl.full((), OK, tl.int32))
    peer = (who >> 32) & 255
    if (word & 0xFFFF) != 0:
        headers = tl.load(control_ptr + HEADERS) + ((word >> 16) & 1) * tl.load(control_ptr + HEADERS_BYTES)
        header = gcn.word_at(headers + peer * 8)
        other = (header >> 16 == word >> 16) & (header != word)
        status = tl.where(other, MISMATCH, status)
        seen = tl.where(other, header, seen)
    abort = gcn.word_at(record_ptr.to(tl.int64))
    if ((abort | (abort >> (8 + peer))) & 1) != 0:
        seen = gcn.word_at(slot)  # what a peer sent before it closed
        is_there = ((abort & 1) == 0) & (seen >> 16 >= word >> 16)
        status = tl.where(is_there, tl.full((), OK, tl.int32), ABORTED)
    if gcn.word_at(control_ptr.to(tl.int64) + FAILED * 8) != 0:
        status = tl.full((), ABORTED, tl.int32)
    return status, seen, started


@triton.jit
def report(control_ptr, record_ptr, status, word, seen, who):
    """Write the record once a group, unless another wait of it has failed before, and mark the group as failed."""
    if gcn.word_at(control_ptr.to(tl.int64) + FAILED * 8) == 0:
        zero = tl.full((), 0, tl.int64)
        if tl.atomic_cas(control_ptr + REPORTER, zero, zero + 1, sem="acq_rel", scope="gpu") == 0:
            tl.store(record_ptr + 2, status.to(tl.int64))
            tl.store(record_ptr + 3, who >> 48)
            tl.store(record_ptr + 4, (who >> 40) & 255)
            tl.store(record_ptr + 5, (who >> 32) & 255)
            tl.store(record_ptr + 6, who & 0xFFFFFFFF)
            tl.store(record_ptr + 7, word)
            tl.store(record_ptr + 8, seen)
            gcn.release()  # of the thread that stores scalars
            tl.atomic_xchg(record_ptr + 1, zero + 2, sem="relaxed", scope="sys")
        tl.store(control_ptr + FAILED, 1, cache_modifier=".wt")  # past the caches, where waits look
