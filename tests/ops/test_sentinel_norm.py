"""The plan sentinel_norm up to its launcher: what it is given, the first time and when the call is known. No device."""

import pytest
import torch

import tp_overlap_kernels as tpo
from tp_overlap_kernels.dispatch import Plan
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.ops import all_reduce_add_rms_norm, gemm_all_reduce_add_rms_norm, sentinel_norm

M, H, K, EPS, STREAM = 4, 96, 64, 1e-6, 5
BF16 = torch.bfloat16


@pytest.fixture
def calls(monkeypatch):
    """The arguments of every launch. All calls get the plan."""
    tpo.init(max_M=64, max_N=128)
    made, arena = [], arenas.get("local")
    arena.cache["sentinel norm"] = lambda *args: made.append(args)
    monkeypatch.setattr(sentinel_norm, "stream_of", lambda index: STREAM)
    for module, name in (
        (all_reduce_add_rms_norm, "sentinel_norm"),
        (gemm_all_reduce_add_rms_norm, "unfused_sentinel_norm"),
    ):
        monkeypatch.setattr(module, "plan_for", lambda *args, name=name: (Plan(name), 7))
    yield made
    tpo.close()


def inputs(offset=0, dtype=BF16):
    """x, residual, weight, `offset` elements into their memory."""
    sizes = (M * H, M * H, H)
    x, residual, weight = (torch.zeros(size + offset, dtype=dtype)[offset:] for size in sizes)
    return x.view(M, H), residual.view(M, H), weight


def pointers(*tensors):
    return tuple(tensor.data_ptr() for tensor in tensors)


@pytest.mark.parametrize("dtype, code", [(BF16, 0), (torch.float16, 1)], ids=str)
@pytest.mark.parametrize("offset", [0, 1])
def test_tensors_are_read_where_they_lie(calls, dtype, code, offset):
    """Known or not: the kernel takes any alignment, and adds squares in one order."""
    for _ in range(3):
        given = inputs(offset, dtype)
        results = torch.ops.tp_overlap.all_reduce_add_rms_norm(*given, EPS, "local")
        assert calls[-1] == (*pointers(*given, *results), M, H, EPS, code, 7, STREAM)


def test_results_go_where_they_are_wanted(calls):
    for _ in range(2):
        x, residual, weight = inputs(1)
        torch.ops.tp_overlap.all_reduce_add_rms_norm_out(x, residual, weight, EPS, "local", x, residual)
        assert calls[-1][:5] == pointers(x, residual, weight, x, residual)


@pytest.mark.parametrize("which", range(3), ids=["x", "residual", "weight"])
def test_strided_inputs_are_copied(calls, which):
    for _ in range(2):
        given = list(inputs())
        wide = torch.zeros(*given[which].shape[:-1], 2 * H, dtype=BF16)
        given[which] = wide[..., ::2]
        torch.ops.tp_overlap.all_reduce_add_rms_norm(*given, EPS, "local")
        assert [i for i in range(3) if calls[-1][i] != given[i].data_ptr()] == [which]


@pytest.mark.parametrize("leading", [(M,), (2, M // 2)], ids=str)
def test_behind_a_product(calls, leading):
    """The product lies where y will be."""
    b = torch.ones(H, K, dtype=BF16)
    for _ in range(3):
        _, residual, weight = inputs()
        a, residual = torch.ones(*leading, K, dtype=BF16), residual.view(*leading, H)
        y, new_residual = torch.ops.tp_overlap.gemm_all_reduce_add_rms_norm(a, b, residual, weight, EPS, "local")
        assert calls[-1][:5] == pointers(y, residual, weight, y, new_residual)
        assert calls[-1][5:8] == (M, H, EPS) and y.shape == (*leading, H)
        assert y.eq(K).all(), "the fake kernel leaves the product there"
