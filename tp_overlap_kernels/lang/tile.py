"""Tiles: which rows and columns a tile_id stands for, and how a tile is loaded and stored.

Ownership: rank r owns the rows [r * c, min(M, (r + 1) * c)) with c = ceil(M / WORLD). Every owner's block of rows
is tiled by itself, so that a tile never has two owners, whatever M is. A tile past the end of a short block has no
rows: it is masked, signalled as all others are, and costs one tile of time on a ragged last rank.
"""

import triton
import triton.language as tl

from .target import on_amd


@triton.jit
def pivot(step, tiles_per_owner, rank, WORLD: tl.constexpr):
    """Launch order of the owners: rank + 1, rank + 2, ..., own rows last. No two ranks push to the same peer at once.

    Returns (owner, tile_id within the owner's block).
    """
    owner = (rank + 1 + step // tiles_per_owner) % WORLD
    return owner, step % tiles_per_owner


@triton.jit
def swizzle(tile_id, m_tiles, n_tiles, GROUP_M: tl.constexpr):
    """Grouped order for reuse in L2: GROUP_M tiles down before the next column. Returns (m, n) in tiles."""
    per_group = GROUP_M * n_tiles
    first_m = (tile_id // per_group) * GROUP_M
    height = tl.minimum(m_tiles - first_m, GROUP_M)
    m = first_m + (tile_id % per_group) % height
    n = (tile_id % per_group) // height
    return m, n


@triton.jit
def offsets(row0, col0, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Row and column indices of a tile: (BLOCK_M,) and (BLOCK_N,)."""
    return row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)


@triton.jit
def elements(rows, cols):
    """rows * cols, which may pass 2^31."""
    return (tl.full((), 0, tl.int64) + rows) * cols


@triton.jit
def operand(source, rows, cols, BLOCK_ROWS: tl.constexpr, BLOCK_COLS: tl.constexpr):
    """What loads blocks of an operand of rows x cols, 0 outside: `source`, a tensor descriptor of it.

    For an AMD GPU, which has no TMA, `source` is a pointer to contiguous rows. (A descriptor that is an argument would
    become loads there, too, but of 2 bytes: nothing would be known of its address and strides.)
    """
    if on_amd():
        return tl.make_tensor_descriptor(source, [rows, cols], [cols, 1], [BLOCK_ROWS, BLOCK_COLS])
    else:
        return source


@triton.jit
def store(ptr, value, rows, cols, row_end, col_end, pitch):
    """Store a tile at ptr[row * pitch + col], what lies before row_end and col_end only.

    16-byte stores where ptr, pitch and col_end are multiples of 16.
    """
    mask = (rows < row_end)[:, None] & (cols < col_end)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * pitch + cols[None, :], value, mask=mask)


@triton.jit
def load(ptr, rows, cols, row_end, col_end, pitch):
    """Load a tile from ptr[row * pitch + col], 0 outside; the counterpart of `store`."""
    mask = (rows < row_end)[:, None] & (cols < col_end)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * pitch + cols[None, :], mask=mask, other=0.0)


@triton.jit
def rows_of(rank, rows_per_rank, M):
    """[begin, end) of the rows that a rank owns; empty, perhaps with end < begin, past the end of a short M."""
    begin = rank * rows_per_rank
    return begin, tl.minimum(M, begin + rows_per_rank)


@triton.jit
def store_rows(ptr, value, rows, cols, row_begin, row_end, col_end, pitch):
    """`store` of those rows alone that lie in [row_begin, row_end)."""
    mask = ((rows >= row_begin) & (rows < row_end))[:, None] & (cols < col_end)[None, :]
    tl.store(ptr + rows.to(tl.int64)[:, None] * pitch + cols[None, :], value, mask=mask)


@triton.jit
def load_rows(ptr, rows, cols, row_begin, row_end, col_end, pitch):
    """`load` of those rows alone that lie in [row_begin, row_end)."""
    mask = ((rows >= row_begin) & (rows < row_end))[:, None] & (cols < col_end)[None, :]
    return tl.load(ptr + rows.to(tl.int64)[:, None] * pitch + cols[None, :], mask=mask, other=0.0)


@triton.jit
def load_bias(bias_ptr, cols, N, HAS_BIAS: tl.constexpr):
    """(BLOCK_N,) f32: the bias of these columns, or 0."""
    if HAS_BIAS:
        return tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    return tl.zeros_like(cols).to(tl.float32)
