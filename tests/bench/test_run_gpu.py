"""The same command on two GPUs: every provider is right and timed, captured and eager."""

import json
import pathlib
import subprocess
import sys

import pytest
import torch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or torch.cuda.device_count() < 2,
        reason="needs two CUDA GPUs that can reach each other",
    ),
]


def run(tmp_path: pathlib.Path, *arguments: str) -> tuple[int, str, list[dict]]:
    path = tmp_path / "out.json"
    command = [sys.executable, "-m", "tp_overlap_kernels.bench", "run", *arguments, "--json", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    text = done.stdout + done.stderr
    return done.returncode, text, json.loads(path.read_text())["rows"] if path.exists() else []


@pytest.mark.parametrize("mode", ["graph", "eager"])
@pytest.mark.parametrize("op", ["gemm_all_reduce", "gemm_reduce_scatter", "all_reduce"])
def test_every_provider_is_right_and_timed(tmp_path, op, mode):
    arguments = ["--ranks", "2", "--preset", "llama-3-8b", "--m", "16,1000", "--op", op, "--mode", mode]
    code, text, rows = run(tmp_path, *arguments)
    assert code == 0, text
    without = {(row["provider"], row["M"]): row["reason"] for row in rows if not row["us"]}
    assert not without, text
    for row in rows:
        assert row["floor_us"] > 2.0 and (row["host_us"] is None) == (mode == "graph")


def test_our_gemm_alone_is_right_and_timed(tmp_path):
    arguments = ["--ranks", "2", "--layer", "1024,3696", "--m", "1,300,1024", "--provider", "matmul:sm90"]
    code, text, rows = run(tmp_path, *arguments, "--op", "gemm_all_reduce")
    assert code == 0, text
    timed = {(row["provider"], row["M"]) for row in rows if row["us"]}
    assert timed == {(name, M) for name in ("matmul", "matmul:sm90") for M in (1, 300, 1024)}, text


def test_four_ranks_on_two_gpus_leave_nccl_out_with_a_reason(tmp_path):
    arguments = ["--ranks", "4", "--ranks-per-device", "2", "--layer", "1024,256", "--m", "48"]
    code, text, rows = run(tmp_path, *arguments, "--op", "gemm_all_reduce")
    assert code == 0, text
    reasons = {row["provider"]: row["reason"] for row in rows if not row["us"]}
    assert set(reasons) == {"matmul+nccl", "matmul+nccl_symmetric"}, text
    assert all("two ranks on one GPU" in reason for reason in reasons.values())
