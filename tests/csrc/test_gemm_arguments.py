"""What the CUDA GEMM cannot do is refused before any launch; no GPU and no driver needed."""

import pytest
import torch

from tp_overlap_kernels import native
from tp_overlap_kernels.errors import TpOverlapError
from tp_overlap_kernels.kernels import gemm

pytestmark = pytest.mark.skipif(
    not native.LIBRARY_PATH.exists(), reason="needs libtpo_kernels.so: install the package where nvcc and cmake are"
)
RIGHT = {
    **{"a_ptr": 4096, "b_ptr": 4096, "out_ptr": 4096, "bias_ptr": 0, "M": 3, "N": 24, "K": 17, "dtype_code": gemm.BF16},
    **{"a_stride": 24, "b_stride": 24, "out_stride": 24, "schedule": gemm.LARGE, "stream": 0},
}


@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"M": -1}, id="negative M"),
        pytest.param({"N": 23}, id="odd N"),
        pytest.param({"K": 0}, id="no K"),
        pytest.param({"a_stride": 16}, id="rows of a overlap"),
        pytest.param({"b_stride": 16}, id="rows of b overlap"),
        pytest.param({"out_stride": 16}, id="rows of out overlap"),
        pytest.param({"a_stride": 28}, id="rows of a not aligned"),
        pytest.param({"b_stride": 28}, id="rows of b not aligned"),
        pytest.param({"out_stride": 28}, id="rows of out not aligned"),
        pytest.param({"a_ptr": 4104}, id="a not aligned"),
        pytest.param({"b_ptr": 4104}, id="b not aligned"),
        pytest.param({"out_ptr": 4104}, id="out not aligned"),
        pytest.param({"bias_ptr": 4098}, id="bias not aligned"),
        pytest.param({"dtype_code": 2}, id="unknown dtype"),
        pytest.param({"group_rows": -1}, id="empty groups"),
        pytest.param({"schedule": gemm.Schedule(3, 256, 128, 2, 8)}, id="a schedule of the sums over ranks"),
        pytest.param({"schedule": gemm.Schedule(99, 256, 256, 2, 8)}, id="unknown schedule"),
    ],
)
def test_it_is_refused(changes):
    with pytest.raises(TpOverlapError, match=r"gemm: .*invalid argument"):
        gemm.launch(**(RIGHT | changes))


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_what_is_right_comes_as_far_as_the_driver():
    with pytest.raises(TpOverlapError, match=r"gemm: .*driver"):
        gemm.launch(**RIGHT)
    with pytest.raises(TpOverlapError, match=r"gemm: the CUDA kernels could not be loaded: .*driver"):
        gemm.prepare()


@pytest.mark.parametrize("empty", ["M", "N"])
def test_nothing_to_compute_launches_nothing(empty):
    gemm.launch(**(RIGHT | {empty: 0}))
