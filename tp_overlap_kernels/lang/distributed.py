"""Triton-Distributed's words on stock Triton: rank, num_ranks, symm_at, notify, wait, consume_token.

    from tp_overlap_kernels.lang import distributed as dl     # was: import triton_dist.language as dl

    @dl.jit                                                   # was: @triton_dist.jit
    def kernel(...): ...

    kernel[grid](..., world=world)                            # a memory.world.World, whose tensors are symmetric

Names, arguments and meanings are theirs. Where theirs leaves something open or to the caller, ours is the stronger:

* `notify` joins the CTA before it releases, and `wait` after it has acquired. So all threads must come to them.
* Scopes are checked and widened to the system: theirs may wait at "gpu" for a word that another GPU writes.
* A wait ends: after the world's timeout, and at once when another wait has, the token is not 0 and `World.check`
  raises. What the kernel stores then is worth nothing.
* `wait` takes any number of words, theirs 32; and "inter_node" is as "intra_node": a world lies on one host.
* A loop with a `wait` in it is not software-pipelined, and `consume_token` makes a pointer depend on the token: no load
  is moved above its wait. Tensor descriptors are refused: a TMA load is ordered by another fence than an acquire.

Signals are the caller's, as there: set or added to, compared for equality, and reset by whoever uses them again.
Every function takes a last argument that `jit` supplies (with_world.py).
"""

import ctypes
import time

import triton
import triton.language as tl

from . import gcn
from .distributed_ptx import NOTIFY_ADD, WAIT_ACQUIRE_32, WAIT_ACQUIRE_64, WAIT_RELAXED_32, WAIT_RELAXED_64
from .interpreter import as_tensor, cpu_impl, pause, program_state, value_of
from .signal import notify as set_slot
from .signal_amd import notify_add
from .target import on_amd, threads
from .with_world import jit

__all__ = ["consume_token", "jit", "notify", "num_ranks", "rank", "symm_at", "wait"]

# Words of a world's table, int64 on the device of its ranks; made by memory.world.
RANK = tl.constexpr(0)
NUM_RANKS = tl.constexpr(1)
TIMEOUT_NS = tl.constexpr(2)  # 0: waits last for ever
FAILED = tl.constexpr(3)  # nonzero: every wait returns at once
ADDRESS = tl.constexpr(4)  # of the word that was waited for in vain
WANTED = tl.constexpr(5)
SEEN = tl.constexpr(6)
BASES = tl.constexpr(8)  # address of each rank's heap, as this rank sees it

_SET, _INTER_NODE = tl.constexpr("set"), tl.constexpr("inter_node")  # Triton 3.6 takes no bare string as a default


@triton.jit
def rank(axis=-1, tpo_world=None):
    """This process's rank, int32. axis: not looked at, as there."""
    tl.static_assert(tpo_world is not None, "rank: the function that calls it needs the decorator distributed.jit")
    return tl.load(tpo_world + RANK).to(tl.int32)


@triton.jit
def num_ranks(axis=-1, tpo_world=None):
    """How many ranks there are, int32."""
    tl.static_assert(tpo_world is not None, "num_ranks: the function that calls it needs the decorator distributed.jit")
    return tl.load(tpo_world + NUM_RANKS).to(tl.int32)


@triton.jit
def symm_at(ptr, rank, tpo_world=None):
    """The same place in the memory of `rank`. ptr: a pointer into a symmetric tensor of this rank; a scalar.

    Heaps are aligned alike, so what is known of the alignment of ptr stays known: that is what wide accesses come from.
    """
    tl.static_assert(tpo_world is not None, "symm_at: the function that calls it needs the decorator distributed.jit")
    ITEM_BYTES: tl.constexpr = ptr.dtype.element_ty.primitive_bitwidth // 8
    own = tl.load(tpo_world + BASES + tl.load(tpo_world + RANK))
    distance = (tl.load(tpo_world + BASES + rank) - own) // ITEM_BYTES  # exact
    return ptr + tl.multiple_of(distance, 16)


@triton.jit
def notify(ptr, rank, signal=1, sig_op: tl.constexpr = _SET, comm_scope: tl.constexpr = _INTER_NODE, tpo_world=None):
    """Publish all that the CTA has stored or seen, by `signal` in a 64-bit word: release, system scope.

    ptr: our own pointer to the word. It is written at `rank`, or here where comm_scope is "gpu". sig_op: "set", "add".
    """
    tl.static_assert(sig_op == "set" or sig_op == "add", "notify: sig_op must be 'set' or 'add'")
    tl.static_assert(
        comm_scope == "gpu" or comm_scope == "intra_node" or comm_scope == "inter_node",
        "notify: comm_scope must be 'gpu', 'intra_node' or 'inter_node'",
    )
    tl.static_assert(ptr.dtype.element_ty.primitive_bitwidth == 64, "notify: the signal must be a 64-bit integer")
    if comm_scope == "gpu":
        slot = ptr.to(tl.int64)
    else:
        slot = symm_at(ptr, rank, tpo_world).to(tl.int64)
    value = tl.full((), 0, tl.int64) + signal
    if sig_op == "set":
        set_slot(slot, value)
    else:
        add_to_slot(slot, value)


@triton.jit
def add_to_slot(slot, value):
    """As signal.notify, but adding."""
    if on_amd():
        notify_add(slot, value)
    else:
        tl.inline_asm_elementwise(NOTIFY_ADD, "=r,l,l", [slot, value], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def wait(barrierPtrs, numBarriers, scope: tl.constexpr, semantic: tl.constexpr, waitValue=1, tpo_world=None):
    """Sleep until each of `numBarriers` words from `barrierPtrs` on equals `waitValue`; the token for consume_token.

    barrierPtrs: a pointer to 32- or 64-bit integers, ours or from symm_at. scope: "cta", "gpu" or "sys"; all are "sys".
    semantic: "acquire", after which the CTA sees what was published with those values; or "relaxed", which promises
    nothing but the values.
    """
    tl.static_assert(tpo_world is not None, "wait: the function that calls it needs the decorator distributed.jit")
    tl.static_assert(scope == "cta" or scope == "gpu" or scope == "sys", "wait: scope must be 'cta', 'gpu' or 'sys'")
    tl.static_assert(semantic == "acquire" or semantic == "relaxed", "wait: semantic must be 'acquire' or 'relaxed'")
    BITS: tl.constexpr = barrierPtrs.dtype.element_ty.primitive_bitwidth
    tl.static_assert(BITS == 32 or BITS == 64, "wait: words must be 32- or 64-bit integers")
    count = tl.full((), 0, tl.int32) + numBarriers
    token = wait_equal(barrierPtrs.to(tl.int64), count, waitValue, tpo_world.to(tl.int64), semantic, BITS)
    # A barrier that the compiler knows: a loop that waits is not software-pipelined, whose loads would overtake the
    # waits. Loops inside such a loop are.
    tl.debug_barrier()
    return token


@triton.jit
def wait_equal(first, count, wanted, world, SEMANTIC: tl.constexpr, BITS: tl.constexpr):
    """`wait` of addresses. Returns 0, or 1 if it has ended in vain, equal in all threads."""
    wanted = tl.full((), 0, tl.int64) + wanted
    if on_amd():
        return _poll_amd(first, count, wanted, world, SEMANTIC, BITS)
    elif BITS == 64:
        ASM: tl.constexpr = WAIT_ACQUIRE_64 if SEMANTIC == "acquire" else WAIT_RELAXED_64
        return _poll(ASM, "=r,l,r,l,l", first, count, wanted, world)
    else:
        ASM_32: tl.constexpr = WAIT_ACQUIRE_32 if SEMANTIC == "acquire" else WAIT_RELAXED_32
        return _poll(ASM_32, "=r,l,r,r,l", first, count, wanted.to(tl.int32), world)


@triton.jit
def _poll(ASM: tl.constexpr, OPERANDS: tl.constexpr, first, count, wanted, world):
    args = [first, count, wanted, world]
    return tl.inline_asm_elementwise(ASM, OPERANDS, args, dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def _poll_amd(first, count, wanted, world, SEMANTIC: tl.constexpr, BITS: tl.constexpr):
    """All threads look at as many words as there are threads, until none differs; then at the next ones."""
    EACH: tl.constexpr = threads()
    if BITS == 32:
        wanted = wanted.to(tl.int32).to(tl.int64)
    table = world.to(tl.pointer_type(tl.int64))
    status = tl.full((), 0, tl.int32)
    started = tl.full((), 0, tl.int64)
    polls = tl.full((), 0, tl.int32)
    for start in tl.range(0, count, EACH):
        # past the end: the last word once more
        addresses = first + tl.minimum(start + tl.arange(0, EACH), count - 1).to(tl.int64) * (BITS // 8)
        seen = gcn.words_at(addresses, BITS)
        while (status == 0) & (tl.max((seen != wanted).to(tl.int32)) != 0):
            polls += 1
            if polls % 1024 == 512:
                now = gcn.clock_ns()
                started = tl.where(started == 0, now, started)
                limit = tl.load(table + TIMEOUT_NS)
                if gcn.word_at(world + FAILED * 8) != 0:
                    status = tl.full((), 1, tl.int32)
                elif (limit != 0) & (now - started > limit):
                    status = tl.full((), 1, tl.int32)
                    _report_amd(table, addresses, wanted, seen)
            seen = gcn.words_at(addresses, BITS)
    if SEMANTIC == "acquire":
        gcn.acquire()
    return status


@triton.jit
def _report_amd(table, addresses, wanted, seen):
    """Leave in the world's table one word that was waited for in vain, unless there is one."""
    zero = tl.full((), 0, tl.int64)
    if tl.atomic_cas(table + FAILED, zero, zero + 1, sem="acq_rel", scope="gpu") == 0:
        address = tl.max(tl.where(seen != wanted, addresses, 0))
        tl.store(table + ADDRESS, address)
        tl.store(table + WANTED, wanted)
        tl.store(table + SEEN, tl.max(tl.where(addresses == address, seen, -(1 << 63))))


@triton.jit
def consume_token(value, token):
    """`value`, not known before `token` is: a load through it comes after the wait. Pointers and integers; other values
    have been loaded already and are handed back as they are."""
    tl.static_assert(
        not hasattr(value, "block_type"),
        "consume_token: a tensor descriptor loads by TMA, which a wait does not order; tl.load from a pointer",
    )
    if value.dtype.is_ptr():
        return value + zero_after(token) * 16  # what is known of the alignment stays known: a hint on 0 would be lost
    if value.dtype.is_int():
        return value + zero_after(token).to(value.dtype)
    return value


@triton.jit
def zero_after(token):
    """0, in a way that the compiler cannot know."""
    if on_amd():
        return gcn.zero_after(token)
    else:
        return tl.inline_asm_elementwise("mov.u32 $0, 0;", "=r,r", [token], dtype=tl.int32, is_pure=True, pack=1)


# ---- the CPU's stand-ins


@cpu_impl(add_to_slot)
def _add_to_slot_cpu(slot, value):
    program_state().barrier()  # the one inside the primitive
    pointer = as_tensor(value_of(slot), tl.int64).to(tl.pointer_type(tl.int64))
    tl.atomic_add(pointer, value, sem="release", scope="sys")
    return as_tensor(0, tl.int32)


@cpu_impl(zero_after)
def _zero_after_cpu(token):
    return as_tensor(0, tl.int32)


@cpu_impl(wait_equal)
def _wait_equal_cpu(first, count, wanted, world, SEMANTIC, BITS):
    kind, dtype = (ctypes.c_int64, tl.int64) if value_of(BITS) == 64 else (ctypes.c_int32, tl.int32)
    wanted = kind(value_of(wanted)).value
    world = (ctypes.c_int64 * BASES.value).from_address(value_of(world))
    started, zero = time.monotonic_ns(), as_tensor(0, dtype)
    for i in range(value_of(count)):
        address, polls = value_of(first) + i * (value_of(BITS) // 8), 0
        word = as_tensor(address, tl.int64).to(tl.pointer_type(dtype))
        while (seen := value_of(tl.atomic_add(word, zero, sem=value_of(SEMANTIC), scope="sys"))) != wanted:
            polls += 1
            pause(polls)
            if polls % 64:
                continue
            program_state().check_stop()
            late = world[TIMEOUT_NS.value] and time.monotonic_ns() - started > world[TIMEOUT_NS.value]
            if late and not world[FAILED.value]:
                world[ADDRESS.value], world[WANTED.value], world[SEEN.value] = address, wanted, seen
                world[FAILED.value] = 1
            if world[FAILED.value]:
                return as_tensor(1, tl.int32)
    return as_tensor(0, tl.int32)
