"""Add a residual, then RMS norm: what follows a sum over ranks in a transformer, in one launch and on one rank.

    new_residual[m, h] = x[m, h] + residual[m, h]
    y[m, h] = new_residual[m, h] / sqrt(mean over h of new_residual[m, h]^2 + eps) * weight[h]

x, residual, y, new_residual: (M, H) contiguous, weight: (H,); bf16 or fp16, addresses multiples of 16. y may be x,
new_residual may be residual.
Rounding: the addition in f32, one rounding to new_residual; the norm of that rounded value in f32, one rounding to y.
Equal inputs give equal bits on all ranks: the order in which squares are added depends on H alone.
Bytes: none between ranks. It reads and writes two rows for each row.

    the kernel before it        this kernel                            time
    ... stores x, ends          launched, waits for that end            |
                                add, square, store new_residual         v
                                sum of squares, store y

Fresh (no one reads too early). `after_previous_kernel` stands first: x is whole.
Reuse (no one overwrites too early). A CTA has whole rows. Of each it has read x and residual before y is stored, and a
  block of residual before it stores new_residual there.
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
):
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
