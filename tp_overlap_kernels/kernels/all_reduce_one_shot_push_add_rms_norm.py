"""One-shot all-reduce, push, with the residual and the RMS norm that follow it: one launch for all three.

    new_residual[m, h] = sum over r of x_r[m, h] + residual[m, h]
    y[m, h] = new_residual[m, h] / sqrt(mean over h of new_residual[m, h]^2 + eps) * weight[h]

x, residual, y, new_residual: (M, H) contiguous, weight: (H,); bf16 or fp16, addresses multiples of 16. y may be x,
new_residual may be residual.
Rounding: ranks added in order 0..W-1 in f32, then the residual in f32, one rounding to new_residual; the norm of that
rounded value in f32, one rounding to y. All ranks hold the same bits, if residual, weight and eps are equal on them:
the order in which squares are added depends on H alone.
Bytes: a rank sends (W-1) * M*H*itemsize. Meant for messages up to a few hundred KiB.

    rank 0                                  rank 1                               time
    1. push own rows, notify -----. .------ push own rows, notify                 |
                                   X                                              v
    2. wait, add, store       <---' '-----> wait, add, store
    3. squares of the row, store y          squares of the row, store y

A tile is one block of columns of one row, and a CTA has all tiles of its rows: it norms them without asking another.

Fresh (no one reads too early). All threads store; notify joins the CTA and one thread releases at system scope on
  the peer's slot of that tile; there one thread acquires on that slot and joins its CTA; then all load.
Reuse (no one overwrites too early). Call e writes half e & 1, slots and flags, which were last read in call e - 2
  or before. In call e - 1, of whatever kind, we acquired from every peer something that it sent in e - 1, hence
  after the end of its e - 2. y may be x: of a row both are touched by one CTA, which has read all of x before it
  stores y. new_residual may be residual: a block of it is read before it is stored.
Live (no one waits for ever). A CTA pushes all of its tiles before it waits for any, so no wait depends on another
  wait.
"""

import triton
import triton.language as tl

from ..lang import norm, signal
from ..lang.peer import slot_at

OP = tl.constexpr(5)


@triton.jit(do_not_specialize=["M", "call_hash", "rank", "timeout_ns"])
def all_reduce_one_shot_push_add_rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    new_residual_ptr,
    heap_ptr,
    control_ptr,
    record_ptr,
    header_offset,
    M,
    H,
    pitch,
    eps,
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
    blocks = tl.cdiv(H, BLOCK)
    failed = 0

    # 1. push
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0)):
        here, pushed_row = row.to(tl.int64) * H, row.to(tl.int64) * pitch
        for block in tl.range(0, blocks):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + here + columns, mask=columns < H, other=0.0)
            for i in tl.static_range(1, WORLD):
                pushed = slot_at(heap_ptr, slots, rank, slot_bytes, (rank + i) % WORLD, DTYPE)
                tl.store(pushed + pushed_row + columns, x, mask=columns < H)
            signal.notify_all(heap_ptr, flags + ((row * blocks + block) * WORLD + rank) * 8, word, rank, WORLD)

    # 2. wait and add; residual and weight are on their way meanwhile
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0)):
        here, pushed_row = row.to(tl.int64) * H, row.to(tl.int64) * pitch
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        hidden = tl.zeros((BLOCK,), dtype=DTYPE)
        weight = tl.zeros((BLOCK,), dtype=DTYPE)
        for block in tl.range(0, blocks):
            columns = block * BLOCK + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + here + columns, mask=columns < H, other=0.0)
            residual = tl.load(residual_ptr + here + columns, mask=columns < H, other=0.0)
            weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0)
            total = tl.zeros((BLOCK,), dtype=tl.float32)
            for source in tl.static_range(0, WORLD):
                if source == rank:
                    total += x.to(tl.float32)
                else:
                    tile_id = row * blocks + block
                    slot = own + flags + (tile_id * WORLD + source) * 8
                    who = signal.waiter(OP, rank, source, tile_id)
                    status = signal.wait(slot, word, timeout_ns, control_ptr, record_ptr, who)
                    failed = tl.maximum(failed, status)
                    pushed = signal.consume_token(slot_at(heap_ptr, slots, source, slot_bytes, rank, DTYPE), status)
                    total += tl.load(pushed + pushed_row + columns, mask=columns < H, other=0.0).to(tl.float32)
            total = tl.where(failed == 0, total + residual.to(tl.float32), float("nan"))
            hidden = total.to(DTYPE)
            tl.store(new_residual_ptr + here + columns, hidden, mask=columns < H)
            squares += hidden.to(tl.float32) * hidden.to(tl.float32)

        # 3. norm
        norm.store_normed(y_ptr + here, new_residual_ptr + here, weight_ptr, hidden, weight, squares, H, eps, DTYPE)
    n = tl.full((), 0, tl.int64) + M
    signal.spoil(y_ptr, n * H, failed, DTYPE)
    signal.spoil(new_residual_ptr, n * H, failed, DTYPE)
