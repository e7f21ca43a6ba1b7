"""Every Triton kernel in every configuration that dispatch gives by default, compiled for sm_90a without a GPU."""

from __future__ import annotations

import functools

import pytest
import triton
import triton.language as tl

from tests import ptx as compiler
from tests.kernels import gates
from tests.kernels.launched import BF16, FP16, Launched, copying, empty, gemm, signalling
from tp_overlap_kernels.kernels import stream_signals
from tp_overlap_kernels.ops import launches

AR, RS = "gemm_all_reduce", "gemm_reduce_scatter"
# op, plan, M, N, K, world size, bias, dtype: each default tile, then worlds, a bias, the other dtype
GEMMS = [
    (AR, "two_shot", 8192, 8192, 4096, 2, False, BF16),
    (AR, "two_shot", 512, 4096, 4096, 2, False, BF16),
    (AR, "two_shot", 8192, 8192, 4096, 2, True, BF16),
    (AR, "two_shot", 8192, 8192, 4096, 2, False, FP16),
    (AR, "two_shot", 8192, 8192, 4096, 4, False, BF16),
    (AR, "two_shot", 512, 4096, 4096, 4, True, BF16),
    (AR, "two_shot", 8192, 8192, 4096, 8, True, BF16),
    (AR, "two_shot", 512, 4096, 4096, 8, False, BF16),
    (RS, "push", 8192, 8192, 4096, 2, False, BF16),
    (RS, "push", 512, 4096, 4096, 2, False, BF16),
    (RS, "push", 8192, 8192, 4096, 2, True, FP16),
    (RS, "push", 8192, 8192, 4096, 4, False, BF16),
    (RS, "push", 8192, 8192, 4096, 8, False, BF16),
    (RS, "push", 512, 4096, 4096, 8, True, BF16),
    (AR, "one_shot", 1, 8192, 4096, 2, False, BF16),
    (AR, "one_shot", 32, 8192, 4096, 2, False, BF16),
    (AR, "one_shot", 64, 8192, 4096, 2, False, BF16),
    (AR, "one_shot", 64, 4096, 4096, 2, True, BF16),
    (AR, "one_shot", 64, 152064, 4096, 2, False, FP16),
    (AR, "one_shot", 16, 8192, 4096, 4, True, BF16),
    (AR, "one_shot", 64, 8192, 4096, 8, False, BF16),
    (RS, "one_shot", 16, 8192, 4096, 2, False, BF16),
    (RS, "one_shot", 64, 8192, 4096, 2, True, FP16),
    (RS, "one_shot", 64, 8192, 4096, 4, False, BF16),
    (RS, "one_shot", 64, 8192, 4096, 8, False, BF16),
]
# which kernel, elements, world size: least and largest block
COPIES = [
    ("one_shot", 8192, 2),
    ("one_shot", 1 << 20, 2),
    ("one_shot", 65536, 8),
    ("two_shot", 1 << 18, 2),
    ("two_shot", 1 << 25, 2),
    ("two_shot", 1 << 25, 8),
    ("push", 1 << 18, 2),
    ("push", 1 << 25, 2),
    ("push", 1 << 25, 8),
]
SIGNALS = {
    "spoil_call": lambda call: launches.spoil(call.arena, empty(64, 64)),
    "begin_call": lambda call: call.begin(),
    "wait_peers": lambda call: call.wait_peers(),
    "notify_peer": lambda call: call.notify(4096, 1),
    "wait_peer": lambda call: call.wait(4096, 1),
    "end_call": lambda call: call.end(empty(64, 64)),
}
# ptxas puts a few addresses of the peers on the stack: with the largest tile and more than one peer for want of
# registers, in kernels that copy even where there are some. Data is more than this.
ADDRESSES_BYTES = 64


def label(row):
    op, plan, M, N, _, world_size, bias, dtype = row
    return f"{'rs-' * (op == RS)}{plan}-{M}x{N}-W{world_size}{'-bias' * bias}{'-fp16' * (dtype is FP16)}"


@functools.cache
def of_gemm(row):
    op, plan, M, N, K, world_size, bias, dtype = row
    launched = gemm(op, plan, M, N, K, world_size, bias=bias, dtype=dtype)
    return launched.meta, launched.compile()


@functools.cache
def of_copy(row):
    return copying(*row).compile()


# --- kernels with a GEMM


@pytest.mark.parametrize("row", GEMMS, ids=label)
def test_signals_of_a_gemm(row):
    _, compiled = of_gemm(row)
    check_signals(compiled)
    gates.plain_loads(compiled)
    gates.addresses_in_64_bits(compiled)


@pytest.mark.parametrize("row", GEMMS, ids=label)
def test_speed_of_a_gemm(row):
    meta, compiled = of_gemm(row)
    gates.sixteen_byte_accesses(compiled.asm["ptx"], narrow_loads=meta["HAS_BIAS"])
    gates.pipelined(compiled, meta["BLOCK_M"], meta["BLOCK_N"], meta["BLOCK_K"], meta["num_stages"])
    if meta["BLOCK_M"] >= 64:
        gates.tensor_cores(compiled.asm["ptx"])
    gates.no_spills(compiled, ADDRESSES_BYTES if meta["BLOCK_N"] == 256 and meta["WORLD"] > 2 else 0)
    gates.fits_an_sm(compiled)


def check_signals(compiled):
    text = compiled.asm["ptx"]
    gates.barrier_before_release(text)
    gates.barrier_after_acquire(text)
    gates.every_wait_has_a_clock(text)
    gates.no_multicast(text)


def test_odd_sizes_compile_too():
    """No alignment is claimed where there is none."""
    launched = gemm(AR, "two_shot", 300, 1001, 72)
    compiled = launched.compile()
    check_signals(compiled)
    gates.no_spills(compiled)
    assert not gates.count(compiled.asm["ptx"], r"@%p\d+ st\.global\.v4"), "16-byte stores to rows of 2002 bytes"


# --- kernels that move and add


@pytest.mark.parametrize("row", COPIES, ids=str)
def test_kernels_that_copy(row):
    compiled = of_copy(row)
    check_signals(compiled)
    gates.plain_loads(compiled)
    gates.addresses_in_64_bits(compiled)
    gates.sixteen_byte_accesses(compiled.asm["ptx"])
    gates.no_spills(compiled, ADDRESSES_BYTES)
    gates.fits_an_sm(compiled)
    gates.waits_for_the_kernel_before(compiled.asm["ptx"])


# --- kernels that only signal


@pytest.mark.parametrize("name", SIGNALS)
def test_kernels_that_signal(name):
    launched = signalling(SIGNALS[name])
    assert launched.name == name
    compiled = launched.compile()
    text = compiled.asm["ptx"]
    gates.no_multicast(text)
    gates.plain_loads(compiled)
    gates.no_spills(compiled)
    if name in ("notify_peer", "end_call"):
        gates.barrier_before_release(text)
    if name in ("wait_peer", "wait_peers"):
        gates.every_wait_has_a_clock(text)


def test_no_kernel_is_left_out():
    """A new kernel in stream_signals belongs in SIGNALS; one in a file of its own is launched by ops.launches."""
    jitted = {name for name, value in vars(stream_signals).items() if isinstance(value, triton.runtime.JITFunction)}
    assert jitted == set(SIGNALS)


@pytest.mark.parametrize("launched", [gemm(*GEMMS[0][:6]), copying("two_shot", 1 << 20)], ids=lambda one: one.name)
def test_no_epoch_is_an_argument(launched):
    """It would be baked into a CUDA graph, and every replay after the first would wait for nothing."""
    assert not {name for name in launched.kernel.arg_names if "epoch" in name or "parity" in name or "half" == name}


# --- each gate fails where it should


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
