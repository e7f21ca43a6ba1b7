"""Which tiles the CUDA GEMM is cut into: a pure function, without a GPU."""

import pytest

from tp_overlap_kernels.kernels.gemm import LARGE, SMALL, schedule_for


@pytest.mark.parametrize(
    ("M", "N", "sms", "expected"),
    [
        pytest.param(8192, 8192, 132, LARGE, id="many waves"),
        pytest.param(1024, 4096, 132, LARGE, id="one wave of large tiles"),
        pytest.param(512, 4096, 132, SMALL, id="large tiles would leave half of the GPU idle"),
        pytest.param(1536, 4096, 132, SMALL, id="a wave and a half of large tiles"),
        pytest.param(1, 8, 132, SMALL, id="one tile"),
        pytest.param(512, 4096, 66, LARGE, id="half a GPU"),
    ],
)
def test_the_schedule_with_the_shortest_waves_is_taken(M, N, sms, expected):
    assert schedule_for(M, N, sms) is expected
