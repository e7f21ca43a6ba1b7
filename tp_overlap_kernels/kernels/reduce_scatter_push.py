"""Reduce-scatter, push: each rank sends each peer the part that the peer owns, and every owner adds.

    out_r[own] = sum over s of x_s[r*part + own],  own < own_elems

x: n contiguous elements, out: own_elems, bf16 or fp16. Rank r owns [r*part, min(n, (r+1)*part)); bias_ptr: (N,),
repeated, or none.
Rounding: ranks added in order 0..W-1 in f32; bias; one rounding.
Bytes: a rank sends (W-1)/W * n*itemsize.

    rank 0 (owns the first part)                  rank 1 (owns the second part)          time
    1. push second part, notify -------. .------- push first part, notify                 |
                                        X                                                 v
    2. wait, add, store <--------------' '------> wait, add, store

Fresh (no one reads too early). All threads store; notify joins the CTA and one thread releases at system scope on
  the slot of that block; the waiting CTA acquires on it and joins before it loads.
Reuse (no one overwrites too early). Staging is written by a peer only after our `done` of the last call that used it.
Live (no one waits for ever). The whole grid is resident, and a CTA ends step 1 before it waits in step 2.
"""

import triton
import triton.language as tl

from ..lang import signal, tile
from ..lang.peer import slot_at, staging_slot

OP = tl.constexpr(2)


@triton.jit(do_not_specialize=["call_hash", "rank", "timeout_ns"])
def reduce_scatter_push(
    x_ptr,
    bias_ptr,
    out_ptr,
    heap_ptr,
    control_ptr,
    record_ptr,
    header_offset,
    n,
    part,  # elements a rank owns: whole rows
    N,
    done_offset,
    partial_flags,
    staging_offset,
    staging_slot_bytes,
    call_hash,
    rank,
    timeout_ns,
    WORLD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    signal.after_previous_kernel()
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    epoch, heap_ptr = signal.enter(heap_ptr, control_ptr, header_offset, call_hash, rank, WORLD)
    word = signal.call_word(epoch, call_hash)
    own = tl.load(heap_ptr + rank)
    blocks = tl.cdiv(part, BLOCK)
    failed = signal.wait_done(heap_ptr, done_offset, timeout_ns, control_ptr, record_ptr, OP, rank, WORLD)
    heap_ptr = signal.reachable(heap_ptr, failed, WORLD)

    # 1. push the other owners' parts
    for block in tl.range(pid, blocks, programs):
        local = block * BLOCK + tl.arange(0, BLOCK)
        for i in tl.range(1, WORLD, num_stages=1):
            owner = (rank + i) % WORLD
            index = owner.to(tl.int64) * part + local
            mask = (index < n) & (local < part)
            x = tl.load(x_ptr + index, mask=mask, other=0.0)
            staged = slot_at(heap_ptr, staging_offset, staging_slot(rank, owner), staging_slot_bytes, owner, DTYPE)
            tl.store(staged + local, x, mask=mask)
            signal.notify(tl.load(heap_ptr + owner) + partial_flags + (block * WORLD + rank) * 8, word)

    # 2. add our own part
    for block in tl.range(pid, blocks, programs):
        local = block * BLOCK + tl.arange(0, BLOCK)
        index = rank.to(tl.int64) * part + local
        mask = (index < n) & (local < part)
        x = tl.load(x_ptr + index, mask=mask, other=0.0)
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        for source in tl.static_range(0, WORLD):
            if source == rank:
                total += x.to(tl.float32)
            else:
                who = signal.waiter(OP, rank, source, block)
                slot = own + partial_flags + (block * WORLD + source) * 8
                status = signal.wait(slot, word, timeout_ns, control_ptr, record_ptr, who)
                failed = tl.maximum(failed, status)
                staged = slot_at(heap_ptr, staging_offset, staging_slot(source, rank), staging_slot_bytes, rank, DTYPE)
                staged = signal.consume_token(staged, status)
                total += tl.load(staged + local, mask=mask, other=0.0).to(tl.float32)
        total += tile.load_bias(bias_ptr, local % N, N, HAS_BIAS)
        result = tl.where(failed == 0, total, float("nan")).to(DTYPE)
        tl.store(out_ptr + local, result, mask=mask)
    signal.leave(heap_ptr, control_ptr, done_offset, epoch, rank, WORLD)
    own_elems = tl.maximum(tl.minimum(n - rank.to(tl.int64) * part, part), 0)
    signal.spoil(out_ptr, own_elems, failed, DTYPE)
