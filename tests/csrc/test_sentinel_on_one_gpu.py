"""The sentinel kernel on one GPU: the ranks are streams of this process, their arenas plain tensors of the same device.

What it cannot show is the link between GPUs; tests/ops runs the same kernel there, through the public op.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.values import assert_sum, in_order, shuffled_patterns
from tp_overlap_kernels import native
from tp_overlap_kernels.kernels.all_reduce_one_shot_sentinel import BF16, FP16, SentinelLauncher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device of compute capability 9.0"),
    pytest.mark.skipif(not native.available(), reason="needs libtpo_kernels.so: install the package where nvcc is"),
]

SLOT_BYTES = 256 << 10
SENTINEL = -0x7FFF8000  # 0x80008000 as int32
CODES = {torch.bfloat16: BF16, torch.float16: FP16}
PADS_BYTES = 4096
DONE, HEADER = 0, 1024
EPOCH, FAILED = 0, 4  # words of control
ABORT, STATE, CODE, OP, RANK, PEER, WANTED = 0, 1, 2, 3, 4, 5, 7  # words of the record
TIMEOUT, MISMATCH, ABORTED = 1, 2, 3
CLOCKS_PER_MS = 1_500_000


@dataclasses.dataclass
class Rank:
    arena: torch.Tensor
    control: torch.Tensor
    record: torch.Tensor
    stream: torch.cuda.Stream
    launch: SentinelLauncher


class Group:
    """Every rank of a group, each on its own stream."""

    def __init__(self, world_size: int, timeout_s: float = 5.0, data_threads: int = 0):
        words = (PADS_BYTES + 3 * world_size * SLOT_BYTES) // 4
        arenas = [torch.full((words,), SENTINEL, dtype=torch.int32, device="cuda") for _ in range(world_size)]
        for arena in arenas:
            arena[: PADS_BYTES // 4] = 0
        self.bases = torch.tensor([arena.data_ptr() for arena in arenas], dtype=torch.int64, device="cuda")
        self.ranks = [self._rank(r, arena, int(timeout_s * 1e9), data_threads) for r, arena in enumerate(arenas)]
        torch.cuda._sleep(1)  # loaded now: CUDA loads a kernel at its first launch, which may wait for those that run
        torch.cuda.synchronize()

    def _rank(self, rank: int, arena: torch.Tensor, timeout_ns: int, data_threads: int) -> Rank:
        control = torch.zeros(64, dtype=torch.int64, device="cuda")
        record = torch.zeros(16, dtype=torch.int64).pin_memory()
        launch = SentinelLauncher(
            base_table_ptr=self.bases.data_ptr(),
            control_ptr=control.data_ptr(),
            record_ptr=record.data_ptr(),
            sentinel_offset=PADS_BYTES,
            sentinel_bytes=SLOT_BYTES,
            header_offset=HEADER,
            done_offset=DONE,
            rank=rank,
            world_size=self.bases.numel(),
            timeout_ns=timeout_ns,
            data_threads=data_threads,
        )
        return Rank(arena, control, record, torch.cuda.Stream(), launch)

    def enqueue(self, rank: int, x: torch.Tensor, out: torch.Tensor, call_hash: int = 7) -> None:
        member = self.ranks[rank]
        member.launch(x.data_ptr(), out.data_ptr(), x.numel(), CODES[x.dtype], call_hash, member.stream.cuda_stream)

    def all_reduce(self, xs: list[torch.Tensor], offset: int = 0, late: int | None = None) -> list[torch.Tensor]:
        """One call on every rank; outputs start `offset` elements into a NaN-filled tensor."""
        outs = [torch.full((x.numel() + offset,), torch.nan, dtype=x.dtype, device="cuda")[offset:] for x in xs]
        torch.cuda.synchronize()
        for rank, (x, out) in enumerate(zip(xs, outs, strict=True)):
            if rank == late:
                with torch.cuda.stream(self.ranks[rank].stream):
                    torch.cuda._sleep(5 * CLOCKS_PER_MS)
            self.enqueue(rank, x, out)
        torch.cuda.synchronize()
        self.expect_no_failure()
        return outs

    def expect_no_failure(self) -> None:
        for rank, member in enumerate(self.ranks):
            assert member.record[STATE] == 0, f"rank {rank} failed: {member.record.tolist()}"


def inputs(world_size: int, n: int, dtype: torch.dtype, seed: int, offset: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    draw = [torch.randn(n + offset, generator=generator, device="cuda").to(dtype)[offset:] for _ in range(world_size)]
    for x in draw:
        x[3::5] = -0.0  # not the first: a norm of nothing but zeros would tell nothing
    return draw


def rank_order_sum(xs: list[torch.Tensor]) -> torch.Tensor:
    total = xs[0].float() + 0.0
    for x in xs[1:]:
        total = total + (x.float() + 0.0)
    return total.to(xs[0].dtype)


def assert_same_bits(outs: list[torch.Tensor], expected: torch.Tensor) -> None:
    for rank, out in enumerate(outs):
        assert torch.equal(out.view(torch.int16), expected.view(torch.int16)), f"rank {rank}"


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("world_size", range(1, 9))
def test_sum_in_rank_order_bit_for_bit_over_many_calls(world_size, dtype):
    group = Group(world_size)
    lengths = [1, 7, 8, 9, 2048, 4099, 131072, 16, 8192, 131071, 3, 65536]  # the buffers change hands at every length
    for call, n in enumerate(lengths * 2):
        xs = inputs(world_size, n, dtype, seed=call)
        assert_same_bits(group.all_reduce(xs), rank_order_sum(xs))
    assert all(member.control[EPOCH] == 2 * len(lengths) for member in group.ranks)


@pytest.mark.parametrize("dtype", CODES, ids=str)
@pytest.mark.parametrize("world_size", [2, 3, 8])
def test_every_bit_pattern_is_data(world_size, dtype):
    """No word of data is taken for the sentinel: 0x8000, half of it, counts as +0.0, whatever stands beside it."""
    group = Group(world_size)
    shuffled = [shuffled_patterns(rank, dtype).cuda() for rank in range(world_size)]
    negative = torch.full_like(shuffled[0], -0.0)
    alternating = torch.stack([shuffled[0], negative], 1).flatten()  # beside every pattern a negative zero
    silent = [torch.zeros_like(alternating)] * (world_size - 1)
    for xs in (shuffled, [negative] * world_size, [alternating, *silent], [*silent, alternating.flip(0)]):
        expected = in_order([x.cpu() for x in xs])
        outs = group.all_reduce(xs)
        for rank, out in enumerate(outs):
            assert_sum(out.cpu(), expected, f"rank {rank}")
        assert_same_bits(outs, outs[0])


@pytest.mark.parametrize("data_threads", [32, 128, 512])
def test_any_block_size_gives_the_same_sum(data_threads):
    group = Group(4, data_threads=data_threads)
    for call in range(4):
        xs = inputs(4, 20000, torch.bfloat16, seed=call)
        assert_same_bits(group.all_reduce(xs), rank_order_sum(xs))


def test_pointers_need_no_alignment():
    group = Group(2)
    for offset in (1, 3, 8):
        xs = inputs(2, 1000, torch.bfloat16, seed=offset, offset=offset)
        assert_same_bits(group.all_reduce(xs, offset=offset), rank_order_sum(xs))


def test_out_may_be_x():
    group = Group(3)
    for call in range(3):
        xs = inputs(3, 5000, torch.float16, seed=call)
        expected = rank_order_sum(xs)
        torch.cuda.synchronize()
        for rank, x in enumerate(xs):
            group.enqueue(rank, x, x)
        torch.cuda.synchronize()
        assert_same_bits(xs, expected)


@pytest.mark.parametrize("late", range(3))
def test_a_late_rank_is_waited_for(late):
    group = Group(3)
    for call in range(4):
        xs = inputs(3, 4096, torch.bfloat16, seed=call)
        assert_same_bits(group.all_reduce(xs, late=late), rank_order_sum(xs))


def test_graphs_replay_any_number_of_times_with_eager_calls_between():
    group, n = Group(2), 8192
    xs = inputs(2, n, torch.bfloat16, seed=0)
    outs = [torch.full_like(x, torch.nan) for x in xs]
    graph, fork = torch.cuda.CUDAGraph(), torch.cuda.Event()
    group.all_reduce(xs)
    with torch.cuda.graph(graph):  # each rank's calls lie on its own branch
        fork.record()
        for rank, member in enumerate(group.ranks):
            member.stream.wait_event(fork)
            for _ in range(2):
                group.enqueue(rank, xs[rank], outs[rank])
            join = torch.cuda.Event()
            join.record(member.stream)
            torch.cuda.current_stream().wait_event(join)
    for replay in range(5):
        for x, fresh in zip(xs, inputs(2, n, torch.bfloat16, seed=replay + 1), strict=True):
            x.copy_(fresh)
        graph.replay()
        torch.cuda.synchronize()
        group.expect_no_failure()
        assert_same_bits(outs, rank_order_sum(xs))
        if replay % 2:
            assert_same_bits(group.all_reduce(xs), rank_order_sum(xs))


def run_alone(group: Group, rank: int, call_hashes: dict[int, int]) -> torch.Tensor:
    """Only the ranks of `call_hashes` call. Returns the output of `rank`."""
    xs = inputs(len(group.ranks), 70000, torch.bfloat16, seed=1)
    outs = [torch.zeros_like(x) for x in xs]
    torch.cuda.synchronize()
    for caller, call_hash in call_hashes.items():
        group.enqueue(caller, xs[caller], outs[caller], call_hash)
    torch.cuda.synchronize()
    return outs[rank]


def test_a_peer_that_never_comes_is_named_and_the_output_is_nan():
    group = Group(2, timeout_s=0.1)
    out = run_alone(group, 1, {1: 7})
    record = group.ranks[1].record
    assert out.isnan().all()
    assert [record[i] for i in (STATE, CODE, OP, RANK, PEER)] == [2, TIMEOUT, 3, 1, 0]
    assert record[WANTED] == (1 << 16 | 7)
    assert group.ranks[1].control[FAILED] == 1


def test_a_failed_group_touches_no_peer_and_returns_nan_at_once():
    group = Group(2, timeout_s=0.1)
    run_alone(group, 0, {0: 7})
    peer_before = group.ranks[1].arena.clone()
    assert run_alone(group, 0, {0: 7}).isnan().all()
    assert torch.equal(group.ranks[1].arena, peer_before)


def test_ranks_that_call_different_things_are_named_and_store_no_sum():
    group = Group(2)
    out = run_alone(group, 0, {0: 7, 1: 8})
    record = group.ranks[0].record
    assert out.isnan().all()
    assert [record[i] for i in (STATE, CODE, PEER)] == [2, MISMATCH, 1]


def test_the_host_ends_a_wait():
    group = Group(2, timeout_s=0)
    group.ranks[0].record[ABORT] = 1
    assert run_alone(group, 0, {0: 7}).isnan().all()
    assert group.ranks[0].record[CODE] == ABORTED
