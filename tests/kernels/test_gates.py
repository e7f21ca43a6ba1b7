"""Each gate fails where it should: small kernels with one fault each, and shipped ones with bad tiles."""

from __future__ import annotations

import re
import types

import pytest
import triton
import triton.language as tl

from tests import ptx as compiler
from tests.kernels import gates, ir_gates
from tests.kernels.launched import Launched, gemm
from tests.kernels.test_ptx import GEMMS, of_gemm


@triton.jit
def releases_without_barrier(x_ptr, slot_ptr):
    index = tl.arange(0, 1024)
    tl.store(x_ptr + index, index)
    tl.inline_asm_elementwise(
        "st.release.sys.global.b64 [$1], 7; mov.u32 $0, 0;", "=r,l", [slot_ptr.to(tl.int64)], tl.int32, False, 1
    )


@triton.jit
def loads_before_the_barrier(x_ptr, out_ptr, slot_ptr):
    seen = tl.inline_asm_elementwise(
        "ld.acquire.sys.global.b64 $0, [$1];", "=l,l", [slot_ptr.to(tl.int64)], tl.int64, False, 1
    )
    index = tl.arange(0, 1024)
    tl.store(out_ptr + index, tl.load(x_ptr + index) + seen.to(tl.int32))


@triton.jit
def waits_for_ever(slot_ptr):
    tl.inline_asm_elementwise(
        """{ .reg .pred here; .reg .b64 seen; .reg .b32 none;
        poll: ld.acquire.sys.global.b64 seen, [$1]; setp.ne.s64 here, seen, 0; @!here bra poll;
        barrier.red.or.pred here, 0, here; mov.u32 $0, 0; }""",
        "=r,l", [slot_ptr.to(tl.int64)], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def loads_as_constant(x_ptr, out_ptr):
    value = tl.inline_asm_elementwise("ld.global.nc.b32 $0, [$1];", "=r,l", [x_ptr.to(tl.int64)], tl.int32, False, 1)
    tl.store(out_ptr, value)


@triton.jit
def stores_narrowly(table_ptr, value_ptr):
    """An address from memory, without the hint that it is a multiple of 16."""
    index = tl.arange(0, 1024)
    out = tl.load(table_ptr).to(tl.pointer_type(tl.bfloat16))
    tl.store(out + index, tl.load(value_ptr + index))


@triton.jit
def looks_before_it_waits(x_ptr, out_ptr):
    early = tl.load(x_ptr)
    tl.inline_asm_elementwise("griddepcontrol.wait; mov.u32 $0, 0;", "=r", [], tl.int32, False, 1)
    tl.store(out_ptr, early)


@triton.jit
def loads_before_it_waits(table_ptr, out_ptr, slot_ptr):
    """As a software pipeliner would have it: the tile is on its way before its slot has been looked at."""
    index = tl.arange(0, 1024)
    tile = tl.load(tl.load(table_ptr).to(tl.pointer_type(tl.int32)) + index)
    wait_for(slot_ptr)
    tl.store(out_ptr + index, tile)


@triton.jit
def loads_in_a_later_block(table_ptr, out_ptr, slot_ptr):
    """One wait for several loads: those of the second turn follow a store."""
    index = tl.arange(0, 1024)
    wait_for(slot_ptr)
    for i in tl.range(0, 2):
        tile = tl.load(tl.load(table_ptr + i).to(tl.pointer_type(tl.int32)) + index)
        tl.store(out_ptr + i * 1024 + index, tile)


@triton.jit
def wait_for(slot_ptr):
    tl.inline_asm_elementwise(
        """{ .reg .pred here; .reg .b64 seen; ld.acquire.sys.global.b64 seen, [$1]; setp.ne.s64 here, seen, 0;
        barrier.red.or.pred here, 0, here; mov.u32 $0, 0; }""",
        "=r,l", [slot_ptr.to(tl.int64)], tl.int32, False, 1,
    )  # fmt: skip


@triton.jit
def polls_with_volatile(slot_ptr):
    while tl.load(slot_ptr, volatile=True) == 0:
        pass


@triton.jit
def releases_to_this_device_only(slot_ptr):
    tl.debug_barrier()
    tl.atomic_xchg(slot_ptr, 1, sem="release", scope="gpu")


@triton.jit
def multiplies_in_32_bits(x_ptr, pitch):
    row, col = tl.program_id(0), tl.arange(0, 1024)
    tl.store(x_ptr + row * pitch + col, col)


@triton.jit
def multiplies_rows_in_32_bits(x_ptr, pitch):
    rows, cols = tl.arange(0, 16), tl.arange(0, 64)
    tl.store(x_ptr + rows[:, None] * pitch + cols[None, :], rows[:, None] + cols[None, :])


def compiled_example(kernel, **types):
    return compiler.hopper(kernel, types, {"num_warps": 4}, [name for name in types])


BAD = [
    (
        releases_without_barrier,
        {"x_ptr": "*i32", "slot_ptr": "*i64"},
        gates.barrier_before_release,
        "no barrier of the CTA",
    ),
    (
        loads_before_the_barrier,
        {"x_ptr": "*i32", "out_ptr": "*i32", "slot_ptr": "*i64"},
        gates.barrier_after_acquire,
        "no barrier of the CTA",
    ),
    (
        loads_before_the_barrier,
        {"x_ptr": "*i32", "out_ptr": "*i32", "slot_ptr": "*i64"},
        gates.every_wait_has_a_clock,
        "end",
    ),
    (waits_for_ever, {"slot_ptr": "*i64"}, gates.every_wait_has_a_clock, "a wait without end"),
    (stores_narrowly, {"table_ptr": "*i64", "value_ptr": "*bf16"}, gates.sixteen_byte_accesses, "no 16-byte store"),
    (looks_before_it_waits, {"x_ptr": "*i32", "out_ptr": "*i32"}, gates.waits_for_the_kernel_before, "ld.global"),
    (stores_narrowly, {"table_ptr": "*i64", "value_ptr": "*bf16"}, gates.barrier_before_release, "nothing is released"),
    (stores_narrowly, {"table_ptr": "*i64", "value_ptr": "*bf16"}, gates.barrier_after_acquire, "nothing is acquired"),
    (stores_narrowly, {"table_ptr": "*i64", "value_ptr": "*bf16"}, gates.tensor_cores, "no wgmma"),
    (stores_narrowly, {"table_ptr": "*i64", "value_ptr": "*bf16"}, gates.waits_for_the_kernel_before, "griddepcontrol"),
]


@pytest.mark.parametrize("kernel, types, gate, text", BAD, ids=lambda x: getattr(x, "__name__", None) or "")
def test_a_bad_kernel_does_not_pass(kernel, types, gate, text):
    with pytest.raises(AssertionError, match=text):
        gate(compiled_example(kernel, **types).asm["ptx"])


WORDS = {"table_ptr": "*i64", "out_ptr": "*i32", "slot_ptr": "*i64"}


@pytest.mark.parametrize(
    "kernel, text",
    [(loads_before_it_waits, "no wait stands before"), (loads_in_a_later_block, "and the wait before it")],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_a_load_away_from_its_wait_does_not_pass(kernel, text):
    with pytest.raises(AssertionError, match=text):
        ir_gates.loads_follow_their_wait(compiled_example(kernel, **WORDS))


def test_an_asynchronous_copy_from_an_arena_does_not_pass():
    ttgir = compiled_example(loads_before_it_waits, **WORDS).asm["ttgir"]
    copied = re.sub(
        r"(%\w+) = tt\.load (%\w+) : (tensor<\S+x!tt\.ptr)", r"\1 = ttg.async_copy_global_to_local \2 : \3", ttgir
    )
    assert copied != ttgir
    with pytest.raises(AssertionError, match="an asynchronous copy from an arena"):
        ir_gates.loads_follow_their_wait(types.SimpleNamespace(asm={"ttgir": copied}))


def test_tma_of_an_arena_does_not_pass():
    ttgir = of_gemm(GEMMS[1])[1].asm["ttgir"]
    for copied in (
        ttgir.replace("async_tma_copy_global_to_local %b_desc", "async_tma_copy_global_to_local %staged"),
        ttgir + "\nttng.async_tma_copy_local_to_global %b_desc",
    ):
        with pytest.raises(AssertionError, match=r"global_to_local|local_to_global"):
            ir_gates.tma_of_arguments(types.SimpleNamespace(asm={"ttgir": copied}))


@pytest.mark.parametrize(
    "kernel, text",
    [(polls_with_volatile, "too small a scope"), (releases_to_this_device_only, "no other device")],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_weaker_signals_do_not_pass(kernel, text):
    with pytest.raises(AssertionError, match=text):
        gates.system_scope(compiled_example(kernel, slot_ptr="*i32").asm["ptx"])


def test_a_fence_in_the_place_of_a_release_does_not_pass():
    with pytest.raises(AssertionError, match="a fence"):
        gates.system_scope("membar.sys;\nst.global.b64 [%rd1], %rd2;")
    with pytest.raises(AssertionError, match="without order"):
        gates.system_scope("atom.global.sys.relaxed.exch.b64 %rd1, [%rd2], %rd3;")


def test_an_epoch_of_32_bits_does_not_pass():
    good = of_gemm(GEMMS[1])[1].asm["ptx"]
    for bad in (good.replace("setp.ge.s64 here, got", "setp.ge.s32 here, got"), good.replace("seen, 16", "seen, 48")):
        assert bad != good
        with pytest.raises(AssertionError, match="compared otherwise"):
            gates.whole_epochs_are_compared(bad)


def test_loads_of_constants_do_not_pass():
    with pytest.raises(AssertionError, match=r"ld\.global\.nc"):
        gates.plain_loads(compiled_example(loads_as_constant, x_ptr="*i32", out_ptr="*i32"))


@pytest.mark.parametrize("kernel", [multiplies_in_32_bits, multiplies_rows_in_32_bits], ids=lambda one: one.__name__)
def test_addresses_in_32_bits_do_not_pass(kernel):
    with pytest.raises(AssertionError, match="pitch in 32 bits"):
        gates.addresses_in_64_bits(compiled_example(kernel, x_ptr="*i32", pitch="i32"))


def test_multicast_does_not_pass():
    for line in (
        "multimem.red.relaxed.sys.global.add.f32 [%rd1], %f1;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r1], ...",
    ):
        with pytest.raises(AssertionError, match="multi"):
            gates.no_multicast(f"mov.u32 %r1, 0;\n{line}\nret;")


def test_a_barrier_further_up_does_not_pass():
    """A branch may lead around it."""
    good = of_gemm(GEMMS[1])[1].asm["ptx"]
    bad = re.sub(r"barrier\.sync\.aligned 0;(?=\s+mov\.u32 tid, %tid\.x;\s+setp\.eq\.u32 first)", "", good)
    assert bad != good
    with pytest.raises(AssertionError, match="no barrier of the CTA"):
        gates.barrier_before_release(bad)


def test_a_store_between_barrier_and_release_does_not_pass():
    good = "bar.sync 0;\n@%p1 st.release.sys.global.b64 [%rd1], %rd2;"
    gates.barrier_before_release(good)
    with pytest.raises(AssertionError, match="no barrier of the CTA"):
        gates.barrier_before_release(good.replace("0;\n", "0;\n@%p2 st.global.v4.b32 [%rd3], {%r1, %r2, %r3, %r4};\n"))
    with pytest.raises(AssertionError, match="asynchronous"):
        gates.barrier_before_release("cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd1], [%r1];\n" + good)


def with_tiles(**tiles) -> Launched:
    launched = gemm(*GEMMS[0][:6])
    return Launched(launched.kernel, launched.args, launched.meta | tiles)


def test_a_kernel_without_stages_does_not_pass():
    launched = with_tiles(num_stages=1)
    with pytest.raises(AssertionError, match="stages"):
        gates.pipelined(launched.compile(), 128, 256, 64, num_stages=3)


def test_a_tile_that_spills_does_not_pass():
    launched = with_tiles(num_warps=4)
    with pytest.raises(AssertionError, match="STACK"):
        gates.no_spills(launched.compile())


def test_a_tile_that_is_too_large_does_not_pass():
    launched = with_tiles(num_stages=5)
    with pytest.raises(AssertionError, match="bytes of shared memory"):
        gates.fits_an_sm(launched.compile())
