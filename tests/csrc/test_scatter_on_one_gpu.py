"""The sentinel reduce-scatter on one GPU: the ranks are streams, as in tests/csrc/test_sentinel_on_one_gpu.py.

Calls of both kernels take turns in the same buffers. A launch ahead of the kernel before it is for ranks with a device
each: tests/gpu.
"""

from __future__ import annotations

import pytest
import torch

from tests.csrc import test_sentinel_on_one_gpu as sums
from tests.csrc.test_sentinel_on_one_gpu import (
    ABORT,
    ABORTED,
    CLOCKS_PER_MS,
    CODE,
    CODES,
    MISMATCH,
    OP,
    PEER,
    RANK,
    STATE,
    TIMEOUT,
    assert_same_bits,
    rank_order_sum,
)
from tests.values import assert_sum, in_order, shuffled_patterns
from tp_overlap_kernels.kernels.reduce_scatter_one_shot_sentinel import ReduceScatterLauncher

pytestmark = sums.pytestmark


class Group(sums.Group):
    """The ranks, with a launcher of either kernel on one arena."""

    def __init__(self, world_size: int, timeout_s: float = 5.0):
        super().__init__(world_size, timeout_s)
        self.scatters = []
        for rank, member in enumerate(self.ranks):
            self.scatters.append(
                ReduceScatterLauncher(
                    base_table_ptr=self.bases.data_ptr(),
                    control_ptr=member.control.data_ptr(),
                    record_ptr=member.record.data_ptr(),
                    sentinel_offset=sums.PADS_BYTES,
                    sentinel_bytes=sums.SLOT_BYTES,
                    header_offset=sums.HEADER,
                    done_offset=sums.DONE,
                    rank=rank,
                    world_size=world_size,
                    timeout_ns=int(timeout_s * 1e9),
                    launched_ahead=False,
                )
            )

    def enqueue_scatter(self, rank: int, x: torch.Tensor, out: torch.Tensor, part: int, call_hash: int = 7) -> None:
        stream = self.ranks[rank].stream.cuda_stream
        self.scatters[rank](x.data_ptr(), out.data_ptr(), x.numel(), part, CODES[x.dtype], call_hash, stream)

    def parts(self, n: int, part: int) -> list[slice]:
        return [slice(min(n, r * part), min(n, (r + 1) * part)) for r in range(len(self.ranks))]

    def reduce_scatter(self, xs: list[torch.Tensor], part: int, late: int | None = None) -> list[torch.Tensor]:
        """One call on every rank; behind each output lies a NaN that has to stay."""
        sizes = [own.stop - own.start for own in self.parts(xs[0].numel(), part)]
        outs = [torch.full((size + 1,), torch.nan, dtype=xs[0].dtype, device="cuda") for size in sizes]
        torch.cuda.synchronize()
        for rank, (x, out) in enumerate(zip(xs, outs, strict=True)):
            if rank == late:
                with torch.cuda.stream(self.ranks[rank].stream):
                    torch.cuda._sleep(5 * CLOCKS_PER_MS)
            self.enqueue_scatter(rank, x, out, part)
        torch.cuda.synchronize()
        self.expect_no_failure()
        assert all(out[-1].isnan() for out in outs)
        return [out[:-1] for out in outs]


def assert_parts(group: Group, outs: list[torch.Tensor], expected: torch.Tensor, part: int) -> None:
    for rank, (out, own) in enumerate(zip(outs, group.parts(expected.numel(), part), strict=True)):
        assert torch.equal(out.view(torch.int16), expected[own].view(torch.int16)), f"rank {rank}"


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("world_size", range(2, 9))
def test_sums_bit_for_bit_with_all_reduces_between(world_size, dtype):
    """Parts of any length, short last ones, owners of nothing; the buffers change hands at every length."""
    group = Group(world_size)
    rows = [(1, 8), (world_size, 1), (3, 41), (64, 1024), (2 * world_size - 1, 333), (128, 1024), (5, 72)]
    for call, (M, N) in enumerate(rows * 2):
        part = -(-M // world_size) * N
        xs = sums.inputs(world_size, M * N, dtype, seed=call)
        assert_parts(group, group.reduce_scatter(xs, part), rank_order_sum(xs), part)
        if call % 3 == 1:
            xs = sums.inputs(world_size, 9 + 5000 * call, dtype, seed=call)
            assert_same_bits(group.all_reduce(xs), rank_order_sum(xs))


@pytest.mark.parametrize("dtype", CODES, ids=str)
def test_every_bit_pattern_is_data(dtype):
    group, W = Group(3), 3
    xs = [shuffled_patterns(rank, dtype).cuda() for rank in range(W)]
    part = -(-xs[0].numel() // W)
    expected = in_order([x.cpu() for x in xs])
    for rank, (out, own) in enumerate(zip(group.reduce_scatter(xs, part), group.parts(65536, part), strict=True)):
        assert_sum(out.cpu(), expected[own], f"rank {rank}")


def test_pointers_need_no_alignment():
    group = Group(2)
    for offset in (1, 3, 8):
        xs = sums.inputs(2, 1001, torch.bfloat16, seed=offset, offset=offset)
        assert_parts(group, group.reduce_scatter(xs, 501), rank_order_sum(xs), 501)


@pytest.mark.parametrize("late", range(3))
def test_a_late_rank_is_waited_for(late):
    """Also by owners of nothing, or they would write, two calls later, what it still clears."""
    group = Group(3)
    for call in range(6):
        n = (4096, 8)[call % 2]
        xs = sums.inputs(3, n, torch.bfloat16, seed=call)
        part = max(8, -(-n // 3))
        assert_parts(group, group.reduce_scatter(xs, part, late=late), rank_order_sum(xs), part)


def run_alone(group: Group, rank: int, call_hashes: dict[int, int]) -> torch.Tensor:
    """Only the ranks of `call_hashes` call. Returns the output of `rank`."""
    xs = sums.inputs(2, 70000, torch.bfloat16, seed=1)
    outs = [torch.zeros(35000, dtype=torch.bfloat16, device="cuda") for _ in xs]
    torch.cuda.synchronize()
    for caller, call_hash in call_hashes.items():
        group.enqueue_scatter(caller, xs[caller], outs[caller], 35000, call_hash)
    torch.cuda.synchronize()
    return outs[rank]


def test_a_peer_that_never_comes_is_named_and_the_output_is_nan():
    group = Group(2, timeout_s=0.1)
    assert run_alone(group, 1, {1: 7}).isnan().all()
    record = group.ranks[1].record
    assert [record[i] for i in (STATE, CODE, OP, RANK, PEER)] == [2, TIMEOUT, 2, 1, 0]


def test_a_failed_group_touches_no_peer_and_returns_nan_at_once():
    group = Group(2, timeout_s=0.1)
    run_alone(group, 0, {0: 7})
    peer_before = group.ranks[1].arena.clone()
    assert run_alone(group, 0, {0: 7}).isnan().all()
    assert torch.equal(group.ranks[1].arena, peer_before)


def test_ranks_that_call_different_things_are_named_and_store_no_sum():
    group = Group(2)
    assert run_alone(group, 0, {0: 7, 1: 8}).isnan().all()
    assert [group.ranks[0].record[i] for i in (STATE, CODE, PEER)] == [2, MISMATCH, 1]


def test_the_host_ends_a_wait():
    group = Group(2, timeout_s=0)
    group.ranks[0].record[ABORT] = 1
    assert run_alone(group, 0, {0: 7}).isnan().all()
    assert group.ranks[0].record[CODE] == ABORTED
