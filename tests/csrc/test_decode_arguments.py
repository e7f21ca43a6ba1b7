"""The launcher of the decode kernel: what it refuses before it launches anything."""

from __future__ import annotations

import ctypes
import re

import pytest

from tests.csrc.test_native import HEADER, needs_library, needs_no_gpu
from tp_overlap_kernels import native
from tp_overlap_kernels.errors import TpOverlapError
from tp_overlap_kernels.kernels import gemm_all_reduce_one_shot_sentinel as decode
from tp_overlap_kernels.kernels.start import Start

RIGHT = {"a": 4096, "b": 4096, "a_stride": 64, "b_stride": 64, "M": 1, "N": 64, "K": 64, "tile_rows": 64, "splits": 1}
RIGHT_SUM = {"out": 4096, "n_elems": 64, "sentinel_bytes": 4096, "world_size": 2}


def launch(**changes: int) -> None:
    """The C launcher with arguments that are right but for `changes`; no kernel may come to run with these pointers."""
    args = decode._Args()
    for name, value in (RIGHT_SUM | RIGHT | changes).items():
        setattr(args.sum if name in RIGHT_SUM or name in ("rank", "dtype") else args, name, value)
    native.check(native.library().tpo_gemm_all_reduce_decode(ctypes.byref(args), None), "launch")


def test_python_and_header_name_the_same_starts():
    found = dict(re.findall(r"TPO_START_(\w+) = (\d)", HEADER.read_text()))
    assert {name: int(value) for name, value in found.items()} == {start.name: start.value for start in Start}


@needs_library
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"M": 129, "n_elems": 129 * 64, "sentinel_bytes": 1 << 20}, id="too many rows"),
        pytest.param(
            {"M": 65, "tile_rows": 128, "n_elems": 65 * 64, "sentinel_bytes": 1 << 20}, id="too many for wide tiles"
        ),
        pytest.param({"M": -1}, id="negative rows"),
        pytest.param({"K": 0}, id="no K"),
        pytest.param({"n_elems": 63}, id="another size of out"),
        pytest.param({"sentinel_bytes": 112}, id="longer than a slot"),
        pytest.param({"N": 33, "n_elems": 33, "sentinel_bytes": 112}, id="longer than a slot when tiles are whole"),
        pytest.param({"tile_rows": 96}, id="unknown tile"),
        pytest.param({"splits": 3}, id="splits that are no power of two"),
        pytest.param({"splits": 16}, id="more blocks than a cluster has"),
        pytest.param({"stages": 2}, id="too few stages"),
        pytest.param({"stages": 32}, id="more stages than memory"),
        pytest.param({"start": 3}, id="unknown start"),
        pytest.param({"a": 4098}, id="a not aligned"),
        pytest.param({"b_stride": 68}, id="rows of b not aligned"),
        pytest.param({"a_stride": 56}, id="rows that overlap"),
        pytest.param({"dtype": 2}, id="unknown dtype"),
        pytest.param({"world_size": 9}, id="more than 8 ranks"),
        pytest.param({"world_size": 1}, id="one rank"),
        pytest.param({"rank": 2}, id="rank outside the group"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_before_any_launch(changes):
    with pytest.raises(TpOverlapError, match="invalid argument"):
        launch(**changes)


@needs_library
@needs_no_gpu
@pytest.mark.parametrize("changes", [{}, {"stages": 20}, {"splits": 8, "start": 2}])
def test_what_it_can_do_gets_as_far_as_the_driver(changes):
    with pytest.raises(TpOverlapError, match=r"launch: .*driver.* \(CUDA error \d+\)"):
        launch(**changes)


@needs_library
@pytest.mark.parametrize("changes", [{"M": 0, "n_elems": 0}, {"N": 0, "n_elems": 0}])
def test_an_empty_call_launches_nothing(changes):
    launch(**changes)


@pytest.mark.parametrize(
    "N, tile_rows, sentinel_bytes, rows",
    [(8192, 64, 1 << 20, 64), (8192, 128, 1 << 20, 64), (4096, 64, 1 << 20, 128), (4096, 128, 1 << 20, 64)]
    + [(65, 64, 256, 1), (65, 64, 255, 0), (8192, 64, 256 << 10, 16)],
)
def test_rows_that_fit(N, tile_rows, sentinel_bytes, rows):
    assert decode.rows_that_fit(N, tile_rows, sentinel_bytes) == rows
