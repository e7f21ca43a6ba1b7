"""The CUDA GEMMs that sum over ranks, on one GPU: the ranks are streams of this process, their arenas plain tensors.

What it cannot show is the link between GPUs; tests/gpu runs the same kernels there, through the public ops.
"""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch

from tests import inputs, truth
from tests.cases import BF16, FP16, Case
from tests.tolerance import check, check_bits, tolerance
from tp_overlap_kernels import native
from tp_overlap_kernels.bench.timeline import intervals_of
from tp_overlap_kernels.kernels.gemm_collectives import SCHEDULES, TRACE_ROLES, TRACE_WORDS, GemmCollectiveLauncher
from tp_overlap_kernels.kernels.start import Start
from tp_overlap_kernels.memory.layout import layout

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device of compute capability 9.0"),
    pytest.mark.skipif(not native.available(), reason="needs libtpo_kernels.so: install the package where nvcc is"),
]

SCATTER, SUM = ("sm90", "gemm_reduce_scatter"), ("sm90", "gemm_all_reduce")
ADDS = ("sm90_add", "gemm_reduce_scatter"), ("sm90_add", "gemm_all_reduce")  # two ranks alone
OPS = (SCATTER, SUM, *ADDS)  # plan and op
SUMS = (SUM, ADDS[1])
KERNELS = [(op, cut) for op in OPS for cut in SCHEDULES[op]]
EVERY = [(op, cut, lead) for (op, cut), lead in itertools.product(KERNELS, (0, 1, 3))]
# Bytes of a piece (some of a tile, all of it, such as do not divide it) and how many blocks send at a time.
WAYS = ((4096, 0), (1 << 16, 1), (4112, 3))
DATA = 5  # sets of operands that the calls of a row take in turn: what an older call left is other data
CODES = {BF16: 0, FP16: 1}
EPOCH, FAILED = 0, 4  # words of control
ABORT, STATE, CODE, OP, RANK, PEER, WANTED = 0, 1, 2, 3, 4, 5, 7  # words of the record
TIMEOUT, MISMATCH, ABORTED = 1, 2, 3
CLOCKS_PER_MS = 1_500_000
CASES = [
    (512, 256, 64, BF16, "one tile or two a rank"),
    (1, 8, 8, BF16, "one row"),
    (77, 264, 40, FP16, "less than a tile each way"),
    (1000, 1000, 72, BF16, "ragged"),
    (2051, 1032, 328, BF16, "nothing divides a tile"),
    (2048, 2048, 1024, FP16, "several tiles a block"),
    (300, 520, 3696, FP16, "long K"),
]


@dataclasses.dataclass
class Rank:
    arena: torch.Tensor
    control: torch.Tensor
    record: torch.Tensor
    stream: torch.cuda.Stream
    launch: dict[tuple[str, str], GemmCollectiveLauncher]


class Group:
    """Every rank of a group, each on its own stream with its share of the SMs, or with `blocks` of them."""

    def __init__(self, world_size: int, timeout_s: float = 5.0, blocks: int = 0):
        self.room = layout(4096, 2304, 2, world_size)
        sms = torch.cuda.get_device_properties(0).multi_processor_count
        # Half of the GPU: those of all ranks must be on it at a time, in clusters of two and of four.
        self.blocks = blocks or sms // world_size // 8 * 4
        arenas = [torch.zeros(self.room.total_bytes, dtype=torch.uint8, device="cuda") for _ in range(world_size)]
        for arena in arenas:
            arena[self.room.staging :] = 0xFF  # NaN
        self.bases = torch.tensor([arena.data_ptr() for arena in arenas], dtype=torch.int64, device="cuda")
        self.ranks = [self._rank(r, arena, int(timeout_s * 1e9)) for r, arena in enumerate(arenas)]
        torch.cuda._sleep(1)  # loaded now: CUDA loads a kernel at its first launch, which may wait for those that run
        torch.cuda.synchronize()

    def _rank(self, rank: int, arena: torch.Tensor, timeout_ns: int) -> Rank:
        control = torch.zeros(64, dtype=torch.int64, device="cuda")
        record = torch.zeros(16, dtype=torch.int64).pin_memory()
        room = self.room
        launch = {
            op: GemmCollectiveLauncher(
                *op,
                base_table_ptr=self.bases.data_ptr(),
                control_ptr=control.data_ptr(),
                record_ptr=record.data_ptr(),
                header_offset=room.header,
                done_offset=room.done,
                partial_flags_offset=room.partial_flags,
                result_flags_offset=room.result_flags,
                tile_slots=room.tile_slots,
                staging_offset=room.staging,
                staging_slot_bytes=room.staging_slot_bytes,
                result_offset=room.result,
                result_bytes=room.total_bytes - room.result,
                timeout_ns=timeout_ns,
                rank=rank,
                world_size=self.bases.numel(),
                blocks=self.blocks,
            )
            for op in OPS
        }
        return Rank(arena, control, record, torch.cuda.Stream(), launch)

    def enqueue(
        self,
        rank: int,
        op: tuple[str, str],
        cut: tuple[int, ...],
        a,
        b,
        bias,
        out,
        call_hash=7,
        lead: int = 0,
        way=(4096, 0),
    ) -> None:
        (M, K), N, member = a.shape, b.shape[0], self.ranks[rank]
        bias_ptr = 0 if bias is None else bias.data_ptr()
        member.launch[op](
            *(a.data_ptr(), b.data_ptr(), bias_ptr, out.data_ptr(), M, N, K, a.stride(0), b.stride(0), CODES[a.dtype]),
            *(SCHEDULES[op][cut], 3, lead, *way, call_hash, Start.IN_ORDER, member.stream.cuda_stream),
        )

    def expect_no_failure(self) -> None:
        for rank, member in enumerate(self.ranks):
            assert member.record[STATE] == 0, f"rank {rank} failed: {member.record.tolist()}"


def those_of(world_size: int, calls: list) -> list:
    """Without the kernels of two ranks, for another number."""
    return [call for call in calls if world_size == 2 or call[0] not in ADDS]


def with_bias_in_product(part: truth.Truth, bias: torch.Tensor) -> truth.Truth:
    """Where the L2 cache adds, rank 0 rounds its product with the bias."""
    partials = part.partials.clone()
    partials[0] += bias.double()
    return dataclasses.replace(part, partials=partials)


def play(
    group: Group,
    case: Case,
    calls: list[tuple[tuple[str, str], tuple[int, ...], int]],
    kind: str,
    with_bias: bool,
    late: int | None = None,
):
    """The calls in a row on every rank, nothing between them; all are judged. calls: op, key of SCHEDULES[op], lead."""
    W = case.world_size
    operands = [[tuple(x.cuda() for x in inputs.operands(case, r, kind, i)) for r in range(W)] for i in range(DATA)]
    biases = [inputs.bias(case, i, "cuda") if with_bias else None for i in range(DATA)]
    exacts = [truth.gemm_all_reduce(case, kind, i, with_bias, "cuda") for i in range(min(DATA, len(calls)))]
    outs = []
    for op, _, _ in calls:
        rows = [case.M if op in SUMS else case.rows_of(r).stop - case.rows_of(r).start for r in range(W)]
        outs.append([torch.full((n + 1, case.N), torch.nan, dtype=case.dtype, device="cuda") for n in rows])
    torch.cuda.synchronize()
    for rank in range(W):
        if rank == late:
            with torch.cuda.stream(group.ranks[rank].stream):
                torch.cuda._sleep(5 * CLOCKS_PER_MS)
        for i, ((op, cut, lead), out) in enumerate(zip(calls, outs, strict=True)):
            a, b = operands[i % DATA][rank]
            way = WAYS[i % len(WAYS)]
            group.enqueue(rank, op, cut, a, b, biases[i % DATA], out[rank], lead=lead, way=way)
    torch.cuda.synchronize()
    group.expect_no_failure()
    for i, ((op, cut, lead), out) in enumerate(zip(calls, outs, strict=True)):
        exact = exacts[i % DATA]
        for rank in range(W):
            part = exact if op in SUMS else exact.rows(case.rows_of(rank))
            if with_bias and op in ADDS:
                part = with_bias_in_product(part, biases[i % DATA])
            what = f"call {i}, {' '.join(op)}, kernel {cut}, lead {lead}, rank {rank}"
            got, around = out[rank][:-1], out[rank][-1]
            check_bits(got, part, what) if kind == "integer" else check(got, part, tolerance(part), what)
            assert around.isnan().all(), f"{what}: a row past the end was written"
            if op in SUMS:
                assert torch.equal(got.view(torch.int16), out[0][:-1].view(torch.int16)), f"{what}: other bits"


@pytest.mark.parametrize("case", [Case(*row[:4], 0, row[4]) for row in CASES], ids=str)
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_sums_are_right_in_any_order_of_calls(world_size, case, with_bias):
    case = dataclasses.replace(case, world_size=world_size)
    group, every = Group(world_size), those_of(world_size, EVERY)
    play(group, case, [*every, *every[::-1], every[0], every[-1]], "normal", with_bias)
    play(group, case, [*every[::-1], *every], "integer", with_bias)
    assert all(member.control[EPOCH] == 4 * len(every) + 2 for member in group.ranks)


@pytest.mark.parametrize("cut", list(SCHEDULES[SCATTER]))
def test_a_rank_without_rows_hears_from_every_peer_and_they_from_it(cut):
    W, case = 4, Case(1, 64, 64, BF16, 4, "fewer rows than ranks")
    group = Group(W)
    play(group, case, [(SCATTER, cut, 0)], "normal", False)
    for rank, member in enumerate(group.ranks):
        flags = member.arena[group.room.partial_flags :][: 8 * W].view(torch.int64)  # of the first tile, by source
        assert [bool(word >> 16) for word in flags.tolist()] == [source != rank for source in range(W)]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("blocks", [2, 4])
def test_one_cluster_a_rank_is_enough(world_size, blocks):
    case = Case(1300, 1000, 136, BF16, world_size, "more tiles than blocks")
    small = [(op, cut, lead) for op, cut, lead in EVERY if SCHEDULES[op][cut].blocks <= blocks]
    play(Group(world_size, blocks=blocks), case, those_of(world_size, small), "normal", True)


@pytest.mark.parametrize("late", range(3))
def test_a_late_rank_is_waited_for(late):
    group, case = Group(3), Case(900, 512, 128, BF16, 3, "three ranks")
    for _ in range(3):
        play(group, case, those_of(3, [(op, cut, 1) for op, cut in KERNELS]), "normal", False, late)


@pytest.mark.parametrize("late", range(2))
def test_a_late_rank_of_two_is_waited_for(late):
    group, case = Group(2), Case(900, 512, 128, BF16, 2, "two ranks")
    for _ in range(3):
        play(group, case, [(op, cut, 0) for op, cut in KERNELS * 2], "normal", True, late)


@pytest.mark.parametrize(("op", "cut"), KERNELS)
def test_a_traced_call_gives_the_same_and_tells_of_every_tile(op, cut):
    """The order of steps within a thread, and as many products as there are tiles of a cluster of two."""
    group, case = Group(2), Case(1024, 512, 640, BF16, 2, "traced")
    room, blocks = 64, group.blocks
    shape = (blocks, len(TRACE_ROLES), room, TRACE_WORDS)
    traces = [torch.zeros(shape, dtype=torch.int32, device="cuda") for _ in range(2)]
    for member, trace in zip(group.ranks, traces, strict=True):
        member.launch[op].trace(trace.data_ptr(), room)
    play(group, case, [(op, cut, 1)] * 3, "normal", True)
    for trace in traces:
        intervals = intervals_of(trace)
        multiplied = [(each.owner, each.tile) for each in intervals if each.step == "multiply"]
        assert len(set(multiplied)) == len(multiplied) == 1024 * 512 // (128 * cut[0])
        for role in TRACE_ROLES:
            for block in range(blocks):
                some = [each for each in intervals if (each.block, each.role) == (block, role)]
                assert all(one.begin_ns <= one.end_ns == two.begin_ns for one, two in itertools.pairwise(some))
        copied = dict(zip(OPS, (0, 0.5, 0.5, 1), strict=True))[op]
        assert sum(each.step == "copy" for each in intervals) == len(multiplied) * copied


def run_alone(
    group: Group, op: tuple[str, str], cut: tuple[int, ...], call_hashes: dict[int, int]
) -> list[torch.Tensor]:
    """Only the ranks of `call_hashes` call."""
    case = Case(512, 256, 64, BF16, len(group.ranks), "alone")
    rows = {r: case.M if op in SUMS else 256 for r in call_hashes}
    outs = {r: torch.zeros(rows[r], case.N, dtype=BF16, device="cuda") for r in call_hashes}
    ab = [tuple(x.cuda() for x in inputs.operands(case, r)) for r in range(len(group.ranks))]
    torch.cuda.synchronize()
    for caller, call_hash in call_hashes.items():
        group.enqueue(caller, op, cut, *ab[caller], None, outs[caller], call_hash)
    torch.cuda.synchronize()
    return list(outs.values())


@pytest.mark.parametrize(("op", "cut"), KERNELS)
def test_a_peer_that_never_comes_is_named_and_the_output_is_nan(op, cut):
    group = Group(2, timeout_s=0.1)
    (out,) = run_alone(group, op, cut, {1: 7})
    record = group.ranks[1].record
    assert out.isnan().all()
    assert [record[i] for i in (STATE, CODE, OP, RANK, PEER)] == [2, TIMEOUT, 1 if op in SUMS else 2, 1, 0]
    assert record[WANTED] == (1 << 16 | 7)
    assert group.ranks[1].control[FAILED] == 1


@pytest.mark.parametrize(("op", "cut"), KERNELS)
def test_a_failed_group_touches_no_peer_and_returns_nan_at_once(op, cut):
    group = Group(2, timeout_s=0.1)
    run_alone(group, op, cut, {0: 7})
    peer = group.ranks[1].arena
    before = peer.clone()
    (out,) = run_alone(group, op, cut, {0: 7})
    assert out.isnan().all() and torch.equal(peer, before)


@pytest.mark.parametrize(("op", "cut"), KERNELS)
def test_ranks_that_call_different_things_are_named_and_store_no_sum(op, cut):
    group = Group(2)
    outs = run_alone(group, op, cut, {0: 7, 1: 8})
    record = group.ranks[0].record
    assert all(out.isnan().any() for out in outs)
    assert [record[i] for i in (STATE, CODE, PEER)] == [2, MISMATCH, 1]


@pytest.mark.parametrize(("op", "cut"), KERNELS)
def test_the_host_ends_a_wait(op, cut):
    group = Group(2, timeout_s=0)
    group.ranks[0].record[ABORT] = 1
    (out,) = run_alone(group, op, cut, {0: 7})
    assert out.isnan().all() and group.ranks[0].record[CODE] == ABORTED
