"""Fused or unfused: the decision of a layer, its counters, and one warning for each reason.

The decision looks only at what all ranks share and what stays as it is from call to call (group, dtype, device, width,
whether a gradient is wanted), never at M. Which kernel runs for which M is chosen inside the op.
torch.compile traces the decision and guards what it read: a graph traced before `init`, which is unfused, is traced
again after it, and the other way round after `close`.
"""

from __future__ import annotations

import collections
import logging

import torch

from ..memory.arena import find

log = logging.getLogger(__name__)

FUSED_DTYPES = (torch.bfloat16, torch.float16)

_counts: collections.Counter[str] = collections.Counter()
_warned: set[str] = set()


def counters() -> dict[str, int]:
    """Calls of this process's layers so far, as {"fused": n, "unfused: <reason>": n, ...}.

    Layers with nothing to sum (one rank, reduce_results=False) are not counted. A compiled call counts once, when it
    is traced. Reasons: needs_grad, dtype, not_initialised, device, max_N; of layers that an adapter looks after also
    input, weight, quantised, partial, output_tensor, and those of `integrations.adoption` and `integrations.engines`.
    Where an adapter joins layers to the norms behind them, also {"fused with norm": n, "norm apart: <reason>": n, ...}.
    """
    return dict(_counts)


def reset_counters() -> None:
    """Counts begin anew, and each reason is warned of once more."""
    _counts.clear()
    _warned.clear()


def fuses(layer: str, group_name: str, rank: int, N: int, dtype: torch.dtype, device: str, needs_grad: bool) -> bool:
    """Whether the call goes to the fused op. Counts it, and warns where it does not."""
    reason = why_not(group_name, N, dtype, device, needs_grad)
    note(reason, layer, group_name, rank, N, dtype, device)
    return not reason


def why_not(group_name: str, N: int, dtype: torch.dtype, device: str, needs_grad: bool) -> str:
    """The reason not to fuse, in a word; empty when there is none."""
    if needs_grad:
        return "needs_grad"
    if dtype not in FUSED_DTYPES:
        return "dtype"
    arena = find(group_name)
    if arena is None:
        return "not_initialised"
    if arena.device.type != device:
        return "device"
    return "max_N" if N > arena.layout.max_N else ""


def note(reason: str, layer: str, group_name: str, rank: int, N: int, dtype: torch.dtype, device: str) -> None:
    """Counts a call, and says the reason in full the first time it is met."""
    _counts[f"unfused: {reason}" if reason else "fused"] += 1
    if not reason or reason in _warned:
        return
    _warned.add(reason)
    if rank != 0:
        return
    text = sentence(reason, group_name, N, dtype, device)
    log.warning("%s runs unfused: %s Later calls for this reason are only counted.", layer, text)


def note_norm(reason: str, layer: str, rank: int, text: str) -> None:
    """Counts a call of a layer that may be one with the norm behind it.

    text: the reason in full, said the first time; empty where it was said before, or there is none.
    """
    _counts[f"norm apart: {reason}" if reason else "fused with norm"] += 1
    if not text or text in _warned:
        return
    _warned.add(text)
    if rank == 0:
        log.warning("%s runs apart from its norm: %s Later calls for this reason are only counted.", layer, text)


def count_unfused(reason: str) -> None:
    """Counts a call for a reason that was said before."""
    _counts[f"unfused: {reason}"] += 1


def sentence(reason: str, group_name: str, N: int, dtype: torch.dtype, device: str) -> str:
    """What stands in the way, and what to do about it."""
    arena = find(group_name)
    return {
        "needs_grad": "a gradient is wanted, and the op has none. Wrap inference in torch.inference_mode().",
        "dtype": f"dtype is {dtype}. The op takes torch.bfloat16 and torch.float16.",
        "not_initialised": f"group {group_name!r} has no arena. Call tp_overlap_kernels.init() on all its ranks.",
        "device": f"its tensors are on {device}, while its group was initialised for {arena and arena.device.type}.",
        "max_N": f"out_features={N} exceeds max_N={arena and arena.layout.max_N}. Give init() a larger max_N.",
        "input": "its input is not a plain tensor of the weight's dtype.",
        "weight": "its weight is not a contiguous matrix, this rank's columns: moved, emptied or replaced.",
        "quantised": "its weight is quantised. The op takes torch.bfloat16 and torch.float16.",
        "partial": "its caller wants this rank's partial, and sees to the sum itself.",
        "output_tensor": "its caller gives the tensor that takes the output, and the op returns one of its own.",
    }[reason]


# Runs while tracing and leaves no trace. This is what torch.compiler.assume_constant_result does; calling that here
# would import the compiler together with this package, which takes 1.6 s.
note._dynamo_marked_constant = True  # type: ignore[attr-defined]
note_norm._dynamo_marked_constant = True  # type: ignore[attr-defined]
count_unfused._dynamo_marked_constant = True  # type: ignore[attr-defined]
