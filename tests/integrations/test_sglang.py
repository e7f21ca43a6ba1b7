"""Decoder layers whose boundary owes the sums, in a stand-in of SGLang: layer or boundary sums, and only one does."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.integrations.engine_cases import BF16, Case, K, N, call, engine, prepare, same
from tests.integrations.engine_cases import run as run_layer
from tests.integrations.sglang_stand_in import DECODERS, SGLang
from tests.integrations.surroundings import environment, heard, integers
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.integrations import sglang as adapter
from tp_overlap_kernels.layers import counters

OWN = {"fused": 2}


@dataclasses.dataclass(frozen=True)
class Decoder:
    """A decoder layer, and the calls that it is to count. sums: of the group, with the plugin; without it there are 2.

    subclass: the layer is of a subclass, which may do other things with its sums.
    """

    why: str
    counted: dict[str, int]
    sums: int
    model: str = "llama"
    case: Case = dataclasses.field(default_factory=lambda: Case(""))
    subclass: bool = False
    said: str = ""  # in rank 0's log
    told: bool = True  # the plugin learns of the layers

    def __str__(self) -> str:
        return self.why


def build(made: SGLang, decoder: Decoder) -> Any:
    kind = made.decoders[decoder.model]
    layer = (type("Subclass", (kind,), {}) if decoder.subclass else kind)(K, N, **decoder.case.layer)
    prepare(layer.self_attn.o_proj, decoder.case, seed=2)
    prepare(layer.mlp.down_proj, decoder.case, seed=4)
    return layer


def run(
    rank: int, world_size: int, decoder: Decoder, overlap: str | None
) -> tuple[Any, int, dict[str, int], list[str]]:
    """(output, or the text of an InvalidInput; sums; what was counted; what was logged)"""
    case = decoder.case
    with heard() as log, engine(SGLang, case, overlap) as made:
        try:
            return call(build(made, decoder), case, rank, world_size), made.group.sums, counters(), log
        except InvalidInput as error:
            return str(error), made.group.sums, counters(), log


def budget(rank: int, world_size: int, settings: dict[str, Any]) -> int:
    with engine(SGLang, Case("", engine=settings), "auto") as made:
        made.RowParallelLinear(K, N)
        return tpo.init(dist.group.WORLD, max_M=1, max_N=1).max_M


# ---- tests

LAYER = {"counted": {"unfused: reduce_results": 2}, "sums": 2}
TAKEN_OVER = [Decoder(model, OWN, 0, model) for model in DECODERS]
TAKEN_OVER += [
    Decoder("fp16", OWN, 0, case=Case("", layer={"params_dtype": torch.float16})),
    Decoder("a bias in rank 0's partial", OWN, 0, case=Case("", layer={"bias": True})),
    Decoder("no rows", OWN, 0, case=Case("", rows=(0,))),
    Decoder("nobody else sums, whatever is said", OWN, 0, case=Case("", engine={"mlp_reduce_scatter": True})),
    Decoder("without boundaries the layers sum", OWN, 0, case=Case("", layer={"stage_boundaries": False})),
]
OWNED_AND_DECLINED = [
    Decoder("packed", {"unfused: weight": 2}, 2, case=Case("", spoil="pack")),
    Decoder("no tensor", {"unfused: input": 2}, 2, case=Case("", activation=True)),
]
LEFT = [
    Decoder(
        "one of the two",
        {"fused": 1, "unfused: quantised": 1},
        1,
        case=Case("", layer={"quantised": "down_proj"}),
    ),
    Decoder("float32", {"unfused: dtype": 2}, 2, case=Case("", layer={"params_dtype": torch.float32})),
    Decoder("quantised", {"unfused: quantised": 2}, 2, case=Case("", layer={"quantised": True})),
    Decoder("no arena", {"unfused: topology": 2}, 2, case=Case("", no_arena=True)),
    Decoder("LoRA", {"unfused: lora": 2}, 2, case=Case("", engine={"enable_lora": True})),
    Decoder("no hook on forward", {}, 2, case=Case("", engine={"broken": "Linear.forward"}), said="see its log"),
    Decoder("no hook on facts", **LAYER, case=Case("", engine={"broken": "stage_facts"})),
    Decoder("no hook on the decoder", **LAYER, case=Case("", engine={"broken": "Layer.__init__"})),
    Decoder("no hook on layers", {}, 2, case=Case("", engine={"broken": "Linear.__init__"}), told=False),
    Decoder("a subclass", **LAYER, subclass=True),
    Decoder("a subclass of Qwen3's", **LAYER, model="qwen3", subclass=True),
    Decoder("layers of its own", {}, 2, case=Case("", engine={"own_layers": True}), told=False),
    *(
        Decoder(name, **LAYER, case=Case("", engine={"ffn": declared}), said="a sum of its own")
        for name, declared in (
            ("a kernel sums and norms", {"read": SimpleNamespace(completing_fusions=("a kernel",))}),
            ("a sparse FFN", {"sparse": True}),
        )
    ),
    *(
        Decoder(name, **LAYER, case=Case("", engine={name: value}), said=said)
        for name, value, said in (
            ("flashinfer_allreduce_fusion_backend", "auto", "fuses it with RMSNorm"),
            ("enable_aiter_allreduce_fusion", True, "fuses it with RMSNorm"),
            ("speculative_algorithm", "EAGLE3", "speculative decoding"),
            ("pp_size", 2, "pipeline parallelism"),
            ("moe_dense_tp_size", 1, "fewer ranks"),
        )
    ),
]


def expected(decoder: Decoder) -> torch.Tensor:
    x = integers((*decoder.case.rows, K), -2, 2, 1)
    bias = integers((N,), -8, 8, 3) if decoder.case.layer.get("bias") else 0
    attention, ffn = (x @ integers((N, K), -2, 2, seed).T + bias for seed in (2, 4))
    return (attention + ffn).to(decoder.case.layer.get("params_dtype", BF16))


@pytest.mark.parametrize("decoder", TAKEN_OVER + OWNED_AND_DECLINED + LEFT, ids=str)
def test_each_sum_is_made_once_by_the_layer_or_by_the_boundary(ranks, decoder):
    for output, sums, counted, log in ranks(2).run(run, decoder, None):
        assert torch.equal(output, expected(decoder)) and sums == 2 and counted == {} and log == []
    for rank, (output, sums, counted, log) in enumerate(ranks(2).run(run, decoder, "auto")):
        assert torch.equal(output, expected(decoder))
        assert (sums, counted) == (decoder.sums, decoder.counted), log
        assert rank != 0 or not decoder.said or any(decoder.said in line for line in log)


@pytest.mark.parametrize("decoder", [each for each in LEFT if each.told], ids=str)
def test_where_the_op_is_required_what_cannot_be_taken_over_is_an_error(ranks, decoder):
    for text, sums, counted, _ in ranks(2).run(run, decoder, "1"):
        assert "cannot be fused, and was required to be: " in text and decoder.said in text
        assert sums == 0 and counted == {}, "before any call"


@pytest.mark.parametrize("layer", [{"parallel_group": "attn_tp"}, {"use_dp_attention_reduce": True}], ids=str)
def test_attentions_group_is_the_tensor_parallel_one_by_another_name(ranks, layer):
    for seen in ranks(2).run(run_layer, SGLang, Case("", layer=layer)):
        assert same(seen.ours, seen.theirs) and seen.counted == {"fused": 1} and seen.our_sums == 0


@pytest.mark.parametrize(
    ("settings", "max_M"),
    [
        ({"chunked_prefill_size": 96}, 96),
        ({"chunked_prefill_size": -1}, 64),
        ({"chunked_prefill_size": None, "max_prefill_tokens": 80}, 80),
        ({"max_running_requests": 112}, 112),
    ],
    ids=["a chunk", "no chunks", "not set", "many requests"],
)
def test_the_largest_call_is_a_chunk_of_prefill_or_a_token_of_each_request(ranks, settings, max_M):
    assert ranks(2).run(budget, settings) == [max_M] * 2


def test_the_plugin_may_be_loaded_again():
    made = SGLang(SimpleNamespace(world_size=2, rank_in_group=0))
    with environment("auto"), made.running():
        adapter.register()
        hooks = list(made.registry.hooks)
        adapter.register()
        assert made.registry.hooks == hooks and len(hooks) == 2 + 2 * len(DECODERS)


def test_another_sglang_without_boundaries_keeps_its_decoders():
    made = SGLang(SimpleNamespace(world_size=2, rank_in_group=0))
    with environment("auto"), made.running():
        for kind in made.decoders.values():
            del kind.stage_facts
        made.load_plugins()
        assert [target.rpartition(".")[2] for target, _, _ in made.registry.hooks] == ["__init__", "forward"]
