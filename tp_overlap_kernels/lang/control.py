"""The words of `control`, an array of int64 in the device's own memory, one a group; and how a wait can end."""

import triton.language as tl

EPOCH = tl.constexpr(0)  # the last call that this rank has entered with its whole grid
ENTERED = tl.constexpr(1)  # CTAs that have read the epoch of the running call
SENTINEL_CALLS = tl.constexpr(2)  # used by csrc/kernels/all_reduce_one_shot_sentinel.cu
SENTINEL_BYTES = tl.constexpr(3)  # likewise
FAILED = tl.constexpr(4)  # nonzero: every wait returns at once
REPORTER = tl.constexpr(5)  # 0 until one thread has taken the record
LEFT = tl.constexpr(6)  # CTAs that have ended in the running call
STAGED = tl.constexpr(7)  # the last call that ended with `leave`
HEADERS = tl.constexpr(8)  # address of our header slots [2, W]: the call word of each peer by parity of the epoch
HEADERS_BYTES = tl.constexpr(9)  # W * 8

# status of a wait, and the record's code
OK, TIMEOUT, MISMATCH, ABORTED = (tl.constexpr(i) for i in range(4))
