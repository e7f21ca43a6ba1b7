"""The short way to launch, on a real device: taken, right, and captured."""

import pytest
import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from tp_overlap_kernels.lang import relaunch
from tp_overlap_kernels.lang.launch import Launch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(
        ".".join(triton.__version__.split(".")[:2]) not in relaunch.VERSIONS,
        reason="this Triton is launched the public way",
    ),
]

ROWS, COLS = 64, 128


@triton.jit
def _scale(x_desc, y_ptr, out_ptr, ROWS_HERE, COLS_HERE, factor, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    row0 = tl.program_id(0) * BLOCK_M
    rows, cols = row0 + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_N)
    at = rows[:, None] * COLS_HERE + cols[None, :]
    mask = (rows < ROWS_HERE)[:, None] & (cols < COLS_HERE)[None, :]
    y = tl.load(y_ptr + at, mask=mask)
    tl.store(out_ptr + at, x_desc.load([row0, 0]) * factor + y, mask=mask)


def _tensors(seed):
    torch.manual_seed(seed)
    return [torch.randint(-8, 8, (ROWS, COLS), device="cuda").to(torch.bfloat16) for _ in range(2)]


def _wanted(x, y):
    return x * 3 + y


@pytest.fixture
def again():
    launch = Launch(_scale, {"BLOCK_M": 16, "BLOCK_N": COLS, "num_warps": 4})
    x, y = _tensors(0)
    out = torch.empty_like(x)
    issued = launch(ROWS // 16, TensorDescriptor(x, [ROWS, COLS], [COLS, 1], [16, COLS]), y, out, ROWS, COLS, 3)
    assert torch.equal(out, _wanted(x, y))
    again = issued.again(x_desc=x.data_ptr(), y_ptr=y.data_ptr(), out_ptr=out.data_ptr())
    assert again is not None, "the public way was taken; log level INFO says why"
    return again


def test_it_reads_the_tensors_it_is_given(again):
    for seed in range(1, 4):
        x, y = _tensors(seed)
        out = torch.full_like(x, float("nan"))
        for _ in range(2):
            assert again(x.data_ptr(), y.data_ptr(), out.data_ptr())
        assert torch.equal(out, _wanted(x, y))


def test_it_runs_on_the_current_stream(again):
    x, y = _tensors(5)
    out, stream = torch.zeros_like(x), torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        assert again(x.data_ptr(), y.data_ptr(), out.data_ptr())
    torch.cuda.current_stream().synchronize()
    assert not stream.query()
    stream.synchronize()
    assert torch.equal(out, _wanted(x, y))


def test_a_captured_launch_needs_nothing_of_the_host(again):
    x, y = _tensors(6)
    out, graph = torch.zeros_like(x), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        assert again(x.data_ptr(), y.data_ptr(), out.data_ptr())
    for maps in (maps for _, maps in again.slots if maps is not None):
        maps.known.clear()
    for seed in (7, 8):
        for mine, other in zip((x, y), _tensors(seed), strict=True):
            mine.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(out, _wanted(x, y))
