"""One kernel a meaning. Launched with one program unless its docstring says otherwise; N is the tile's elements.

The caller joins its CTA before `notify`, as Triton-Distributed demands.
"""

import triton.language as tl

from . import dl, jit


@jit
def who_am_i(out_ptr):
    """rank and num_ranks: of this process, int32; an axis changes nothing."""
    tl.store(out_ptr, dl.rank())
    tl.store(out_ptr + 1, dl.num_ranks())
    tl.store(out_ptr + 2, dl.rank(0))
    tl.store(out_ptr + 3, dl.num_ranks(axis=0))


@jit
def write_at(x_ptr, peer, value, N: tl.constexpr):
    """symm_at: the same place at the peer, also from the middle of a tensor and for one's own rank."""
    tl.store(dl.symm_at(x_ptr, peer) + tl.arange(0, N), value + tl.arange(0, N))
    tl.store(dl.symm_at(x_ptr + N, peer), value - 1)


@jit
def next_of(rank, num_ranks):
    """A device function of its own, which asks for nothing."""
    return (rank + 1) % num_ranks


@jit
def pass_on(x_ptr, signal_ptr):
    """A device function with words in it."""
    peer = next_of(dl.rank(), dl.num_ranks())
    dl.notify(signal_ptr, peer, signal=tl.load(x_ptr), sig_op="set", comm_scope="intra_node")


@jit
def set_at_the_next(x_ptr, signal_ptr):
    """notify "set" writes the word at the peer, not here; through a function that is called."""
    pass_on(x_ptr, signal_ptr)


@jit
def add_at_all(signal_ptr, addend):
    """notify "add" of every rank counts at every rank; the scope "inter_node" reaches peers on the same node too."""
    for peer in range(0, dl.num_ranks()):
        dl.notify(signal_ptr, peer, signal=addend, sig_op="add", comm_scope="intra_node")
        dl.notify(signal_ptr + 1, peer, signal=1, sig_op="add")


@jit
def set_here(signal_ptr, peer, value):
    """comm_scope "gpu" writes here, whatever the rank says."""
    dl.notify(signal_ptr, peer, signal=value, sig_op="set", comm_scope="gpu")


@jit
def message(x_ptr, inbox_ptr, signal_ptr, out_ptr, call, N: tl.constexpr):
    """What all threads stored before notify is seen by all threads after wait. Signals count calls from 1."""
    rank, num_ranks = dl.rank(), dl.num_ranks()
    peer = (rank + 1) % num_ranks
    index = tl.arange(0, N)
    tl.store(dl.symm_at(inbox_ptr, peer) + index, tl.load(x_ptr + index))
    tl.debug_barrier()
    dl.notify(signal_ptr, peer, signal=call, sig_op="set", comm_scope="intra_node")
    token = dl.wait(signal_ptr, 1, "sys", "acquire", waitValue=call)
    inbox_ptr = dl.consume_token(inbox_ptr, token)
    tl.store(out_ptr + index, tl.load(inbox_ptr + index))
    # the inbox may be filled again
    tl.debug_barrier()
    dl.notify(signal_ptr + 1, (rank + num_ranks - 1) % num_ranks, signal=call, sig_op="set", comm_scope="intra_node")
    dl.wait(signal_ptr + 1, 1, "sys", "acquire", waitValue=call)


@jit
def relay(x_ptr, inbox_ptr, signal_ptr, out_ptr, N: tl.constexpr):
    """What was seen by a wait is published by the next notify: rank 0 stores at the last, tells 1, who tells 2, ..."""
    rank, num_ranks = dl.rank(), dl.num_ranks()
    index, last = tl.arange(0, N), num_ranks - 1
    if rank == 0:
        tl.store(dl.symm_at(inbox_ptr, last) + index, tl.load(x_ptr + index))
    else:
        token = dl.wait(signal_ptr, 1, "sys", "acquire", waitValue=1)
        inbox_ptr = dl.consume_token(inbox_ptr, token)
    if rank == last:
        tl.store(out_ptr + index, tl.load(inbox_ptr + index))
    else:
        tl.debug_barrier()
        dl.notify(signal_ptr, rank + 1, signal=1, sig_op="set", comm_scope="intra_node")


@jit
def wait_for_all(signal_ptr, out_ptr, count, value):
    """wait lasts until every one of `count` words equals the value."""
    token = dl.wait(signal_ptr, count, "sys", "acquire", waitValue=value)
    signal_ptr = dl.consume_token(signal_ptr, token)
    for i in range(0, count):
        tl.store(out_ptr + i, tl.load(signal_ptr + i))


@jit
def meet(x_ptr, signal_ptr, out_ptr, N: tl.constexpr):
    """Every rank stores at every rank and raises a word of its own there; one wait for all the words."""
    rank, num_ranks = dl.rank(), dl.num_ranks()
    for peer in range(0, num_ranks):
        tl.store(dl.symm_at(x_ptr, peer) + rank * N + tl.arange(0, N), tl.zeros((N,), tl.int32) + rank + 1)
        tl.debug_barrier()
        dl.notify(signal_ptr + rank, peer, signal=1, sig_op="set", comm_scope="intra_node")
    token = dl.wait(signal_ptr, num_ranks, "sys", "acquire", waitValue=1)
    x_ptr = dl.consume_token(x_ptr, token)
    for source in range(0, num_ranks):
        tl.store(out_ptr + source, tl.max(tl.load(x_ptr + source * N + tl.arange(0, N)), 0))


@jit
def wait_there(signal_ptr, out_ptr):
    """wait takes the address of a peer's word. The last rank raises its own word, the others watch it."""
    last = dl.num_ranks() - 1
    if dl.rank() == last:
        dl.notify(signal_ptr, last, signal=7, sig_op="set", comm_scope="gpu")
    there = dl.symm_at(signal_ptr, last)
    token = dl.wait(there, 1, "gpu", "acquire", waitValue=7)
    tl.store(out_ptr, tl.load(dl.consume_token(there, token)))


@jit
def queue(signal_ptr, item_ptr, out_ptr, items):
    """Grid of two: program 0 produces at the next rank, program 1 consumes, through one slot that is emptied each time.

    2i means empty for item i, 2i + 1 full.
    """
    rank = dl.rank()
    peer = (rank + 1) % dl.num_ranks()
    if tl.program_id(0) == 0:
        for i in range(0, items):
            there = dl.symm_at(signal_ptr, peer)
            token = dl.wait(there, 1, "sys", "acquire", waitValue=2 * i)
            tl.store(dl.consume_token(dl.symm_at(item_ptr, peer), token), 100 * rank + i)
            tl.debug_barrier()
            dl.notify(signal_ptr, peer, signal=2 * i + 1, sig_op="set", comm_scope="intra_node")
    else:
        for i in range(0, items):
            token = dl.wait(signal_ptr, 1, "sys", "acquire", waitValue=2 * i + 1)
            tl.store(out_ptr + i, tl.load(dl.consume_token(item_ptr, token)))
            tl.debug_barrier()
            dl.notify(signal_ptr, rank, signal=2 * i + 2, sig_op="set", comm_scope="intra_node")


@jit
def product_of_parts(a_ptr, b_ptr, out_ptr, signal_ptr, parts, BLOCK: tl.constexpr):
    """Grid of two: program 1 fills the next rank's a part by part, with part + 1, and raises a signal for each.

    Program 0: out = a @ b, with a wait in the loop over the parts, which would be software-pipelined without it.
    a: (BLOCK, parts * BLOCK), symmetric; b: (parts * BLOCK, BLOCK).
    """
    rows, cols = tl.arange(0, BLOCK)[:, None], tl.arange(0, BLOCK)[None, :]
    if tl.program_id(0) == 1:
        peer = (dl.rank() + 1) % dl.num_ranks()
        for part in range(0, parts):
            there = dl.symm_at(a_ptr, peer) + rows * (parts * BLOCK) + part * BLOCK + cols
            tl.store(there, tl.full((BLOCK, BLOCK), part + 1, tl.float32).to(a_ptr.dtype.element_ty))
            tl.debug_barrier()
            dl.notify(signal_ptr + part, peer, signal=1, sig_op="set", comm_scope="intra_node")
    else:
        acc = tl.zeros((BLOCK, BLOCK), dtype=tl.float32)
        for part in tl.range(0, parts, num_stages=3):
            token = dl.wait(signal_ptr + part, 1, "sys", "acquire", waitValue=1)
            a = tl.load(dl.consume_token(a_ptr, token) + rows * (parts * BLOCK) + part * BLOCK + cols)
            b = tl.load(b_ptr + (part * BLOCK + rows) * BLOCK + cols)
            acc = tl.dot(a, b, acc)
        tl.store(out_ptr + rows * BLOCK + cols, acc)


@jit
def tokens_change_nothing(x_ptr, out_ptr, signal_ptr, N: tl.constexpr):
    """consume_token is the identity: of pointers, tiles of pointers, integers, tiles of numbers."""
    token = dl.wait(signal_ptr, 1, "sys", "acquire", waitValue=0)
    index = dl.consume_token(tl.arange(0, N), token)
    x = dl.consume_token(tl.load(dl.consume_token(x_ptr + index, token)), token)
    tl.store(dl.consume_token(out_ptr, token) + index, x)


@jit
def wait_in_vain(signal_ptr, out_ptr):
    """Ours alone: a wait ends."""
    tl.store(out_ptr, dl.wait(signal_ptr, 2, "sys", "acquire", waitValue=5))
