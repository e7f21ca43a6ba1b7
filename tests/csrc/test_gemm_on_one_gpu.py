"""The CUDA GEMM on one GPU, against float64."""

from __future__ import annotations

import pytest
import torch

from tp_overlap_kernels import native
from tp_overlap_kernels.kernels import gemm

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs one CUDA device of compute capability 9.0"),
    pytest.mark.skipif(not native.available(), reason="needs libtpo_kernels.so: install the package where nvcc is"),
]
CODES = {torch.bfloat16: gemm.BF16, torch.float16: gemm.FP16}
CASES = [
    (128, 256, 64, torch.bfloat16, "one tile, one stage"),
    (1, 8, 8, torch.bfloat16, "one row"),
    (77, 264, 40, torch.bfloat16, "less than a tile each way"),
    (300, 520, 1000, torch.float16, "K not of whole stages"),
    (4099, 1032, 328, torch.bfloat16, "nothing divides a tile"),
    (129, 4104, 4096, torch.float16, "second block of the last pair nearly empty"),
    (2048, 8192, 1024, torch.bfloat16, "several tiles a block"),
    (1024, 4096, 14784, torch.bfloat16, "long K"),
]


def run(a, b, bias, schedule, group_rows):
    """Two calls in a row into rows of a larger tensor filled with NaN; returns out and what lies around it."""
    M, N = a.shape[0], b.shape[0]
    whole = torch.full((M + 2, (N + 15) // 8 * 8), torch.nan, dtype=a.dtype, device="cuda")
    out = whole[:M, :N]
    for _ in range(2):
        gemm.launch(
            **{"a_ptr": a.data_ptr(), "b_ptr": b.data_ptr(), "out_ptr": out.data_ptr()},
            **{"a_stride": a.stride(0), "b_stride": b.stride(0), "out_stride": out.stride(0)},
            **{"M": M, "N": N, "K": a.shape[1], "dtype_code": CODES[a.dtype], "schedule": schedule},
            bias_ptr=0 if bias is None else bias.data_ptr(),
            group_rows=group_rows,
            stream=torch.cuda.current_stream().cuda_stream,
        )
    torch.cuda.synchronize()
    return out, (whole[M:], whole[:, N:])


@pytest.mark.parametrize("schedule", gemm.SCHEDULES, ids=lambda s: f"{s.rows}x{s.cols}")
@pytest.mark.parametrize("with_bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize(("M", "N", "K", "dtype"), [case[:4] for case in CASES], ids=[case[4] for case in CASES])
def test_it_is_the_rounded_product(M, N, K, dtype, with_bias, schedule):
    gemm.prepare()
    generator = torch.Generator("cuda").manual_seed(M + N + K)
    draw = lambda *size: torch.randn(*size, generator=generator, device="cuda").to(dtype)
    padding = 8 - K % 8 if K % 8 else 16  # rows that are longer than K
    a, b = draw(M, K + padding)[:, :K], draw(N, K + padding)[:, :K]
    bias = draw(N) if with_bias else None
    truth, mass = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    if with_bias:
        truth, mass = truth + bias.double(), mass + bias.double().abs()
    u, u32 = torch.finfo(dtype).eps / 2, 2.0**-24
    subnormal = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    tolerance = (1 + 2**-6) * (u * truth.abs() + 2 * (K + 1) * u32 * mass) + subnormal
    for group_rows in (1, 3, 8):
        out, around = run(a, b, bias, schedule, group_rows)
        assert ((out.double() - truth).abs() <= tolerance).all()
        assert all(part.isnan().all() for part in around)
