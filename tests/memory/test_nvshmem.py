"""The store over NVSHMEM, on a stand-in for nvshmem4py that knows what NVSHMEM would hang or crash on."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.cases import BF16, Case
from tests.dist import barrier
from tests.memory.nvshmem_stand_in import BrokenContract, stand_in, start
from tests.ops import calls as rank_side
from tests.ops.calls import Call, cpu_plans
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.memory import nvshmem
from tp_overlap_kernels.memory import store as stores
from tp_overlap_kernels.memory.nvshmem import Card, check_wheel, check_worlds

CPU, NBYTES, TIMEOUT_S = torch.device("cpu"), 4096, 1.0


@contextlib.contextmanager
def a_process(**faults):
    """A stand-in, in a process that has no NVSHMEM yet; waits are short."""
    tpo.close()
    short = dataclasses.replace(nvshmem.settings(), timeout_s=TIMEOUT_S)
    with (
        mock.patch.object(nvshmem, "_here", nvshmem._Process()),
        mock.patch.object(nvshmem, "settings", lambda: short),
        mock.patch.dict(os.environ),
        stand_in(**faults) as core,
    ):
        yield core
        barrier()


def make(group=None):
    return stores.create("nvshmem", NBYTES, CPU, group or dist.group.WORLD)


def write_to_all(store, rank, world_size):
    """What each peer finds of each source, in the memory that NVSHMEM gave it."""
    barrier()
    for peer in range(world_size):
        store.peer_buffer(peer)[rank] = 10 * peer + rank
    barrier()
    return store.buffer[:world_size].tolist() == [10 * rank + source for source in range(world_size)]


# --- what it gives


def test_memory_of_a_world_that_the_store_makes(ranks):
    for calls, zeroed, arrived, own, nvls in ranks(3).run(make_and_close):
        assert calls == ["init", "malloc", "free", "finalize"]
        assert zeroed and arrived and own
        assert nvls == "1", "NVSHMEM would set up multicast"


def make_and_close(rank, world_size):
    with a_process() as core:
        os.environ.pop("NVSHMEM_DISABLE_NVLS", None)
        store = make()
        zeroed = store.buffer.numel() == NBYTES and not store.buffer.any()
        own = store.bases[rank] == store.buffer.data_ptr() and len(set(store.bases)) == world_size
        arrived = write_to_all(store, rank, world_size)
        for _ in range(2):
            store.close(together=True)
        assert store.buffer.numel() == 0 and not core.live
        return core.calls, zeroed, arrived, own, core.disable_nvls


def test_a_users_choice_about_multicast_stays(ranks):
    assert ranks(3).run(make_with_nvls) == ["0"] * 3


def make_with_nvls(rank, world_size):
    with a_process() as core, mock.patch.dict(os.environ, NVSHMEM_DISABLE_NVLS="0"):
        make().close(together=True)
        return core.disable_nvls


def test_pes_in_another_order_than_ranks(ranks):
    """Rank r is PE W-1-r of a world that the application has made, and keeps."""
    for calls, arrived, kept in ranks(3).run(on_a_world_of_the_application):
        assert calls == ["init", "malloc", "malloc", "free", "free", "finalize"]
        assert arrived and kept, "the application's tensor is its own"


def on_a_world_of_the_application(rank, world_size):
    with a_process() as core:
        start(core, rank, world_size, pe=world_size - 1 - rank)
        own = core.bytetensor((64,))
        own.fill_(rank)
        store = make()
        arrived = write_to_all(store, rank, world_size)
        store.close(together=True)
        kept = core.live == 1 and bool((own == rank).all())
        core.free_tensor(own)
        core.finalize()
        return core.calls, arrived, kept


def test_two_groups_share_a_world_and_the_last_to_close_ends_it(ranks):
    for calls, arrived in ranks(3).run(two_groups):
        assert calls == ["init", "malloc", "malloc", "free", "free", "finalize"] and arrived


def two_groups(rank, world_size):
    other = dist.new_group(sort_ranks=False)
    with a_process() as core:
        first, second = make(), make(other)
        arrived = [write_to_all(store, rank, world_size) for store in (first, second)]
        first.close(together=True)
        assert core.calls[-1] == "free" and core.live == 1
        second.close(together=True)
        result = core.calls, all(arrived)
    dist.destroy_process_group(other)
    return result


def test_ten_times(ranks):
    for calls in ranks(3).run(ten_times):
        assert calls == ["init", "malloc", "free", "finalize"] * 10


def ten_times(rank, world_size):
    with a_process() as core:
        for _ in range(10):
            make().close(together=True)
        return core.calls


# --- close where not everyone comes


@pytest.mark.parametrize("says", ["failed", "late"])
def test_where_one_rank_does_not_come_nobody_frees_until_all_meet_again(ranks, says):
    """Rank 1 has failed and waits for nobody; or it closes after the others have given up."""
    for rank, (calls, left, after, ended) in enumerate(ranks(3).run(close_alone, says)):
        assert calls == ["init", "malloc"] and left == 1, f"rank {rank} frees, where NVSHMEM would hang"
        assert after == [*calls, "free", "malloc"], "what was left is freed by the next store"
        assert ended == [*after, "free", "finalize"]


def close_alone(rank, world_size, says):
    with a_process() as core:
        store = make()
        if rank == 1 and says == "late":
            barrier()
        store.close(together=not (rank == 1 and says == "failed"))
        if rank != 1 and says == "late":
            barrier()
        calls, left = list(core.calls), core.live
        again = make()
        after = list(core.calls)
        assert write_to_all(again, rank, world_size)
        again.close(together=True)
        return calls, left, after, list(core.calls)


def test_what_is_left_keeps_nvshmem_up(ranks):
    for calls, ended in ranks(3).run(leave_one_of_two):
        assert calls == ["init", "malloc", "malloc", "free"], "the end of NVSHMEM would take what is left with it"
        assert ended == [*calls, "free", "malloc", "free", "finalize"]


def leave_one_of_two(rank, world_size):
    with a_process() as core:
        first, second = make(), make()
        first.close(together=rank != 1)
        second.close(together=True)
        calls = list(core.calls)
        make().close(together=True)
        return calls, core.calls


# --- errors, on every rank

FAULTS = {
    "absent": r"store 'nvshmem' needs the package nvshmem4py. pip install 'tp-overlap-kernels\[nvshmem\]'",
    "load": r"nvshmem4py does not load: Failed to dlopen.* pip install 'tp-overlap-kernels\[nvshmem\]'",
    "init": "NVSHMEM does not initialise with 3 PEs: no heap.*NVSHMEM_DEBUG",
    "init_silently": "NVSHMEM does not initialise with 3 PEs: it came back",
    "malloc": "NVSHMEM gives no 4096 bytes: Failed to allocate.*max_M",
    "unreachable": r"no pointer from rank 1 \(PE 1\) to the memory of rank 2 \(PE 2\): Failed.*store='symm_mem'",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_one_rank_meets_is_raised_on_all(ranks, fault):
    for rank, (kind, text, calls) in enumerate(ranks(3).run(fail_on_rank_1, fault)):
        assert kind == "UnsupportedTopology" and re.search(FAULTS[fault], text), text
        assert text.startswith("init: on rank 1: " if rank != 1 else "init: "), text
        if fault in ("absent", "load"):
            assert calls == [], "a rank has gone on alone"
        if fault == "unreachable":
            assert calls == ["init", "malloc", "free", "finalize"], "memory is left"


def fail_on_rank_1(rank, world_size, fault):
    faults = {"unreachable": ((1, 2),)} if fault == "unreachable" else {"faults": (fault,)}
    with a_process(**(faults if rank == 1 else {})) as core:
        with pytest.raises(tpo.TpOverlapError) as raised:
            make()
        return type(raised.value).__name__, str(raised.value), core.calls


def test_no_unique_id_names_the_setting(ranks):
    for text in ranks(3).run(fail_to_make_an_id):
        assert "NVSHMEM makes no unique id: no socket interface" in text and "UID_SOCK_IFNAME" in text


def fail_to_make_an_id(rank, world_size):
    with a_process(faults=("get_unique_id",)), pytest.raises(tpo.UnsupportedTopology) as raised:
        make()
    return str(raised.value)


def test_a_part_of_the_world_is_refused(ranks):
    """Where the third PE would be waited for in vain."""
    first, second, third = ranks(3).run(take_a_part)
    assert first == second and third == ""
    assert "its 2 ranks are the PEs [0, 1] of [3, 3] (by rank)" in first and "store='symm_mem'" in first


def take_a_part(rank, world_size):
    part, text = dist.new_group([0, 1]), ""
    with a_process() as core:
        start(core, rank, world_size)
        if rank < 2:
            with pytest.raises(tpo.UnsupportedTopology) as raised:
                make(part)
            text = str(raised.value)
        core.finalize()
    dist.destroy_process_group(part) if rank < 2 else None
    return text


def card(pe=-1, pes=0, world=""):
    return Card(world, pe, pes, (), "")


@pytest.mark.parametrize(
    "cards",
    [[card(), card()], [card(0, 2), card(1, 2)], [card(1, 2, "w"), card(0, 2, "w")]],
    ids=["nowhere", "the application's", "ours"],
)
def test_worlds_that_serve(cards):
    check_worlds(cards)


@pytest.mark.parametrize(
    "cards, says",
    [
        ([card(0, 2), card(), card(1, 2)], r"is initialised on ranks \[0, 2\] of the group and not on ranks \[1\]"),
        ([card(0, 4), card(1, 4)], r"the PEs \[0, 1\] of \[4, 4\]"),
        ([card(0, 2), card(0, 2)], r"the PEs \[0, 0\] of \[2, 2\]"),
        ([card(0, 2, "a"), card(1, 2, "b")], "of several worlds"),
    ],
    ids=["on some ranks", "more PEs", "one PE of each world", "PEs that only look alike"],
)
def test_worlds_that_do_not(cards, says):
    with pytest.raises(tpo.UnsupportedTopology, match=says):
        check_worlds(cards)


@pytest.mark.parametrize(
    "cuda, installed", [("13.0", ["nvshmem4py-cu13"]), ("12.8", ["nvshmem4py-cu12"]), ("13.0", []), (None, [])]
)
def test_wheels_that_serve(cuda, installed):
    check_wheel(cuda, installed)


@pytest.mark.parametrize(
    "cuda, installed, fix",
    [
        ("13.0", ["nvshmem4py-cu12"], "pip uninstall nvshmem4py-cu12; pip install 'nvshmem4py-cu13>=0.4,<0.5'"),
        ("12.8", ["nvshmem4py-cu13"], "pip uninstall nvshmem4py-cu13; pip install 'nvshmem4py-cu12>=0.4,<0.5'"),
        ("13.0", list(nvshmem.WHEELS), "pip uninstall nvshmem4py-cu12 nvshmem4py-cu13; pip install 'nvshmem4py-cu13"),
    ],
    ids=["of CUDA 12", "of CUDA 13", "of both"],
)
def test_a_wheel_of_another_cuda_is_refused(cuda, installed, fix):
    with pytest.raises(tpo.UnsupportedTopology, match=f"torch is built for CUDA {cuda}") as raised:
        check_wheel(cuda, installed)
    assert fix in str(raised.value)


def test_the_command_for_torch_of_cuda_12():
    assert nvshmem._install("12.8") == "pip install 'nvshmem4py-cu12>=0.4,<0.5'"


def test_the_versions_are_those_of_the_extra():
    pyproject = (Path(__file__).parents[2] / "pyproject.toml").read_text()
    assert f'nvshmem = ["nvshmem4py-cu13{nvshmem.VERSIONS}"]' in pyproject


# --- an arena in it


@contextlib.contextmanager
def arena_in(store):
    """The group's arena in that store, which CPU ranks are not offered by `pick`."""
    with mock.patch.object(stores, "pick", lambda named, device, world_size: "shm" if named == "auto" else named):
        yield tpo.init(max_M=64, max_N=128, store=store)


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_op_and_plan_gives_the_bits_of_shared_memory(ranks, world_size):
    for different, count in ranks(world_size).run(both_stores):
        assert different == [] and count >= 6


def both_stores(rank, world_size):
    def results(store):
        with arena_in(store) as info, torch.inference_mode():
            assert info.store == store
            made = [invoke(backend, call, rank) for backend, call in calls]
        return made

    calls = [
        (backend, Call(op, Case(1, 33 + case.M, 0, BF16, world_size, "") if op == "all_reduce" else case, plan=plan))
        for backend in (("ref", "interp") if world_size == 2 else ("ref",))
        for op in rank_side.CPU_PLANS
        for plan in (cpu_plans(op, world_size) if backend == "interp" else (None,))
        for case in (Case(5, 24, 16, BF16, world_size, ""), Case(33, 40, 24, BF16, world_size, ""))
    ]
    with a_process() as core:
        pairs = zip(results("shm"), results("nvshmem"), calls, strict=True)
        tpo.close()
        assert core.calls == ["init", "malloc", "free", "finalize"]
    return [str(call) for one, other, call in pairs if not torch.equal(one, other)], len(calls)


def invoke(backend, call, rank):
    tensors = rank_side.operands(call, rank)
    with tpo.cpu_backend(backend), tpo.force_plan(call.plan) if call.plan else contextlib.nullcontext():
        return rank_side.invoke(call, tensors, rank)


def test_each_node_has_a_world_of_its_own(ranks):
    for nodes, right, calls in ranks(4).run(on_two_nodes):
        assert nodes == 2 and right and calls == ["init", "malloc", "free", "finalize"]


def on_two_nodes(rank, world_size):
    call = Call("gemm_all_reduce", Case(5, 24, 16, BF16, 4, ""), "integer")
    with a_process() as core, rank_side.nodes_of(2), arena_in("nvshmem") as info:
        right = torch.equal(invoke("ref", call, rank).double(), exact(call))
        tpo.close()
        return info.nodes, right, core.calls


def exact(call):
    """The sum of a call whose inputs are integers."""
    operands = [rank_side.operands(call, rank) for rank in range(call.case.world_size)]
    return sum(a.double() @ b.double().T for a, b in operands)


def test_a_larger_arena_frees_the_smaller(ranks):
    for stores_seen, calls, live in ranks(2).run(grow):
        assert stores_seen == ["shm", "nvshmem", "nvshmem", "nvshmem", "shm"], "a store that is named is had"
        assert calls == ["init", "malloc", "free", "finalize"] * 2 and live == 0


def grow(rank, world_size):
    with a_process() as core, arena_in("auto") as first:
        seen = [first.store, tpo.init(max_M=64, max_N=128, store="nvshmem").store]
        for sizes, store in (((64, 128), "auto"), ((65, 128), "nvshmem"), ((65, 128), "shm")):
            seen.append(tpo.init(max_M=sizes[0], max_N=sizes[1], store=store).store)
        tpo.close()
        return seen, core.calls, core.live


def test_a_capture_keeps_the_store_and_changes_none(ranks):
    for kept, text in ranks(2).run(init_in_a_capture):
        assert kept == ["nvshmem"] * 2
        assert "while a CUDA graph is being captured" in text and "max_N=128, store='shm') on every rank" in text


def init_in_a_capture(rank, world_size):
    with a_process(), arena_in("nvshmem"):
        with (
            mock.patch.object(torch.cuda, "is_available", lambda: True),
            mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: True),
        ):
            kept = [tpo.init(max_M=64, max_N=128, store=store).store for store in ("auto", "nvshmem")]
            with pytest.raises(tpo.InvalidInput) as raised:
                tpo.init(max_M=64, max_N=128, store="shm")
        tpo.close()
        return kept, str(raised.value)


def test_a_group_that_failed_is_closed_and_made_again(ranks):
    """Rank 1 never calls, and its peer gives up: nobody frees, though only one of them knows why."""
    for rank, (failed, calls, ended, right) in enumerate(ranks(2).run(fail_and_recover)):
        assert failed == (rank == 0)
        assert calls == ["init", "malloc"], "a rank frees alone"
        assert ended == ["init", "malloc", "free", "malloc", "free", "finalize"] and right


def fail_and_recover(rank, world_size):
    call = Call("gemm_all_reduce", Case(5, 24, 16, BF16, 2, ""), "integer")
    with a_process() as core, arena_in("nvshmem"):
        arena, failed = arenas.get(rank_side.group_name()), False
        arena.timeout_s = TIMEOUT_S / 2
        with contextlib.suppress(tpo.GroupFailed):
            if rank == 0:
                failed = True
                invoke("ref", call, rank)
                failed = False
        tpo.close()
        calls = list(core.calls)
        tpo.init(max_M=64, max_N=128, store="nvshmem")
        out = invoke("ref", call, rank)
        tpo.close()
        return failed, calls, core.calls, torch.equal(out.double(), exact(call))


# --- the stand-in is strict


@pytest.mark.parametrize(
    "breach, says",
    [
        ("init_twice", "init of what is initialised"),
        ("free_twice", "freed twice"),
        ("finalize_with_tensors", "finalize with 1 live tensors"),
        ("another_order", "free 1 met free 2|free 2 met free 1"),
        ("own_pointer", "finalize with 1 live tensors"),
    ],
)
def test_a_breach_of_contract_is_seen(ranks, breach, says):
    for text in ranks(2).run(break_contract, breach):
        assert re.search(says, text), text


def break_contract(rank, world_size, breach):
    with a_process() as core:
        start(core, rank, world_size)
        tensors = [core.bytetensor((64,)), core.bytetensor((64,))]
        with pytest.raises(BrokenContract) as raised:
            BREACHES[breach](core, rank, tensors)
        return str(raised.value)


def init_twice(core, rank, tensors):
    core.init(core.device(), "id", rank, 2, initializer_method="uid")


def free_twice(core, rank, tensors):
    for _ in range(2):
        core.free_tensor(tensors[0])


def finalize_with_tensors(core, rank, tensors):
    core.free_tensor(tensors[0])
    core.finalize()


def another_order(core, rank, tensors):
    core.free_tensor(tensors[rank])


def own_pointer(core, rank, tensors):
    core.get_peer_tensor(tensors[0], rank)
    for tensor in tensors:
        core.free_tensor(tensor)
    core.finalize()


BREACHES = {f.__name__: f for f in (init_twice, free_twice, finalize_with_tensors, another_order, own_pointer)}
