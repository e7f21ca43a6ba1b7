"""Other projects' cases on CPU ranks: interpreted at small sizes, with the reference at original ones where a CPU can.

On devices, at the original sizes: tests/gpu/peers.py.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.ops import calls as rank_side
from tests.ops.calls import Setup, cpu_plans
from tests.peers import cases, held
from tests.peers.cases import BF16, GEMMS, MAILBOX, SEQUENCES, SUMS, PeerCase, of_tokens
from tp_overlap_kernels.lang import signal

LARGEST_FOR_A_CPU = 1 << 30  # multiplications of a rank


@pytest.mark.parametrize("world_size", [2, 4])
def test_in_the_interpreter(ranks, world_size):
    ranks(world_size).run(all_cases, "interp", timeout=200)


@pytest.mark.parametrize("world_size", [2, 4])
def test_with_the_reference(ranks, world_size):
    ranks(world_size).run(all_cases, "ref", timeout=200)


def all_cases(rank, world_size, backend):
    rank_side.prepare_arena(Setup(max_M=512, max_N=1024))
    with tpo.cpu_backend(backend), torch.inference_mode():
        for peer in GEMMS + (SUMS if world_size == 2 or backend == "ref" else SUMS[::4]):
            M, N, K = peer.sizes
            original = backend == "ref" and M * N * max(K, 1) <= LARGEST_FOR_A_CPU and N <= 1024
            case = peer.on(world_size, original)
            plans = cpu_plans(peer.op, world_size) if backend == "interp" else ["ref"]
            for plan in plans:
                held.hold(peer, case, plan, rank, "cpu", calls=3 if world_size == 2 else 1)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("sequence", [MAILBOX, SEQUENCES, [(n, 16) for n in (1, 2, 32, 64, 65, 256)] * 4], ids=str)
def test_sums_of_changing_size_on_one_workspace(ranks, sequence, world_size):
    ranks(world_size).run(in_sequence, sequence)


def in_sequence(rank, world_size, sequence):
    rank_side.prepare_arena(Setup())
    peers = [of_tokens(*row) for row in sequence]
    with tpo.cpu_backend("interp"):
        held.layers_in_a_row(peers, cpu_plans("all_reduce", world_size), rank, world_size, "cpu")


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_the_mean_split_along_any_dimension(ranks, dim):
    for world_size in (2, 4):
        ranks(world_size).run(mean_split, dim)


def mean_split(rank, world_size, dim):
    rank_side.prepare_arena(Setup(max_M=512))
    for backend, plan in (("ref", "ref"), ("interp", "push"), ("interp", "unfused_push")):
        sizes = (8, 64, 16, 1024) if backend == "ref" else (8, 12, 16, 64)
        with tpo.cpu_backend(backend):
            held.scattered_average(dim, sizes, plan, rank, world_size, "cpu")


# --- lifetimes: PyTorch, test/distributed/test_symmetric_memory.py


def test_overlapping_groups_and_a_name_that_comes_again(ranks):
    """Groups that share ranks, made in one order and used in another; then all anew, as if nothing had been."""
    for sums in ranks(4).run(overlapping_groups):
        assert sums == [True] * len(sums) and len(sums) >= 6


def overlapping_groups(rank, world_size):
    """Whether each sum over each of this rank's groups is right, twice, with a close and another init in between."""
    tpo.close()
    members = [[0, 1, 2, 3], [0, 1], [2, 3], [1, 2], [0, 2, 3]]
    groups = [(ranks, dist.new_group(ranks)) for ranks in members]
    mine = [(ranks, group) for ranks, group in groups if rank in ranks]
    found = []
    with tpo.cpu_backend("interp"):
        for turn in range(2):
            for _, group in mine:
                tpo.init(group, max_M=16, max_N=64)
            for ranks, group in reversed(mine):
                for call in range(3):
                    x = torch.full((100,), float(rank + call + turn), dtype=BF16)
                    out = torch.ops.tp_overlap.all_reduce(x, group.group_name)
                    found.append(bool((out == sum(r + call + turn for r in ranks)).all()))
            for _, group in mine:
                tpo.close(group)
    dist.barrier()
    for _, group in mine:
        dist.destroy_process_group(group)
    return found


def test_pads_of_recycled_memory_are_clean(ranks):
    """Words of a group that is gone are no signals to the next: epochs begin again, and a late rank is waited for."""
    for right in ranks(2).run(many_short_lives):
        assert right


def many_short_lives(rank, world_size):
    right = []
    for life in range(12):
        tpo.close()
        tpo.init(max_M=16, max_N=64)
        with tpo.cpu_backend("interp"):
            for call in range(life % 4 + 1):
                x = torch.full((64,), float(rank + life + call), dtype=BF16)
                out = torch.ops.tp_overlap.all_reduce(x, rank_side.group_name())
                right.append(bool((out == 1 + 2 * (life + call)).all()))
    return all(right)


def test_a_result_outlives_its_group(ranks):
    for kept in ranks(2).run(result_after_close):
        assert (kept == 3).all()


def result_after_close(rank, world_size):
    rank_side.prepare_arena(Setup())
    with tpo.cpu_backend("interp"):
        out = torch.ops.tp_overlap.all_reduce(torch.full((1000,), rank + 1.0, dtype=BF16), rank_side.group_name())
    tpo.close()
    return out


# --- negative controls: what must fail does


def test_without_waiting_the_cases_fail(ranks):
    """FlashInfer, tests/comm/test_pcie_ipc_*.py: a protocol that is broken on purpose must give wrong results."""
    for noticed in ranks(2).run(without_waiting):
        assert noticed == {"one_shot": True, "two_shot": True}


def without_waiting(rank, world_size):
    noticed = {}
    peer = PeerCase(cases.SGLANG, cases.SUM, (1, 9000, 0), (1, 9000, 0), BF16, "0 to 15", 0.0, 0.0)
    for plan in ("one_shot", "two_shot"):
        rank_side.prepare_arena(Setup(jitter_s=0))
        with (
            tpo.cpu_backend("interp"),
            mock.patch.object(signal, "_poll", lambda *args: signal.OK.value),
            rank_side.jitter(0.01 if rank else 0.0),
        ):
            try:
                held.hold(peer, peer.on(2, True), plan, rank, "cpu", calls=4)
            except AssertionError:
                noticed[plan] = True
            dist.barrier()
        tpo.close()
    return noticed


def test_a_lost_rank_passes_at_a_peers_tolerance_and_not_at_ours(ranks):
    """Flux, test/python/gemm_rs/stress: normal data of 0.01 (rank + 1) at 2e-2 does not miss rank 0 at all."""
    peer = PeerCase(cases.FLUX, cases.RS, (64, 64, 1008), (64, 64, 1008), BF16, "flux", 2e-2, 2e-2)
    case = peer.on(2, True)
    wanted = held.truth(peer, case, "cpu")
    without_rank_0 = (wanted.ref - wanted.partials[0]).to(BF16)
    torch.testing.assert_close(without_rank_0.double(), wanted.ref, rtol=peer.rtol, atol=peer.atol)
    with pytest.raises(AssertionError, match="elements are wrong"):
        held.tolerance.check(without_rank_0, wanted, held.ours(peer, case, "push", wanted))
