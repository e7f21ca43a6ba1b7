"""A world and `jit`: what they refuse, and how a wait ends that nobody answers."""

from __future__ import annotations

import time

import pytest
import torch
import torch.distributed as dist
import triton
import triton.language as tl

from tests import ptx
from tests.words import dl, jit, kernels
from tests.words.meanings import Room
from tp_overlap_kernels.errors import InvalidInput, PeerTimeout
from tp_overlap_kernels.memory.world import World


def waits_in_vain(rank, num_ranks, late_rank):
    """(tokens, seconds, error or None): the late rank gets no signal, and waits twice."""
    room = Room(timeout_s=0.5)
    signal, out = room.symmetric(4, dtype=torch.int64), room.local(1, dtype=torch.int32)
    signal[:2] = 5
    if rank == late_rank:
        signal[1] = 4
    started, tokens, error = time.monotonic(), [], None
    for _ in range(2):
        room.launch(kernels.wait_in_vain, 1, signal, out)
        tokens.append(out.item())
    seconds = time.monotonic() - started
    try:
        room.world.check()
    except PeerTimeout as raised:
        error = str(raised)
    room.close()
    return tokens, seconds, error


def test_a_wait_ends(ranks):
    (tokens, _, error), (late_tokens, seconds, late_error) = ranks(2).run(waits_in_vain, 1)
    assert tokens == [0, 0] and error is None
    assert late_tokens == [1, 1]
    assert 0.5 <= seconds < 60
    assert "rank 1 waited for byte 8 of rank 1's heap for 0.5 s, value wanted 5, seen 4." in late_error


def test_waits_that_follow_a_failed_one_do_not_last():
    world = World(1 << 10, timeout_s=0)  # a wait would last for ever
    world.table[dl.FAILED.value] = 1
    signal, out = world.empty(2, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    kernels.wait_in_vain[(1,)](signal, out, world=world)
    assert out.item() == 1
    with pytest.raises(PeerTimeout, match="wait: rank 0"):
        world.check()


def test_tensors_lie_one_after_the_other_and_end_with_the_world():
    world = World(1000)
    first, second = world.empty(3, dtype=torch.uint8), world.empty(2, 100, dtype=torch.bfloat16)
    assert second.data_ptr() - first.data_ptr() == 256 and second.shape == (2, 100)
    with pytest.raises(InvalidInput, match=r"World.empty: 400 bytes for \(200,\), of which 256 are left of 1024"):
        world.empty(200, dtype=torch.bfloat16)
    world.close()


def numbers_in_two_worlds(rank, num_ranks):
    """(rank, num_ranks) and what the next rank wrote, in the world of all and in one of the last two."""
    others = dist.new_group([1, 2])
    found = []
    for group in (None, others) if rank else (None,):
        world = World(1 << 12, group, timeout_s=60)
        x, signal = world.empty(1, dtype=torch.int64), world.empty(1, dtype=torch.int64)
        x[0] = 10 * (world.num_ranks + rank)
        kernels.set_at_the_next[(1,)](x, signal, world=world)
        out = torch.zeros(4, dtype=torch.int32)
        kernels.who_am_i[(1,)](out, world=world)
        world.barrier()
        found.append((*out.tolist()[:2], signal.item()))
    return found


def test_worlds_of_two_groups_live_side_by_side(ranks):
    assert ranks(3).run(numbers_in_two_worlds) == [
        [(0, 3, 50)],
        [(1, 3, 30), (0, 2, 40)],
        [(2, 3, 40), (1, 2, 30)],
    ]


def test_a_launch_needs_a_world():
    with pytest.raises(TypeError, match="who_am_i: needs world="):
        kernels.who_am_i[(1,)](torch.zeros(4, dtype=torch.int32))


@triton.jit
def bare(out_ptr):
    tl.store(out_ptr, dl.rank())


def test_a_word_without_the_decorator_says_so():
    with pytest.raises(triton.CompilationError) as raised:
        ptx.hopper(bare, {"out_ptr": "*i32"}, {})
    assert "needs the decorator distributed.jit" in str(raised.value.__cause__)


@jit(do_not_specialize=["addend"])
def plus_rank(x_ptr, addend, SCALE: tl.constexpr = 2):
    """Defaults, options, a nested call in an argument."""
    tl.store(x_ptr, kernels.next_of(dl.rank(), dl.num_ranks() + 5) * SCALE + addend)


def test_a_function_keeps_its_defaults_and_options():
    assert plus_rank.arg_names == ["x_ptr", "addend", "SCALE", "tpo_world"]
    assert plus_rank.params[1].do_not_specialize
    world, x = World(256), torch.zeros(1, dtype=torch.int32)
    plus_rank[(1,)](x, 10, world=world)
    assert x.item() == 12
    plus_rank[lambda meta: (1,)](x, 10, SCALE=3, world=world)
    assert x.item() == 13


@jit
def asks_for(ptr, WHAT: tl.constexpr):
    if WHAT == "sig_op":
        dl.notify(ptr, 0, sig_op="max", comm_scope="gpu")
    elif WHAT == "comm_scope":
        dl.notify(ptr, 0, comm_scope="node")
    elif WHAT == "scope":
        dl.wait(ptr, 1, "device", "acquire")
    elif WHAT == "semantic":
        dl.wait(ptr, 1, "sys", "release")
    elif WHAT == "64-bit":
        dl.notify(ptr.to(tl.pointer_type(tl.int32)), 0)
    elif WHAT == "32- or 64-bit":
        dl.wait(ptr.to(tl.pointer_type(tl.int16)), 1, "sys", "acquire")
    elif WHAT == "tensor descriptor":
        descriptor = tl.make_tensor_descriptor(ptr, [64, 64], [64, 1], [32, 32])
        dl.consume_token(descriptor, dl.wait(ptr, 1, "sys", "acquire"))


@pytest.mark.parametrize(
    "what", ["sig_op", "comm_scope", "scope", "semantic", "64-bit", "32- or 64-bit", "tensor descriptor"]
)
def test_what_is_refused(what, monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    with pytest.raises(triton.CompilationError, match=what):
        ptx.hopper(asks_for, {"ptr": "*i64", "tpo_world": "*i64"}, {"WHAT": what})
