"""The kernels that norm, alone and together with a sum: operands as these want them, and launches.

All tensors go to the kernels contiguous and at multiples of 16 bytes, copied where the caller's are not. Triton lays
out a block by the alignment of what it loads and stores, and squares are added in the order of that layout: it has to
be the same on every rank, wherever the caller's tensors lie.
"""

import torch
import triton
from torch import Tensor

from ..kernels.add_rms_norm import add_rms_norm as add_rms_norm_kernel
from ..kernels.all_reduce_one_shot_push_add_rms_norm import all_reduce_one_shot_push_add_rms_norm
from ..lang.launch import Issued
from ..memory.arena import Arena
from ..memory.layout import align_down, pitch
from .launches import _launch, _triton_dtype, spoil
from .norm import Norm

BLOCKS = (1024, 8192)  # columns of a block, least and most: twice as many spill with four ranks
BLOCK_ELEMS_A_WARP = 512  # 16 a thread: two vectors
ALIGNED_ROWS = 8  # whatever H, so many rows are a multiple of 16 bytes
CTAS_AN_SM = 4  # of the norm alone, in which no CTA waits for another


def add_rms_norm(arena: Arena, x: Tensor, norm: Norm) -> None:
    """kernels/add_rms_norm.py; x [M, H] may be y."""
    given, (M, H) = _laid_out(norm), x.shape
    block = _block(H)
    whole = H <= block["BLOCK"]
    launch = _launch(arena, add_rms_norm_kernel, (H,), DTYPE=_triton_dtype(x), **block, WHOLE=whole, launch_pdl=True)
    addresses = (_laid(x), given.residual, given.weight, given.y, given.new_residual)
    launch(min(M, CTAS_AN_SM * arena.programs), *addresses, M, H, norm.eps)
    _give_back(given, norm)


def all_reduce_add_rms_norm(arena: Arena, x: Tensor, norm: Norm, word: int) -> Issued | None:
    """kernels/all_reduce_one_shot_push_add_rms_norm.py; x [M, H] fits the one-shot region.

    Returns what was issued, if it was one launch: more rows than there are flags for run in chunks.
    """
    given, x = _laid_out(norm), _laid(x)
    (M, H), issued = x.shape, None
    limit = arena.layout.one_shot_tiles // triton.cdiv(H, _block(H)["BLOCK"])
    if M <= limit:
        issued = _all_reduce_add_rms_norm(arena, x, given, word)
    else:
        residual, weight, eps, y, new_residual = given
        step = align_down(limit, ALIGNED_ROWS)
        for start in range(0, M, step):
            rows = slice(start, start + step)
            part = Norm(residual[rows], weight, eps, y[rows], new_residual[rows])
            _all_reduce_add_rms_norm(arena, x[rows], part, word)
        spoil(arena, y)
        spoil(arena, new_residual)
    _give_back(given, norm)
    return issued


def _all_reduce_add_rms_norm(arena: Arena, x: Tensor, norm: Norm, word: int) -> Issued:
    (M, H), W, room = x.shape, arena.world_size, arena.layout
    launch = _launch(
        arena,
        all_reduce_one_shot_push_add_rms_norm,
        (H,),
        WORLD=W,
        DTYPE=_triton_dtype(x),
        **_block(H),
        launch_pdl=True,
    )
    return launch(
        min(M, arena.programs),
        x,
        norm.residual,
        norm.weight,
        norm.y,
        norm.new_residual,
        arena.heap,
        arena.control,
        arena.record.words,
        room.header,
        M,
        H,
        pitch(H),
        norm.eps,
        room.one_shot_flags,
        room.one_shot,
        room.one_shot_bytes,
        room.one_shot_tiles * W * 8,
        word,
        arena.rank,
        arena.timeout_ns,
    )


def _block(H: int) -> dict[str, int]:
    """One block for the row, if a CTA can hold it."""
    block = min(max(triton.next_power_of_2(H), BLOCKS[0]), BLOCKS[1])
    return {"BLOCK": block, "num_warps": min(max(block // BLOCK_ELEMS_A_WARP, 4), 16)}


def _laid(x: Tensor) -> Tensor:
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _laid_out(norm: Norm) -> Norm:
    """The same where a kernel can take it, else copies, and memory for results, which `_give_back` copies out of."""
    y, new_residual = (x if x.data_ptr() % 16 == 0 else torch.empty_like(x) for x in (norm.y, norm.new_residual))
    return Norm(_laid(norm.residual), _laid(norm.weight), norm.eps, y, new_residual)


def _give_back(given: Norm, norm: Norm) -> None:
    for ours, theirs in ((given.y, norm.y), (given.new_residual, norm.new_residual)):
        if ours is not theirs:
            theirs.copy_(ours)
