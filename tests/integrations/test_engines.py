"""What the plugins of both engines have in common, on CPU ranks, in stand-ins of the engines."""

from __future__ import annotations

import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests.integrations.engine_cases import Case, M, N, run, run_compiled, run_model, run_required, same
from tests.integrations.sglang_stand_in import SGLang
from tests.integrations.surroundings import environment, heard
from tests.integrations.vllm_stand_in import VLLM
from tp_overlap_kernels.integrations import engines, sglang, vllm

ENGINES = {"vLLM": VLLM, "SGLang": SGLang}
FUSED = [
    Case("a bias"),
    Case("no bias", layer={"bias": False}),
    Case("the bias is the caller's", layer={"skip_bias_add": True}),
    Case("fp16", layer={"params_dtype": torch.float16}),
    Case("three dimensions", rows=(2, 3)),
    Case("no rows", rows=(0,)),
    Case("more rows than the budget", rows=(100,)),
]
LAYER_DECLINED = [
    Case("reduce_results=False", "reduce_results", layer={"reduce_results": False, "bias": False}),
    Case("the whole input", "whole_input", layer={"input_is_parallel": False}),
    Case("a quant method", "quantised", layer={"quantised": True}),
    Case("float32", "dtype", layer={"params_dtype": torch.float32}),
    Case("no arena can be made", "topology", no_arena=True),
]
CALL_DECLINED = [
    Case("the weight is packed", "weight", spoil="pack"),
    Case("the weight is gone", "weight", spoil="remove"),
    Case("the weight is transposed in memory", "weight", spoil="transpose_in_memory"),
    Case("no tensor comes in", "input", activation=True),
    Case("a gradient is wanted", "needs_grad", grad=True),
]
OF_VLLM = [
    Case("tensor parallelism is off for the layer", "one_rank", layer={"disable_tp": True}),
    Case("LoRA", "lora", engine={"lora_config": SimpleNamespace()}),
    Case("batch invariance", "batch_invariant", engine={"batch_invariant": True}),
    Case("two batches at once", "two_batches", engine={"ubatching": True}),
    Case("the compile cache cannot be told", "compile_cache", engine={"additional_config": None}),
]
OF_SGLANG = [
    Case("a replicated layer", "one_rank", layer={"parallel_group": "replicated"}),
    Case("LoRA", "lora", engine={"enable_lora": True}),
    Case("LoRA by its paths", "lora", engine={"lora_paths": ["an adapter"]}),
    Case("deterministic inference", "batch_invariant", engine={"enable_deterministic_inference": True}),
    Case("as a policy's trainer computes", "batch_invariant", engine={"rl_on_policy_target": "fsdp"}),
    Case("two batches at once", "two_batches", engine={"enable_two_batch_overlap": True}),
    Case("data-parallel attention", "other_group", engine={"attn_dp_size": 2}),
    Case("context-parallel attention", "other_group", engine={"attn_cp_size": 2}),
    Case("columns of more ranks", "other_group", layer={"parallel_group": "shared_experts_tp"}),
    Case("sequence parallelism", "other_sum", engine={"enable_layernorm_sp": True}),
    Case("scattered input", "other_sum", engine={"enable_attn_tp_input_scattered": True}),
    Case("quantised sums", "other_sum", engine={"enable_quant_communications": True}),
    Case("the caller sums", "partial", call={"skip_all_reduce": True}),
    Case("the decoder layer scatters the sum", "partial", engine={"mlp_reduce_scatter": True}),
    Case("the caller's output", "output_tensor", call={"output_tensor": torch.empty(M, N, dtype=torch.bfloat16)}),
]
DECLINED = [("vLLM", case) for case in LAYER_DECLINED + CALL_DECLINED + OF_VLLM]
DECLINED += [("SGLang", case) for case in LAYER_DECLINED + CALL_DECLINED + OF_SGLANG]


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", FUSED, ids=str)
@pytest.mark.parametrize("name", ENGINES)
def test_the_op_gives_the_engines_sum_and_nothing_is_summed_again(ranks, name, case, world_size):
    for seen in ranks(world_size).run(run, ENGINES[name], case):
        assert same(seen.ours, seen.theirs)
        assert seen.counted == {"fused": 1} and (seen.our_sums, seen.their_sums) == (0, 1)


@pytest.mark.parametrize(("name", "case"), DECLINED, ids=str)
def test_what_is_declined_runs_as_the_engine_runs_it_and_is_counted_and_said(ranks, name, case):
    for rank, seen in enumerate(ranks(2).run(run, ENGINES[name], case)):
        assert same(seen.ours, seen.theirs) and seen.our_sums == seen.their_sums
        assert seen.counted == {f"unfused: {case.reason}": 1}
        said = [line for line in seen.log if "not active for model.layers.*.mlp.down_proj" in line or "unfused" in line]
        assert len(said) == (1 if rank == 0 else 0), seen.log


@pytest.mark.parametrize(("name", "case"), DECLINED, ids=str)
def test_where_the_op_is_required_the_same_is_an_error_that_says_why(ranks, name, case):
    for text, counted in ranks(2).run(run_required, ENGINES[name], case):
        assert "mlp.down_proj" in text and "cannot be fused, and was required to be: " in text and counted == {}


@pytest.mark.parametrize("name", ENGINES)
def test_a_group_of_one_rank_has_nothing_to_sum(ranks, name):
    for seen in ranks(2).run(run, ENGINES[name], Case("alone"), True):
        assert same(seen.ours, seen.theirs) and seen.counted == {"unfused: one_rank": 1} and seen.our_sums == 0


@pytest.mark.parametrize("name", ENGINES)
def test_a_compiled_layer_is_one_graph_that_calls_the_op(ranks, name):
    assert ranks(2).run(run_compiled, ENGINES[name], Case("")) == [([True] * 3, [1], 0)] * 2


@pytest.mark.parametrize("name", ENGINES)
def test_the_engines_budget_sizes_the_arena_and_each_kind_of_layer_is_said_once(ranks, name):
    for rank, (log, held_bytes, max_M) in enumerate(ranks(2).run(run_model, ENGINES[name], Case(""))):
        assert max_M == 48 and held_bytes > 0
        said = [line for line in log if line.startswith(f"tp_overlap_kernels for {name}: ")]
        if rank != 0:
            assert said == []
            continue
        attention, mlp, gate = said
        assert "active for model.layers.*.attention.out (N=40, K=24 a rank)" in attention
        assert f"max_M=48; {held_bytes} bytes a rank" in attention and f"; {held_bytes} bytes" in mlp
        assert "not active for model.layers.*.gate: reduce_results=False" in gate


@pytest.mark.parametrize("overlap", [None, "0"])
@pytest.mark.parametrize("name", ENGINES)
def test_an_installed_plugin_does_nothing_unless_it_is_asked(name, overlap):
    made = ENGINES[name](SimpleNamespace(world_size=2, rank_in_group=0))
    before = {key: vars(made.RowParallelLinear)[key] for key in ("__init__", "forward")}
    with environment(overlap), made.running(), heard() as log:
        made.load_plugins()
    assert not made.is_changed() and log == []
    assert before == {key: vars(made.RowParallelLinear)[key] for key in before}


@pytest.mark.parametrize(("group", "adapter"), [("vllm.general_plugins", vllm), ("sglang.srt.plugins", sglang)])
def test_the_entry_point_names_the_function(group, adapter):
    tomllib: Any = pytest.importorskip("tomllib", reason="needs Python 3.11, which reads toml")
    root = pathlib.Path(__file__).resolve().parents[2]
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = points[group]["tp_overlap_kernels"].partition(":")
    assert (module, getattr(adapter, function)) == (adapter.__name__, adapter.register)


def test_every_reason_to_decline_a_layer_is_met_above():
    rows = [line.split("|")[1].strip() for line in (engines.__doc__ or "").splitlines() if line.startswith("| ")]
    met = {case.reason for _, case in DECLINED} | {"no_hook"}  # which is met in test_sglang.py
    assert len(rows) > 2 and set(rows[2:]) <= met
