"""Fused or unfused: the decision of a layer, its counters, and one warning for each reason.

The decision looks only at what all ranks share and what stays as it is from call to call (group, dtype, device, width,
whether a gradient is wanted), never at M. Which kernel runs for which M is chosen inside the op.
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
    is traced. Reasons: needs_grad, dtype, not_initialised, device, max_N.
    """
    return dict(_counts)


def reset_counters() -> None:
    """Counts begin anew, and each reason is warned of once more."""
    _counts.clear()
    _warned.clear()


def fuses(layer: str, group_name: str, rank: int, N: int, dtype: torch.dtype, device: str, needs_grad: bool) -> bool:
    """Whether the call goes to the fused op. Counts it, and warns where it does not.

    Under torch.compile this runs once, while tracing, and its answer becomes part of the graph: initialise the group
    before compiling. A graph traced without an arena stays right, and unfused, until it is compiled again.
    """
    found = why_not(group_name, N, dtype, device, needs_grad)
    if found is None:
        _counts["fused"] += 1
        return True
    reason, sentence = found
    _counts[f"unfused: {reason}"] += 1
    if reason not in _warned:
        _warned.add(reason)
        if rank == 0:
            log.warning("%s runs unfused: %s Later calls for this reason are only counted.", layer, sentence)
    return False


# What torch.compiler.assume_constant_result does; calling that would import the compiler with this package (1.6 s).
fuses._dynamo_marked_constant = True  # type: ignore[attr-defined]


def why_not(group_name: str, N: int, dtype: torch.dtype, device: str, needs_grad: bool) -> tuple[str, str] | None:
    """The reason not to fuse, as (word, sentence), or None."""
    if needs_grad:
        return "needs_grad", "a gradient is wanted, and the op has none. Wrap inference in torch.inference_mode()."
    if dtype not in FUSED_DTYPES:
        return "dtype", f"dtype is {dtype}. The op takes torch.bfloat16 and torch.float16."
    arena = find(group_name)
    if arena is None:
        return "not_initialised", f"group {group_name!r} has no arena. Call tp_overlap_kernels.init() on all its ranks."
    if arena.device.type != device:
        return "device", f"its tensors are on {device}, while its group was initialised for {arena.device.type}."
    if N > arena.layout.max_N:
        return "max_N", f"out_features={N} exceeds max_N={arena.layout.max_N}. Give init() a larger max_N."
    return None
