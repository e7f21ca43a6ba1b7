"""From a plan to a launch: the arguments of each kernel, taken from the problem and from the group's arena.

One function a kernel. Each takes tensors that have been checked, contiguous outputs, and calls that fit the arena
(`rows_that_fit`), and returns what it issued, which can then be had again with less work.
"""

import triton.language as tl
from torch import Tensor, bfloat16

from ..dispatch import Plan
from ..dispatch.defaults import SM90_PLANS
from ..dispatch.select import rows_of_whole_tiles
from ..errors import InvalidInput
from ..kernels import stream_signals
from ..kernels.all_reduce_one_shot_push import all_reduce_one_shot_push
from ..kernels.all_reduce_two_shot_push import all_reduce_two_shot_push
from ..kernels.gemm_all_reduce_one_shot_push import gemm_all_reduce_one_shot_push
from ..kernels.gemm_all_reduce_two_shot_push import gemm_all_reduce_two_shot_push
from ..kernels.gemm_reduce_scatter_one_shot_push import gemm_reduce_scatter_one_shot_push
from ..kernels.gemm_reduce_scatter_push import gemm_reduce_scatter_push
from ..kernels.reduce_scatter_push import reduce_scatter_push
from ..lang.launch import Issued, Launch, specialisation
from ..memory.arena import Arena
from ..memory.layout import align_up, pitch, rows_per_rank
from . import decode, scatter_sentinel, sm90
from .operands import describe

LINK_BYTES_PER_NS = 350  # what stores of SMs reach, both directions busy, H200
COPY_BLOCKS = (1024, 16384)  # elements of a block in kernels that only move and add, least and most


def _launch(arena: Arena, kernel, key: tuple, **meta) -> Launch:
    key = (kernel.fn, key, tuple(meta.items()))
    launch = arena.cache.get(key)
    if launch is None:
        launch = arena.cache[key] = Launch(kernel, meta, arena.device.type == "cpu")
    return launch


def _triton_dtype(x: Tensor) -> tl.dtype:
    return tl.bfloat16 if x.dtype == bfloat16 else tl.float16


def _tiles(plan: Plan, grouped: bool = True) -> dict[str, int]:
    meta = {"BLOCK_M": plan["block_m"], "BLOCK_N": plan["block_n"], "BLOCK_K": plan["block_k"]}
    if grouped:
        meta["GROUP_M"] = plan["group_m"]
    return meta | {"num_warps": plan["num_warps"], "num_stages": plan["num_stages"]}


def rows_that_fit(arena: Arena, plan: Plan, N: int, itemsize: int) -> int:
    """The most rows that one launch of this plan can take; a larger call runs in chunks. Equal on all ranks.

    Errors: InvalidInput where forced tiles are so narrow that one row of them has more tiles than there are flags.
    """
    room, W = arena.layout, arena.world_size
    rows = room.max_M
    if plan.name == "one_shot":
        by_flags = room.one_shot_tiles // -(-N // plan["block_n"]) * plan["block_m"]
        rows = min(room.one_shot_bytes // (pitch(N) * itemsize), by_flags)
    elif plan.name == "decode":
        rows = decode.rows_that_fit(arena, plan, N)
    elif plan.name in ("two_shot", "push"):
        tiles_down = room.tile_slots // W // -(-N // plan["block_n"])
        rows = min(rows, tiles_down * plan["block_m"] * W)
    elif plan.name in SM90_PLANS:
        rows = min(rows, rows_of_whole_tiles(N, plan, arena.topology))
    elif plan.name == "unfused_sentinel":
        rows = min(rows, scatter_sentinel.rows_that_fit(arena, N, itemsize))
    elif plan.name == "unfused_push":
        rows = min(rows, room.tile_slots // W * COPY_BLOCKS[1] // N * W)
    if rows < 1:
        raise InvalidInput(f"plan {str(plan)!r} has no room for one row of N={N}. Give it a larger block_n.")
    return rows


def elements_that_fit(arena: Arena, plan: Plan, itemsize: int) -> int:
    """The most elements that one launch of an all-reduce plan can take. Equal on all ranks."""
    room, W = arena.layout, arena.world_size
    if plan.name == "one_shot":
        return min(room.one_shot_bytes // itemsize, room.one_shot_tiles * 1024)
    if plan.name == "sentinel":
        return room.sentinel_bytes // itemsize
    slot, block = room.staging_slot_bytes // itemsize, COPY_BLOCKS[1]
    # A part is rounded up to whole blocks; in a tiny arena one owner may get all.
    step = W * (slot // block * block) if slot >= 4 * block else slot
    by_flags = room.tile_slots // W * block * W
    return min(step, by_flags, (room.total_bytes - room.result) // itemsize, 1 << 30)


def spoil(arena: Arena, out: Tensor) -> None:
    """After the pieces of a call: NaN in all of out if one has failed. On the CPU the op itself sees to that."""
    if arena.device.type == "cuda":
        key = (specialisation(out), out.numel() >= 1 << 31)
        launch = _launch(arena, stream_signals.spoil_call, key, DTYPE=_triton_dtype(out), num_warps=4)
        launch(1, out, arena.control, out.numel())


def copy_block(arena: Arena, elements: int) -> dict[str, int]:
    """Elements of a block such that one a CTA covers the call: smaller ones, pipelined, cost 2-30 us at 4-16 MiB.

    Large enough, too, that every block has a flag of each rank.
    """
    block, most = COPY_BLOCKS[0], min(arena.programs, arena.layout.tile_slots // arena.world_size)
    while block < COPY_BLOCKS[1] and block * most < elements:
        block *= 2
    return {"BLOCK": block, "num_warps": 4 if block <= 2048 else 8}


def _gemm_one_shot(
    arena: Arena, plan: Plan, kernel, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int, *owned: int
) -> Issued:
    """owned: rows per rank, where rows have owners."""
    (M, K), N, W, room = a.shape, b.shape[0], arena.world_size, arena.layout
    meta = _tiles(plan, grouped=False)
    m_tiles, n_tiles = -(-M // meta["BLOCK_M"]), -(-N // meta["BLOCK_N"])
    key = (N, K, specialisation(out, out if bias is None else bias))
    launch = _launch(arena, kernel, key, WORLD=W, HAS_BIAS=bias is not None, DTYPE=_triton_dtype(a), **meta)
    return launch(
        min(m_tiles * n_tiles, arena.programs),
        describe(a, meta["BLOCK_M"], meta["BLOCK_K"]),
        describe(b, meta["BLOCK_N"], meta["BLOCK_K"]),
        out if bias is None else bias,
        out,
        arena.heap,
        arena.control,
        arena.record.words,
        room.header,
        M,
        N,
        K,
        *owned,
        m_tiles,
        n_tiles,
        pitch(N),
        N,
        room.one_shot_flags,
        room.one_shot,
        room.one_shot_bytes,
        room.one_shot_tiles * W * 8,
        word,
        arena.rank,
        arena.timeout_ns,
    )


def gemm_all_reduce_one_shot(
    arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int
) -> Issued:
    """kernels/gemm_all_reduce_one_shot_push.py"""
    return _gemm_one_shot(arena, plan, gemm_all_reduce_one_shot_push, a, b, bias, out, word)


def gemm_reduce_scatter_one_shot(
    arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int
) -> Issued:
    """kernels/gemm_reduce_scatter_one_shot_push.py"""
    rows = rows_per_rank(a.shape[0], arena.world_size)
    return _gemm_one_shot(arena, plan, gemm_reduce_scatter_one_shot_push, a, b, bias, out, word, rows)


def _gemm_staged(
    arena: Arena, plan: Plan, kernel, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int, *pads
) -> Issued:
    (M, K), N, W, room = a.shape, b.shape[0], arena.world_size, arena.layout
    meta = _tiles(plan)
    rows = rows_per_rank(M, W)
    m_tiles, n_tiles = -(-rows // meta["BLOCK_M"]), -(-N // meta["BLOCK_N"])
    key = (N, K, specialisation(out, out if bias is None else bias))
    launch = _launch(arena, kernel, key, WORLD=W, HAS_BIAS=bias is not None, DTYPE=_triton_dtype(a), **meta)
    return launch(
        min(W * m_tiles * n_tiles, arena.programs),
        describe(a, meta["BLOCK_M"], meta["BLOCK_K"]),
        describe(b, meta["BLOCK_N"], meta["BLOCK_K"]),
        out if bias is None else bias,
        out,
        arena.heap,
        arena.control,
        arena.record.words,
        room.header,
        M,
        N,
        K,
        rows,
        m_tiles,
        n_tiles,
        pitch(N),
        N,
        *pads,
        word,
        arena.rank,
        plan.get("stagger_ns", meta["BLOCK_M"] * meta["BLOCK_N"] * 2 // LINK_BYTES_PER_NS),
        arena.timeout_ns,
    )


def gemm_all_reduce_two_shot(
    arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int
) -> Issued:
    """kernels/gemm_all_reduce_two_shot_push.py"""
    room = arena.layout
    pads = (room.done, room.partial_flags, room.result_flags, room.staging, room.staging_slot_bytes, room.result)
    return _gemm_staged(arena, plan, gemm_all_reduce_two_shot_push, a, b, bias, out, word, *pads)


def gemm_reduce_scatter(
    arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int
) -> Issued:
    """kernels/gemm_reduce_scatter_push.py"""
    room = arena.layout
    pads = (room.done, room.partial_flags, room.staging, room.staging_slot_bytes)
    return _gemm_staged(arena, plan, gemm_reduce_scatter_push, a, b, bias, out, word, *pads)


def gemm_all_reduce_sm90(
    arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int
) -> sm90.IssuedSm90 | None:
    """csrc/kernels/gemm_all_reduce_two_shot_push.cu, gemm_all_reduce_one_shot_push.cu"""
    return sm90.run(arena, "gemm_all_reduce", plan, a, b, bias, out, word)


def gemm_reduce_scatter_sm90(
    arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int
) -> sm90.IssuedSm90 | None:
    """csrc/kernels/gemm_reduce_scatter_push.cu, gemm_reduce_scatter_push_add.cu"""
    return sm90.run(arena, "gemm_reduce_scatter", plan, a, b, bias, out, word)


def all_reduce_one_shot(arena: Arena, plan: Plan, x: Tensor, out: Tensor, word: int) -> Issued:
    """kernels/all_reduce_one_shot_push.py; x and out flat."""
    n, W, room = x.numel(), arena.world_size, arena.layout
    meta = copy_block(arena, n)
    launch = _launch(
        arena,
        all_reduce_one_shot_push,
        specialisation(x, out, n),
        WORLD=W,
        DTYPE=_triton_dtype(x),
        **meta,
        launch_pdl=True,
    )
    return launch(
        min(-(-n // meta["BLOCK"]), arena.programs),
        x,
        out,
        arena.heap,
        arena.control,
        arena.record.words,
        room.header,
        n,
        room.one_shot_flags,
        room.one_shot,
        room.one_shot_bytes,
        room.one_shot_tiles * W * 8,
        word,
        arena.rank,
        arena.timeout_ns,
    )


def all_reduce_two_shot(arena: Arena, plan: Plan, x: Tensor, out: Tensor, word: int) -> Issued:
    """kernels/all_reduce_two_shot_push.py; x and out flat."""
    n, W, room = x.numel(), arena.world_size, arena.layout
    meta = copy_block(arena, rows_per_rank(n, W))
    part = align_up(rows_per_rank(n, W), meta["BLOCK"])
    launch = _launch(
        arena,
        all_reduce_two_shot_push,
        specialisation(x, out, n),
        WORLD=W,
        DTYPE=_triton_dtype(x),
        **meta,
        launch_pdl=True,
    )
    return launch(
        min(part // meta["BLOCK"], arena.programs),
        x,
        out,
        arena.heap,
        arena.control,
        arena.record.words,
        room.header,
        n,
        part,
        room.done,
        room.partial_flags,
        room.result_flags,
        room.staging,
        room.staging_slot_bytes,
        room.result,
        word,
        arena.rank,
        arena.timeout_ns,
    )


def reduce_scatter(arena: Arena, x: Tensor, bias: Tensor | None, out: Tensor, word: int) -> Issued:
    """kernels/reduce_scatter_push.py; x: [M, N] contiguous, out: our rows of it."""
    (M, N), W, room = x.shape, arena.world_size, arena.layout
    part = rows_per_rank(M, W) * N
    meta = copy_block(arena, part)
    launch = _launch(
        arena,
        reduce_scatter_push,
        (N, specialisation(x, out, out if bias is None else bias, M * N, part)),
        WORLD=W,
        HAS_BIAS=bias is not None,
        DTYPE=_triton_dtype(x),
        **meta,
        launch_pdl=True,
    )
    return launch(
        min(-(-part // meta["BLOCK"]), arena.programs),
        x,
        out if bias is None else bias,
        out,
        arena.heap,
        arena.control,
        arena.record.words,
        room.header,
        M * N,
        part,
        N,
        room.done,
        room.partial_flags,
        room.staging,
        room.staging_slot_bytes,
        word,
        arena.rank,
        arena.timeout_ns,
    )
