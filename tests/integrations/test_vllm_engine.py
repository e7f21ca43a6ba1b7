"""The same tokens from vLLM itself with the plugin and without, eager and compiled, over two CPU ranks.

`make engines` runs this, in an environment of its own: minutes.
"""

from __future__ import annotations

import dataclasses
import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import pytest
import torch

from tests.integrations.vllm_engine import MARK, MAX_TOKENS, NEW_TOKENS, PROMPTS

pytest.importorskip("vllm", reason="needs vLLM, for CPUs: make engines")
pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]

ROOT = pathlib.Path(__file__).resolve().parents[2]
LAYERS = 2


@dataclasses.dataclass
class Run:
    tokens: list[list[int]]
    workers: list[dict[str, Any]]
    output: str

    @property
    def calls(self) -> list[int]:
        """Of the op, on each rank."""
        return [sum(worker["calls"]) for worker in self.workers]

    @property
    def active(self) -> list[str]:
        return [line for line in self.output.splitlines() if "tp_overlap_kernels for vLLM: active for" in line]


class EngineEnded(Exception):
    """It gave no answer; the text is all that it has said."""


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> tuple[str, list[list[int]]]:
    """A folder with a random Llama, and its tokens: at no step of them may fp16 choose another."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": LAYERS, "vocab_size": 128}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64}  # vLLM's CPU attention wants 64
    torch.manual_seed(18)
    model = LlamaForCausalLM(LlamaConfig(**sizes, **heads, max_position_embeddings=256, tie_word_embeddings=False))
    for name, param in model.named_parameters():
        if "norm" not in name:
            torch.nn.init.normal_(param, std=1.0 if "embed" in name or "lm_head" in name else 0.08)
    model = model.to(torch.float16)
    folder = str(tmp_path_factory.mktemp("llama"))
    model.save_pretrained(folder)
    return folder, [greedy(model, prompt) for prompt in PROMPTS]


def greedy(model: Any, prompt: list[int]) -> list[int]:
    lengths = {"min_new_tokens": NEW_TOKENS, "max_new_tokens": NEW_TOKENS}
    ids = torch.tensor([prompt])
    with torch.inference_mode():
        made = model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, pad_token_id=0, **lengths)
        steps = slice(len(prompt) - 1, -1)
        logits, exact = model(made).logits[0, steps].float(), model.float()(made).logits[0, steps]
    model.half()  # the numbers are fp16's all the while
    first, second = exact.topk(2).values.unbind(-1)
    error = (logits - exact).abs().amax(-1)
    assert (first - second > 2 * 2 * error).all(), "two tokens are too near to each other"
    return made[0, len(prompt) :].tolist()


def run(folder: str, mode: str, cache: pathlib.Path, overlap: str | None, dtype: str = "float16") -> Run:
    cores = sorted(os.sched_getaffinity(0))
    environment = {
        "VLLM_CACHE_ROOT": str(cache),
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": f"{cores[0]}|{cores[-1]}",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
    }
    environment = {key: value for key, value in os.environ.items() if key != "TP_OVERLAP"} | environment
    if overlap:
        environment["TP_OVERLAP"] = overlap
    command = [sys.executable, "-m", "tests.integrations.vllm_engine", folder, mode, dtype]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    output = done.stdout + done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    if done.returncode or len(lines) != 1:
        raise EngineEnded(output)
    return Run(**json.loads(lines[0].removeprefix(MARK)), output=output)


def test_eager(model, tmp_path):
    folder, tokens = model
    plain, ours = (run(folder, "eager", tmp_path, overlap) for overlap in (None, "auto"))
    assert plain.tokens == ours.tokens == tokens
    assert plain.calls == [0, 0] and not plain.active
    assert len(ours.active) == 2, "o_proj and down_proj, each once"
    for worker in ours.workers:
        (calls,) = worker["calls"]
        assert worker["counted"] == {"fused": calls} and calls >= 2 * LAYERS * NEW_TOKENS
        assert worker["max_M"] == [MAX_TOKENS]


def test_compiled_and_from_vllms_cache_of_compiled_graphs(model, tmp_path):
    folder, tokens = model
    ours, plain, again = (run(folder, "compiled", tmp_path, overlap) for overlap in ("auto", None, "auto"))
    assert ours.tokens == plain.tokens == again.tokens == tokens
    assert plain.calls == [0, 0] and not plain.active, "a graph with the op was not taken for one without"
    for each in (ours, again):
        assert min(each.calls) >= 2 * LAYERS * NEW_TOKENS and len(each.active) == 2
    assert [worker["counted"] for worker in ours.workers] == [{"fused": 2 * LAYERS}] * 2, "traced once"
    assert [worker["counted"] for worker in again.workers] == [{}] * 2, "loaded, not traced"


def test_what_is_required_and_cannot_be_had_ends_the_engine(model, tmp_path):
    with pytest.raises(EngineEnded, match=r"was required to be: its dtype is torch[.]float32"):
        run(model[0], "eager", tmp_path, "1", "float32")
