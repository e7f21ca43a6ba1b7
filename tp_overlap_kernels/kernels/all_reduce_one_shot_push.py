"""One-shot all-reduce, push: each rank sends its whole vector to every peer, and every rank adds.

    out[n] = sum over r of x_r[n]

x, out: n contiguous elements, bf16 or fp16; out may be x.
Rounding: ranks added in order 0..W-1 in f32; one rounding. All ranks hold the same bits.
Bytes: a rank sends (W-1) * n*itemsize. Meant for messages up to a few hundred KiB.

    rank 0                            rank 1                         time
    1. push block, notify -----. .--- push block, notify              |
                                X                                     v
    2. wait, add, store <------' '--> wait, add, store

Fresh (no one reads too early). All threads store; notify joins the CTA and one thread releases at system scope on
  the peer's slot; there one thread acquires on that slot and joins its CTA; then all load.
Reuse (no one overwrites too early). Call e writes half e & 1, slots and flags, which were last read in call e - 2
  or before. In call e - 1, of whatever kind, we acquired from every peer something that it sent in e - 1, hence
  after the end of its e - 2.
Live (no one waits for ever). A CTA pushes all of its blocks before it waits for any, so no wait depends on another
  wait.
"""

import triton
import triton.language as tl

from ..lang import signal
from ..lang.peer import slot_at

OP = tl.constexpr(3)


@triton.jit(do_not_specialize=["call_hash", "rank", "timeout_ns"])
def all_reduce_one_shot_push(
    x_ptr,
    out_ptr,
    heap_ptr,
    control_ptr,
    record_ptr,
    header_offset,
    n,
    flags_offset,
    slots_offset,
    slot_bytes,
    flags_half_bytes,
    call_hash,
    rank,
    timeout_ns,
    WORLD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    signal.after_previous_kernel()
    epoch, heap_ptr = signal.enter(heap_ptr, control_ptr, header_offset, call_hash, rank, WORLD)
    word = signal.call_word(epoch, call_hash)
    half = epoch & 1
    slots = slots_offset + half * WORLD * slot_bytes
    flags = flags_offset + half * flags_half_bytes
    own = tl.load(heap_ptr + rank)
    blocks = tl.cdiv(n, BLOCK)
    failed = 0

    # 1. push
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0)):
        index = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < n, other=0.0)
        for i in tl.static_range(1, WORLD):
            peer = (rank + i) % WORLD
            tl.store(slot_at(heap_ptr, slots, rank, slot_bytes, peer, DTYPE) + index, x, mask=index < n)
        signal.notify_all(heap_ptr, flags + (block * WORLD + rank) * 8, word, rank, WORLD)

    # 2. wait and add
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0)):
        index = block * BLOCK + tl.arange(0, BLOCK)
        x = tl.load(x_ptr + index, mask=index < n, other=0.0)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for source in tl.static_range(0, WORLD):
            if source == rank:
                total += x.to(tl.float32)
            else:
                who = signal.waiter(OP, rank, source, block)
                slot = own + flags + (block * WORLD + source) * 8
                status = signal.wait(slot, word, timeout_ns, control_ptr, record_ptr, who)
                failed = tl.maximum(failed, status)
                pushed = signal.consume_token(slot_at(heap_ptr, slots, source, slot_bytes, rank, DTYPE), status)
                total += tl.load(pushed + index, mask=index < n, other=0.0).to(tl.float32)
        result = tl.where(failed == 0, total, float("nan")).to(DTYPE)
        tl.store(out_ptr + index, result, mask=index < n)
    signal.spoil(out_ptr, n, failed, DTYPE)
