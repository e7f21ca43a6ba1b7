"""Signals between ranks: notify, wait, consume_token (Triton-Distributed's words) on stock Triton.

A slot is a 64-bit word in symmetric memory: epoch << 16 | call hash. Epochs only grow, so nothing is ever reset and
a captured graph may be replayed any number of times: the epoch is read from device memory, `control[EPOCH]`, and
advanced by `enter`.

Epochs run to LAST_EPOCH, where the sign bit of the word begins: at one call a microsecond that is over four years, so
the device does not look; the CPU's stand-ins, for which it costs nothing, refuse the call after it.

Every word here is `.sys` scoped, has the CTA barrier on the side where it belongs, and ends:

* `notify` first joins the CTA (`barrier.sync`), so that the stores of *all* its threads come before the release of
  one. Triton puts no barrier there by itself before 3.9.
* `wait` lets one thread poll with acquire and then joins the CTA (`barrier.red`), so that all threads may load what
  was published, and all of them see the same status. A status other than OK means that the data must not be used:
  the caller stores NaN.
* A wait lasts `timeout_ns` at most, by `%globaltimer` (nanoseconds; `clock64` would follow the SM clock). The
  thread that gives up writes the record described in `memory.record`, once a group, and sets `control[FAILED]`,
  after which no wait of the group lasts.

`control` is a device-local array of int64 (one a group; its words: control.py), `record` is pinned host memory that the
device can write.

That is said of NVIDIA GPUs, for which the assembly is ptx.py's. Compiled for an AMD GPU the words that need assembly
take their bodies from signal_amd.py; the clock is `s_memrealtime` (100 MHz on gfx942), and there is no programmatic
launch, so that `after_previous_kernel` has nothing to wait for: a kernel starts when the one before it has ended.
"""

import ctypes
import time

import triton
import triton.language as tl

from . import gcn, signal_amd
from .control import (
    ABORTED,
    ENTERED,
    EPOCH,
    FAILED,
    HEADERS,
    HEADERS_BYTES,
    LEFT,
    MISMATCH,
    OK,
    REPORTER,
    STAGED,
    TIMEOUT,
)
from .interpreter import address_of, as_tensor, cpu_impl, pause, program_state, value_of
from .ptx import ENTER, NOTIFY, STAGGER, WAIT
from .target import on_amd

LAST_EPOCH = (1 << 47) - 1


@triton.jit
def call_word(epoch, call_hash):
    """What an arrival writes: 48 bits of epoch, 16 bits of the call's hash."""
    return (epoch.to(tl.int64) << 16) | call_hash


@triton.jit
def reachable(heap_ptr, failed, WORLD: tl.constexpr):
    """The table of bases to go on with: `heap_ptr`, or, if a wait has failed, what lies W words behind it.

    Every base there is our own. So a kernel that is queued or replayed behind a failure, and one that must not send
    since its own wait has failed, writes into nobody's memory: a peer that is slow and alive finds no words or data of
    calls that it has not reached. To be applied twice in a kernel at most: the table has 3 W words.
    """
    return heap_ptr + tl.where(failed != 0, WORLD, 0)


@triton.jit
def enter(heap_ptr, control_ptr, header_offset, call_hash, rank, WORLD: tl.constexpr):
    """Begin the call: (epoch, the same in every CTA; the table of bases that the call is to use). To be called once,
    first, by every CTA of the grid.

    One CTA also tells every peer which call this is (a header), by weak stores: a waiting peer compares hashes, it
    reads no data by it.

    The CTA barrier puts every thread's load before the count, and the CTA that completes the count writes the epoch
    for the next call: nobody of this call can read it any more. The last thread counts, so that the first warp,
    which starts the loads, does not wait.
    """
    epoch = tl.load(control_ptr + EPOCH) + 1
    heap_ptr = reachable(heap_ptr, tl.load(control_ptr + FAILED), WORLD)
    count_in(control_ptr, epoch)
    if tl.program_id(0) == 0:
        THROUGH: tl.constexpr = ".wt" if on_amd() else ""  # its L2 would keep the word until the next release
        for i in tl.static_range(1, WORLD):
            header = tl.load(heap_ptr + (rank + i) % WORLD) + header_offset + ((epoch & 1) * WORLD + rank) * 8
            tl.store(header.to(tl.pointer_type(tl.int64)), call_word(epoch, call_hash), cache_modifier=THROUGH)
    return epoch, heap_ptr


@triton.jit
def count_in(control_ptr, epoch):
    """Join the CTA and count it among those that have read the epoch; the last one advances it."""
    if on_amd():
        signal_amd.count_in(control_ptr, epoch)
    else:
        args = [control_ptr.to(tl.int64), epoch]
        tl.inline_asm_elementwise(ENTER, "=r,l,l", args, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def waiter(op, rank, peer, tile_id):
    """Who waits for whom and where, packed for the record of a failed wait."""
    zero = tl.full((), 0, tl.int64)  # widens Python ints and i32 alike
    return ((zero + op) << 48) | ((zero + rank) << 40) | ((zero + peer) << 32) | (zero + tile_id)


@triton.jit
def notify(slot, word):
    """Publish all that the CTA has stored: CTA barrier, then `*slot = word` by one thread, release, system scope.

    slot: int64 address of a 64-bit slot (ours or a peer's). word: int64. All threads of the CTA must call it.
    """
    if on_amd():
        signal_amd.notify(slot, word)
    else:
        tl.inline_asm_elementwise(NOTIFY, "=r,l,l", [slot, word], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(slot, word, timeout_ns, control_ptr, record_ptr, who):
    """Sleep until the slot holds the epoch of `word` or a later one; acquire, system scope; then a CTA barrier.

    slot: int64 address in our own memory. who: from `waiter`. Returns OK, or why the data must not be used, equal
    in all threads.
    """
    if on_amd():
        return signal_amd.wait(slot, word, timeout_ns, control_ptr, record_ptr, who)
    else:
        return tl.inline_asm_elementwise(
            WAIT,
            "=r,l,l,l,l,l,l",
            [slot, word, tl.full((), 0, tl.int64) + timeout_ns, control_ptr.to(tl.int64), record_ptr.to(tl.int64), who],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def stagger(delay_ns):
    """Begin `delay_ns` later. Orders nothing: it spreads CTAs in time that would else all push at once.

    CTAs of equal work run in step, and the link serves them all at the same slow rate while no math runs. Each one late
    by the link's time for one tile, they push one after the other, and each push hides behind the others' math.
    """
    if delay_ns > 0:
        delay = tl.full((), 0, tl.int64) + delay_ns
        if on_amd():
            gcn.stagger(delay)
        else:
            tl.inline_asm_elementwise(STAGGER, "=r,l", [delay], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def spoil(out_ptr, n, failed, DTYPE: tl.constexpr):
    """Make all n elements of the call's output NaN if a wait of this CTA has failed. To be called last.

    Other CTAs may have stored sums before, or be about to, of what came in time: hence the delay. Each CTA that has
    failed does it all; to elect one by an atomic costs registers in every call, and this is not a fast path. A call
    that goes well pays for a branch.
    """
    if failed != 0:
        stagger(2_000_000)
        fill_nan(out_ptr, n, DTYPE)


@triton.jit
def fill_nan(out_ptr, n, DTYPE: tl.constexpr):
    """n elements, by this CTA alone."""
    BLOCK: tl.constexpr = 8192 if on_amd() else 4096  # 16 bytes a thread at least, with 16 warps too
    for start in tl.range(tl.full((), 0, tl.int64), tl.full((), 0, tl.int64) + n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + index, tl.full((BLOCK,), float("nan"), tl.float32).to(DTYPE), mask=index < n)


@triton.jit
def after_previous_kernel():
    """For a kernel launched with `launch_pdl`: wait until the kernel before it in the stream has ended and is visible.

    To be called first. What it saves is the launch itself, which then lies under the other kernel's end: about 1 us.
    On an AMD GPU there is no such launch, and nothing is done.
    """
    if not on_amd():
        asm: tl.constexpr = "griddepcontrol.wait; mov.u32 $0, 0;"
        tl.inline_asm_elementwise(asm, "=r", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def consume_token(value, token):
    """Tie `value` to a wait, as in Triton-Distributed. Stock Triton keeps the order of `wait` by itself."""
    return value


@triton.jit
def notify_all(heap_ptr, offset, word, rank, WORLD: tl.constexpr):
    """`notify` the slot at `offset` of every peer's arena; the CTA barrier is passed once a peer."""
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        notify(tl.load(heap_ptr + peer) + offset, word)


@triton.jit
def publish(heap_ptr, slot_offset, owner, word, rank, WORLD: tl.constexpr):
    """Notify what was stored some time ago: the owner if that is a peer, every peer if it is us. Offset 0: nothing.

    A release waits until the thread's stores have arrived, a microsecond and more under load, in which the tensor cores
    idle. Called one tile later, it finds them arrived. To be called before the CTA waits for anybody, and at its end.
    """
    if slot_offset != 0:
        if owner != rank:
            notify(tl.load(heap_ptr + owner) + slot_offset, word)
        else:
            notify_all(heap_ptr, slot_offset, word, rank, WORLD)


@triton.jit
def leave(heap_ptr, control_ptr, done_offset, epoch, rank, WORLD: tl.constexpr):
    """End a call that has used staging and gives no other sign of it: tell every peer that all our loads are over.

    `done[rank]` at a peer is what lets that peer overwrite, in its next call, what we have read in this one.
    """
    if on_amd():
        gcn.join()
    else:
        tl.debug_barrier()
    ended = tl.atomic_add(control_ptr + LEFT, 1, sem="acq_rel", scope="gpu")
    if ended == tl.num_programs(0) - 1:
        tl.store(control_ptr + LEFT, 0)
        tl.store(control_ptr + STAGED, epoch)
        notify_all(heap_ptr, done_offset + rank * 8, epoch << 16, rank, WORLD)


@triton.jit
def wait_done(heap_ptr, done_offset, timeout_ns, control_ptr, record_ptr, op, rank, WORLD: tl.constexpr):
    """Wait until every peer has left the last call that ended with `leave`. Usually long true.

    If it fails the caller sends nothing any more (`reachable`): a peer may still read what it would overwrite.
    """
    status = 0
    staged = tl.load(control_ptr + STAGED)
    own = tl.load(heap_ptr + rank) + done_offset
    for i in tl.static_range(1, WORLD):
        peer = (rank + i) % WORLD
        seen = wait(own + peer * 8, staged << 16, timeout_ns, control_ptr, record_ptr, waiter(op, rank, peer, 0))
        status = tl.maximum(status, seen)
    return status


# ---- the CPU's stand-ins: the same words, spelled with the interpreter's atomics


def _slot(address):
    return as_tensor(address, tl.int64).to(tl.pointer_type(tl.int64))


@cpu_impl(notify)
def _notify_cpu(slot, word):
    program_state().barrier()  # the one inside the primitive
    tl.atomic_xchg(_slot(value_of(slot)), word, sem="release", scope="sys")
    return as_tensor(0, tl.int32)


@cpu_impl(after_previous_kernel)
def _after_previous_kernel_cpu():
    pass


@cpu_impl(stagger)
def _stagger_cpu(delay_ns):
    pass


@cpu_impl(count_in)
def _count_in_cpu(control_ptr, epoch):
    control = address_of(control_ptr)
    check_epoch(value_of(epoch))
    count = tl.atomic_add(_slot(control + 8 * ENTERED.value), as_tensor(1, tl.int64), sem="acq_rel", scope="gpu")
    if value_of(count) == program_state().grid_size[0] - 1:
        _poke(control + 8 * ENTERED.value, 0)
        _poke(control + 8 * EPOCH.value, value_of(epoch))


def check_epoch(epoch: int) -> None:
    """Refuse a call whose word would be negative, hence older than all before it."""
    if epoch > LAST_EPOCH:
        raise OverflowError(f"epoch {epoch} exceeds {LAST_EPOCH}. close() and init() begin again at 0.")


def _peek(address: int) -> int:
    return ctypes.c_int64.from_address(address).value


def _poke(address: int, value: int) -> None:
    ctypes.c_int64.from_address(address).value = value


def _report(control: int, record: int, code: int, who: int, wanted: int, seen: int) -> int:
    """Write the record once a group, and mark the group as failed."""
    if (
        value_of(tl.atomic_cas(_slot(control + 8 * REPORTER.value), as_tensor(0, tl.int64), as_tensor(1, tl.int64)))
        == 0
    ):
        words = (code, who >> 48, (who >> 40) & 255, (who >> 32) & 255, who & 0xFFFFFFFF, wanted, seen)
        for i, word in enumerate(words):
            _poke(record + 16 + 8 * i, word)
        _poke(record + 8, 2)
    _poke(control + 8 * FAILED.value, 1)
    return code


def _header(control: int, wanted: int, who: int) -> int:
    parity, peer = wanted >> 16 & 1, who >> 32 & 255
    return _peek(_peek(control + 8 * HEADERS.value) + parity * _peek(control + 8 * HEADERS_BYTES.value) + 8 * peer)


def _poll(address: int, wanted: int, timeout_ns: int, control: int, record: int, who: int) -> int:
    slot, zero = _slot(address), as_tensor(0, tl.int64)
    started, polls = time.monotonic_ns(), 0
    while True:
        seen = value_of(tl.atomic_add(slot, zero, sem="acquire", scope="sys"))
        if seen >> 16 >= wanted >> 16:
            mismatched = seen >> 16 == wanted >> 16 and seen != wanted
            return _report(control, record, MISMATCH.value, who, wanted, seen) if mismatched else OK.value
        polls += 1
        pause(polls)
        if polls % 64 == 0:
            program_state().check_stop()
            if _peek(control + 8 * FAILED.value):
                return ABORTED.value
            header = _header(control, wanted, who)
            if wanted & 0xFFFF and header >> 16 == wanted >> 16 and header != wanted:
                return _report(control, record, MISMATCH.value, who, wanted, header)
            if _peek(record) & (1 | 1 << (8 + (who >> 32 & 255))):
                # what a peer sent before it closed
                seen = value_of(tl.atomic_add(slot, zero, sem="acquire", scope="sys"))
                if seen >> 16 < wanted >> 16:
                    return _report(control, record, ABORTED.value, who, wanted, seen)
                continue
            if timeout_ns and time.monotonic_ns() - started > timeout_ns:
                return _report(control, record, TIMEOUT.value, who, wanted, seen)


@cpu_impl(wait)
def _wait_cpu(slot, word, timeout_ns, control_ptr, record_ptr, who):
    control, record = address_of(control_ptr), address_of(record_ptr)
    status = _poll(value_of(slot), value_of(word), value_of(timeout_ns), control, record, value_of(who))
    return as_tensor(status, tl.int32)
