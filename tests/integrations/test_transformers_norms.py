"""Row-parallel layers of transformers' models, each one call with the residual and the norm behind it, on CPU ranks."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.integrations import loaded
from tests.integrations.judged import check_joined, no_worse, ties
from tests.integrations.loaded import Load
from tests.integrations.surroundings import environment
from tests.integrations.traced import traced
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.layers import counters

pytest.importorskip("transformers", "5.17", reason="needs transformers >= 5.17: pip install -e .[transformers]")

LAYERS = 2
NEW_TOKENS = 4
PROMPT = torch.arange(1, 14).view(1, -1)
SIZES = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6, "num_hidden_layers": LAYERS}
# Attention is whole on every rank, and o_proj takes its columns of an input that all ranks hold.
MLP_ONLY = {
    "model.layers.*.self_attn.o_proj": "rowwise_split_input",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """folder(family): a model of random weights. llama has biases, which would show if one were added twice."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    loaded.quiet()
    sizes = SIZES | {"vocab_size": 66, "intermediate_size": 144, "rms_norm_eps": 1e-5}
    models = {
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**sizes, attention_bias=True, mlp_bias=True)),
        "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**sizes)),
    }
    folders: dict[str, str] = {}

    def make(family: str) -> str:
        if family not in folders:
            torch.manual_seed(0)
            model = models[family]().to(torch.bfloat16)
            for name, param in model.named_parameters():
                torch.nn.init.normal_(param, mean=float("norm" in name), std=1.0 if "embed" in name else 0.1)
            folders[family] = str(tmp_path_factory.mktemp(family))
            model.save_pretrained(folders[family])
        return folders[family]

    return make


# ---- tasks, run on every rank


def compiled(rank: int, world_size: int, load: Load) -> tuple[list[bool], list[int]]:
    """(whether each output equals the eager one's bits, how often each graph calls the op with the norm)"""
    with loaded.parts(world_size, load) as model, torch.no_grad():
        one_graph, graphs = traced(model, "gemm_all_reduce_add_rms_norm")
        prompts = [PROMPT, torch.arange(1, 8).view(1, -1)]
        pairs = [[each(prompt, use_cache=False).logits for each in (one_graph, model)] for prompt in prompts]
        return [torch.equal(*pair) for pair in pairs], graphs


def switched_off(rank: int, world_size: int, load: Load) -> tuple[Any, dict[str, int]]:
    with environment("0"), loaded.parts(world_size, load) as model, torch.inference_mode():
        return model(PROMPT).logits, counters()


def required_of_gradients(rank: int, world_size: int, load: Load) -> str:
    with loaded.parts(world_size, load) as model:
        try:
            model(PROMPT)
        except InvalidInput as error:
            return str(error)
    return ""


# ---- tests


@pytest.mark.parametrize(
    ("family", "plan", "world_size"),
    [("llama", "auto", 2), ("llama", MLP_ONLY, 2), ("qwen2", "auto", 2), ("qwen2", "auto", 3)],
    ids=["llama", "split", "qwen2", "3"],
)
def test_every_layer_is_one_call_with_its_norm_and_gives_the_same_tokens(ranks, folder, family, plan, world_size):
    load = Load(folder(family), plan, norms={})
    texts = (PROMPT, NEW_TOKENS, PROMPT, PROMPT)
    seen = ranks(world_size).run(loaded.run, load, *texts, timeout=120)
    apart = ranks(world_size).run(loaded.run, dataclasses.replace(load, norms=None), *texts, timeout=120)
    model, finer = (loaded.whole(load.folder, dtype) for dtype in (torch.bfloat16, torch.float32))
    with torch.inference_mode():
        tokens = loaded.greedy(model, PROMPT, NEW_TOKENS)
        assert len(set(tokens)) > 2 and not ties(model, finer, PROMPT, tokens), "these tokens would show nothing"
        whole, exact = (each(PROMPT, output_hidden_states=True).hidden_states for each in (model, finer))
    calls = 2 * LAYERS * (NEW_TOKENS + 2)
    for rank, (ours, theirs) in enumerate(zip(seen, apart, strict=True)):
        assert ours.tokens == theirs.tokens == tokens
        assert ours.counted == {"fused": calls, "fused with norm": calls} and theirs.counted == {"fused": calls}
        said = [line for line in ours.log if "is one call with the residual" in line]
        assert len(said) == (2 if rank == 0 else 0), "each kind is said once, on rank 0"
    names = [f"model.layers.{i}.{row}" for i in range(LAYERS) for row in ("self_attn.o_proj", "mlp.down_proj")]
    assert [call.name for call in seen[0].joined] == names
    check_joined(model, seen)
    for layer, states in enumerate(zip(seen[0].hidden, whole, exact, strict=True)):
        no_worse(*states, (world_size + 1) ** 0.5, f"hidden state {layer}")


def test_a_compiled_model_is_one_graph_that_calls_the_op_with_the_norm(ranks, folder):
    for equal, graphs in ranks(2).run(compiled, Load(folder("llama"), norms={}), timeout=240):
        assert equal == [True] * 2 and graphs == [2 * LAYERS]


def test_TP_OVERLAP_0_leaves_the_norms_alone(ranks, folder):
    load = Load(folder("llama"), norms={})
    theirs = ranks(2).run(switched_off, dataclasses.replace(load, enable=None, norms=None), timeout=120)
    for (ours, counted), (logits, _) in zip(ranks(2).run(switched_off, load, timeout=120), theirs, strict=True):
        assert torch.equal(ours, logits) and counted == {}


def test_where_a_joint_is_required_a_gradient_is_an_error(ranks, folder):
    load = Load(folder("llama"), norms={"required": True})
    for text in ranks(2).run(required_of_gradients, load, timeout=120):
        assert "o_proj: its norm cannot be fused, and was required to be: its product does not go to the op" in text
