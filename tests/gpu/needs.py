"""What tests on two GPUs are marked with."""

from __future__ import annotations

import pytest
import torch

TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.timeout(280),
    pytest.mark.skipif(
        torch.cuda.device_count() < 2 or not torch.cuda.can_device_access_peer(0, 1),
        reason="needs two CUDA devices that reach each other",
    ),
]
