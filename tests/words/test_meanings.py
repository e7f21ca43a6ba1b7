"""The meanings, on CPU ranks. On devices: tests/gpu/words.py."""

from __future__ import annotations

import pytest

from . import meanings


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("meaning", [meaning.__name__ for meaning in meanings.MEANINGS])
def test_on_stock_triton(ranks, meaning, num_ranks):
    ranks(num_ranks).run(meanings.hold, meaning)
