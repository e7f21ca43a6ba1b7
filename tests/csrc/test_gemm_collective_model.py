"""The kernels that sum products over ranks, as a model: nobody reads too early or waits for ever. No GPU.

Planted errors in it must be found: else it would not show much.
"""

from __future__ import annotations

import itertools
import subprocess

import pytest

from tests.csrc.built import CSRC, NVCC, needs_nvcc
from tests.csrc.collective_block import Wrong, turn_of
from tests.csrc.collective_model import (
    OF_ANY_WORLD,
    OF_TWO_RANKS,
    AddingScatter,
    OneShotSum,
    Scatter,
    TwoShotSum,
    play,
)


@needs_nvcc
def test_the_order_of_tiles_is_that_of_the_kernels(tmp_path):
    sizes = list(itertools.product((1, 2, 5), (2, 3, 8), (0, 1, 2, 4, 9), (1, 2, 4, 9, 66)))
    program = '#include <cstdio>\n#include "tpo/gemm_owners.cuh"\nint main() { int number;\n'
    for run, world, lead, wave in sizes:
        program += (
            f"for (int s = 0; s < {run * world}; ++s) {{ int turn = tpo::turn_of(s, {run}, {world}, {lead}, {wave}, "
        )
        program += '&number); printf("%d %d\\n", turn, number); }\n'
    source = tmp_path / "order.cu"
    source.write_text(program + "}\n")
    command = [NVCC, "-std=c++17", "-gencode", "arch=compute_90a,code=sm_90a", f"-I{CSRC}", f"-I{CSRC / 'include'}"]
    subprocess.run([*command, "-o", tmp_path / "order", source], check=True)
    printed = subprocess.check_output([tmp_path / "order"], text=True).split()
    pairs = iter(zip(map(int, printed[::2]), map(int, printed[1::2]), strict=True))
    for run, world, lead, wave in sizes:
        order = [next(pairs) for _ in range(run * world)]
        assert order == [turn_of(step, run, world, lead, wave) for step in range(run * world)]
        assert sorted(order) == [(turn, number) for turn in range(1, world + 1) for number in range(run)]
        for (turn, number), step in zip(order, itertools.count()):
            assert turn == world or step < order.index((world, number))


@pytest.mark.parametrize("stagings", [(1,), (2,), (1, 2)], ids=["one staging", "two stagings", "in turn"])
@pytest.mark.parametrize("world", [2, 3, 4])
def test_nobody_reads_too_early_or_waits_for_ever(world, stagings):
    for seed in range(130 // world):
        play(world, seed, stagings=stagings)


@pytest.mark.parametrize("kernel", OF_TWO_RANKS)
def test_nor_where_all_calls_are_of_one_kind(kernel):
    for seed in range(40):
        play(2, seed, kernels=(kernel,))


@pytest.mark.parametrize("stagings", [1, 2])
@pytest.mark.parametrize(
    ("error", "world", "kernels"),
    [
        ("flag when read", 2, OF_ANY_WORLD),
        ("flag when read", 2, OneShotSum),
        ("flag when read", 2, AddingScatter),
        ("free before read", 2, OF_ANY_WORLD),
        ("free before read", 2, OneShotSum),
        ("free before read", 2, AddingScatter),
        ("staging not waited for", 2, OF_ANY_WORLD),
        ("staging not waited for", 2, OneShotSum),
        ("staging not waited for", 2, AddingScatter),
        ("done not waited for", 2, Scatter),
        ("done not waited for", 2, AddingScatter),
        ("begin not waited for", 2, OneShotSum),
        ("sums not waited for", 2, TwoShotSum),
        ("sums not waited for", 2, OneShotSum),
        ("sums not waited for", 2, AddingScatter),
        ("kept not waited for", 2, OneShotSum),
        ("kept not waited for", 2, AddingScatter),
        ("kept when read", 2, OneShotSum),
        ("kept when read", 2, AddingScatter),
        ("carried not waited for", 2, AddingScatter),
        ("left before read", 2, AddingScatter),
        ("begun before done was awaited", 2, AddingScatter),
        ("partials not waited for", 3, OF_ANY_WORLD),
        ("turn not ended", 2, OF_TWO_RANKS),
    ],
    ids=lambda value: getattr(value, "__name__", "kinds in turn" if isinstance(value, tuple) else None),
)
def test_a_planted_error_is_found(error, world, kernels, stagings):
    find(error, world, kernels, stagings)


# Of the fetcher, which two staging buffers need, and of the courier in its place.
@pytest.mark.parametrize(
    ("error", "stagings"), [("fetch before the flag", 1), ("fetch before read", 2), ("free not counted", 2)]
)
def test_an_error_planted_where_partials_are_fetched_is_found(error, stagings):
    find(error, 2, OF_ANY_WORLD, stagings)


def find(error: str, world: int, kernels, stagings: int) -> None:
    found = 0
    for seed in range(400):
        try:
            play(world, seed, error, (stagings,), kernels if isinstance(kernels, tuple) else (kernels,))
        except Wrong:
            found += 1
        if found == 3:
            return
    raise AssertionError(f"found in {found} of 400 runs")
