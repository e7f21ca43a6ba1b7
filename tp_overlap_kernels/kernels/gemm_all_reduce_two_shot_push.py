"""Two-shot GEMM + all-reduce, push: the owner of a row sums its partials and pushes the sum to everyone.

    out[M, N] = sum over r of  a_r[M, K_local] @ b_r[N, K_local].T  (+ bias)

a: (M, K_local) and b: (N, K_local), bf16 or fp16, as tensor descriptors. out: (M, N), same dtype, on every rank.
bias: (N,) or none.
Rounding: f32 over K; a partial that travels is rounded once to the wire dtype, the owner's own stays in f32; added
in the order own, then ranks 0..W-1; bias; one last rounding. The owner alone adds and everyone gets its bits: they
are equal on all ranks.
Bytes: a rank sends 2 (W-1)/W * M*N*itemsize: partials to their owners, sums to all. Meant for large M.

    rank 0 (owns the upper rows)                 rank 1 (owns the lower rows)           time
    1. gemm a lower tile, push the partial       gemm an upper tile, push the partial    |
       notify ------------------------------. .------------------------------ notify     v
    2. gemm an upper tile                    X   gemm a lower tile
       wait <-------------------------------' '-----------------------------> wait
       add, store, push the sum, notify ----. .---- add, store, push the sum, notify
    3. wait <--------------------------------X---------------------------------> wait
       copy the sum to out                       copy the sum to out

Fresh (no one reads too early). All threads store; notify joins the CTA and one thread releases at system scope on
  the slot of that tile; the waiting CTA acquires on it and joins before it loads. Slots hold the epoch, so an older
  call's arrival does not pass.
Reuse (no one overwrites too early). Staging: we leave a call only after every owner's sums have come, which it sends
  after it has read our partials; a call of another kind sends `done`, for which the first push waits. Result: an owner
  pushes a sum only after our partial of that call has come, hence after we have left the call before.
Live (no one waits for ever). The whole grid is resident (at most one CTA an SM is launched). Tiles of step 1 wait
  for nobody (but for the end of the peers' previous call); each tile of step 2 waits for tiles of step 1; step 3
  waits for tiles of step 2.
"""

import triton
import triton.language as tl

from ..lang import signal, tile
from ..lang.peer import slot_at, staging_slot, symm_at

OP = tl.constexpr(1)


@triton.jit(do_not_specialize=["M", "m_tiles", "rows_per_rank", "call_hash", "rank", "stagger_ns", "timeout_ns"])
def gemm_all_reduce_two_shot_push(
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
    m_tiles,  # tiles down one owner's block
    n_tiles,
    pitch,  # elements between rows in the arena
    out_pitch,
    done_offset,
    partial_flags,
    result_flags,
    staging_offset,
    staging_slot_bytes,
    result_offset,
    call_hash,
    rank,
    stagger_ns,  # between the starts of two CTAs: the link's time for a tile
    timeout_ns,
    WORLD: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    a_desc = tile.operand(a_desc, M, K, BLOCK_M, BLOCK_K)
    b_desc = tile.operand(b_desc, N, K, BLOCK_N, BLOCK_K)
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    epoch, heap_ptr = signal.enter(heap_ptr, control_ptr, header_offset, call_hash, rank, WORLD)
    word = signal.call_word(epoch, call_hash)
    tiles_per_owner = m_tiles * n_tiles
    failed = 0

    signal.stagger(pid * stagger_ns)
    k_tiles = tl.cdiv(K, BLOCK_K)
    total = WORLD * tiles_per_owner
    steps = tl.cdiv(total - pid, programs) * k_tiles
    step = pid - programs
    k = k_tiles - 1
    owner = rank
    t = pid
    row0 = 0
    col0 = 0
    pending = 0  # offset of the slot of the tile that is stored and not yet published; 0: none
    pending_owner = rank
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    # One loop over tiles and K together, so that the loads of the next tile are in flight during this one's epilogue.
    for _ in tl.range(0, steps):
        k = tl.where(k == k_tiles - 1, 0, k + 1)
        if k == 0:
            step += programs
            owner, t = tile.pivot(step, tiles_per_owner, rank, WORLD)
            m, n = tile.swizzle(t, m_tiles, n_tiles, GROUP_M)
            row0 = owner * rows_per_rank + m * BLOCK_M
            col0 = n * BLOCK_N
        a = a_desc.load([row0, k * BLOCK_K])
        b = b_desc.load([col0, k * BLOCK_K])
        acc = tl.dot(a, b.T, acc)
        if k == k_tiles - 1:
            if step == pid:  # before the first store
                failed = signal.wait_done(heap_ptr, done_offset, timeout_ns, control_ptr, record_ptr, OP, rank, WORLD)
            # The tile before this one has long arrived where it went: its release waits for nothing.
            signal.publish(heap_ptr, tl.where(failed == 0, pending, 0), pending_owner, word, rank, WORLD)
            rows, cols = tile.offsets(row0, col0, BLOCK_M, BLOCK_N)
            row_end = tl.where(failed == 0, tl.minimum(M, (owner + 1) * rows_per_rank), 0)  # failed: no rows, no sign
            if owner != rank:
                # 1. push the partial to its owner: staging slot of ours, row 0 is the owner's first
                partial = slot_at(heap_ptr, staging_offset, staging_slot(rank, owner), staging_slot_bytes, owner, DTYPE)
                first = owner * rows_per_rank
                tile.store(partial, acc.to(DTYPE), rows - first, cols, row_end - first, N, pitch)
                pending = partial_flags + (t * WORLD + rank) * 8
            else:
                # 2. add the peers' partials to our own, store the sum and push it to all
                first = rank * rows_per_rank
                for i in tl.range(0, WORLD - 1, num_stages=1):
                    peer = i + (i >= rank).to(tl.int32)  # 0..W-1 without us
                    who = signal.waiter(OP, rank, peer, t)
                    slot = tl.load(heap_ptr + rank) + partial_flags + (t * WORLD + peer) * 8
                    status = signal.wait(slot, word, timeout_ns, control_ptr, record_ptr, who)
                    failed = tl.maximum(failed, status)
                    staged = slot_at(heap_ptr, staging_offset, i, staging_slot_bytes, rank, DTYPE)
                    staged = signal.consume_token(staged, status)
                    acc += tile.load(staged, rows - first, cols, row_end - first, N, pitch).to(tl.float32)
                acc += tile.load_bias(bias_ptr, cols, N, HAS_BIAS)[None, :]
                result = tl.where(failed == 0, acc, float("nan")).to(DTYPE)
                for i in tl.range(1, WORLD, num_stages=1):
                    peer = (rank + i) % WORLD
                    tile.store(symm_at(heap_ptr, result_offset, peer, DTYPE), result, rows, cols, row_end, N, pitch)
                tile.store(out_ptr, result, rows, cols, row_end, N, out_pitch)
                pending = result_flags + (rank * tiles_per_owner + t) * 8
            pending_owner = owner
            acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)

    signal.publish(heap_ptr, tl.where(failed == 0, pending, 0), pending_owner, word, rank, WORLD)

    # 3. the sums of the other owners, from the arena to the caller's tensor, in the order in which they were computed
    failed = collect_results(
        out_ptr, heap_ptr, control_ptr, record_ptr, M, N, rows_per_rank, m_tiles, n_tiles, pitch, out_pitch,
        result_flags, result_offset, word, rank, timeout_ns, failed, WORLD, DTYPE, BLOCK_M, BLOCK_N, GROUP_M,
    )  # fmt: skip
    signal.spoil(out_ptr, tile.elements(M, N), failed, DTYPE)


@triton.jit
def collect_results(
    out_ptr, heap_ptr, control_ptr, record_ptr, M, N, rows_per_rank, m_tiles, n_tiles, pitch, out_pitch,
    result_flags, result_offset, word, rank, timeout_ns, failed,
    WORLD: tl.constexpr, DTYPE: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    """Wait for each tile that another rank owns and copy it out, NaN where a wait has failed. Returns the status."""
    tiles_per_owner = m_tiles * n_tiles
    own = tl.load(heap_ptr + rank)
    result = symm_at(heap_ptr, result_offset, rank, DTYPE)
    programs = tl.num_programs(0)
    total = (WORLD - 1) * tiles_per_owner
    # The CTAs that had one tile fewer begin, with the tiles that came first.
    for i in tl.range(programs - 1 - tl.program_id(0), total, programs):
        peer = (rank + 1 + i % (WORLD - 1)) % WORLD
        t = i // (WORLD - 1)
        m, n = tile.swizzle(t, m_tiles, n_tiles, GROUP_M)
        slot = own + result_flags + (peer * tiles_per_owner + t) * 8
        status = signal.wait(
            slot, word, timeout_ns, control_ptr, record_ptr, signal.waiter(OP, rank, peer, peer * tiles_per_owner + t)
        )
        failed = tl.maximum(failed, status)
        rows, cols = tile.offsets(peer * rows_per_rank + m * BLOCK_M, n * BLOCK_N, BLOCK_M, BLOCK_N)
        row_end = tl.minimum(M, (peer + 1) * rows_per_rank)
        total_tile = tile.load(signal.consume_token(result, status), rows, cols, row_end, N, pitch)
        total_tile = tl.where(failed == 0, total_tile.to(tl.float32), float("nan")).to(DTYPE)
        tile.store(out_ptr, total_tile, rows, cols, row_end, N, out_pitch)
    return failed
