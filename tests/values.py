"""Values that show what a sum does: every bit pattern of a dtype, and numbers whose sum depends on the order.

The rules, for every op with more than one rank:

    finite      to the last bit what the ranks' values give in f32, in the order that the kernel states, rounded once
    zero        +0.0, whatever the signs of the ranks' zeros: every sum starts from +0.0 (one rank alone copies)
    infinity    stays; with an infinity of the other sign it makes a NaN
    NaN         in any rank's value makes a NaN of that element on all ranks, and of no other; its payload and sign are
                not promised, but all ranks hold the same bits
"""

from __future__ import annotations

import itertools

import torch

from tests.cases import BF16, FP16

PATTERNS = 1 << 16
# large + small - large is 0 in f32, large - large + small is small
LARGE_AND_SMALL = {BF16: (2.0**24, 1.0), FP16: (2.0**15, 2.0**-10)}


def shuffled_patterns(rank: int, dtype: torch.dtype) -> torch.Tensor:
    """(65536,) every bit pattern once, in another order on each rank."""
    order = torch.randperm(PATTERNS, generator=torch.Generator().manual_seed(rank))
    return order.to(torch.int32).to(torch.int16).view(dtype)


def in_order(values: list[torch.Tensor]) -> torch.Tensor:
    """The sum in f32, one after the other, rounded once."""
    total = torch.zeros_like(values[0], dtype=torch.float32)
    for value in values:
        total = total + value.float()
    return total.to(values[0].dtype)


def assert_sum(out: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """NaN where NaN is expected and nowhere else; everywhere else the same bits."""
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan), f"{what}: NaN at other elements"
    bits, wanted = (x.view(torch.int16)[~nan] for x in (out, expected))
    wrong = (bits != wanted).nonzero().flatten()
    first = f"{bits[wrong[0]].item() & 0xFFFF:#06x} for {wanted[wrong[0]].item() & 0xFFFF:#06x}" if len(wrong) else ""
    assert not len(wrong), f"{what}: {len(wrong)} patterns changed, the first {first}"


def arrangements(world_size: int, dtype: torch.dtype) -> torch.Tensor:
    """(count, world_size): what each rank gives, in every arrangement of large, small, -large over the ranks."""
    large, small = LARGE_AND_SMALL[dtype]
    values = [large, small, -large, *[3 * small] * (world_size - 3)]
    return torch.tensor(sorted(set(itertools.permutations(values)))[:: 1 if world_size < 8 else 7], dtype=dtype)
