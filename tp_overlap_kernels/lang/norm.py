"""RMS norm of a row that one CTA holds, a block of columns at a time."""

import triton
import triton.language as tl


@triton.jit
def store_normed(y_row, hidden_row, weight_ptr, hidden, weight, squares, H, eps, DTYPE: tl.constexpr):
    """y = hidden / sqrt(mean(hidden^2) + eps) * weight, for the row at `hidden_row`; f32 until y is rounded.

    hidden, weight: the row's last block and its weights, still in registers: of most models that is the row.
    squares: (BLOCK,) f32, those of all blocks added up. The blocks before the last are read again; the barrier puts
    the stores of all threads before that, and the loads of all threads before y, which may lie where they read.
    """
    BLOCK: tl.constexpr = squares.shape[0]
    scale = tl.rsqrt(tl.sum(squares, axis=0) / H + eps)
    last = (tl.cdiv(H, BLOCK) - 1) * BLOCK
    tl.debug_barrier()
    for start in tl.range(0, last, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        earlier = tl.load(hidden_row + columns).to(tl.float32)
        y = earlier * scale * tl.load(weight_ptr + columns).to(tl.float32)
        tl.store(y_row + columns, y.to(DTYPE))
    columns = last + tl.arange(0, BLOCK)
    y = hidden.to(tl.float32) * scale * weight.to(tl.float32)
    tl.store(y_row + columns, y.to(DTYPE), mask=columns < H)
