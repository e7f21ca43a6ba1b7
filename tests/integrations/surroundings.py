"""What an adapter finds around it (TP_OVERLAP, an arena or none), what it says, and operands whose sums are exact."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import Any

import torch

from tp_overlap_kernels.config import settings
from tp_overlap_kernels.errors import UnsupportedTopology
from tp_overlap_kernels.integrations import adoption


@contextlib.contextmanager
def environment(overlap: str | None) -> Iterator[None]:
    """TP_OVERLAP is `overlap` meanwhile, or unset for None."""
    before = os.environ.pop("TP_OVERLAP", None)
    if overlap is not None:
        os.environ["TP_OVERLAP"] = overlap
    settings.cache_clear()
    try:
        yield
    finally:
        os.environ.pop("TP_OVERLAP", None)
        if before is not None:
            os.environ["TP_OVERLAP"] = before
        settings.cache_clear()


@contextlib.contextmanager
def no_arena() -> Iterator[None]:
    """`init` finds that the machine cannot have an arena, as adapters see it."""

    def cannot(*_: Any, **__: Any) -> None:
        raise UnsupportedTopology("init: this machine cannot.")

    init, adoption.init = adoption.init, cannot
    try:
        yield
    finally:
        adoption.init = init


@contextlib.contextmanager
def heard() -> Iterator[list[str]]:
    """What the package logs meanwhile."""
    texts: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: texts.append(record.getMessage())  # type: ignore[method-assign]
    log = logging.getLogger("tp_overlap_kernels")
    level = log.level
    log.addHandler(handler)
    log.setLevel(logging.INFO)
    try:
        yield texts
    finally:
        log.removeHandler(handler)
        log.setLevel(level)


def integers(shape: tuple[int, ...], low: int, high: int, seed: int) -> torch.Tensor:
    """Small integers in float64: their products and sums are exact in every dtype, and may be compared by bits."""
    return torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed)).double()
