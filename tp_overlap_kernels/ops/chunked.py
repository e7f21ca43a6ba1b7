"""The chunked plan, two ranks: cuBLAS on row chunks, the copy engine between the ranks, the sum as beta = 1 of a GEMM.

    out[M, N] = sum over r of a_r @ b_r.T  (+ bias), all of it (all-reduce) or our rows of it (reduce-scatter)

Rounding: f32 over K; the peer's partial is rounded once to the wire dtype and enters the owner's GEMM as beta * C; one
last rounding. (cuBLAS may round a product before it adds beta * C, be that the peer's partial or a bias.) The bias
enters the peer's partial. The owner alone adds and sends its bits: they are equal on both ranks.
Bytes: all-reduce M*N*itemsize a rank, half of it partials and half sums; reduce-scatter the half.

    compute stream                      push stream                            collect stream (all-reduce)       time
    begin                                                                                                         |
    gemm of the peer's rows, chunk 0    wait until the peer has left the                                          v
                                        last staged call
    gemm of the peer's rows, chunk 1    copy chunk 0 to the peer, notify
    wait for the peer's chunk 0         copy chunk 1 to the peer, notify
    gemm of own rows, chunk 0, + chunk  copy own sums 0 to the peer, notify    wait for the peer's sums 0
    ...                                 ...                                    copy them to out
    join both streams, end

Fresh, reuse, live: see kernels/stream_signals.py, whose kernels are all the signalling there is. On the CPU the
streams are one, in an order in which every push stands before the wait that needs it on the other side.
"""

import contextlib
import itertools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..dispatch import Plan
from ..kernels import stream_signals
from ..lang.launch import specialisation
from ..memory.arena import Arena
from ..memory.layout import rows_per_rank
from ..memory.record import op_code
from .launches import _launch, _triton_dtype

ROW_ALIGNMENT = 128  # rows of a chunk: whole GEMM tiles


@dataclass
class _Call:
    """One call's signals: thin launches of kernels/stream_signals.py with the arena's pointers filled in."""

    arena: Arena
    op: str
    word: int

    @property
    def peer(self) -> int:
        return 1 - self.arena.rank

    def begin(self) -> None:
        arena = self.arena
        launch = _launch(arena, stream_signals.begin_call, (), WORLD=2, num_warps=1)
        launch(1, arena.heap, arena.control, arena.layout.header, self.word, arena.rank)

    def wait_peers(self) -> None:
        arena = self.arena
        launch = _launch(arena, stream_signals.wait_peers, (), OP=op_code(self.op), WORLD=2, num_warps=1)
        launch(1, arena.heap, arena.control, arena.record.words, arena.layout.done, arena.rank, arena.timeout_ns)

    def notify(self, pad: int, index: int) -> None:
        arena = self.arena
        launch = _launch(arena, stream_signals.notify_peer, (), WORLD=2, num_warps=1)
        launch(1, arena.heap, arena.control, pad + 8 * index, self.peer, self.word)

    def wait(self, pad: int, index: int) -> None:
        arena = self.arena
        launch = _launch(arena, stream_signals.wait_peer, (), OP=op_code(self.op), num_warps=1)
        args = (arena.record.words, pad + 8 * index, index, self.peer, self.word, arena.rank, arena.timeout_ns)
        launch(1, arena.heap, arena.control, *args)

    def end(self, out: Tensor) -> None:
        arena = self.arena
        launch = _launch(
            arena,
            stream_signals.end_call,
            (specialisation(out), out.numel() >= 1 << 31),
            WORLD=2,
            DTYPE=_triton_dtype(out),
            num_warps=4,
        )
        launch(1, out, arena.heap, arena.control, out.numel(), arena.layout.done, arena.rank)


class _Streams:
    """The call's own stream and two beside it; on the CPU they are all the caller's thread."""

    def __init__(self, arena: Arena):
        self._main: Any = torch.cuda.current_stream(arena.device) if arena.device.type == "cuda" else None
        self._side = arena.side_streams
        for stream in self._side:
            stream.wait_stream(self._main)

    def on(self, index: int, after_main: bool = False):
        """A context in which work goes to side stream `index`, after what the main stream holds now if asked."""
        if self._main is None:
            return contextlib.nullcontext()
        if after_main:
            self._side[index].wait_stream(self._main)
        return torch.cuda.stream(self._side[index])

    def join(self) -> None:
        for stream in self._side:
            self._main.wait_stream(stream)


PUSH, COLLECT = 0, 1


def row_chunks(rows: int, chunks: int, taper: bool = False) -> list[tuple[int, int]]:
    """[start, end) of the chunks of a block of rows, whole tiles each; with taper each is half of what is left."""
    bounds = [0]
    for left in range(chunks, 1, -1):
        share = (rows - bounds[-1]) // (2 if taper else left)
        bounds.append(min(rows, bounds[-1] + -(-share // ROW_ALIGNMENT) * ROW_ALIGNMENT))
    bounds.append(rows)
    return [(start, end) for start, end in itertools.pairwise(bounds) if end > start]


def gemm_all_reduce_chunked(
    arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int
) -> None:
    """The whole sum on both ranks."""
    M, N, c = a.shape[0], b.shape[0], rows_per_rank(a.shape[0], 2)
    call, room = _Call(arena, "gemm_all_reduce", word), arena.layout
    first, peer_first = arena.rank * c, call.peer * c
    own = out[first : min(M, first + c)]
    theirs = out[peer_first : min(M, peer_first + c)]
    own_chunks = row_chunks(own.shape[0], plan["own_chunks"], bool(plan.get("taper", 0)))
    their_chunks = row_chunks(theirs.shape[0], plan["own_chunks"], bool(plan.get("taper", 0)))
    call.begin()
    streams = _Streams(arena)  # after begin: every wait of the call, on any stream, needs the new epoch
    partials = _push_partials(call, streams, plan, a, b, bias)  # noqa: F841  kept alive until the streams have joined
    sums = arena.view(call.peer, room.result, (own.shape[0], N), a.dtype)
    for i, (start, end) in enumerate(own_chunks):
        _add_chunk(call, plan, a, b, own, start, end)
        with streams.on(PUSH, after_main=True):
            sums[start:end].copy_(own[start:end])
            call.notify(room.result_flags, i)
    received = arena.view(arena.rank, room.result, (theirs.shape[0], N), a.dtype)
    with streams.on(COLLECT):
        for i, (start, end) in enumerate(their_chunks):
            call.wait(room.result_flags, i)
            theirs[start:end].copy_(received[start:end])
    streams.join()
    call.end(out)


def gemm_reduce_scatter_chunked(
    arena: Arena, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None, out: Tensor, word: int
) -> None:
    """Our rows of the sum."""
    call = _Call(arena, "gemm_reduce_scatter", word)
    call.begin()
    streams = _Streams(arena)  # after begin: every wait of the call, on any stream, needs the new epoch
    partials = _push_partials(call, streams, plan, a, b, bias)  # noqa: F841  kept alive until the streams have joined
    for start, end in row_chunks(out.shape[0], plan["own_chunks"]):
        _add_chunk(call, plan, a, b, out, start, end)
    if out.shape[0] == 0:
        call.wait(arena.layout.partial_flags, 0)  # hear from the peer in every call
    streams.join()
    call.end(out)


def _push_partials(
    call: _Call, streams: _Streams, plan: Plan, a: Tensor, b: Tensor, bias: Tensor | None
) -> list[Tensor]:
    """Multiply the peer's rows and push them, chunk by chunk. Returns what the copies still read."""
    arena, room = call.arena, call.arena.layout
    M, N, c = a.shape[0], b.shape[0], rows_per_rank(a.shape[0], 2)
    first = call.peer * c
    rows = max(0, min(M, first + c) - first)
    staging = arena.view(call.peer, room.staging, (rows, N), a.dtype)
    partials = []
    with streams.on(PUSH, after_main=True):
        call.wait_peers()
    for i, (start, end) in enumerate(row_chunks(rows, plan["chunks"]) or [(0, 0)]):
        ours = a[first + start : first + end]
        partials.append(torch.mm(ours, b.t()) if bias is None else torch.addmm(bias, ours, b.t()))
        with streams.on(PUSH, after_main=True):
            staging[start:end].copy_(partials[-1])
            call.notify(room.partial_flags, i)
    return partials


def _add_chunk(call: _Call, plan: Plan, a: Tensor, b: Tensor, own: Tensor, start: int, end: int) -> None:
    """own[start:end] = the peer's partial + our product, once every chunk of the peer's that it touches has arrived."""
    arena, room = call.arena, call.arena.layout
    first = arena.rank * rows_per_rank(a.shape[0], 2)
    staged = arena.view(arena.rank, room.staging, tuple(own.shape), a.dtype)
    for i, (chunk_start, chunk_end) in enumerate(row_chunks(own.shape[0], plan["chunks"])):
        if chunk_start < end and chunk_end > start:
            call.wait(room.partial_flags, i)
    torch.addmm(staged[start:end], a[first + start : first + end], b.t(), out=own[start:end])
