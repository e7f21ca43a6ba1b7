"""Add a residual, then RMS norm: what follows a sum over ranks in a transformer, in one launch and on one rank.

    new_residual[m, h] = x[m, h] + residual[m, h]
    y[m, h] = new_residual[m, h] / sqrt(mean over h of new_residual[m, h]^2 + eps) * weight[h]

x, residual, y, new_residual: (M, H) contiguous, weight: (H,); bf16 or fp16, addresses multiples of 16. y may be x,
new_residual may be residual.
Rounding: the addition in f32, one rounding to new_residual; the norm of that rounded value in f32, one rounding to y.
Equal inputs give equal bits on all ranks: the order in which squares are added depends on H alone.
Bytes: none between ranks. It reads and writes two rows for each row.

    the kernel before it        this kernel                            time
    ... stores x, ends          launched, loads weight and residual     |
                                waits for that end                      v
                                add, square, store new_residual
                                sum of squares, store y

Fresh (no one reads too early). `after_previous_kernel` stands before x is read. weight and residual may be read before:
  the kernel before this one stores x alone, and has waited for all kernels before it when it lets this one begin.
Reuse (no one overwrites too early). Nothing is stored before `after_previous_kernel`. A CTA has whole rows. Of each it
  has read x and residual before y is stored, and a block of residual before it stores new_residual there.
Live (no one waits for ever). It waits for the kernel before it on the stream, and for no rank.
"""

import triton
import triton.language as tl

from ..lang import norm, signal


@triton.jit(do_not_specialize=["M"])
def add_rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    new_residual_ptr,
    M,
    H,
    eps,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """WHOLE: a block holds the row, H <= BLOCK."""
    if WHOLE:
        _whole_rows(x_ptr, residual_ptr, weight_ptr, y_ptr, new_residual_ptr, M, H, eps, DTYPE, BLOCK)
    else:
        _rows_in_blocks(x_ptr, residual_ptr, weight_ptr, y_ptr, new_residual_ptr, M, H, eps, DTYPE, BLOCK)


@triton.jit
def _whole_rows(x_ptr, residual_ptr, weight_ptr, y_ptr, new_residual_ptr, M, H, eps, DTYPE, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < H
    first = tl.program_id(0)
    weight = tl.load(weight_ptr + columns, mask=inside, other=0.0)
    residual = tl.load(residual_ptr + first.to(tl.int64) * H + columns, mask=inside & (first < M), other=0.0)
    signal.after_previous_kernel()
    for row in tl.range(first, M, tl.num_programs(0)):
        here = row.to(tl.int64) * H
        x = tl.load(x_ptr + here + columns, mask=inside, other=0.0).to(tl.float32)
        hidden = (x + residual.to(tl.float32)).to(DTYPE)
        following = row + tl.num_programs(0)
        ahead = residual_ptr + following.to(tl.int64) * H + columns
        residual = tl.load(ahead, mask=inside & (following < M), other=0.0)
        tl.store(new_residual_ptr + here + columns, hidden, mask=inside)
        squares = hidden.to(tl.float32) * hidden.to(tl.float32)
        norm.store_normed(y_ptr + here, new_residual_ptr + here, weight_ptr, hidden, weight, squares, H, eps, DTYPE)


@triton.jit
def _rows_in_blocks(x_ptr, residual_ptr, weight_ptr, y_ptr, new_residual_ptr, M, H, eps, DTYPE, BLOCK: tl.constexpr):
    signal.after_previous_kernel()
    for row in tl.range(tl.program_id(0), M, tl.num_programs(0)):
        here = row.to(tl.int64) * H
        squares = tl.zeros((BLOCK,), dtype=tl.float32)
        hidden = tl.zeros((BLOCK,), dtype=DTYPE)
        weight = tl.zeros((BLOCK,), dtype=DTYPE)
        for start in tl.range(0, H, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + here + columns, mask=columns < H, other=0.0).to(tl.float32)
            residual = tl.load(residual_ptr + here + columns, mask=columns < H, other=0.0)
            weight = tl.load(weight_ptr + columns, mask=columns < H, other=0.0)
            hidden = (x + residual.to(tl.float32)).to(DTYPE)
            tl.store(new_residual_ptr + here + columns, hidden, mask=columns < H)
            squares += hidden.to(tl.float32) * hidden.to(tl.float32)
        norm.store_normed(y_ptr + here, new_residual_ptr + here, weight_ptr, hidden, weight, squares, H, eps, DTYPE)
