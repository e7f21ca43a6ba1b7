"""cuBLAS called as torch.mm would: what cublasGemmEx is given means the product, and when torch.mm serves instead.

No device here: a stand-in for the C function reads its arguments by cuBLAS's own rule (columns first) and computes.
"""

import ctypes

import numpy as np
import pytest
import torch

from tp_overlap_kernels.ops import cublas

HANDLE = 4711


class GemmEx:
    """cublasGemmEx on fp16 in this process's memory. status: what it returns."""

    status, calls = 0, 0

    def __call__(self, handle, ta, tb, m, n, k, alpha, A, At, lda, B, Bt, ldb, beta, C, Ct, ldc, compute, algo):
        self.calls += 1
        assert (handle.value, compute.value, algo.value) == (HANDLE, 68, 99)
        assert (alpha._obj.value, beta._obj.value) == (1.0, 0.0)
        assert {kind.value for kind in (At, Bt, Ct)} == {2}  # CUDA_R_16F
        m, n, k = m.value, n.value, k.value
        stored_a = _columns(A, k if ta.value else m, m if ta.value else k, lda.value)
        stored_b = _columns(B, n if tb.value else k, k if tb.value else n, ldb.value)
        product = (stored_a.T if ta.value else stored_a).astype(float) @ (stored_b.T if tb.value else stored_b)
        _columns(C, m, n, ldc.value)[:] = product
        return self.status


def _columns(pointer, rows: int, columns: int, leading: int) -> np.ndarray:
    """A matrix that is stored column after column, `leading` elements from one to the next."""
    assert leading >= rows
    words = (ctypes.c_uint16 * (leading * (columns - 1) + rows)).from_address(pointer.value)
    flat = np.frombuffer(words, dtype=np.float16)
    return np.lib.stride_tricks.as_strided(flat, (rows, columns), (2, 2 * leading), writeable=True)


@pytest.fixture
def device(monkeypatch):
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 0, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentBlasHandle", lambda: HANDLE, raising=False)


def product_of(a, b, out, gemm):
    product = cublas.Product(gemm, a, b, out)
    product._device = 0
    return product


@pytest.mark.parametrize("strided", [False, True], ids=["contiguous", "rows apart"])
@pytest.mark.parametrize(("M", "N", "K"), [(3, 5, 4), (1, 8, 16), (7, 1, 2)])
def test_the_arguments_mean_a_times_b_transposed(device, M, N, K, strided):
    a, b, out = (torch.zeros(rows, columns + 3 * strided).half() for rows, columns in ((M, K), (N, K), (M, N)))
    a, b, out = a[:, :K], b[:, :K], out[:, :N]
    gemm = GemmEx()
    product = product_of(a, b, out, gemm)
    for seed in range(2):  # the second time in other memory, of the same strides
        a, b, out = (torch.empty_strided(x.shape, x.stride(), dtype=x.dtype) for x in (a, b, out))
        for x in (a, b):
            x.copy_(torch.randint(-4, 5, x.shape, generator=torch.Generator().manual_seed(seed)))
        assert product(a.data_ptr(), b.data_ptr(), out.data_ptr())
        assert torch.equal(out.float(), a.float() @ b.float().T)


def test_an_error_of_cublas_sends_the_call_the_public_way(device):
    a, gemm = torch.zeros(2, 2).half(), GemmEx()
    gemm.status = 14
    assert not product_of(a, a, a, gemm)(a.data_ptr(), a.data_ptr(), a.data_ptr())


def test_another_current_device_is_not_served(device, monkeypatch):
    a, gemm = torch.zeros(2, 2).half(), GemmEx()
    product = product_of(a, a, a, gemm)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: 1, raising=False)
    assert not product(a.data_ptr(), a.data_ptr(), a.data_ptr()) and gemm.calls == 0


@pytest.mark.parametrize(
    ("dtype", "setting"),
    [
        (torch.bfloat16, "allow_bf16_reduced_precision_reduction"),
        (torch.float16, "allow_fp16_reduced_precision_reduction"),
        (torch.float16, "allow_fp16_accumulation"),
    ],
    ids=str,
)
def test_who_changes_how_cublas_adds_gets_torch_mm(device, dtype, setting):
    a, gemm = torch.zeros(2, 2, dtype=dtype), GemmEx()
    product = product_of(a, a, a, gemm)
    before = getattr(torch.backends.cuda.matmul, setting)
    try:
        setattr(torch.backends.cuda.matmul, setting, not before)
        assert not product(a.data_ptr(), a.data_ptr(), a.data_ptr()) and gemm.calls == 0
    finally:
        setattr(torch.backends.cuda.matmul, setting, before)
    assert cublas.as_torch_starts(dtype)


def test_cpu_tensors_are_not_bound():
    a = torch.zeros(2, 2).half()
    assert cublas.bind(a, a, a) is None
