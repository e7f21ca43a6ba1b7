"""Two-shot all-reduce, push: the owner of a part sums it and pushes the sum to everyone.

    out[n] = sum over r of x_r[n]

x, out: n contiguous elements, bf16 or fp16; out may be x. Rank r owns the elements [r*part, min(n, (r+1)*part)).
Rounding: ranks added in order 0..W-1 in f32; one rounding, by the owner. All ranks hold the same bits.
Bytes: a rank sends 2 (W-1)/W * n*itemsize.

    rank 0 (owns the first part)                  rank 1 (owns the second part)          time
    1. push second part, notify -------. .------- push first part, notify                 |
                                        X                                                 v
    2. wait, add, store, push, notify <' '------> wait, add, store, push, notify
    3. wait <----------------------------- X ---------------------------------> wait
       copy the sum to out                        copy the sum to out

Fresh (no one reads too early). All threads store; notify joins the CTA and one thread releases at system scope on
  the slot of that block; the waiting CTA acquires on it and joins before it loads.
Reuse (no one overwrites too early). Staging: we leave a call only after every owner's sums have come, which it sends
  after it has read our partials; a call of another kind sends `done`, for which the first push waits. Result: an owner
  pushes a sum only after our partial of that call has come, hence after we have left the call before. out may be x:
  a block of x is read by us before step 2 (own part) or step 3 (other parts) stores there, by the same CTA.
Live (no one waits for ever). The whole grid is resident, and a CTA ends step 1 before it waits in step 2, and step
  2 before step 3.
"""

import triton
import triton.language as tl

from ..lang import signal
from ..lang.peer import slot_at, staging_slot, symm_at

OP = tl.constexpr(3)


@triton.jit(do_not_specialize=["call_hash", "rank", "timeout_ns"])
def all_reduce_two_shot_push(
    x_ptr,
    out_ptr,
    heap_ptr,
    control_ptr,
    record_ptr,
    header_offset,
    n,
    part,  # elements a rank owns, a multiple of BLOCK
    done_offset,
    partial_flags,
    result_flags,
    staging_offset,
    staging_slot_bytes,
    result_offset,
    call_hash,
    rank,
    timeout_ns,
    WORLD: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    signal.after_previous_kernel()
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    epoch, heap_ptr = signal.enter(heap_ptr, control_ptr, header_offset, call_hash, rank, WORLD)
    word = signal.call_word(epoch, call_hash)
    own = tl.load(heap_ptr + rank)
    blocks = part // BLOCK
    failed = 0

    # 1. push the other owners' parts
    for block in tl.range(pid, blocks, programs):
        for i in tl.static_range(1, WORLD):
            owner = (rank + i) % WORLD
            local = block * BLOCK + tl.arange(0, BLOCK)
            index = owner.to(tl.int64) * part + local
            x = tl.load(x_ptr + index, mask=index < n, other=0.0)
            if (block == pid) & (i == 1):  # while x is on its way
                failed = signal.wait_done(heap_ptr, done_offset, timeout_ns, control_ptr, record_ptr, OP, rank, WORLD)
                heap_ptr = signal.reachable(heap_ptr, failed, WORLD)
            staged = slot_at(heap_ptr, staging_offset, staging_slot(rank, owner), staging_slot_bytes, owner, DTYPE)
            tl.store(staged + local, x, mask=index < n)
            signal.notify(tl.load(heap_ptr + owner) + partial_flags + (block * WORLD + rank) * 8, word)

    # 2. add our own part and push the sum
    for block in tl.range(pid, blocks, programs):
        local = block * BLOCK + tl.arange(0, BLOCK)
        index = rank.to(tl.int64) * part + local
        x = tl.load(x_ptr + index, mask=index < n, other=0.0)
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
                total += tl.load(staged + local, mask=index < n, other=0.0).to(tl.float32)
        result = tl.where(failed == 0, total, float("nan")).to(DTYPE)
        for i in tl.static_range(1, WORLD):
            peer = (rank + i) % WORLD
            tl.store(symm_at(heap_ptr, result_offset, peer, DTYPE) + index, result, mask=index < n)
        tl.store(out_ptr + index, result, mask=index < n)
        signal.notify_all(heap_ptr, result_flags + (rank * blocks + block) * 8, word, rank, WORLD)

    # 3. the other parts, from the arena to the caller's tensor
    for block in tl.range(pid, blocks, programs):
        for i in tl.static_range(1, WORLD):
            owner = (rank + i) % WORLD
            who = signal.waiter(OP, rank, owner, owner * blocks + block)
            slot = own + result_flags + (owner * blocks + block) * 8
            status = signal.wait(slot, word, timeout_ns, control_ptr, record_ptr, who)
            failed = tl.maximum(failed, status)
            index = owner.to(tl.int64) * part + block * BLOCK + tl.arange(0, BLOCK)
            result = signal.consume_token(symm_at(heap_ptr, result_offset, rank, DTYPE), status)
            total = tl.load(result + index, mask=index < n, other=0.0).to(tl.float32)
            total = tl.where(failed == 0, total, float("nan")).to(DTYPE)
            tl.store(out_ptr + index, total, mask=index < n)
    signal.spoil(out_ptr, n, failed, DTYPE)
