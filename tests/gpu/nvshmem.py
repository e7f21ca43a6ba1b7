"""store="nvshmem" on devices: the bits of torch's store, many lives, failures, an NVSHMEM of the application's own.

Needs nvshmem4py-cu13 of 0.4 (with cuda-core, cuda-bindings, cuda-pathfinder), beside the NVSHMEM that torch brings. A
rank has a GPU for itself: with several PEs on one NVSHMEM promises less.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16, Case
from tests.gpu import mixtures, norms
from tests.ops.calls import Call, group_name
from tests.ops.norms import CPU_PLANS as NORM_OPS
from tests.ops.norms import GEMM, call_of
from tests.ops.norms import invoke as invoke_norm
from tp_overlap_kernels.dispatch.problem import PLAN_NAMES
from tp_overlap_kernels.memory import arena as arenas

MAX_M, MAX_N = 2048, 8192
LIVES = 10
HEAP_PIECE_BYTES = 512 << 20  # of NVSHMEM's, which a life that is not given back would hold
SIZES = [(1, 8192, 1024), (16, 4096, 136), (33, 1000, 41), (600, 2048, 512), (2048, 1024, 256)]  # M, N, K


@contextlib.contextmanager
def arena_in(store: str) -> Iterator[None]:
    """Where another arena was; none is left."""
    tpo.close()
    assert tpo.init(max_M=MAX_M, max_N=MAX_N, store=store).store == store
    yield
    torch.cuda.synchronize()
    tpo.check()
    tpo.close()


def is_up() -> bool:
    """Whether NVSHMEM is initialised in this process."""
    import nvshmem.core as core

    return core.init_status() >= core.InitStatus.STATUS_IS_INITIALIZED


def every_plan(world_size: int) -> list[Call]:
    """Each op without a norm, by each plan that can run it here, on sizes from one row to many."""
    calls = []
    for op in (op for op in PLAN_NAMES if op not in NORM_OPS):
        for M, N, K in SIZES:
            sizes = (1, M * N, 0) if op == "all_reduce" else (M, N, K)
            case = Case(*sizes, BF16, world_size, "")
            calls += [Call(op, case, plan=plan) for plan in mixtures.plans_for(Call(op, case))]
    return calls


def results_of_sums(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    calls = [*every_plan(world_size), *mixtures.mixture(world_size, 31, 160)]
    made = mixtures.make(rank, calls, mixtures.on_device(rank, calls))
    return {f"{i} {call}": out for i, (call, out) in enumerate(zip(calls, made, strict=True))}


def results_of_norms(rank: int, world_size: int) -> dict[str, torch.Tensor]:
    made = {}
    for op in NORM_OPS:
        for M, H in ((1, 8192), (16, 4096), (5, 5120), (300, 264)):
            case = Case(M, H, 136 * (op == GEMM), FP16 if M == 5 else BF16, world_size, "")
            for plan in norms.plans_for(call_of(op, case), M):
                call = call_of(op, case, plan=plan)
                tensors = norms.on_device(call, rank)
                with tpo.force_plan(plan):
                    made[f"{call} y"], made[f"{call} new_residual"] = invoke_norm(call, tensors, rank)
    return made


def every_op_and_plan_gives_the_bits_of_torchs_store(rank: int, world_size: int) -> None:
    if world_size > torch.cuda.device_count():
        return
    by_store = {}
    for store in ("symm_mem", "nvshmem"):
        with arena_in(store):
            by_store[store] = results_of_sums(rank, world_size) | results_of_norms(rank, world_size)
    expected, found = by_store["symm_mem"], by_store["nvshmem"]
    assert expected.keys() == found.keys(), "a store has plans that the other has not"
    bits = torch.int16
    different = [name for name, x in found.items() if not torch.equal(x.view(bits), expected[name].view(bits))]
    assert not different, f"{len(different)} of {len(found)}: {different[:8]}"


def graphs_replay_in_it(rank: int, world_size: int) -> None:
    if world_size > torch.cuda.device_count():
        return
    with arena_in("nvshmem"):
        mixtures.graphs_of_any_plans(rank, world_size)


def many_lives(rank: int, world_size: int) -> None:
    """init, calls, close, ten times: NVSHMEM ends with each, and gives its memory back."""
    if world_size > torch.cuda.device_count():
        return
    free = []
    for life in range(LIVES):
        with arena_in("nvshmem"):
            mixtures.call_and_judge(rank, world_size, mixtures.mixture(world_size, 40 + life, 8))
            assert is_up()
        assert not is_up(), f"life {life}"
        torch.cuda.empty_cache()
        dist.barrier()  # memory is free when the last rank has unmapped it
        free.append(torch.cuda.mem_get_info()[0])
    assert min(free) >= free[0] - HEAP_PIECE_BYTES // 2, f"free bytes after each life: {free}"


def a_rank_that_fails_leaves_nobody_in_a_free(rank: int, world_size: int) -> None:
    """The last rank never calls; the others give up; all close, and begin anew in the same NVSHMEM."""
    if world_size > torch.cuda.device_count():
        return
    tpo.close()
    tpo.init(max_M=MAX_M, max_N=MAX_N, store="nvshmem")
    arenas.get(group_name()).timeout_s = 2.0
    if rank != world_size - 1:
        x = torch.ones(64, 512, device="cuda", dtype=BF16)
        with contextlib.suppress(tpo.GroupFailed):
            torch.ops.tp_overlap.all_reduce(x, group_name())
            torch.cuda.synchronize()
            tpo.check()
            raise AssertionError("the wait was met")
    tpo.close()
    assert is_up(), "NVSHMEM was finalised, though not every rank knew"
    dist.barrier()
    with arena_in("nvshmem"):
        mixtures.call_and_judge(rank, world_size, mixtures.mixture(world_size, 60, 20))
    assert not is_up(), "what was left is not free"


def the_applications_nvshmem_is_its_own(rank: int, world_size: int) -> None:
    """Rank r is PE W-1-r of a world that was there before; its tensors and its life are not ours."""
    if world_size > torch.cuda.device_count():
        return
    import nvshmem.core as core
    from cuda.core import Device

    tpo.close()
    os.environ.setdefault("NVSHMEM_DISABLE_NVLS", "1")
    unique_id = [core.get_unique_id() if rank == 0 else core.get_unique_id(empty=True)]
    dist.broadcast_object_list(unique_id, src=0)
    device = Device(torch.cuda.current_device())
    device.set_current()
    pe = world_size - 1 - rank
    core.init(device=device, uid=unique_id[0], rank=pe, nranks=world_size, initializer_method="uid")
    own = core.bytetensor((4096,))
    own.fill_(rank)
    for seed in range(2):
        with arena_in("nvshmem"):
            mixtures.call_and_judge(rank, world_size, mixtures.mixture(world_size, 70 + seed, 40))
    assert is_up() and (core.my_pe(), core.n_pes()) == (pe, world_size)
    peer = core.get_peer_tensor(own, (pe + 1) % world_size)  # that of the rank before this one
    assert bool((own == rank).all()) and bool((peer == (rank - 1) % world_size).all())
    torch.cuda.synchronize()
    dist.barrier()
    core.free_tensor(own)
    core.finalize()


CHECKS = (
    every_op_and_plan_gives_the_bits_of_torchs_store,
    graphs_replay_in_it,
    many_lives,
    a_rank_that_fails_leaves_nobody_in_a_free,
    the_applications_nvshmem_is_its_own,
)
