"""What tests add to the workers of vLLM (`worker_extension_cls`), which import this and nothing else of the tests."""

from __future__ import annotations

import pathlib
import re
from typing import Any

import torch
import vllm

# vLLM's passes over compiled graphs name kernels that exist for GPUs only; to be named, an op need only be declared.
PASSES = pathlib.Path(vllm.__file__).parent / "compilation" / "passes" / "utility" / "fix_functionalization.py"
NAMED = set(re.findall(r"torch\.ops\._C\.(\w+)\.default", PASSES.read_text()))
DECLARED = torch.library.Library("_C", "FRAGMENT")
for name in sorted(name for name in NAMED if not hasattr(torch.ops._C, name)):
    DECLARED.define(f"{name}(Tensor x) -> Tensor")


class Ask:
    """Its methods are asked for by name."""

    def tp_overlap_seen(self) -> dict[str, Any]:
        from tp_overlap_kernels import counters
        from tp_overlap_kernels.memory.arena import all_arenas
        from tp_overlap_kernels.ops.reference import EPOCH

        arenas = all_arenas()
        return {
            "counted": counters(),
            "calls": [int(arena.control[EPOCH]) for arena in arenas],  # also those of graphs that nobody has traced
            "max_M": [arena.layout.max_M for arena in arenas],
        }
