"""The launcher of the sentinel kernel with a norm: what it refuses before it launches anything."""

from __future__ import annotations

import ctypes

import pytest

from tests.csrc.test_native import needs_library, needs_no_gpu
from tp_overlap_kernels import native
from tp_overlap_kernels.dispatch.select import SENTINEL_NORM_MAX_N
from tp_overlap_kernels.errors import TpOverlapError
from tp_overlap_kernels.kernels import all_reduce_one_shot_sentinel_add_rms_norm as norm

RIGHT = {"M": 2, "H": 64}
RIGHT_SUM = {"n_elems": 128, "sentinel_bytes": 4096, "world_size": 2}


def launch(**changes: int) -> None:
    """The C launcher with arguments that are right but for `changes`; no kernel may come to run with these pointers."""
    args = norm._Args()
    for name, value in (RIGHT_SUM | RIGHT | changes).items():
        setattr(args.sum if name in RIGHT_SUM or name in ("rank", "dtype") else args, name, value)
    function = native.library().tpo_all_reduce_one_shot_sentinel_add_rms_norm
    native.check(function(ctypes.byref(args), None), "launch")


@needs_library
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"M": 1, "H": 8193, "n_elems": 8193, "sentinel_bytes": 1 << 20}, id="a row too long for a block"),
        pytest.param({"M": -1}, id="negative rows"),
        pytest.param({"n_elems": 127}, id="another size"),
        pytest.param({"sentinel_bytes": 240}, id="longer than a slot"),
        pytest.param({"M": 8, "H": 9, "n_elems": 72, "sentinel_bytes": 240}, id="longer than a slot in whole vectors"),
        pytest.param({"sentinel_bytes": 4088}, id="a slot that is no whole number of vectors"),
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
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"launched_ahead": 1},
        {"M": 8, "H": 9, "n_elems": 72, "sentinel_bytes": 256},
        {"M": 1, "H": SENTINEL_NORM_MAX_N, "n_elems": SENTINEL_NORM_MAX_N, "sentinel_bytes": 2 * SENTINEL_NORM_MAX_N},
    ],
)
def test_what_it_can_do_gets_as_far_as_the_driver(changes):
    with pytest.raises(TpOverlapError, match=r"launch: .*driver.* \(CUDA error \d+\)"):
        launch(**changes)


@needs_library
@pytest.mark.parametrize("changes", [{"M": 0, "n_elems": 0}, {"H": 0, "n_elems": 0}])
def test_an_empty_call_launches_nothing(changes):
    launch(**changes)


def test_dispatch_knows_the_longest_row():
    assert norm.MAX_COLUMNS == SENTINEL_NORM_MAX_N
