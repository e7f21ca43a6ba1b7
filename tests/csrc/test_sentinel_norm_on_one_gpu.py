"""The sentinel kernel with a norm on one GPU; ranks are streams of this process, as in test_sentinel_on_one_gpu.py."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch

from tests.csrc.test_sentinel_on_one_gpu import (
    CLOCKS_PER_MS,
    CODE,
    CODES,
    DONE,
    FAILED,
    HEADER,
    MISMATCH,
    OP,
    PADS_BYTES,
    PEER,
    SLOT_BYTES,
    TIMEOUT,
    Group,
    assert_same_bits,
    inputs,
    pytestmark,  # noqa: F401
    rank_order_sum,
)
from tests.ops.norms import EPS, check_norm
from tp_overlap_kernels.kernels.all_reduce_one_shot_sentinel_add_rms_norm import SentinelNormLauncher

SHAPES = [(1, 8192), (1, 4096), (16, 8192), (3, 41), (7, 1003), (1, 1), (300, 64), (2, 5120), (5, 8), (31, 4100)]


class Call(NamedTuple):
    """The tensors of one rank."""

    x: torch.Tensor
    residual: torch.Tensor
    weight: torch.Tensor
    y: torch.Tensor
    new_residual: torch.Tensor


class NormGroup(Group):
    """The same ranks, arenas and words, with a launcher of the kernel with a norm each."""

    def __init__(self, world_size: int, timeout_s: float = 5.0):
        super().__init__(world_size, timeout_s)
        self.norms = [
            SentinelNormLauncher(
                base_table_ptr=self.bases.data_ptr(),
                control_ptr=member.control.data_ptr(),
                record_ptr=member.record.data_ptr(),
                sentinel_offset=PADS_BYTES,
                sentinel_bytes=SLOT_BYTES,
                header_offset=HEADER,
                done_offset=DONE,
                rank=rank,
                world_size=world_size,
                timeout_ns=int(timeout_s * 1e9),
                launched_ahead=False,
            )
            for rank, member in enumerate(self.ranks)
        ]

    def enqueue_norm(self, rank: int, call: Call, call_hash: int = 7) -> None:
        pointers = (tensor.data_ptr() for tensor in call)
        sizes = (*call.x.shape, EPS, CODES[call.x.dtype])
        self.norms[rank](*pointers, *sizes, call_hash, self.ranks[rank].stream.cuda_stream)

    def norm(self, calls: list[Call], late: int | None = None) -> None:
        torch.cuda.synchronize()
        for rank, call in enumerate(calls):
            if rank == late:
                with torch.cuda.stream(self.ranks[rank].stream):
                    torch.cuda._sleep(5 * CLOCKS_PER_MS)
            self.enqueue_norm(rank, call)
        torch.cuda.synchronize()
        self.expect_no_failure()


def calls_of(world_size: int, M: int, H: int, dtype: torch.dtype, seed: int, offset: int = 0) -> list[Call]:
    """Residual and weight equal on all ranks; every tensor `offset` elements into its memory."""
    xs = inputs(world_size, M * H, dtype, seed, offset)
    residual, weight = inputs(1, M * H, dtype, seed + 1000)[0], 1 + inputs(1, H, dtype, seed + 2000)[0] / 4

    def at_offset(values: torch.Tensor | float, n: int) -> torch.Tensor:
        memory = torch.full((n + offset,), torch.nan, dtype=dtype, device="cuda")[offset:]
        memory[:] = values
        return memory

    return [
        Call(
            x.view(M, H),
            at_offset(residual, M * H).view(M, H),
            at_offset(weight, H),
            *(at_offset(torch.nan, M * H).view(M, H) for _ in range(2)),
        )
        for x in xs
    ]


def exact_residual(calls: list[Call]) -> torch.Tensor:
    """Ranks in order in f32, residual last, rounded once."""
    total = calls[0].x.float() + 0.0
    for call in calls[1:]:
        total = total + (call.x.float() + 0.0)
    return (total + calls[0].residual.float()).to(calls[0].x.dtype)


def judge(calls: list[Call], new_residual: torch.Tensor) -> None:
    assert_same_bits([call.new_residual for call in calls], new_residual)
    assert_same_bits([call.y for call in calls], calls[0].y)
    check_norm(calls[0].y.cpu(), calls[0].new_residual.cpu(), calls[0].weight.cpu())


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("world_size", range(2, 9))
def test_bits_over_many_calls_with_plain_sums_between(world_size, dtype):
    """The two kernels use the same buffers in turn."""
    group = NormGroup(world_size)
    for seed, (M, H) in enumerate(SHAPES * 2):
        rows = min(M, 5 * 132 // world_size)  # a block each, and those of all ranks must be on this GPU at a time
        calls = calls_of(world_size, rows, H, dtype, seed)
        new_residual = exact_residual(calls)
        group.norm(calls)
        judge(calls, new_residual)
        xs = inputs(world_size, 1 + 4099 * (seed % 7), dtype, seed)
        assert_same_bits(group.all_reduce(xs), rank_order_sum(xs))


def test_pointers_need_no_alignment():
    group = NormGroup(2)
    for offset in (1, 3, 8):
        calls = calls_of(2, 3, 1000, torch.bfloat16, offset, offset)
        new_residual = exact_residual(calls)
        group.norm(calls)
        judge(calls, new_residual)


def test_ranks_agree_wherever_their_tensors_lie():
    group = NormGroup(2)
    aligned, odd = (calls_of(2, 3, 8192, torch.float16, 5, offset)[rank] for rank, offset in ((0, 0), (1, 1)))
    group.norm([aligned, odd])
    assert_same_bits([odd.y.clone()], aligned.y.clone())


def test_in_place():
    group = NormGroup(3)
    for seed in range(3):
        calls = calls_of(3, 5, 4104, torch.bfloat16, seed)
        new_residual = exact_residual(calls)
        calls = [call._replace(y=call.x, new_residual=call.residual) for call in calls]
        group.norm(calls)
        judge(calls, new_residual)


@pytest.mark.parametrize("late", range(3))
def test_a_late_rank_is_waited_for(late):
    group = NormGroup(3)
    for seed in range(4):
        calls = calls_of(3, 4, 1024, torch.bfloat16, seed)
        new_residual = exact_residual(calls)
        group.norm(calls, late=late)
        judge(calls, new_residual)


@pytest.mark.parametrize("hashes, code", [({0: 7}, TIMEOUT), ({0: 7, 1: 8}, MISMATCH)], ids=["nobody", "another call"])
def test_without_the_peer_both_results_are_nan(hashes, code):
    group = NormGroup(2, timeout_s=0.1)
    calls = calls_of(2, 40, 1024, torch.bfloat16, 1)
    for call in calls:
        call.y.zero_()
        call.new_residual.zero_()
    torch.cuda.synchronize()
    for rank, call_hash in hashes.items():
        group.enqueue_norm(rank, calls[rank], call_hash)
    torch.cuda.synchronize()
    member = group.ranks[0]
    assert calls[0].y.isnan().all() and calls[0].new_residual.isnan().all()
    assert [member.record[i] for i in (CODE, OP, PEER)] == [code, 5, 1] and member.control[FAILED] == 1
