"""A wait for a peer that has closed: what the peer sent before still counts, and nothing is waited for but that."""

from __future__ import annotations

import pytest
import torch
import triton

from tp_overlap_kernels.lang import signal
from tp_overlap_kernels.lang.interpreter import interpret
from tp_overlap_kernels.memory.record import ABORTED, Record

RANK, PEER, WORD = 0, 1, 1 << 16 | 9


@triton.jit
def wait_for_one(slot_ptr, out_ptr, control_ptr, record_ptr, word, rank, peer):
    who = signal.waiter(1, rank, peer, 0)
    status = signal.wait(slot_ptr.to(signal.tl.int64), word, 0, control_ptr, record_ptr, who)
    signal.tl.store(out_ptr, status)


@pytest.mark.parametrize(
    "closed, arrives, status",
    [(PEER, 10_000, ABORTED), (PEER, 64, 0), (2, 200, 0)],
    ids=["too late", "behind the poll that finds it closed", "another one closed"],
)
def test_the_slot_is_looked_at_once_more(monkeypatch, closed, arrives, status):
    """arrives: in which turn of the loop the slot changes. There is no timeout."""
    slot, out = torch.zeros(1, dtype=torch.int64), torch.full((1,), -1, dtype=torch.int32)
    headers, record = torch.zeros(16, dtype=torch.int64), Record(torch.device("cpu"))
    control = torch.zeros(64, dtype=torch.int64)
    control[signal.HEADERS.value], control[signal.HEADERS_BYTES.value] = headers.data_ptr(), 64

    def pause(polls):
        if polls == 64:
            record.close_peer(closed)
        if polls == arrives:
            slot[0] = WORD

    monkeypatch.setattr(signal, "pause", pause)
    interpret(wait_for_one, (1,), slot, out, control, record.words, WORD, RANK, PEER)
    assert out.item() == status
    assert (record.read() is None) == (status == 0)
