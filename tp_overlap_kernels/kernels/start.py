"""How a CUDA kernel begins."""

import enum


class Start(enum.IntEnum):
    """TpoStart of csrc/api.h: how a call begins, seen from the kernels before it on the stream."""

    IN_ORDER = 0
    LAUNCHED_AHEAD = 1
    WEIGHTS_AHEAD = 2  # b is read before they have ended; none of them may write it
