"""One arena a group: made, found again, grown, closed, made anew; and nothing left behind."""

from __future__ import annotations

import os
import threading

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, Case
from tests.dist import barrier
from tests.ops.calls import Call, Setup, group_name, invoke, operands, prepare_arena
from tests.ops.judge import judge
from tp_overlap_kernels.lang import signal
from tp_overlap_kernels.memory import arena as arenas

CALL = Call("gemm_all_reduce", Case(20, 40, 24, BF16, 2, ""), bias=True)


def mapped():
    """(number, bytes) of the arenas' files that this process maps, as the kernel says."""
    with open("/proc/self/maps") as lines:
        spans = [line.split()[0].split("-") for line in lines if "memfd:tp_overlap_kernels" in line]
    return len(spans), sum(int(end, 16) - int(start, 16) for start, end in spans)


def left_behind():
    """What a process can leak: descriptors, mappings, threads, names in /dev/shm."""
    return {
        "descriptors": sorted(os.readlink(f"/proc/self/fd/{fd}").split(":")[0] for fd in fds()),
        "maps": mapped()[0],
        "threads": sorted(t.name for t in threading.enumerate() if t.name.startswith("tp_overlap")),
        "shm": sorted(name for name in os.listdir("/dev/shm") if "tp_overlap" in name),
    }


def fds():
    """Open descriptors, but for the one with which the folder was read."""
    found = []
    for fd in os.listdir("/proc/self/fd"):
        try:
            os.stat(f"/proc/self/fd/{fd}")
        except OSError:
            continue
        found.append(fd)
    return found


# --- size


@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
def test_bytes_needed_are_the_bytes_taken(ranks, world_size):
    for needed, described, reported, length, maps in ranks(world_size).run(weigh):
        assert needed == described == reported == length
        assert world_size == 1 or maps == (world_size, world_size * (-(-needed // 4096) * 4096))


def weigh(rank, world_size):
    tpo.close()
    info = tpo.init(max_M=100, max_N=200)
    needed = tpo.bytes_needed(100, 200)  # the world size is that of torch.distributed
    report = tpo.memory_report()
    length = arenas.get(info.group_name).store.buffer.numel()
    assert (
        str(needed) in str(report) and repr(info.group_name) in str(report) and set(report.groups) == {info.group_name}
    )
    result = needed, info.bytes, report.total_bytes, length, mapped()
    tpo.close()
    assert tpo.memory_report().total_bytes == 0 and tpo.memory_report().groups == {}
    return result


def test_the_default_device_of_the_caller_does_not_matter(ranks):
    for device, output in ranks(2).run(under_another_default):
        assert device == "cpu" and output == [[4.0] * 3] * 2


def under_another_default(rank, world_size):
    """As an engine that builds its model under torch.device(...): meta cannot even be written to."""
    tpo.close()
    with torch.device("meta"):
        info = tpo.init(max_M=16, max_N=16)
    a, b = torch.ones(2, 2, dtype=BF16), torch.ones(3, 2, dtype=BF16)
    output = torch.ops.tp_overlap.gemm_all_reduce(a, b, info.group_name)
    device = arenas.get(info.group_name).control.device.type
    tpo.close()
    return device, output.tolist()


def test_eighty_layers_take_the_memory_of_one(ranks):
    for first, last, outputs in ranks(2).run(many_layers, 80):
        assert first == last, "bytes of symmetric memory, files, descriptors"
        assert all(torch.equal(x, outputs[0]) for x in outputs)


def many_layers(rank, world_size, count):
    prepare_arena(Setup())
    layers, outputs, seen = [], [], []
    x = torch.ones(20, 24, dtype=BF16)
    with torch.inference_mode():
        for _ in range(count):
            layer = tpo.RowParallelLinear(48, 40, dtype=BF16)
            layer.load_state_dict({"weight": torch.ones(40, 48), "bias": torch.ones(40)})
            layers.append(layer)
            outputs.append(layer(x))
            seen.append((tpo.memory_report().total_bytes, mapped(), len(fds())))
    return seen[0], seen[-1], outputs


# --- found again, grown, closed


def test_init_again_finds_the_same_arena(ranks):
    for same, sizes in ranks(2).run(init_again):
        assert same and sizes == [(64, 64)] * 3


def init_again(rank, world_size):
    tpo.close()
    first, arena = tpo.init(max_M=64, max_N=64), arenas.get(group_name())
    second, third = tpo.init(max_M=64, max_N=64), tpo.init(max_M=1, max_N=2, dtype=torch.float16)
    return arenas.get(group_name()) is arena, [(info.max_M, info.max_N) for info in (first, second, third)]


def test_growth(ranks):
    """Each size grows by itself; calls before and after are right, and results of before stay."""
    by_rank = ranks(2).run(grow)
    for sizes, kept, _ in by_rank:
        assert sizes == [(64, 64), (128, 64), (128, 96), (128, 96)] and kept
    for results in zip(*(results for _, _, results in by_rank), strict=True):
        judge(CALL, "ref", list(results))


def grow(rank, world_size):
    tpo.close()
    sizes, results = [], []
    for wanted in (
        {"max_M": 64, "max_N": 64},
        {"max_M": 128, "max_N": 8},
        {"max_M": 8, "max_N": 96},
        {"max_M": 1, "max_N": 1},
    ):
        info = tpo.init(**wanted)
        sizes.append((info.max_M, info.max_N))
        results.append(invoke(CALL, operands(CALL, rank), rank))
    kept = all(torch.equal(result, results[0]) for result in results)
    assert mapped()[1] == 2 * (-(-info.bytes // 4096) * 4096), "the smaller arenas are gone"
    return sizes, kept, results


def test_nothing_is_left_after_fifty_cycles(ranks):
    for before, after, last in ranks(2).run(cycle, 50):
        assert before == after
        assert before["maps"] == 0 and before["threads"] == [] and before["shm"] == []
        assert torch.equal(*last)


def cycle(rank, world_size, count):
    tpo.close()
    results = []
    for number in range(count + 1):
        tpo.init(max_M=32, max_N=64)
        with (
            tpo.cpu_backend("interp" if number % 10 == 0 else "ref"),
            tpo.force_plan("two_shot" if number % 10 == 0 else None),
        ):
            results.append(torch.ops.tp_overlap.all_reduce(torch.full((64,), 1.0 + rank, dtype=BF16), group_name()))
        if number % 2:
            tpo.init(max_M=40, max_N=64)
        tpo.close()
        tpo.close()  # of nothing: nothing happens
        if number == 0:  # what torch itself opens at the first call is there now
            barrier()
            before = left_behind()
    barrier()
    return before, left_behind(), (results[0], results[-1])


def test_the_files_have_no_name_and_are_the_users_own(ranks):
    """So a process that ends in whatever way takes the memory with it."""
    for names, modes in ranks(2).run(files):
        assert names == [] and modes == {0o600}


def files(rank, world_size):
    prepare_arena(Setup())
    ours = [fd for fd in fds() if "memfd:tp_overlap_kernels" in os.readlink(f"/proc/self/fd/{fd}")]
    modes = {os.stat(f"/proc/self/fd/{fd}").st_mode & 0o777 for fd in ours}
    return [name for name in os.listdir("/dev/shm") if "tp_overlap" in name], modes


# --- contents of a new arena


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_a_new_arena_is_ready(ranks, world_size):
    ranks(world_size).run(look_inside)


def look_inside(rank, world_size):
    tpo.close()
    tpo.init(max_M=64, max_N=64)
    arena = arenas.get(group_name())
    room, buffer = arena.layout, arena.store.buffer
    assert not buffer[: room.sentinel].any(), "every slot is zero: no call yet"
    assert (buffer[room.sentinel : room.one_shot].view(torch.int32) == arenas.SENTINEL_WORD).all()
    assert arenas.SENTINEL_WORD & 0xFFFFFFFF == 0x80008000
    assert arena.heap.tolist() == [*arena.store.bases, *[buffer.data_ptr()] * 2 * world_size]
    assert arena.heap[rank] == buffer.data_ptr()
    assert arena.control[signal.HEADERS.value] == buffer.data_ptr() + room.header
    assert arena.control[signal.HEADERS_BYTES.value] == 8 * world_size
    assert arena.control.count_nonzero() == 2 and not arena.record.failed
    barrier()


def test_a_view_of_a_peer_is_its_memory(ranks):
    for seen in ranks(3).run(write_to_all):
        assert seen == [100.0, 101.0, 102.0]


def write_to_all(rank, world_size):
    arena = prepare_arena(Setup())
    for peer in range(world_size):
        arena.view(peer, arena.layout.staging + 16 * rank, (2, 2), BF16).fill_(100 + rank)
    barrier()
    views = [arena.view(rank, arena.layout.staging + 16 * source, (2, 2), BF16) for source in range(world_size)]
    assert arena.address(arena.layout.staging) == views[0].data_ptr()
    return [view.double().mean().item() for view in views]


def test_tensors_made_in_inference_mode_can_be_written_outside_it(ranks):
    """An engine may initialise under inference_mode and call without it."""
    for backend in ("ref", "interp"):
        judge(CALL, "ref" if backend == "ref" else "one_shot", ranks(2).run(init_in_inference_mode, backend))


def init_in_inference_mode(rank, world_size, backend):
    tpo.close()
    with torch.inference_mode():
        prepare_arena(Setup())
    with tpo.cpu_backend(backend), torch.no_grad():
        return invoke(CALL, operands(CALL, rank), rank)


# --- one rank by itself


def test_one_rank_needs_no_process_group():
    info = tpo.init(max_M=8, max_N=24)
    try:
        assert (info.group_name, info.rank, info.world_size, info.store) == ("local", 0, 1, "local")
        y = torch.ops.tp_overlap.gemm_all_reduce(torch.ones(9, 16, dtype=BF16), torch.ones(24, 16, dtype=BF16), "local")
        assert y.eq(16).all() and y.shape == (9, 24)
    finally:
        tpo.close()
