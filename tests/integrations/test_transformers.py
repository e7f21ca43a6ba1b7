"""transformers' models on CPU ranks: a small random Llama, with biases, so that one added twice would show."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from tests.integrations import loaded
from tests.integrations.judged import check_rows
from tests.integrations.loaded import Load
from tests.integrations.surroundings import environment, heard
from tests.integrations.traced import traced
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.layers import counters

pytest.importorskip("transformers", "5.17", reason="needs transformers >= 5.17: pip install -e .[transformers]")

LAYERS = 2
PROMPT = torch.arange(1, 14).view(1, -1)
# Attention is whole on every rank, and o_proj takes its columns of an input that all ranks hold.
MLP_ONLY = {
    "model.layers.*.self_attn.o_proj": "rowwise_split_input",
    "model.layers.*.mlp.gate_proj": "colwise",
    "model.layers.*.mlp.up_proj": "colwise",
    "model.layers.*.mlp.down_proj": "rowwise",
}
BY_NAME = {name: f"tp_overlap_{style}" if style.startswith("rowwise") else style for name, style in MLP_ONLY.items()}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A folder with a model of `intermediate` features, which by default divide over 2 and 3 ranks."""
    from transformers import LlamaConfig, LlamaForCausalLM

    loaded.quiet()
    folders: dict[int, str] = {}

    def make(intermediate: int = 144) -> str:
        if intermediate not in folders:
            sizes = {"hidden_size": 96, "num_attention_heads": 6, "num_key_value_heads": 6, "num_hidden_layers": LAYERS}
            config = LlamaConfig(
                vocab_size=66, intermediate_size=intermediate, attention_bias=True, mlp_bias=True, **sizes
            )
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).to(torch.bfloat16)
            for name, param in model.named_parameters():
                torch.nn.init.normal_(param, std=0.5 if name.endswith("bias") else 0.1)
            folders[intermediate] = str(tmp_path_factory.mktemp("llama"))
            model.save_pretrained(folders[intermediate])
        return folders[intermediate]

    return make


# ---- tasks, run on every rank


@dataclasses.dataclass(frozen=True)
class Call:
    """One pass over PROMPT. spoil: a function of this file that changes each layer first; environment: TP_OVERLAP."""

    load: Load
    spoil: str = ""
    grad: bool = False
    environment: str = "auto"


def call(rank: int, world_size: int, asked: Call) -> tuple[Any, dict[str, int], list[str]]:
    """(logits, or the text of an InvalidInput; what was counted; what was logged)."""
    with environment(asked.environment), heard() as log:
        try:
            with loaded.parts(world_size, asked.load) as model, torch.set_grad_enabled(asked.grad):
                for name, module in model.named_modules():
                    if asked.spoil and name.endswith(("o_proj", "down_proj")):
                        globals()[asked.spoil](module)
                return model(PROMPT).logits.detach(), counters(), log
        except InvalidInput as error:
            return str(error), counters(), log


def quantise(module: Any) -> None:
    module._hf_quantized_needs_local_tp = True  # the mark of transformers' quantisers


def transpose_in_memory(module: Any) -> None:
    from torch.distributed.tensor import DTensor

    weight = module.weight
    local = weight.to_local().detach().t().contiguous().t()
    same = DTensor.from_local(local, weight.device_mesh, weight.placements, run_check=False)
    module._parameters["weight"] = torch.nn.Parameter(same, requires_grad=False)


def compiled(rank: int, world_size: int, load: Load) -> tuple[list[bool], list[int], dict[str, int]]:
    """(whether each output equals the eager one's bits, how often each graph calls the op, what was counted)"""
    with loaded.parts(world_size, load) as model, torch.no_grad():
        one_graph, graphs = traced(model, "gemm_all_reduce")
        prompts = [PROMPT, torch.arange(1, 8).view(1, -1)]  # not a view: its strides would be another graph
        outputs = [one_graph(prompt, use_cache=False).logits for prompt in prompts]
        counted = counters()
        eager = [model(prompt, use_cache=False).logits for prompt in prompts]
        return [torch.equal(*pair) for pair in zip(outputs, eager, strict=True)], graphs, counted


def no_rows(rank: int, world_size: int, load: Load) -> tuple[torch.Size, dict[str, int]]:
    with loaded.parts(world_size, load) as model, torch.inference_mode():
        module = model.model.layers[0].mlp.down_proj
        return module(torch.zeros(2, 0, 144 // world_size, dtype=torch.bfloat16)).shape, counters()


# ---- tests


@pytest.mark.parametrize(
    ("world_size", "plan"), [(2, "auto"), (3, "auto"), (2, MLP_ONLY), (2, BY_NAME)], ids=["2", "3", "split", "named"]
)
def test_every_row_parallel_layer_calls_the_op_and_gives_the_sum(ranks, llama, world_size, plan):
    load = Load(llama(), plan)
    seen = ranks(world_size).run(loaded.run, load, PROMPT, 3, PROMPT, PROMPT, timeout=240)
    check_rows(loaded.whole(load.folder, load.dtype), seen)
    passes = 3 + 2
    for rank, each in enumerate(seen):
        assert each.counted == {"fused": 2 * LAYERS * passes} and len(each.rows) == 2 * LAYERS
        assert each.tokens == seen[0].tokens
        assert each.bytes == seen[0].bytes > 0
        active = [line for line in each.log if "active for" in line]
        assert [line.split(" active for ")[1].split(" ")[0] for line in active] == (
            ["model.layers.*.self_attn.o_proj", "model.layers.*.mlp.down_proj"] if rank == 0 else []
        ), "each kind is said once, on rank 0"
        assert all(f"max_M=64; {each.bytes} bytes a rank" in line for line in active)


def test_a_compiled_model_is_one_graph_that_calls_the_op(ranks, llama):
    for equal, graphs, counted in ranks(2).run(compiled, Load(llama()), timeout=240):
        assert equal == [True] * 2 and graphs == [2 * LAYERS] and list(counted) == ["fused"]


def test_no_rows(ranks, llama):
    for shape, counted in ranks(2).run(no_rows, Load(llama()), timeout=120):
        assert shape == (2, 0, 96) and counted == {"fused": 1}


DECLINED = {
    "dtype": (Call(Load("", dtype=torch.float32)), 2 * LAYERS),
    "needs_grad": (Call(Load(""), grad=True), 2 * LAYERS),
    "quantised": (Call(Load(""), spoil="quantise"), 2 * LAYERS),
    "weight": (Call(Load(""), spoil="transpose_in_memory"), 2 * LAYERS),
    "uneven": (Call(Load("")), LAYERS),  # of down_proj; o_proj is fused
}


@pytest.mark.parametrize("reason", DECLINED)
def test_what_is_declined_runs_as_transformers_would_run_it_and_is_counted_and_said(ranks, llama, reason):
    asked, times = DECLINED[reason]
    load = dataclasses.replace(asked.load, folder=llama(145 if reason == "uneven" else 144))
    asked = dataclasses.replace(asked, load=load)
    theirs = dataclasses.replace(asked, load=dataclasses.replace(load, enable=None))
    results = ranks(2).run(call, asked, timeout=120)
    for rank, ((ours, counted, log), (logits, nothing, _)) in enumerate(
        zip(results, ranks(2).run(call, theirs, timeout=120), strict=True)
    ):
        assert nothing == {} and counted[f"unfused: {reason}"] == times
        if counted == {f"unfused: {reason}": times}:
            assert torch.equal(ours, logits)
        said = [line for line in log if "not active for" in line or "runs unfused" in line]
        assert (len(said) >= 1) == (rank == 0), said


@pytest.mark.parametrize("reason", DECLINED)
def test_where_the_op_is_required_the_same_is_an_error_that_says_why(ranks, llama, reason):
    asked, _ = DECLINED[reason]
    load = dataclasses.replace(asked.load, folder=llama(145 if reason == "uneven" else 144))
    for text, counted, _ in ranks(2).run(call, dataclasses.replace(asked, load=load, environment="1"), timeout=120):
        assert isinstance(text, str) and "cannot be fused, and was required to be: " in text
        assert not any(key.startswith("unfused") for key in counted)


def test_a_layer_that_a_plan_names_is_required(ranks, llama):
    load = Load(llama(), BY_NAME, dtype=torch.float32)
    for text, _, _ in ranks(2).run(call, Call(load), timeout=120):
        assert isinstance(text, str) and "self_attn.o_proj cannot be fused" in text and "torch.float32" in text


@pytest.mark.parametrize("plan", ["auto", BY_NAME], ids=["rowwise", "named"])
def test_TP_OVERLAP_0_leaves_all_to_transformers(ranks, llama, plan):
    off = Call(Load(llama(), plan), environment="0")
    theirs = Call(Load(llama(), "auto" if plan == "auto" else MLP_ONLY, enable=None))
    for (ours, counted, log), (logits, _, _) in zip(
        ranks(2).run(call, off, timeout=120), ranks(2).run(call, theirs, timeout=120), strict=True
    ):
        assert torch.equal(ours, logits) and counted == {}
        assert log == ["tp_overlap_kernels for transformers: off, by TP_OVERLAP=0"]


def test_required_while_switched_off_is_a_contradiction(ranks, llama):
    asked = Call(Load(llama(), enable={"required": True}), environment="0")
    for text, _, _ in ranks(2).run(call, asked, timeout=120):
        assert isinstance(text, str) and "TP_OVERLAP=0" in text


def test_disable_gives_the_names_back():
    from transformers.distributed.tensor_parallel import ALL_PARALLEL_STYLES

    from tp_overlap_kernels.integrations import transformers as adapter

    before = dict(ALL_PARALLEL_STYLES.items())
    assert adapter.enable() and adapter.enable(max_tokens=7)
    assert dict(ALL_PARALLEL_STYLES.items()) != before
    adapter.disable()
    assert dict(ALL_PARALLEL_STYLES.items()) == before


def test_another_version_is_refused(monkeypatch):
    """Later ones leave the weights of our plan values whole, and every product fails."""
    from tp_overlap_kernels.integrations import transformers as adapter

    monkeypatch.setattr(pytest.importorskip("transformers"), "__version__", "5.23.0")
    with pytest.raises(InvalidInput, match=r"needed, found 5[.]23"):
        adapter.enable()
