"""The assembly behind the words on AMD GPUs, and nowhere else: GCN of gfx942 (CDNA 3). Compiled in CI, never run.

Less is assembly than in ptx.py: barriers and atomics are Triton's. An atomic of a scalar is done by one thread, and
what it returns is handed to all. What the memory model of gfx942 asks for at system scope is written out here:

* A release is `buffer_wbl2 sc0 sc1`, which writes back what the L2 holds of other devices' memory, and a wait for that
  and for the wave's own stores. Every wave does it, and then comes the barrier: `s_barrier` waits for waves and not for
  their stores, and a release by one wave would wait for its own alone. It is not left to an atomic with sem="release":
  where LLVM knows of no access under way, it drops the wait between the write-back and the atomic.
* An acquire is `buffer_inv sc0 sc1`, which drops what the L1 holds, and the L2 of other devices' memory.
* Loads and stores with sc0 sc1 go past the caches.

A wait is a loop that all threads go through together, since there are barriers in it. So each look, at a word or at the
clock, is handed round the CTA before anything is decided by it (`word_at`, `clock_ns`).

No barrier stands inside a piece of assembly: LLVM may copy such a piece into both sides of a branch, and a wave that
goes through both would come to the barrier twice. What stands here does no harm when done twice.
"""

import triton
import triton.language as tl

from .target import threads

TICK_NS = tl.constexpr(10)  # s_memrealtime counts at 100 MHz on gfx942

_SETTLE = tl.constexpr("s_waitcnt vmcnt(0) lgkmcnt(0)\nv_mov_b32 $0, 0")
_RELEASE = tl.constexpr("buffer_wbl2 sc0 sc1\ns_waitcnt vmcnt(0) lgkmcnt(0)\nv_mov_b32 $0, 0")
_ACQUIRE = tl.constexpr("s_waitcnt vmcnt(0) lgkmcnt(0)\nbuffer_inv sc0 sc1\nv_mov_b32 $0, 0")
_LOAD_64 = tl.constexpr("global_load_dwordx2 $0, $1, off sc0 sc1\ns_waitcnt vmcnt(0)")
_LOAD_32 = tl.constexpr("global_load_dword $0, $1, off sc0 sc1\ns_waitcnt vmcnt(0)")
_TICKS = tl.constexpr("s_memrealtime $0\ns_waitcnt lgkmcnt(0)")
_SLEEP = tl.constexpr("s_sleep 3\nv_mov_b32 $0, 0")  # 192 cycles, about 100 ns
_ZERO = tl.constexpr("v_mov_b32 $0, 0")


@triton.jit
def join():
    """CTA barrier, before which all loads and stores of all its threads have ended; a store is in the L2 or beyond."""
    tl.inline_asm_elementwise(_SETTLE, "=v", [], dtype=tl.int32, is_pure=False, pack=1)
    tl.debug_barrier()


@triton.jit
def release():
    """This wave's stores are where other devices see them; by every wave, before a barrier or by itself."""
    tl.inline_asm_elementwise(_RELEASE, "=v", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def acquire():
    """Loads from here on see what was published before the words that have been seen. By every wave."""
    tl.inline_asm_elementwise(_ACQUIRE, "=v", [], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def words_at(addresses, BITS: tl.constexpr):
    """The words of 32 or 64 bits at these addresses, int64, as the memory has them now: relaxed, system scope."""
    if BITS == 64:
        return tl.inline_asm_elementwise(_LOAD_64, "=v,v", [addresses], dtype=tl.int64, is_pure=False, pack=1)
    else:
        return tl.inline_asm_elementwise(_LOAD_32, "=v,v", [addresses], dtype=tl.int32, is_pure=False, pack=1).to(
            tl.int64
        )


@triton.jit
def word_at(address):
    """The 64-bit word there, as `words_at`, the same in all threads: the greatest that any of them has seen."""
    EACH: tl.constexpr = threads()
    return tl.max(words_at(address + tl.zeros((EACH,), tl.int64), 64))


@triton.jit
def clock_ns():
    """Nanoseconds since some time, the same in all threads."""
    EACH: tl.constexpr = threads()
    zeros = tl.zeros((EACH,), tl.int32)
    return tl.max(tl.inline_asm_elementwise(_TICKS, "=s,v", [zeros], dtype=tl.int64, is_pure=False, pack=1)) * TICK_NS


@triton.jit
def stagger(delay_ns):
    """Each wave sleeps so long, by a clock of its own."""
    start = tl.inline_asm_elementwise(_TICKS, "=s", [], dtype=tl.int64, is_pure=False, pack=1)
    now = start
    while (now - start) * TICK_NS < delay_ns:
        tl.inline_asm_elementwise(_SLEEP, "=v", [], dtype=tl.int32, is_pure=False, pack=1)
        now = tl.inline_asm_elementwise(_TICKS, "=s", [], dtype=tl.int64, is_pure=False, pack=1)


@triton.jit
def zero_after(token):
    """0, in a way that the compiler cannot know."""
    return tl.inline_asm_elementwise(_ZERO, "=v,v", [token], dtype=tl.int32, is_pure=True, pack=1)
