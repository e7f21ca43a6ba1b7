"""The examples run, as their first lines say and on the pool's ranks; what they compute is held against float64."""

from __future__ import annotations

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from examples import triton_distributed_all_gather as all_gather
from examples import triton_distributed_gemm_reduce_scatter as gemm_reduce_scatter
from tests import inputs, truth
from tests.cases import Case
from tests.tolerance import check, check_bites, tolerance
from tp_overlap_kernels.lang.interpreter import jitter

ROOT = pathlib.Path(__file__).resolve().parents[2]
EXAMPLES = [ROOT / "examples" / f"triton_distributed_{name}.py" for name in ("all_gather", "gemm_reduce_scatter")]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_the_command(path):
    """As many lines "right" as ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", str(path)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    environment["CUDA_VISIBLE_DEVICES"] = ""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(command, env=environment, cwd=ROOT, **streams) as launcher:
        try:
            said, _ = launcher.communicate(timeout=120)
        except subprocess.TimeoutExpired:
            launcher.terminate()  # it ends its ranks, which a kill would leave behind
            raise
    assert launcher.returncode == 0 and said.count(": right") == 2, said[-4000:]


def with_delays(rank, num_ranks, which):
    with jitter(0.003):
        {"all_gather": all_gather, "gemm_reduce_scatter": gemm_reduce_scatter}[which].run(rank, num_ranks)


@pytest.mark.parametrize("num_ranks", [2, 3])
@pytest.mark.parametrize("which", ["all_gather", "gemm_reduce_scatter"])
def test_in_other_orders(ranks, which, num_ranks):
    """Random delays around every signal."""
    ranks(num_ranks).run(with_delays, which, timeout=120)


def sums(rank, num_ranks, case, calls):
    op = gemm_reduce_scatter.GemmReduceScatter(case.M, case.N, case.dtype)
    outs = []
    for call in range(calls):
        outs.append(op(*inputs.operands(case, rank, "normal", call)))
        op.world.check()
    op.world.close()
    return outs


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("num_ranks", [2, 3])
def test_a_sum_is_right_by_float64(ranks, num_ranks, dtype):
    case, calls = Case(40 * num_ranks, 72, 200, dtype, num_ranks, "nothing divides a tile"), 3
    results = ranks(num_ranks).run(sums, case, calls, timeout=120)
    for rank, outs in enumerate(results):
        for call, out in enumerate(outs):
            expected = truth.gemm_reduce_scatter(case, rank, "normal", call)
            allowed = tolerance(expected)
            check_bites(expected, allowed)
            check(out, expected, allowed, f"rank {rank}, call {call}")
