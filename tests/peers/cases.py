"""What other projects test their fused and custom collectives with: sizes, data, tolerance; written anew for our ops.

Each row names its source. Our ops take bf16 and fp16; where the source has f32, fp16, the nearer of the two, stands in
its place, at the source's own tolerance. `small` are sizes of the same shape for the interpreter; devices take those
of the source.
"""

from __future__ import annotations

import dataclasses

import torch

from tests.cases import BF16, FP16, Case

KRAKEN = "kraken, test/test_gemm_allreduce.py"
KRAKEN_RS = "kraken, test/test_gemm_reduce_scatter.py"
PYTORCH = "PyTorch, test/distributed/test_symmetric_memory.py"
VLLM = "vLLM, tests/distributed/test_custom_all_reduce.py"
SGLANG = "SGLang, test/registered/kernels/ops/communication/test_custom_all_reduce.py"
TRITON_AR = "Triton-distributed, python/triton_dist/test/nvidia/test_gemm_ar.py"
TRITON_RS = "Triton-distributed, python/triton_dist/test/nvidia/test_gemm_rs.py"
FLASHINFER = "FlashInfer, tests/comm/test_allreduce_unified_api.py"
FLUX = "Flux, test/python/gemm_rs/stress/stress_gemm_rs.py"


@dataclasses.dataclass(frozen=True)
class PeerCase:
    """M, N, K of one rank; K = 0: N elements to sum. data: a name of DATA. rtol, atol: the source's own."""

    source: str
    op: str
    sizes: tuple[int, int, int]
    small: tuple[int, int, int]
    dtype: torch.dtype
    data: str
    rtol: float
    atol: float

    def __str__(self) -> str:
        return f"{self.source.split(',')[0]}-{self.op}-{'x'.join(map(str, self.sizes))}-{str(self.dtype)[6:]}"

    def on(self, world_size: int, original: bool) -> Case:
        """Sizes for the interpreter, or the source's."""
        return Case(*(self.sizes if original else self.small), self.dtype, world_size, "")


AR, RS, SUM = "gemm_all_reduce", "gemm_reduce_scatter", "all_reduce"

GEMMS = [
    PeerCase(KRAKEN, AR, (512, 256, 128), (40, 40, 64), FP16, "normal", 1e-1, 1e-1),
    PeerCase(KRAKEN, AR, (256, 256, 256), (40, 40, 64), FP16, "normal", 1e-1, 1e-1),
    PeerCase(KRAKEN, AR, (32, 32, 32), (32, 32, 32), FP16, "rank + 1", 1e-5, 1e-5),  # exact
    PeerCase(KRAKEN_RS, RS, (512, 256, 128), (40, 40, 64), FP16, "normal", 1e-1, 1e-1),
    PeerCase(KRAKEN_RS, RS, (512, 256, 128), (40, 40, 64), FP16, "rank + 1", 1e-1, 1e-1),
    # Normal data there; of its sums, which bf16 resolves to 1, the tolerance could only ask for equal roundings. Of
    # partials of 4 and more, which unit variance has, still.
    PeerCase(KRAKEN_RS, RS, (8192, 4096, 14336), (64, 40, 112), BF16, "a quarter", 1e-2, 1e-2),
    # Its data is a tenth of normal; K is of all ranks, so half of it on each of two.
    PeerCase(TRITON_AR, AR, (32, 5120, 12800), (32, 40, 100), BF16, "a tenth", 6e-2, 6e-2),
    PeerCase(TRITON_AR, AR, (28000, 7168, 2048), (109, 28, 16), BF16, "a tenth", 6e-2, 6e-2),
    PeerCase(TRITON_AR, AR, (32, 5120, 12800), (32, 40, 100), FP16, "a tenth", 1e-2, 1e-2),
    PeerCase(TRITON_RS, RS, (8192, 8192, 14784), (64, 32, 115), BF16, "a tenth", 6e-2, 6e-2),
    PeerCase(TRITON_RS, RS, (4096, 4096, 6144), (64, 32, 96), FP16, "a tenth", 1e-2, 1e-2),
]

SUMS = [
    PeerCase(source, SUM, (1, n, 0), (1, min(n, 10_000), 0), dtype, "0 to 15", 0.0, 0.0)
    for dtype in (BF16, FP16)
    for source, n in [
        *((SGLANG, n) for n in (16, 32, 512, 1024, 1040, 4096, 32768, 262144, 2097152, 4194304)),
        *((VLLM, n) for n in (1032, 1_048_576 - 8, 2_097_144)),
        *((PYTORCH, n) for n in (2, 4096, 4098, 0)),  # 4, 8192 and 8196 bytes, and nothing
    ]
]

# Tokens of one call after another on one workspace, each with its hidden size.
MAILBOX = [(tokens, 64) for tokens in (1, 6, 12, 8, 16, 3, 5, 2, 4, 1)]  # vLLM
SEQUENCES = [(tokens, 72) for tokens in (1, 4, 15, 27, 11, 24, 256, 127)]  # FlashInfer


def of_tokens(tokens: int, hidden: int, dtype: torch.dtype = BF16) -> PeerCase:
    """A sum of tokens x hidden elements, as between two layers."""
    return PeerCase(FLASHINFER, SUM, (1, tokens * hidden, 0), (1, tokens * hidden, 0), dtype, "0 to 15", 0.0, 0.0)
