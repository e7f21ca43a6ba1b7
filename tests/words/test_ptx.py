"""What the compiler makes of the words, for sm_90a: order, scope, a barrier before each release and after each acquire,
an end to each wait, wide accesses, and no load before its wait."""

from __future__ import annotations

import functools
import re

import pytest

from examples import triton_distributed_all_gather as all_gather
from examples import triton_distributed_gemm_reduce_scatter as gemm_reduce_scatter
from tests import ptx
from tests.kernels import gates
from tests.words import kernels

# kernel: types of its arguments, constants; both notify and wait are in each
BOTH = {
    "message": dict(x_ptr="*bf16", inbox_ptr="*bf16", signal_ptr="*i64", out_ptr="*bf16", call="i32", N=1024),
    "relay": dict(x_ptr="*bf16", inbox_ptr="*bf16", signal_ptr="*u64", out_ptr="*bf16", N=1024),
    "wait_there": dict(signal_ptr="*i64", out_ptr="*i64"),
    "queue": dict(signal_ptr="*u64", item_ptr="*i32", out_ptr="*i32", items="i32"),
    "product_of_parts": dict(a_ptr="*bf16", b_ptr="*bf16", out_ptr="*fp32", signal_ptr="*i64", parts="i32", BLOCK=64),
}
OF_EXAMPLES = {
    "all_gather": dict(
        x_ptr="*bf16", gathered_ptr="*bf16", signal_ptr="*i64", out_ptr="*bf16", n="i32", call="i32", BLOCK=1024
    ),
    "gemm_reduce_scatter": dict(
        a_ptr="*bf16",
        b_ptr="*bf16",
        partial_ptr="*bf16",
        signal_ptr="*i64",
        out_ptr="*bf16",
        **dict.fromkeys(("M", "N", "K", "call"), "i32"),
        **dict.fromkeys(("BLOCK_M", "BLOCK_N", "BLOCK_K"), 64),
    ),
}
SIZES = ("n", "N", "K")  # of the examples; multiples of 16, as in a model


@functools.cache
def compiled(name: str):
    return compiled_by(ptx.hopper, name)


def compiled_by(compiler, name: str):
    """By tests.ptx.hopper, or another of its kind."""
    in_example = getattr(all_gather, name, None) or getattr(gemm_reduce_scatter, name, None)
    kernel = in_example if name in OF_EXAMPLES else getattr(kernels, name)
    arguments = {**OF_EXAMPLES, **BOTH, **OTHERS}[name]
    types = {key: value for key, value in arguments.items() if isinstance(value, str)} | {"tpo_world": "*i64"}
    constants = {key: value for key, value in arguments.items() if key not in types}
    aligned = [key for key, kind in types.items() if kind.startswith("*") or (name in OF_EXAMPLES and key in SIZES)]
    return compiler(kernel, types, constants | {"num_warps": 4}, aligned)


OTHERS = {
    "wait_for_all": dict(signal_ptr="*i32", out_ptr="*i32", count="i32", value="i32"),
    "add_at_all": dict(signal_ptr="*i64", addend="i64"),
}


@pytest.mark.parametrize("name", [*BOTH, *OF_EXAMPLES])
def test_order_and_scope(name):
    text = compiled(name).asm["ptx"]
    gates.barrier_before_release(text)
    gates.barrier_after_acquire(text)
    gates.system_scope(text)
    gates.no_multicast(text)
    gates.plain_loads(compiled(name))
    every_wait_ends(text)


def every_wait_ends(text: str) -> None:
    waits = re.findall(r"ld\.acquire\.sys\.global.*?(?:barrier\.red|\Z)", "\n".join(gates.lines_of(text)), flags=re.S)
    assert waits, "nothing waits"
    for wait in waits:
        assert "%globaltimer" in wait, "a wait without end"
        assert re.search(r"ld\.relaxed\.gpu\.global\.b64 failed", wait), "a wait that outlasts another's failure"
        assert wait.endswith("barrier.red"), "a token that threads do not share"


def test_words_of_32_bits_are_polled_as_such():
    text = compiled("wait_for_all").asm["ptx"]
    assert gates.count(text, r"ld\.acquire\.sys\.global\.b32 seen")
    assert not gates.count(text, r"ld\.acquire\.sys\.global\.b64 seen")
    every_wait_ends(text)


def test_adding_is_a_release_behind_a_barrier():
    lines = gates.lines_of(compiled("add_at_all").asm["ptx"])
    found = [at for at, line in enumerate(lines) if "red.release.sys.global.add.u64" in line]
    assert len(found) == 2
    for at in found:
        before = next(line for line in reversed(lines[:at]) if not gates.ON_REGISTERS.match(line))
        assert gates.BARRIER.search(before), f"{before!r} between the barrier and the release"


@pytest.mark.parametrize("name", ["message", "relay", "all_gather", "gemm_reduce_scatter"])
def test_wide_accesses(name):
    """A peer's place, and a pointer that was tied to a token, keep their alignment."""
    gates.sixteen_byte_accesses(compiled(name).asm["ptx"])


def test_a_wait_in_a_loop_keeps_its_loads_behind_it():
    """The software pipeliner would fetch the parts of later turns before their waits."""
    lines = gates.lines_of(compiled("product_of_parts").asm["ptx"])
    waits = [at for at, line in enumerate(lines) if "ld.acquire.sys.global" in line]
    tiles = [at for at, line in enumerate(lines) if re.search(r"ld\.global\.v4|cp\.async\.\S*global", line)]
    assert len(waits) == 1 and tiles, "where are they?"
    assert waits[0] < tiles[0], f"{lines[tiles[0]]!r} stands before the wait"
    joined = next(at for at in range(waits[0], len(lines)) if "barrier.red" in lines[at])
    assert joined < tiles[0]


def test_the_product_beside_it_is_pipelined():
    """A loop with no wait of its own, in a kernel that waits."""
    copies = gates.count(compiled("gemm_reduce_scatter").asm["ptx"], r"cp\.async\.\S*shared\.global")
    assert copies, "no asynchronous copies: no pipeline"


def test_a_load_through_a_consumed_pointer_depends_on_the_token():
    text = compiled("message").asm["ttgir"]
    token = re.search(r"(%\S+) = tt\.elementwise_inline_asm .*ld\.acquire", text)[1]
    zero = re.search(rf'(%\S+) = tt\.elementwise_inline_asm "mov.u32 \$0, 0;" .* {token} : ', text)[1]
    scaled = re.search(rf"(%\S+) = arith\.\w+ {zero}, ", text)[1]
    assert re.search(rf"tt\.addptr %inbox_ptr, {scaled} ", text)
