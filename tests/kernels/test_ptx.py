"""Every Triton kernel in every configuration that we ship, compiled for sm_90a without a GPU.

Those are what dispatch gives by default, at several world sizes and for both dtypes, and what its tables name.
"""

from __future__ import annotations

import functools

import pytest
import triton

from tests.kernels import gates, ir_gates
from tests.kernels.launched import BF16, FP16, Launched, copying, empty, gemm, norming, signalling
from tp_overlap_kernels.dispatch.table import TABLES, parse
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
# H, world size, dtype: of the smallest block, of models, of more than a block; odd
NORMS = [
    (1024, 2, BF16),
    (4096, 8, BF16),
    (5120, 4, FP16),
    (8192, 2, BF16),
    (8192, 8, BF16),
    (32768, 4, BF16),
    (8192, 1, BF16),
    (32768, 1, FP16),
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
    ir_gates.tma_of_arguments(compiled)
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
    gates.whole_epochs_are_compared(text)
    gates.system_scope(text)
    gates.no_multicast(text)
    ir_gates.loads_follow_their_wait(compiled)


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


# --- kernels that norm


@pytest.mark.parametrize("row", NORMS, ids=str)
def test_kernels_that_norm(row):
    compiled = norming(*row).compile()
    text = compiled.asm["ptx"]
    gates.plain_loads(compiled)
    gates.sixteen_byte_accesses(text)
    gates.no_spills(compiled, ADDRESSES_BYTES)
    gates.fits_an_sm(compiled)
    gates.waits_for_the_kernel_before(text, may_read=row[1] == 1)  # the residual, by the norm alone
    gates.no_multicast(text)
    if row[1] > 1:
        check_signals(compiled)
        gates.addresses_in_64_bits(compiled)


def test_rows_of_any_width_norm():
    """No alignment is claimed where there is none."""
    for world_size in (1, 2):
        compiled = norming(1003, world_size).compile()
        gates.no_spills(compiled)
        assert not gates.count(compiled.asm["ptx"], r"st\.global\.v4"), "16-byte stores to rows of 2006 bytes"


# --- what the tables name, the runners-up too: one of them runs where the first cannot


def of_tables() -> dict[str, Launched]:
    """One launch for each way in which a kernel is compiled."""
    copies = {"one_shot": "one_shot", "two_shot": "two_shot"}
    copies |= {"unfused_one_shot": "one_shot", "unfused_two_shot": "two_shot", "unfused_push": "push"}
    found = {}
    for path in sorted(TABLES.glob("*.json")):
        table = parse(path.read_text(), path.name)
        for entry in table.entries:
            for plan in entry.plans:
                if entry.op != "all_reduce" and plan.name in ("one_shot", "two_shot", "push"):
                    launched = gemm(entry.op, str(plan), entry.M, entry.N, entry.K, table.world_size)
                    sizes = "" if entry.N % 16 == entry.K % 16 == 0 else f" N={entry.N} K={entry.K}"
                elif plan.name in copies:
                    launched, sizes = copying(copies[plan.name], entry.M * entry.N, table.world_size), ""
                else:
                    continue
                meta = " ".join(f"{key}={value}" for key, value in launched.meta.items() if isinstance(value, int))
                found[f"{launched.name} {meta}{sizes}"] = launched
    return found


SHIPPED = of_tables()


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("name", SHIPPED)
def test_what_the_tables_name(name):
    launched = SHIPPED[name]
    compiled, meta = launched.compile(), launched.meta
    check_signals(compiled)
    gates.plain_loads(compiled)
    gates.addresses_in_64_bits(compiled)
    gates.fits_an_sm(compiled)
    elements = meta["BLOCK_M"] * meta["BLOCK_N"] if "BLOCK_M" in meta else meta["BLOCK"]
    if elements >= 8 * 32 * meta["num_warps"]:  # of 16 x 32 elements each of 128 threads has 8 bytes
        gates.sixteen_byte_accesses(compiled.asm["ptx"])
    if "BLOCK_M" in meta:
        ir_gates.tma_of_arguments(compiled)
        gates.pipelined(compiled, meta["BLOCK_M"], meta["BLOCK_N"], meta["BLOCK_K"], meta["num_stages"])
        gates.no_spills(compiled)
    else:
        gates.waits_for_the_kernel_before(compiled.asm["ptx"])
        gates.no_spills(compiled, ADDRESSES_BYTES)


def test_the_tables_are_looked_at():
    kernels = {launched.name for launched in SHIPPED.values()}
    assert len(SHIPPED) >= 20 and kernels >= {"gemm_all_reduce_two_shot_push", "reduce_scatter_push"}, SHIPPED.keys()


# --- kernels that only signal


@pytest.mark.parametrize("name", SIGNALS)
def test_kernels_that_signal(name):
    launched = signalling(SIGNALS[name])
    assert launched.name == name
    compiled = launched.compile()
    text = compiled.asm["ptx"]
    gates.no_multicast(text)
    gates.system_scope(text)
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
