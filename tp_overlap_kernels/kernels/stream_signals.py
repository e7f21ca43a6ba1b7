"""Signals as kernels of one CTA, for plans whose work is done by others: cuBLAS on one stream, the copy engine on
another.

    begin    first on the call's stream: epoch, header
    notify   after a copy on its stream: the copy has arrived
    wait     before what reads it
    spoil    last, after pieces of a call that were calls of their own: NaN where one has failed
    end      last, after all streams have joined: leave, and NaN where a wait has failed

Fresh (no one reads too early). A copy has ended, and its bytes are at the peer, before the next kernel of its
  stream starts; that kernel releases at system scope. The waiting kernel acquires, and what follows on its stream
  starts after its end.
Reuse (no one overwrites too early). `wait_peers` stands before the first push: our peers' `done` of the last call
  that used staging. `end` runs after every reader of this call.
Live (no one waits for ever). A wait holds one CTA of one SM; the pushes that a peer waits for stand before it on
their stream. The epoch: `begin` advances it, so the kernels after it read `control[EPOCH]` itself; one call is in
flight a group.
"""

import triton
import triton.language as tl

from ..lang import signal


@triton.jit(do_not_specialize=["call_hash", "rank"])
def begin_call(heap_ptr, control_ptr, header_offset, call_hash, rank, WORLD: tl.constexpr):
    """Enter the call."""
    signal.enter(heap_ptr, control_ptr, header_offset, call_hash, rank, WORLD)


@triton.jit(do_not_specialize=["rank", "timeout_ns"])
def wait_peers(heap_ptr, control_ptr, record_ptr, done_offset, rank, timeout_ns, OP: tl.constexpr, WORLD: tl.constexpr):
    """Wait until the peers have left the last call that used staging."""
    signal.wait_done(heap_ptr, done_offset, timeout_ns, control_ptr, record_ptr, OP, rank, WORLD)


@triton.jit(do_not_specialize=["slot_offset", "peer", "call_hash"])
def notify_peer(heap_ptr, control_ptr, slot_offset, peer, call_hash, WORLD: tl.constexpr):
    """Raise one slot of a peer, unless a wait has failed."""
    epoch = tl.load(control_ptr + signal.EPOCH)
    heap_ptr = signal.reachable(heap_ptr, tl.load(control_ptr + signal.FAILED), WORLD)
    signal.notify(tl.load(heap_ptr + peer) + slot_offset, signal.call_word(epoch, call_hash))


@triton.jit(do_not_specialize=["slot_offset", "tile_id", "peer", "call_hash", "rank", "timeout_ns"])
def wait_peer(
    heap_ptr, control_ptr, record_ptr, slot_offset, tile_id, peer, call_hash, rank, timeout_ns, OP: tl.constexpr
):
    """Wait for one of our own slots, which `peer` raises."""
    epoch = tl.load(control_ptr + signal.EPOCH)
    who = signal.waiter(OP, rank, peer, tile_id)
    slot = tl.load(heap_ptr + rank) + slot_offset
    signal.wait(slot, signal.call_word(epoch, call_hash), timeout_ns, control_ptr, record_ptr, who)


@triton.jit(do_not_specialize=["n"])
def spoil_call(out_ptr, control_ptr, n, DTYPE: tl.constexpr):
    """After a call that ran in pieces: if a wait of the group has failed, the whole output becomes NaN."""
    if tl.load(control_ptr + signal.FAILED) != 0:
        signal.fill_nan(out_ptr, n, DTYPE)


@triton.jit(do_not_specialize=["n", "rank"])
def end_call(out_ptr, heap_ptr, control_ptr, n, done_offset, rank, WORLD: tl.constexpr, DTYPE: tl.constexpr):
    """Leave the call. If a wait of it has failed, the whole output becomes NaN."""
    epoch = tl.load(control_ptr + signal.EPOCH)
    failed = tl.load(control_ptr + signal.FAILED)
    if failed != 0:
        signal.fill_nan(out_ptr, n, DTYPE)
    heap_ptr = signal.reachable(heap_ptr, failed, WORLD)
    signal.leave(heap_ptr, control_ptr, done_offset, epoch, rank, WORLD)
