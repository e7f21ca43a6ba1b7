"""Compile each Triton kernel for gfx942: `python -m tests.kernels.amd_compiled out.pickle`, in a process of its own.

LLVM ends a process where it meets what it cannot compile, and keeps settings of one target for the next. The file maps
the name of a case to what the gates read: a `Compiled`.
"""

from __future__ import annotations

import dataclasses
import pickle
import sys
from collections.abc import Callable
from typing import Any

from tests import ptx
from tests.kernels import test_ptx
from tests.kernels.launched import BF16, FP16, Launched, copying, gemm, norming, signalling
from tests.words import test_ptx as words

AR, RS = "gemm_all_reduce", "gemm_reduce_scatter"
# Blocks of 64 columns of K in two stages: what the 64 KiB of LDS of a gfx942 hold. Those of an H200 need more.
STAGES = 2


@dataclasses.dataclass
class Compiled:
    """What Triton's compiled object says, without what cannot be pickled."""

    kernel: str
    asm: dict[str, Any]
    shared: int


def _gemm(*row: Any, **options: Any) -> Launched:
    launched = gemm(*row, **options)
    return Launched(launched.kernel, launched.args, launched.meta | {"num_stages": STAGES})


LAUNCHES: dict[str, Callable[[], Launched]] = {
    "gemm_all_reduce_two_shot_push": lambda: _gemm(AR, "two_shot", 512, 4096, 4096),
    "gemm_all_reduce_two_shot_push of 4 ranks": lambda: _gemm(AR, "two_shot", 512, 4096, 4096, 4, bias=True),
    "gemm_reduce_scatter_push": lambda: _gemm(RS, "push", 512, 4096, 4096),
    "gemm_all_reduce_one_shot_push": lambda: _gemm(AR, "one_shot", 64, 8192, 4096),
    "gemm_reduce_scatter_one_shot_push": lambda: _gemm(RS, "one_shot", 64, 8192, 4096, dtype=FP16),
    "all_reduce_one_shot_push": lambda: copying("one_shot", 1 << 20),
    "all_reduce_two_shot_push": lambda: copying("two_shot", 1 << 25),
    "reduce_scatter_push": lambda: copying("push", 1 << 25),
    "all_reduce_one_shot_push_add_rms_norm": lambda: norming(8192, 2, BF16),
    "add_rms_norm": lambda: norming(32768, 1, BF16),
    **{name: lambda step=step: signalling(step) for name, step in test_ptx.SIGNALS.items()},
}
WORDS = ("words: message", "words: add_at_all", "words: wait_for_all", "words: gemm_reduce_scatter")


def compiled(name: str) -> Any:
    """Triton's object of one case."""
    if name in LAUNCHES:
        return LAUNCHES[name]().compile(ptx.gfx942)
    return words.compiled_by(ptx.gfx942, name.removeprefix("words: "))


def main(path: str) -> None:
    found = {}
    for name in (*LAUNCHES, *WORDS):
        made = compiled(name)
        texts = {stage: made.asm[stage] for stage in ("ttgir", "amdgcn", "hsaco")}
        found[name] = Compiled(made.metadata.name, texts, made.metadata.shared)
    with open(path, "wb") as file:
        pickle.dump({name: dataclasses.astuple(one) for name, one in found.items()}, file)


if __name__ == "__main__":
    main(sys.argv[1])
