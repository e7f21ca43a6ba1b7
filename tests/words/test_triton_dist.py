"""The same meanings against `triton_dist.language`, where that project is installed."""

from __future__ import annotations

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
import torch

from . import meanings

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.skipif(
    importlib.util.find_spec("triton_dist") is None,
    reason="needs triton_dist: Triton-Distributed's compiler, which takes the place of stock Triton",
)
def test_that_project_means_the_same():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = os.environ | {"TPO_TEST_WORDS": "triton_dist", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*command, "-m", "tests.words.of_triton_dist"],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=280,
    )
    held = [line.removeprefix("held: ") for line in ended.stdout.splitlines() if line.startswith("held: ")]
    assert held == [meaning.__name__ for meaning in meanings.MEANINGS], ended.stderr[-4000:]
