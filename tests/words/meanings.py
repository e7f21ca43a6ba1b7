"""What each word means: one function a meaning, run by every rank, on the CPU or on devices.

`room` gives symmetric tensors (zeros), a launch and a barrier: `Room` is ours, of_triton_dist.py has that project's.
"""

from __future__ import annotations

import time

import torch

from . import kernels

N = 256
NAN = float("nan")


class Room:
    """One rank's side of a test on stock Triton."""

    def __init__(self, timeout_s: float = 60) -> None:
        from tp_overlap_kernels.memory.world import World  # not where that project's room is

        self.world = World(1 << 16, timeout_s=timeout_s)
        self.rank, self.num_ranks, self.device = self.world.rank, self.world.num_ranks, self.world.device

    def symmetric(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        return self.world.empty(*shape, dtype=dtype)

    def local(self, *shape: int, dtype: torch.dtype, value: float = -1) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def launch(self, kernel, grid: int, *args) -> None:
        kernel[(grid,)](*args, world=self.world)

    def end(self) -> None:
        """All ranks' kernels are over, and no wait was in vain."""
        self.world.barrier()
        self.world.check()

    def close(self) -> None:
        self.world.close()


def ranks_are_numbered(room) -> None:
    out = room.local(4, dtype=torch.int32)
    room.launch(kernels.who_am_i, 1, out)
    room.end()
    assert out.tolist() == [room.rank, room.num_ranks] * 2


def a_place_is_the_same_at_a_peer(room) -> None:
    room.symmetric(3, dtype=torch.uint8)  # so that x does not begin where the heap does
    for dtype in (torch.int32, torch.float16, torch.int64):
        x = room.symmetric(room.num_ranks, N + 1, dtype=dtype)
        for peer in range(room.num_ranks):
            room.launch(kernels.write_at, 1, x[room.rank], peer, 10 * peer, N)
        room.end()
        row = torch.tensor([*range(N), -1]) + 10 * room.rank  # every writer has left the same here
        assert torch.equal(x.cpu().to(torch.int64), row.expand(room.num_ranks, -1)), dtype


def set_writes_at_the_peer_alone(room) -> None:
    signal = room.symmetric(3, dtype=torch.int64)
    x = room.local(1, dtype=torch.int64, value=(1 << 40) + room.rank)  # all 64 bits travel
    room.launch(kernels.set_at_the_next, 1, x, signal[1:])
    room.end()
    assert signal.tolist() == [0, (1 << 40) + (room.rank - 1) % room.num_ranks, 0]


def add_counts(room) -> None:
    signal = room.symmetric(2, dtype=torch.int64)
    for _ in range(3):
        room.launch(kernels.add_at_all, 4, signal, 1 << 33)
    room.end()
    arrivals = 3 * 4 * room.num_ranks
    assert signal.tolist() == [arrivals << 33, arrivals]


def the_scope_gpu_stays_here(room) -> None:
    signal = room.symmetric(1, dtype=torch.int64)
    room.launch(kernels.set_here, 1, signal, (room.rank + 1) % room.num_ranks, 50 + room.rank)
    room.end()
    assert signal.item() == 50 + room.rank


def what_was_stored_is_published(room) -> None:
    _messages(room, 0)


def a_wait_is_for_equality(room) -> None:
    """What is larger will not do."""
    _messages(room, 1000)


def _messages(room, at_first: int) -> None:
    """Each rank late in turn, by a sleep before its launch; other data in every call. Signals begin `at_first`."""
    inbox, signal = room.symmetric(N, dtype=torch.float32), room.symmetric(2, dtype=torch.int64)
    inbox.fill_(NAN)
    signal.fill_(at_first)
    room.end()
    for call in range(1, 1 + 2 * room.num_ranks):
        x = torch.arange(N, dtype=torch.float32, device=room.device) + 1000 * call + 100_000 * room.rank
        out = room.local(N, dtype=torch.float32, value=NAN)
        if call % room.num_ranks == room.rank:
            time.sleep(0.05)
        room.launch(kernels.message, 1, x, inbox, signal, out, call, N)
        expected = x + 100_000 * ((room.rank - 1) % room.num_ranks - room.rank)
        assert torch.equal(out, expected), (call, out[:3], expected[:3])
    room.end()


def what_was_seen_is_published(room) -> None:
    inbox, signal = room.symmetric(N, dtype=torch.float32), room.symmetric(1, dtype=torch.int64)
    inbox.fill_(NAN)
    room.end()
    x, out = room.local(N, dtype=torch.float32, value=3), room.local(N, dtype=torch.float32, value=NAN)
    if room.rank < room.num_ranks - 1:
        time.sleep(0.05)
    room.launch(kernels.relay, 1, x, inbox, signal, out, N)
    room.end()
    if room.rank == room.num_ranks - 1:
        assert torch.equal(out, x)


def a_wait_is_for_every_word(room) -> None:
    """Those of late ranks too; and 32 words of 64 and of 32 bits."""
    x, signal = room.symmetric(room.num_ranks * N, dtype=torch.int32), room.symmetric(room.num_ranks, dtype=torch.int64)
    met = room.local(room.num_ranks, dtype=torch.int32)
    time.sleep(0.05 * room.rank)
    room.launch(kernels.meet, 1, x, signal, met, N)
    room.end()
    assert met.tolist() == [1 + rank for rank in range(room.num_ranks)]
    for dtype in (torch.int64, torch.int32):
        signal, out = room.symmetric(32, dtype=dtype), room.local(32, dtype=dtype)
        signal.fill_(-3)
        room.launch(kernels.wait_for_all, 1, signal, out, 32, -3)
        room.end()
        assert out.tolist() == [-3] * 32, dtype


def a_wait_may_be_for_a_peers_word(room) -> None:
    signal, out = room.symmetric(1, dtype=torch.int64), room.local(1, dtype=torch.int64)
    if room.rank == room.num_ranks - 1:
        time.sleep(0.05)
    room.launch(kernels.wait_there, 1, signal, out)
    room.end()
    assert out.item() == 7


def a_slot_serves_many_items(room) -> None:
    signal, item = room.symmetric(1, dtype=torch.int64), room.symmetric(1, dtype=torch.int32)
    out = room.local(9, dtype=torch.int32)
    room.launch(kernels.queue, 2, signal, item, out, 9)
    room.end()
    assert out.tolist() == [100 * ((room.rank - 1) % room.num_ranks) + i for i in range(9)]


def consuming_changes_no_value(room) -> None:
    signal = room.symmetric(1, dtype=torch.int64)
    for dtype in (torch.float32, torch.bfloat16, torch.int32):
        x = torch.arange(N, device=room.device).to(dtype)
        x[0] = -0.0
        out = room.local(N, dtype=dtype)
        room.launch(kernels.tokens_change_nothing, 1, x, out, signal, N)
        room.end()
        assert torch.equal(out.view(torch.uint8), x.view(torch.uint8)), dtype


def a_wait_in_a_loop_comes_before_its_loads(room) -> None:
    """Each part of a comes from the rank before, NaN until its signal is up; a product in a loop over the parts."""
    parts, block = 4, 64
    a = room.symmetric(block, parts * block, dtype=torch.bfloat16)
    signal, out = room.symmetric(parts, dtype=torch.int64), room.local(block, block, dtype=torch.float32, value=NAN)
    b = torch.arange(parts * block, device=room.device).remainder(3).sub(1).bfloat16()[:, None].expand(-1, block)
    a.fill_(NAN)
    room.end()
    room.launch(kernels.product_of_parts, 2, a, b.contiguous(), out, signal, parts, block)
    room.end()
    expected = (torch.arange(parts, device=room.device).repeat_interleave(block)[None, :] + 1.0) @ b.float()
    assert torch.equal(out, expected.expand(block, -1))


MEANINGS = (
    ranks_are_numbered,
    a_place_is_the_same_at_a_peer,
    set_writes_at_the_peer_alone,
    add_counts,
    the_scope_gpu_stays_here,
    what_was_stored_is_published,
    a_wait_is_for_equality,
    what_was_seen_is_published,
    a_wait_is_for_every_word,
    a_wait_may_be_for_a_peers_word,
    a_slot_serves_many_items,
    a_wait_in_a_loop_comes_before_its_loads,
    consuming_changes_no_value,
)


def hold(rank: int, num_ranks: int, name: str) -> None:
    """A rank's task: one meaning, on stock Triton."""
    room = Room()
    next(meaning for meaning in MEANINGS if meaning.__name__ == name)(room)
    room.close()
