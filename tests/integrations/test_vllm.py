"""What only the plugin for vLLM does, in a stand-in of vLLM; the rest is in test_engines.py."""

from __future__ import annotations

import contextlib
import logging
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.integrations.engine_cases import BF16, Case, K, M, N, build, call, engine, run, same
from tests.integrations.surroundings import environment, heard, integers
from tests.integrations.vllm_stand_in import VLLM, RowParallelLinearWithLoRA
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.integrations import vllm as adapter
from tp_overlap_kernels.layers import counters


def run_lora(rank: int, world_size: int, case: Case) -> tuple[Any, int, dict[str, int], list[str]]:
    with heard() as log, engine(VLLM, case, "auto") as made:
        wrapped = RowParallelLinearWithLoRA(made, build(made, case))
        return call(wrapped, case, rank, world_size), made.group.sums, counters(), log


def hidden_size(rank: int, world_size: int) -> tuple[int, int]:
    """(max_N of the arena, N of the layer that made it)"""
    with engine(VLLM, Case(""), "auto") as made:
        build(made, Case(""))
        return tpo.init(dist.group.WORLD, max_M=1, max_N=1).max_N, N


def test_a_layer_may_return_the_output_alone(ranks):
    for seen in ranks(2).run(run, VLLM, Case("", layer={"return_bias": False})):
        assert isinstance(seen.ours, torch.Tensor) and same(seen.ours, seen.theirs) and seen.counted == {"fused": 1}


def test_a_layer_that_lora_has_wrapped_sums_once_by_itself(ranks):
    case = Case("LoRA", engine={"lora_config": SimpleNamespace()}, layer={"return_bias": False})
    total = integers((M, K), -2, 2, 1) @ integers((N, K), -2, 2, 2).T + integers((N,), -8, 8, 3)
    for rank, (output, sums, counted, log) in enumerate(ranks(2).run(run_lora, case)):
        assert torch.equal(output, total.to(BF16)) and sums == 1 and counted == {}
        assert any("LoRA is on" in line for line in log) == (rank == 0)


def test_the_arena_is_as_wide_as_the_model(ranks):
    assert ranks(2).run(hidden_size) == [(64, 40)] * 2


def test_vllms_key_for_compiled_graphs_holds_the_decision(ranks):
    fused, declined = (ranks(2).run(run, VLLM, Case("", no_arena=without)) for without in (False, True))
    for one, other in zip(fused, declined, strict=True):
        assert other.notes == {"model.layers.*.mlp.down_proj": "declined: topology"}
        assert list(one.notes) == list(other.notes) and one.notes != other.notes


# ---- loading the plugin, without ranks


@contextlib.contextmanager
def process(overlap: str) -> Any:
    made = VLLM(SimpleNamespace(world_size=2, rank_in_group=0))
    with environment(overlap), made.running():
        yield made


@pytest.mark.parametrize("overlap", ["auto", "1"])
def test_the_plugin_may_be_loaded_again(overlap):
    with process(overlap) as made:
        adapter.register()
        (ours,) = made.registry.values()
        adapter.register()
        assert list(made.registry.values()) == [ours] and issubclass(ours, made.RowParallelLinear)


def other_plugin(made: VLLM) -> None:
    made.PluggableLayer.register_oot(name="RowParallelLinear")(type("Other", (made.RowParallelLinear,), {}))


def older_vllm(made: VLLM) -> None:
    del sys.modules["vllm.model_executor.custom_op"].PluggableLayer


@pytest.mark.parametrize(
    ("hindrance", "text"), [(other_plugin, "another plugin has replaced"), (older_vllm, "no registry")]
)
def test_where_vllm_has_no_place_for_it_the_plugin_steps_aside_or_says_that_it_cannot(hindrance, text):
    with process("auto") as made, heard() as log:
        hindrance(made)
        before = dict(made.registry)
        adapter.register()
        assert made.registry == before and len(log) == 1 and text in log[0]
    with process("1") as made:
        hindrance(made)
        with pytest.raises(InvalidInput, match=text):
            adapter.register()


def test_the_lines_go_where_vllms_go():
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("tp_overlap_kernels")
    handler, kept = logging.Handler(), (ours.handlers, ours.propagate, ours.level)
    lines: list[str] = []
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    theirs.addHandler(handler)
    theirs.setLevel(logging.INFO)
    ours.handlers = []
    try:
        with process("auto"):
            adapter.register()
            logging.getLogger("tp_overlap_kernels.integrations.adoption").info("active")
        assert lines == ["active"]
    finally:
        theirs.removeHandler(handler)
        theirs.setLevel(logging.NOTSET)
        ours.handlers, ours.propagate = kept[:2]
        ours.setLevel(kept[2])
