"""Triton-Distributed's words and the examples written with them, on devices: the meanings of tests/words."""

from __future__ import annotations

from examples import triton_distributed_all_gather, triton_distributed_gemm_reduce_scatter
from tests.words import meanings

MAX_M, MAX_N = 64, 64  # of the ops, which are not called here


def words_mean_what_they_say(rank: int, world_size: int) -> None:
    for meaning in meanings.MEANINGS:
        meanings.hold(rank, world_size, meaning.__name__)


def an_all_gather_gathers(rank: int, world_size: int) -> None:
    for n in (1, 5000, 1 << 20):
        triton_distributed_all_gather.run(rank, world_size, n)


def a_gemm_reduce_scatter_sums(rank: int, world_size: int) -> None:
    for rows, N, K in ((72, 136, 80), (1024, 2048, 256)):
        triton_distributed_gemm_reduce_scatter.run(rank, world_size, rows, N, K)


CHECKS = (words_mean_what_they_say, an_all_gather_gathers, a_gemm_reduce_scatter_sums)
