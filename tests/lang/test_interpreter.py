"""Each test is a canary for one assumption about Triton's interpreter, or for one check that must be able to fail."""

from __future__ import annotations

import ctypes
import os
import pathlib
import re
import subprocess
import sys
import threading
import time

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tests import inputs, truth
from tests.cases import Case
from tests.tolerance import Rounding, check, check_bits, tolerance
from tp_overlap_kernels.lang.interpreter import (
    Aborted,
    LintError,
    address_of,
    as_tensor,
    cpu_impl,
    interpret,
    jitter,
    lint,
    poll,
    program_state,
    substitute,
    value_of,
)

SEVEN = tl.constexpr(7)
FP8 = {torch.float8_e4m3fn: tl.float8e4nv, torch.float8_e5m2: tl.float8e5}


# --- numbers


@triton.jit
def matmul(a, b, out, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    n_tiles = tl.cdiv(N, BLOCK_N)
    num_tiles = tl.cdiv(M, BLOCK_M) * n_tiles
    for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), num_stages=3, flatten=True):
        rows = (tile // n_tiles).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
        cols = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)
        acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(tl.cdiv(K, BLOCK_K)):
            ks = k * BLOCK_K + tl.arange(0, BLOCK_K)
            x = tl.load(a + rows[:, None] * K + ks, mask=(rows[:, None] < M) & (ks < K), other=0.0)
            y = tl.load(b + cols[:, None] * K + ks, mask=(cols[:, None] < N) & (ks < K), other=0.0)
            acc = tl.dot(x, y.T, acc)
        inside = (rows[:, None] < M) & (cols < N)
        tl.store(out + rows[:, None] * N + cols, acc.to(out.dtype.element_ty), mask=inside)


@pytest.mark.parametrize("grid", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_dot_is_right_and_rounds_to_nearest(dtype, grid):
    """Triton's interpreter multiplies bf16's bits as integers and truncates on the way back."""
    case = Case(100, 65, 72, dtype, 1, "ragged")
    for kind in ("normal", "integer"):
        out = torch.full((case.M, case.N), float("nan"), dtype=dtype)
        a, b = inputs.operands(case, 0, kind)
        interpret(matmul, (grid,), a, b, out, 100, 65, 72, BLOCK_M=64, BLOCK_N=64, BLOCK_K=32, num_warps=4)
        expected = truth.gemm_all_reduce(case, kind)
        if kind == "integer":
            check_bits(out, expected)
        else:
            check(out, expected, tolerance(expected, Rounding.F32))


@triton.jit
def cast(x, out, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at).to(out.dtype.element_ty))


def f32_values() -> torch.Tensor:
    """(65536,): random bits, ties between two bf16 (even and odd), and the special values."""
    bits = torch.randint(-(2**31), 2**31 - 1, (65536,), generator=torch.Generator().manual_seed(1), dtype=torch.int64)
    bits[:32768] = (bits[:32768] & ~0xFFFF) | 0x8000
    bits[-8:] = torch.tensor([0, 0x80000000, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 1, 0x7F7F8000])
    return (bits & 0xFFFFFFFF).to(torch.uint32).view(torch.float32)


def same_bits(x: torch.Tensor, y: torch.Tensor) -> bool:
    nan = x.isnan()
    return torch.equal(nan, y.isnan()) and torch.equal(x[~nan].view(torch.int16), y[~nan].view(torch.int16))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrowing_rounds_to_nearest_even(dtype):
    x = f32_values()
    out = torch.empty(x.shape, dtype=dtype)
    interpret(cast, (16,), x, out, BLOCK=4096)
    assert same_bits(out, x.to(dtype))
    truncated = (x.view(torch.int32) & -65536).view(torch.float32).bfloat16()
    assert not same_bits(out.bfloat16(), truncated)  # the inputs can tell


@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_fp8_saturates_and_rounds_to_nearest_even(dtype):
    x = torch.randn(4096, generator=torch.Generator().manual_seed(2)) * 200
    x[:2] = torch.tensor([1e9, -1e9])
    out, wide = torch.empty(4096, dtype=dtype), torch.empty(4096)
    interpret(cast, (1,), x, out, BLOCK=4096)
    interpret(cast, (1,), out, wide, BLOCK=4096)
    largest = torch.finfo(dtype).max
    assert torch.equal(wide, x.clamp(-largest, largest).to(dtype).float())


def test_every_bf16_widens_to_itself():
    x = torch.arange(-32768, 32768).to(torch.int16).view(torch.bfloat16)
    wide, back = torch.empty(x.shape), torch.empty_like(x)
    interpret(cast, (1,), x, wide, BLOCK=65536)
    interpret(cast, (1,), wide, back, BLOCK=65536)
    assert torch.equal(wide.nan_to_num(), x.float().nan_to_num())
    assert same_bits(back, x)


@triton.jit
def smaller(x, y):
    return tl.minimum(x, y)


@triton.jit
def bf16_arithmetic(x, y, out):
    at = tl.arange(0, 64)
    a, b = tl.load(x + at), tl.load(y + at)
    tl.store(out + at, a + b)
    tl.store(out + 64 + at, a * b)
    tl.store(out + 128 + at, a - b)
    tl.store(out + 192 + at, tl.where(a < b, a, b))
    tl.store(out + 256 + at, tl.maximum(a, b))
    tl.store(out + 320 + at, -a)
    tl.store(out + 384 + at, tl.abs(a))
    tl.store(out + 448, tl.max(a, axis=0))
    tl.store(out + 449, tl.reduce(a, 0, smaller))
    tl.store(out + 450, tl.sum(a, axis=0))


def test_bf16_arithmetic_is_of_numbers():
    x, y = (torch.randn(64, generator=torch.Generator().manual_seed(s)).bfloat16() for s in (3, 4))
    out = torch.empty(451, dtype=torch.bfloat16)
    interpret(bf16_arithmetic, (1,), x, y, out)
    expected = [
        x + y,
        x * y,
        x - y,
        torch.minimum(x, y),
        torch.maximum(x, y),
        -x,
        x.abs(),
        x.max()[None],
        x.min()[None],
    ]
    assert torch.equal(out[:450], torch.cat(expected))
    assert abs(out[450] - x.double().sum()) < 0.1


# --- programs


@triton.jit
def spin_until(slot, value):
    """A device function as lang has them: PTX for the GPU, a stand-in for the CPU."""
    return tl.inline_asm_elementwise("trap;", "=l,l", [value], dtype=tl.int64, is_pure=False, pack=1)


@cpu_impl(spin_until)
def _spin_until_cpu(slot, value):
    word = ctypes.c_int64.from_address(address_of(slot))
    if not poll(lambda: word.value >= value_of(value), 10):
        raise TimeoutError
    return word.value


@triton.jit
def first_waits_for_last(slot, data, out, BY_STAND_IN: tl.constexpr):
    if tl.program_id(0) == 0:
        if BY_STAND_IN:
            spin_until(slot, 1)
        else:
            while tl.atomic_add(slot, 0, sem="acquire", scope="sys") < 1:
                pass
        tl.store(out + tl.arange(0, 16), tl.load(data + tl.arange(0, 16)))
    elif tl.program_id(0) == tl.num_programs(0) - 1:
        tl.store(data + tl.arange(0, 16), tl.full((16,), 5, tl.int64))
        tl.debug_barrier()
        tl.atomic_xchg(slot, 1, sem="release", scope="sys")


def passes_data(grid=4, by_stand_in=True) -> bool:
    slot, data, out = torch.zeros(1, dtype=torch.int64), torch.zeros(16, dtype=torch.int64), torch.zeros(16).long()
    interpret(first_waits_for_last, (grid,), slot, data, out, BY_STAND_IN=by_stand_in)
    return bool((out == 5).all())


@pytest.mark.parametrize("by_stand_in", [True, False], ids=["poll in a stand-in", "loop of atomics"])
def test_a_program_may_wait_for_a_later_one(by_stand_in):
    assert passes_data(2, by_stand_in)
    assert passes_data(8, by_stand_in)


def test_a_wait_that_does_not_wait_is_seen():
    with substitute(spin_until, lambda slot, value: 0):
        assert not all(passes_data() for _ in range(5))
    assert passes_data()


def test_ranks_may_be_threads_and_the_language_is_restored():
    originals = (tl.load, tl.tensor.__add__, tl.range, tl.multiple_of, triton.JITFunction.__call__)
    results = []
    threads = [threading.Thread(target=lambda: results.append(passes_data())) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == [True] * 6
    assert originals == (tl.load, tl.tensor.__add__, tl.range, tl.multiple_of, triton.JITFunction.__call__)


@triton.jit
def last_fails(slot, BY_STAND_IN: tl.constexpr):
    if tl.program_id(0) == tl.num_programs(0) - 1:
        tl.device_assert(tl.program_id(0) == 0, "wrong on purpose")
    elif BY_STAND_IN:
        spin_until(slot, 1)
    else:
        while tl.atomic_cas(slot, 1, 1) != 1:
            pass


@pytest.mark.parametrize("by_stand_in", [True, False], ids=["poll in a stand-in", "loop of atomics"])
def test_a_failure_ends_the_programs_that_wait(by_stand_in):
    load, started = tl.load, time.monotonic()
    with pytest.raises(AssertionError, match="wrong on purpose") as caught:
        interpret(last_fails, (3,), torch.zeros(1, dtype=torch.int64), BY_STAND_IN=by_stand_in)
    assert time.monotonic() - started < 5
    if sys.version_info >= (3, 11):
        assert caught.value.__notes__ == ["in program (2, 0, 0) of last_fails, grid (3, 1, 1)"]
    assert tl.load is load


def test_a_waiting_program_is_told_to_stop():
    seen = []

    def stand_in(slot, value):
        try:
            poll(lambda: False)
        except Aborted as error:
            seen.append(program_state().grid_position)
            raise error

    with substitute(spin_until, stand_in), pytest.raises(AssertionError, match="on purpose"):
        interpret(last_fails, (3,), torch.zeros(1, dtype=torch.int64), BY_STAND_IN=True)
    assert sorted(seen) == [(0, 0, 0), (1, 0, 0)]


def test_poll_times_out():
    assert not poll(lambda: False, 0.01)
    assert poll(lambda: True, 0.01)


def test_jitter_delays_stand_ins():
    started = time.monotonic()
    with jitter(0.1):
        assert all(passes_data(2) for _ in range(10))
    assert time.monotonic() - started > 0.15  # 20 delays with a chance of 1/2, 0.05 s in the mean


# --- checks


@triton.jit
def publishes(data, slot, BARRIER: tl.constexpr, WIDTH: tl.constexpr):
    if WIDTH == 1:
        tl.store(data, 1)
    else:
        tl.store(data + tl.arange(0, WIDTH), tl.full((WIDTH,), 1, tl.int64))
    if BARRIER:
        tl.debug_barrier()
    tl.atomic_add(slot, 1, sem="release", scope="sys")


@triton.jit
def accumulates_and_publishes(data, slots):
    tl.atomic_add(data + tl.arange(0, 16), tl.full((16,), 1, tl.int64))
    tl.atomic_xchg(slots + tl.arange(0, 2), 1, sem="release", scope="sys")


def test_lint_wants_a_barrier_between_a_tile_and_its_release():
    data, slot = torch.zeros(16, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    interpret(publishes, (1,), data, slot, BARRIER=True, WIDTH=16)
    interpret(publishes, (1,), data, slot, BARRIER=False, WIDTH=1)  # one thread stores and releases
    with pytest.raises(LintError, match="with no barrier of the block"):
        interpret(publishes, (1,), data, slot, BARRIER=False, WIDTH=16)
    with pytest.raises(LintError, match="with no barrier of the block"):
        interpret(accumulates_and_publishes, (1,), data, slot)
    with lint(False):
        interpret(publishes, (1,), data, slot, BARRIER=False, WIDTH=16)


@triton.jit
def publishes_by_stand_in(data, slot):
    tl.store(data + tl.arange(0, 16), tl.full((16,), 1, tl.int64))
    spin_until(slot, 1)


def test_a_stand_in_can_lint_and_can_be_a_barrier():
    data, slot = torch.zeros(16, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)

    def releases(slot, value):
        program_state().check_release("notify")

    def joins_the_block_and_releases(slot, value):
        program_state().barrier()
        program_state().check_release()

    with substitute(spin_until, releases), pytest.raises(LintError, match="notify after a tile store"):
        interpret(publishes_by_stand_in, (1,), data, slot)
    with substitute(spin_until, joins_the_block_and_releases):
        interpret(publishes_by_stand_in, (1,), data, slot)


@triton.jit
def promises(address, n):
    tl.assume(n > 0)
    tl.multiple_of(address.to(tl.pointer_type(tl.bfloat16)), 16)


def test_false_promises_are_errors():
    interpret(promises, (1,), 2**40, 1)
    with pytest.raises(LintError, match="no multiple of 16"):
        interpret(promises, (1,), 2**40 + 8, 1)
    with pytest.raises(AssertionError, match="Assume"):
        interpret(promises, (1,), 2**40, 0)


@triton.jit
def needs_constexpr(n: tl.constexpr):
    return tl.arange(0, n)


@triton.jit
def passes_a_tensor(out, N: tl.constexpr):
    n = N
    tl.store(out + tl.arange(0, N), needs_constexpr(n))


def test_a_tensor_for_a_constexpr_is_an_error():
    with pytest.raises(TypeError, match="n is a"):
        interpret(passes_a_tensor, (1,), torch.zeros(8), N=8)


# --- values


@triton.jit
def peer_pointer(table, peer, DTYPE: tl.constexpr):
    return tl.multiple_of(tl.load(table + peer).to(tl.pointer_type(DTYPE), bitcast=True), 16)


@triton.jit
def two_numbers(big):
    return big, big


@triton.jit
def touches_everything(
    table, desc, out, nothing, flag, scale, pair, address, N, DTYPE: tl.constexpr, BLOCK: tl.constexpr
):
    at = tl.max_contiguous(tl.multiple_of(tl.arange(0, BLOCK), 8), 8)
    tile = desc.load([0, 0])  # (4, 8)
    if nothing is None and flag:
        tile = tile * scale
    target = peer_pointer(table, 1, DTYPE)
    for i in tl.static_range(2):
        tl.store(target + i * BLOCK + at, tl.where(at < N, tile.reshape(BLOCK), 0.0))
    total = 0
    for i in range(N):
        total += i.to(tl.int64)
    step = tl.num_programs(0) * 0 + 1
    while total % 10 != 0:
        total += step
    tl.store(out, total)
    high, low = two_numbers(3)
    tl.store(out + 1, (high << 40) + low)  # int64, or it would overflow
    tl.store(out + 2, tl.load(pair[0]) + pair[1])
    tl.store(address.to(tl.pointer_type(tl.int64)) + 3, SEVEN + tl.program_id(2) * 0)
    tl.store(out + 4 + tl.arange(0, 4), tl.sum(tile, axis=1).to(tl.int64))
    desc.store([0, 0], tile)


@cpu_impl(two_numbers)
def _two_numbers_cpu(value):
    return value_of(value), as_tensor(value_of(value), tl.int64)


def test_arguments_and_control_flow():
    x, y = torch.arange(32).reshape(4, 8).bfloat16(), torch.full((64,), 9.0).bfloat16()
    table, out = torch.tensor([0, y.data_ptr()]), torch.zeros(8, dtype=torch.int64)
    before, tripled = set(globals()), x * 3
    interpret(
        touches_everything, lambda args: (1, 1), table, TensorDescriptor.from_tensor(x, [4, 8]), out, None, True, 3.0,
        (torch.tensor([20]), 2), out.data_ptr(), 30, DTYPE=tl.bfloat16, BLOCK=32, num_warps=8, num_stages=2,
    )  # fmt: skip
    assert torch.equal(x, tripled)
    assert torch.equal(y[:30], tripled.flatten()[:30]) and not y[30:32].any() and torch.equal(y[:32], y[32:])
    assert out.tolist() == [440, (3 << 40) + 3, 22, 7, *tripled.float().sum(1).long().tolist()]
    assert set(globals()) == before  # Triton's interpreter adds its own names to the kernel's module


def test_values_of_tensors():
    assert value_of(as_tensor(2**40, tl.int64)) == 2**40
    assert value_of(as_tensor([1.5, 2.5], tl.bfloat16)).tolist() == [1.5, 2.5]
    assert value_of(tl.constexpr(3)) == 3 and value_of(4) == 4
    assert address_of(as_tensor(2**63 + 8, tl.pointer_type(tl.bfloat16))) == 2**63 + 8
    assert address_of(as_tensor([8, 16], tl.pointer_type(tl.int64))).tolist() == [8, 16]


@triton.jit
def adds_bf16(out):
    tl.atomic_add(out + tl.arange(0, 4), tl.full((4,), 1.0, tl.bfloat16), mask=tl.arange(0, 4) < 3, sem="relaxed")


def test_atomic_add_of_bf16_by_several_programs():
    out = torch.zeros(4, dtype=torch.bfloat16)
    interpret(adds_bf16, (8,), out)
    assert out.tolist() == [8, 8, 8, 0]


# --- refusals, and the way back to the compiler


@triton.jit
def has_no_stand_in(x):
    return tl.inline_asm_elementwise("mov.b64 $0, $1;", "=l,l", [x], dtype=tl.int64, is_pure=True, pack=1)


@triton.jit
def calls_assembly(out):
    tl.store(out, has_no_stand_in(tl.load(out)))


def test_what_cannot_run_is_refused_with_the_way_out(monkeypatch):
    out = torch.zeros(1, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="cpu_impl"):
        interpret(calls_assembly, (1,), out)
    with pytest.raises(TypeError, match="no parameter num_wraps"):
        interpret(calls_assembly, (1,), out, num_wraps=4)
    with pytest.raises(ValueError, match="argument out lies on meta"):
        interpret(calls_assembly, (1,), out.to("meta"))
    monkeypatch.setattr(triton, "__version__", "3.5.1")
    with pytest.raises(RuntimeError, match=re.escape("Triton 3.5.1 is outside the tested versions, 3.6 to 3.9")):
        interpret(calls_assembly, (1,), out)


def test_an_interpreted_kernel_still_compiles(monkeypatch, tmp_path):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    assert passes_data()
    source = triton.compiler.ASTSource(
        fn=first_waits_for_last,
        signature={"slot": "*i64", "data": "*i64", "out": "*i64", "BY_STAND_IN": "constexpr"},
        constexprs={(3,): True},
    )
    compiled = triton.compile(source, target=triton.backends.compiler.GPUTarget("cuda", 90, 32))
    assert "trap;" in compiled.asm["ptx"]  # the assembly, and not the stand-in
    assert passes_data()


COMPILES_AFTER_INTERPRETING = """
import torch, triton, triton.language as tl
from tests.ptx import hopper
from tests.lang.test_interpreter import refuses
from tp_overlap_kernels.lang.interpreter import interpret

interpret(refuses, 1, torch.zeros(1), True)
try:
    hopper(refuses, {"x_ptr": "*fp32"}, {"OK": False})
except triton.CompilationError:
    print("refused")
"""


@triton.jit
def refuses(x_ptr, OK: tl.constexpr):
    tl.static_assert(OK, "on purpose")
    tl.store(x_ptr, 1.0)


def test_a_process_that_interpreted_first_compiles_no_less_strictly(tmp_path):
    """The compiler remembers tl.static_assert when it is first imported, which must not be during a launch."""
    command = [sys.executable, "-c", COMPILES_AFTER_INTERPRETING]
    root = pathlib.Path(__file__).resolve().parents[2]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    environment = os.environ | {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": path}
    ended = subprocess.run(command, capture_output=True, text=True, timeout=240, env=environment)
    assert ended.stdout.strip() == "refused", ended.stderr[-2000:]
