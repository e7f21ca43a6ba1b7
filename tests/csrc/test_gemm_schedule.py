"""Which tiles the CUDA GEMM is cut into: a pure function, without a GPU."""

import pytest

from tp_overlap_kernels.kernels.gemm import LARGE, PING_PONG, SMALL, schedule_for


@pytest.mark.parametrize(
    ("M", "N", "K", "sms", "expected"),
    [
        pytest.param(8192, 8192, 4096, 132, LARGE, id="many waves"),
        pytest.param(8192, 8192, 2048, 132, PING_PONG, id="many waves of short tiles"),
        pytest.param(2048, 4096, 7168, 132, LARGE, id="two waves of large tiles"),
        pytest.param(1024, 4096, 7168, 132, SMALL, id="one wave of large tiles"),
        pytest.param(512, 4096, 2048, 132, SMALL, id="large tiles would leave half of the GPU idle"),
        pytest.param(1, 8, 64, 132, SMALL, id="one tile"),
        pytest.param(1024, 4096, 7168, 66, LARGE, id="half a GPU"),
    ],
)
def test_a_schedule_is_taken_that_fills_the_gpu(M, N, K, sms, expected):
    assert schedule_for(M, N, K, sms) is expected
