"""Addresses in another rank's memory: 64 bits from the first multiplication on."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from tp_overlap_kernels.lang.interpreter import interpret
from tp_overlap_kernels.lang.peer import slot_at, symm_at

BASES = (1 << 20, 5 << 40)


@triton.jit
def addresses(heap_ptr, out_ptr, offset, index, slot_bytes, peer):
    tl.store(out_ptr, symm_at(heap_ptr, offset, peer, tl.bfloat16).to(tl.int64))
    tl.store(out_ptr + 1, slot_at(heap_ptr, offset, index, slot_bytes, peer, tl.bfloat16).to(tl.int64))


@pytest.mark.parametrize("offset", [16, (1 << 31) + 512, (1 << 33) + 16])
@pytest.mark.parametrize(
    "slot_bytes, index", [(512, 3), (1 << 30, 1), (1 << 30, 2), (1 << 30, 7), ((1 << 32) + 512, 5)]
)
@pytest.mark.parametrize("peer", [0, 1])
def test_an_address_is_base_and_offset_and_slots(offset, slot_bytes, index, peer):
    heap, out = torch.tensor(BASES, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)
    interpret(addresses, 1, heap, out, offset, index, slot_bytes, peer)
    assert out.tolist() == [BASES[peer] + offset, BASES[peer] + offset + index * slot_bytes]
