r"""One-shot GEMM + reduce-scatter, push: a tile spans the rows of several owners, and each gets its own of them.

    out_r[rows of r, N] = sum over s of  (a_s[M, K_local] @ b_s[N, K_local].T)[rows of r]  (+ bias)

a: (M, K_local) and b: (N, K_local), bf16 or fp16, as tensor descriptors. out: the rows [r*c, min(M, (r+1)*c)), c =
ceil(M / W), on rank r.
bias: (N,) or none.
Rounding: f32 over K; one rounding to the wire dtype (the rank's own partial too); ranks added in order 0..W-1 in
f32; bias; one last rounding: the bits of the one-shot all-reduce's rows.
Bytes: a rank sends (W-1)/W * M*N*itemsize. Meant for small M: tiles of one owner's rows, as gemm_reduce_scatter_push
has them, would each stream b from memory again.

    rank 0 (owns the upper rows)               rank 1 (owns the lower rows)          time
    1. gemm t                                  gemm t                                 |
    2. push the lower rows to rank 1           push the upper rows to rank 0          v
       notify(t, e)  ---- release.sys ---.  .--- notify(t, e)
                                          \/
    3. wait(t, e)  <----- acquire.sys ----'`---> wait(t, e)
       add W partials, store upper rows          add W partials, store lower rows

Fresh (no one reads too early). All threads store; notify joins the CTA and one thread releases at system scope on
  the peer's slot; there one thread acquires on that slot and joins its CTA; then all load.
Reuse (no one overwrites too early). Call e writes half e & 1, slots and flags, which were last read in call e - 2
  or before. In call e - 1, of whatever kind, we acquired from every peer something that it sent in e - 1, hence
  after the end of its e - 2. For that, every tile is signalled to every peer and waited for from every peer, also
  where an owner has no row in it.
Live (no one waits for ever). Every CTA takes its tiles in rising order on every rank, and a tile waits only for the
  same tile of the peers: the lowest tile unfinished anywhere is being computed, or can be, without any wait. The
  whole grid is resident.
"""

import triton
import triton.language as tl

from ..lang import signal, tile
from ..lang.peer import slot_at

OP = tl.constexpr(2)


@triton.jit(do_not_specialize=["M", "rows_per_rank", "m_tiles", "call_hash", "rank", "timeout_ns"])
def gemm_reduce_scatter_one_shot_push(
    a_desc,
    b_desc,
    bias_ptr,
    out_ptr,
    heap_ptr,
    control_ptr,
    record_ptr,
    header_offset,
    M,
    N,
    K,
    rows_per_rank,
    m_tiles,
    n_tiles,
    pitch,  # elements between rows of a partial
    out_pitch,
    flags_offset,
    slots_offset,
    slot_bytes,  # of one rank's partial in one half, by capacity
    flags_half_bytes,
    call_hash,
    rank,
    timeout_ns,
    WORLD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    a_desc = tile.operand(a_desc, M, K, BLOCK_M, BLOCK_K)
    b_desc = tile.operand(b_desc, N, K, BLOCK_N, BLOCK_K)
    epoch, heap_ptr = signal.enter(heap_ptr, control_ptr, header_offset, call_hash, rank, WORLD)
    word = signal.call_word(epoch, call_hash)
    half = epoch & 1
    slots = slots_offset + half * WORLD * slot_bytes
    flags = flags_offset + half * flags_half_bytes
    own = tl.load(heap_ptr + rank)
    own_begin, own_end = tile.rows_of(rank, rows_per_rank, M)
    failed = 0

    for t in tl.range(tl.program_id(0), m_tiles * n_tiles, tl.num_programs(0)):
        row0 = (t // n_tiles) * BLOCK_M
        col0 = (t % n_tiles) * BLOCK_N
        # 1. produce
        acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for k in tl.range(0, tl.cdiv(K, BLOCK_K)):
            a = a_desc.load([row0, k * BLOCK_K])
            b = b_desc.load([col0, k * BLOCK_K])
            acc = tl.dot(a, b.T, acc)
        partial = acc.to(DTYPE)
        # 2. push to every peer the rows that it owns, then say so
        rows, cols = tile.offsets(row0, col0, BLOCK_M, BLOCK_N)
        for i in tl.static_range(1, WORLD):
            peer = (rank + i) % WORLD
            begin, end = tile.rows_of(peer, rows_per_rank, M)
            slot = slot_at(heap_ptr, slots, rank, slot_bytes, peer, DTYPE)
            tile.store_rows(slot, partial, rows, cols, begin, end, N, pitch)
        signal.notify_all(heap_ptr, flags + (t * WORLD + rank) * 8, word, rank, WORLD)
        # 3. wait for theirs and add in rank order
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for source in tl.static_range(0, WORLD):
            if source == rank:
                total += partial.to(tl.float32)
            else:
                who = signal.waiter(OP, rank, source, t)
                flag = own + flags + (t * WORLD + source) * 8
                status = signal.wait(flag, word, timeout_ns, control_ptr, record_ptr, who)
                failed = tl.maximum(failed, status)
                pushed = slot_at(heap_ptr, slots, source, slot_bytes, rank, DTYPE)
                pushed = signal.consume_token(pushed, status)
                total += tile.load_rows(pushed, rows, cols, own_begin, own_end, N, pitch).to(tl.float32)
        total += tile.load_bias(bias_ptr, cols, N, HAS_BIAS)[None, :]
        result = tl.where(failed == 0, total, float("nan")).to(DTYPE)
        tile.store_rows(out_ptr, result, rows - own_begin, cols, 0, own_end - own_begin, N, out_pitch)
    signal.spoil(out_ptr, tile.elements(own_end - own_begin, N), failed, DTYPE)
