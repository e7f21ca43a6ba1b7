"""Triton-Distributed's words: what each means, as kernels that are written once and run against whoever offers them.

`dl` and `jit` are ours on stock Triton. In a process with TPO_TEST_WORDS=triton_dist they are that project's own.
"""

import os

if os.environ.get("TPO_TEST_WORDS") == "triton_dist":
    import triton_dist  # type: ignore[import-not-found]
    import triton_dist.language as dl  # type: ignore[import-not-found]

    jit = triton_dist.jit
else:
    from tp_overlap_kernels.lang import distributed as dl

    jit = dl.jit

__all__ = ["dl", "jit"]
