"""The decode kernel on one GPU: the ranks are streams of this process, their arenas plain tensors of the same device.

Inputs are small integers, whose products and sums over K are exact: what comes out is known to the last bit. What one
GPU cannot show is the link between GPUs; tests/gpu runs the same kernel there, through the public op.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.csrc.test_sentinel_on_one_gpu import (
    ABORT,
    ABORTED,
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
    RANK,
    SLOT_BYTES,
    STATE,
    TIMEOUT,
    WANTED,
    Group,
    assert_same_bits,
    inputs,
    rank_order_sum,
)
from tp_overlap_kernels import native
from tp_overlap_kernels.kernels.gemm_all_reduce_one_shot_sentinel import DecodeLauncher, slot_bytes
from tp_overlap_kernels.kernels.start import Start

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device of compute capability 9.0"),
    pytest.mark.skipif(not native.available(), reason="needs libtpo_kernels.so: install the package where nvcc is"),
]

BF16, FP16 = torch.bfloat16, torch.float16


@dataclasses.dataclass(frozen=True)
class Case:
    M: int
    N: int
    K: int
    why: str
    dtype: torch.dtype = BF16
    world_size: int = 2
    tile_rows: int = 64
    splits: int = 1
    bias: bool = True
    stages: int = 0
    more_stride: int = 0  # elements between the end of a row of a or b and the next


# The blocks of all ranks must be resident at a time: an SM holds two.
CASES = [
    Case(1, 64, 64, "one stage, one tile"),
    Case(1, 2048, 2048, "M=1", splits=2),
    Case(3, 1032, 328, "nothing divides", splits=2),
    Case(7, 1001, 72, "N odd, a K tail"),
    Case(8, 512, 4096, "a ring that turns many times"),
    Case(16, 4096, 1024, "16 columns"),
    Case(16, 2048, 7168, "long K", bias=False, splits=2),
    Case(17, 520, 200, "32 columns, ragged", splits=4),
    Case(32, 2048, 1024, "32 columns"),
    Case(33, 1000, 520, "64 columns, ragged", tile_rows=128, splits=2),
    Case(64, 2048, 1024, "64 columns"),
    Case(64, 2048, 2048, "wide tiles, four parts", tile_rows=128, splits=4),
    Case(50, 1016, 136, "wide tiles, eight parts, one of them empty", tile_rows=128, splits=8, dtype=FP16),
    Case(100, 1000, 328, "128 columns, ragged"),
    Case(128, 1024, 1024, "128 columns, two parts", splits=2, dtype=FP16),
    Case(5, 256, 64, "fewer stages than parts", splits=8),
    Case(16, 1024, 2048, "few stages", stages=3),
    Case(16, 1024, 2048, "one block an SM", stages=20),
    Case(16, 1024, 512, "fp16", dtype=FP16),
    Case(9, 640, 264, "rows that lie apart", more_stride=24),
    Case(4, 1024, 512, "three ranks", world_size=3),
    Case(20, 1024, 512, "four ranks", world_size=4, splits=2),
    Case(60, 512, 512, "eight ranks", world_size=8, tile_rows=128, splits=2),
    Case(2, 1000, 328, "eight ranks, ragged", world_size=8),
]


class DecodeGroup(Group):
    """The same ranks, arenas and words, with a launcher of the decode kernel each."""

    def __init__(self, world_size: int, timeout_s: float = 5.0):
        super().__init__(world_size, timeout_s)
        self.decode = [
            DecodeLauncher(
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
            )
            for rank, member in enumerate(self.ranks)
        ]

    def enqueue_gemm(self, case: Case, rank: int, operands, out, start=Start.IN_ORDER, call_hash: int = 9) -> None:
        a, b, bias = operands
        self.decode[rank](
            a.data_ptr(),
            b.data_ptr(),
            0 if bias is None else bias.data_ptr(),
            out.data_ptr(),
            case.M,
            case.N,
            case.K,
            a.stride(0),
            b.stride(0),
            CODES[case.dtype],
            case.tile_rows,
            case.splits,
            case.stages,
            start,
            call_hash,
            self.ranks[rank].stream.cuda_stream,
        )

    def gemm(self, case: Case, by_rank, start=Start.IN_ORDER, late: int | None = None) -> list[torch.Tensor]:
        """One call on every rank, into NaN."""
        outs = [torch.full((case.M, case.N), torch.nan, dtype=case.dtype, device="cuda") for _ in by_rank]
        torch.cuda.synchronize()
        for rank, operands in enumerate(by_rank):
            if rank == late:
                with torch.cuda.stream(self.ranks[rank].stream):
                    torch.cuda._sleep(5 * CLOCKS_PER_MS)
            self.enqueue_gemm(case, rank, operands, outs[rank], start)
        torch.cuda.synchronize()
        self.expect_no_failure()
        return outs


def integers(generator, rows: int, cols: int, case: Case) -> torch.Tensor:
    wide = torch.randint(-2, 3, (rows, cols + case.more_stride), generator=generator, device="cuda").to(case.dtype)
    if wide.stride(0) % 8:  # rows begin at multiples of 16 bytes
        wide = torch.nn.functional.pad(wide, (0, -wide.stride(0) % 8), value=torch.nan)
    return wide[:, :cols]


def operands(case: Case, seed: int) -> list[tuple]:
    """(a, b, bias) of each rank; what lies between rows, where something does, is never 0."""
    generator = torch.Generator("cuda").manual_seed(seed)
    bias = torch.randint(-9, 10, (case.N,), generator=generator, device="cuda").to(case.dtype) if case.bias else None
    return [
        (integers(generator, case.M, case.K, case), integers(generator, case.N, case.K, case), bias)
        for _ in range(case.world_size)
    ]


def expected(case: Case, by_rank) -> torch.Tensor:
    """Each partial exact and rounded once, the ranks in order, the bias, rounded once."""
    total = torch.zeros(case.M, case.N, device="cuda")
    for a, b, _ in by_rank:
        total = total + (a.double() @ b.double().T).float().to(case.dtype).float()
    return (total if by_rank[0][2] is None else total + by_rank[0][2].float()).to(case.dtype)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.why)
def test_bit_for_bit_over_many_calls(case):
    assert slot_bytes(case.M, case.N, case.tile_rows) <= SLOT_BYTES
    group = DecodeGroup(case.world_size)
    for seed in range(5):
        by_rank = operands(case, seed)
        assert_same_bits(group.gemm(case, by_rank), expected(case, by_rank))


@pytest.mark.parametrize("start", Start, ids=lambda start: start.name)
def test_calls_of_both_kernels_share_buffers_and_may_follow_each_other_closely(start):
    """Between calls on a stream lies what `start` says: the next may begin under the end of the one before."""
    cases = [Case(16, 1024, 512, "a"), Case(1, 512, 2048, "b", splits=2), Case(64, 1024, 256, "c", tile_rows=128)]
    group = DecodeGroup(2)
    work = [(case, operands(case, seed)) for seed, case in enumerate(cases * 4)]
    xs = inputs(2, 70000, BF16, seed=3)
    gemm_outs = [[torch.full((c.M, c.N), torch.nan, dtype=c.dtype, device="cuda") for _ in range(2)] for c, _ in work]
    sum_outs = [[torch.full_like(x, torch.nan) for x in xs] for _ in work]
    torch.cuda.synchronize()
    for rank in range(2):
        for i, (case, by_rank) in enumerate(work):
            group.enqueue_gemm(case, rank, by_rank[rank], gemm_outs[i][rank], start)
            if i % 3 == 2:
                group.enqueue(rank, xs[rank], sum_outs[i][rank])
    torch.cuda.synchronize()
    group.expect_no_failure()
    for i, (case, by_rank) in enumerate(work):
        assert_same_bits(gemm_outs[i], expected(case, by_rank))
        if i % 3 == 2:
            assert_same_bits(sum_outs[i], rank_order_sum(xs))


def test_what_the_kernel_before_writes_is_read_after_it():
    """`a` is the output of the call before, which is launched so that the next begins under it."""
    case = Case(8, 512, 512, "a chain", bias=False)
    group = DecodeGroup(2)
    by_rank = operands(case, 1)
    eye = torch.eye(512, device="cuda", dtype=BF16)
    passing = [torch.full((8, 512), torch.nan, dtype=BF16, device="cuda") for _ in range(2)]
    outs = [torch.full((8, 512), torch.nan, dtype=BF16, device="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    for rank, (a, _, _) in enumerate(by_rank):
        for _ in range(3):  # twice the sum of the ranks' a after each, from a again
            group.enqueue_gemm(case, rank, (a, eye, None), passing[rank], Start.WEIGHTS_AHEAD)
            group.enqueue_gemm(case, rank, (passing[rank], eye, None), outs[rank], Start.WEIGHTS_AHEAD)
    torch.cuda.synchronize()
    group.expect_no_failure()
    assert_same_bits(outs, 2 * (by_rank[0][0] + by_rank[1][0]))


@pytest.mark.parametrize("late", range(3))
def test_a_late_rank_is_waited_for(late):
    case = Case(16, 1024, 512, "", world_size=3, splits=2)
    group = DecodeGroup(3)
    for seed in range(4):
        by_rank = operands(case, seed)
        assert_same_bits(group.gemm(case, by_rank, late=late), expected(case, by_rank))


def test_graphs_replay_any_number_of_times_with_other_calls_between():
    case = Case(16, 1024, 1024, "", splits=2)
    group = DecodeGroup(2)
    by_rank = operands(case, 0)
    outs = [torch.full((case.M, case.N), torch.nan, dtype=case.dtype, device="cuda") for _ in range(2)]
    graph, fork = torch.cuda.CUDAGraph(), torch.cuda.Event()
    group.gemm(case, by_rank)
    with torch.cuda.graph(graph):  # each rank's calls lie on its own branch
        fork.record()
        for rank, member in enumerate(group.ranks):
            member.stream.wait_event(fork)
            for _ in range(2):
                group.enqueue_gemm(case, rank, by_rank[rank], outs[rank], Start.WEIGHTS_AHEAD)
            join = torch.cuda.Event()
            join.record(member.stream)
            torch.cuda.current_stream().wait_event(join)
    for replay in range(5):
        for (a, _, _), (fresh, _, _) in zip(by_rank, operands(case, replay + 1), strict=True):
            a.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        group.expect_no_failure()
        assert_same_bits(outs, expected(case, by_rank))
        if replay % 2:
            xs = inputs(2, 8192, BF16, seed=replay)
            assert_same_bits(group.all_reduce(xs), rank_order_sum(xs))


def test_negative_zeros_and_nans():
    """A partial that is -0.0 is no sentinel; a NaN in one rank's a is NaN in that row and nowhere else."""
    case = Case(4, 512, 64, "", bias=False)
    group = DecodeGroup(2)
    by_rank = operands(case, 0)
    for a, b, _ in by_rank:
        a[0], b[:] = -(2.0**-80), 2.0**-80  # the product rounds to -0.0
    by_rank[1][0][2, 5] = torch.nan
    for out in group.gemm(case, by_rank):
        assert not (out[0].view(torch.int16)).any(), "+0.0, whatever the signs"
        assert out[2].isnan().all() and not out[[0, 1, 3]].isnan().any()


def run_alone(group: DecodeGroup, rank: int, call_hashes: dict[int, int]) -> torch.Tensor:
    """Only the ranks of `call_hashes` call. Returns the output of `rank`."""
    case = Case(16, 1000, 256, "", world_size=len(group.ranks), splits=2)
    by_rank = operands(case, 0)
    outs = [torch.zeros((case.M, case.N), dtype=case.dtype, device="cuda") for _ in by_rank]
    torch.cuda.synchronize()
    for caller, call_hash in call_hashes.items():
        group.enqueue_gemm(case, caller, by_rank[caller], outs[caller], call_hash=call_hash)
    torch.cuda.synchronize()
    return outs[rank]


def test_a_peer_that_never_comes_is_named_and_the_output_is_nan():
    group = DecodeGroup(2, timeout_s=0.1)
    out = run_alone(group, 1, {1: 9})
    record = group.ranks[1].record
    assert out.isnan().all()
    assert [record[i] for i in (STATE, CODE, OP, RANK, PEER)] == [2, TIMEOUT, 1, 1, 0]
    assert record[WANTED] == (1 << 16 | 9)
    assert group.ranks[1].control[FAILED] == 1


def test_a_failed_group_touches_no_peer_and_returns_nan_at_once():
    group = DecodeGroup(2, timeout_s=0.1)
    run_alone(group, 0, {0: 9})
    peer_before = group.ranks[1].arena.clone()
    assert run_alone(group, 0, {0: 9}).isnan().all()
    assert torch.equal(group.ranks[1].arena, peer_before)


def test_ranks_that_call_different_things_are_named_and_store_no_sum():
    group = DecodeGroup(2)
    out = run_alone(group, 0, {0: 9, 1: 8})
    record = group.ranks[0].record
    assert out.isnan().all()
    assert [record[i] for i in (STATE, CODE, PEER)] == [2, MISMATCH, 1]


def test_the_host_ends_a_wait():
    group = DecodeGroup(2, timeout_s=0)
    group.ranks[0].record[ABORT] = 1
    assert run_alone(group, 0, {0: 9}).isnan().all()
    assert group.ranks[0].record[CODE] == ABORTED
