"""The one table that drives every operator's tests. `why` says what a row is for, and is its test's id.

K is what one rank holds. Rows for the CPU are small, since each operation costs the interpreter a fixed time; rows for
GPUs are sizes of models, and sizes that divide nothing.
"""

from __future__ import annotations

import dataclasses

import torch

BF16, FP16 = torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class Case:
    """a: (M, K) and b: (N, K) on each of world_size ranks; all-reduce: N elements, M = 1, K = 0."""

    M: int
    N: int
    K: int
    dtype: torch.dtype
    world_size: int
    why: str

    def __str__(self) -> str:
        return self.why.replace(" ", "_")

    def rows_of(self, rank: int) -> slice:
        """The rows of the sum that `rank` keeps in a reduce-scatter."""
        height = -(-self.M // self.world_size)
        return slice(min(self.M, rank * height), min(self.M, (rank + 1) * height))


def _table(*rows: tuple) -> list[Case]:
    cases = [Case(*row) for row in rows]
    assert len({c.why for c in cases}) == len(cases), "two rows with one reason"
    return cases


CASES = _table(
    (64, 64, 64, BF16, 1, "one rank"),
    (128, 128, 64, BF16, 2, "one tile a rank"),
    (256, 192, 96, BF16, 2, "more tiles than programs"),
    (1, 64, 64, BF16, 2, "one row, so rank 1 owns none"),
    (1, 1, 1, BF16, 2, "one element"),
    (0, 64, 64, BF16, 2, "no rows"),
    (33, 72, 72, BF16, 2, "ragged M, N and K"),
    (65, 129, 130, BF16, 2, "one past a tile in each dimension"),
    (16, 64, 8, BF16, 2, "K of one 16-byte vector"),
    (17, 64, 3, BF16, 2, "odd K, no vector loads"),
    (17, 5, 64, BF16, 2, "odd N, no vector stores"),
    (16, 1000, 64, BF16, 2, "N of 1000"),
    (48, 40, 1024, BF16, 2, "long K"),
    (64, 64, 256, FP16, 2, "fp16"),
    (7, 72, 40, BF16, 3, "three ranks"),
    (2, 24, 16, FP16, 3, "fewer rows than three ranks, fp16"),
    (128, 64, 64, BF16, 4, "four ranks"),
    (3, 64, 64, BF16, 4, "fewer rows than ranks"),
    (33, 72, 72, FP16, 4, "four ranks, ragged, fp16"),
    (100, 64, 32, BF16, 8, "eight ranks, the last one short"),
    (9, 32, 32, BF16, 8, "eight ranks, three of them without rows"),
)

ALL_REDUCE_CASES = _table(
    (1, 4096, 0, BF16, 1, "one rank"),
    (1, 4096, 0, BF16, 2, "whole vectors"),
    (1, 1, 0, BF16, 2, "one element"),
    (1, 0, 0, BF16, 2, "no elements"),
    (1, 4099, 0, BF16, 2, "prime number of elements"),
    (1, 7, 0, FP16, 2, "less than one vector, fp16"),
    (1, 5000, 0, FP16, 3, "three ranks, fp16"),
    (1, 1000, 0, BF16, 4, "four ranks"),
    (1, 3, 0, BF16, 4, "fewer elements than ranks"),
    (1, 2053, 0, BF16, 8, "eight ranks"),
)

# For two GPUs; `on(case, world_size)` for more.
GPU_CASES = _table(
    (4099, 1032, 328, BF16, 2, "nothing divides a tile"),
    (1, 8192, 1024, BF16, 2, "decode of one token"),
    (8, 8192, 3584, BF16, 2, "decode of eight tokens"),
    (17, 8192, 14784, BF16, 2, "long K, odd M"),
    (64, 5120, 3200, FP16, 2, "fp16 decode"),
    (128, 4096, 2048, BF16, 2, "one row of tiles"),
    (512, 4096, 3696, BF16, 2, "K that no block divides"),
    (1000, 1000, 72, BF16, 2, "short K, ragged"),
    (2048, 8192, 4096, BF16, 2, "prefill"),
    (4096, 5120, 3200, FP16, 2, "fp16 prefill"),
    (8192, 8192, 1024, BF16, 2, "largest M"),
    (255, 5, 64, BF16, 2, "odd N, no vector stores"),
    (255, 264, 3, BF16, 2, "odd K, no vector loads"),
    (0, 8192, 1024, BF16, 2, "no rows"),
)

GPU_ALL_REDUCE_CASES = _table(
    (1, 8192, 0, BF16, 2, "one token"),
    (1, 4099, 0, BF16, 2, "prime number of elements"),
    (1, 512 * 1024, 0, FP16, 2, "one MiB, fp16"),
    (1, 4096 * 8192, 0, BF16, 2, "64 MiB"),
)


def on(case: Case, world_size: int) -> Case:
    """The same sizes on another number of ranks."""
    return dataclasses.replace(case, world_size=world_size)
