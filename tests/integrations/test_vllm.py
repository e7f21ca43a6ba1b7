"""The plugin for vLLM, on CPU ranks, in a stand-in of the engine. Small integers: sums are exact, bits are compared."""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.integrations import stand_in
from tests.integrations.stand_in import Group, QuantizedActivation
from tests.integrations.surroundings import environment, heard, integers, no_arena
from tests.integrations.vllm_stand_in import VLLM, RowParallelLinearWithLoRA
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.integrations import vllm as adapter
from tp_overlap_kernels.layers import counters, routing

K, N, M = 48, 40, 6  # K of the whole layer; divides over 2 and 3 ranks
BF16 = torch.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, the engine it is in, and what is to come of a call. reason: counted as unfused; empty: fused."""

    why: str
    reason: str = ""
    layer: dict[str, Any] = dataclasses.field(default_factory=dict)
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    spoil: str = ""  # a function of stand_in that changes the layer after loading
    activation: bool = False  # the input is no tensor
    rows: tuple[int, ...] = (M,)
    grad: bool = False
    no_arena: bool = False

    def __str__(self) -> str:
        return self.why


@dataclasses.dataclass
class Seen:
    """Of our layer and of vLLM's own: what it returned, and how many sums it asked the group for."""

    ours: Any
    theirs: Any
    our_sums: int
    their_sums: int
    counted: dict[str, int]
    log: list[str]
    decisions: dict[str, str]


def build(engine: VLLM, case: Case) -> Any:
    arguments = {"input_size": K, "output_size": N, "prefix": "model.layers.3.mlp.down_proj"} | case.layer
    layer = engine.RowParallelLinear(**arguments)
    layer.load(integers((N, K), -2, 2, 2), integers((N,), -8, 8, 3))
    if case.spoil:
        getattr(stand_in, case.spoil)(layer)
    return layer


def call(layer: Any, case: Case) -> Any:
    x = integers((*case.rows, K), -2, 2, 1).to(case.layer.get("params_dtype", BF16))
    whole = case.layer.get("disable_tp") or not case.layer.get("input_is_parallel", True)
    columns = x if whole else x.chunk(layer.tp_size, dim=-1)[layer.tp_rank].contiguous()
    columns = columns.requires_grad_(case.grad)
    with torch.set_grad_enabled(case.grad):
        output = layer(QuantizedActivation(columns) if case.activation else columns)
    return (
        [None if part is None else part.detach() for part in output] if isinstance(output, tuple) else output.detach()
    )


@contextlib.contextmanager
def engine(case: Case, overlap: str | None, group: dist.ProcessGroup | None = None) -> Any:
    """A process of vLLM that has loaded its plugins."""
    routing.reset_counters()
    made = VLLM(Group(group or dist.group.WORLD), **case.engine)
    without = no_arena() if case.no_arena else contextlib.nullcontext()
    with environment(overlap), made.running(), without:
        adapter.register()
        try:
            yield made
        finally:
            tpo.close(group)


def run(rank: int, world_size: int, case: Case, alone: bool = False) -> Seen:
    group = [dist.new_group([each]) for each in range(world_size)][rank] if alone else None
    with engine(case, None, group) as own:
        theirs = call(build(own, case), case)
        assert counters() == {} and own.config.additional_config in ({}, None), "TP_OVERLAP is unset"
    with heard() as log, engine(case, "auto", group) as made:
        ours = call(build(made, case), case)
        decisions = (made.config.additional_config or {}).get("tp_overlap", {})
        return Seen(ours, theirs, made.group.sums, own.group.sums, counters(), log, decisions)


def run_required(rank: int, world_size: int, case: Case) -> tuple[str, dict[str, int]]:
    with engine(case, "1") as made:
        try:
            return f"fused: {call(build(made, case), case)}", counters()
        except InvalidInput as error:
            return str(error), counters()


def run_lora(rank: int, world_size: int, case: Case) -> Seen:
    with heard() as log, engine(case, "auto") as made:
        ours = call_wrapped(RowParallelLinearWithLoRA(made, build(made, case)), case)
        return Seen(ours, None, made.group.sums, 0, counters(), log, made.config.additional_config["tp_overlap"])


def call_wrapped(wrapper: Any, case: Case) -> Any:
    wrapper.tp_rank, wrapper.tp_size = wrapper.base_layer.tp_rank, wrapper.base_layer.tp_size
    return call(wrapper, case)


def run_model(rank: int, world_size: int) -> tuple[list[str], dict[str, dict[str, int]], int, int]:
    """(what is logged, the arena's bytes, and its sizes) of two decoder layers."""
    case = Case("")
    with heard() as log, engine(case, "auto") as made:
        for index in range(2):
            for name, width in (("self_attn.o_proj", N), ("mlp.down_proj", N), ("mlp.gate", 24)):
                parts = {"prefix": f"model.layers.{index}.{name}", "output_size": width}
                build_at = {"reduce_results": False, "bias": False} if name == "mlp.gate" else {}
                made.RowParallelLinear(K, **parts, **build_at)
        room = tpo.init(dist.group.WORLD, max_M=1, max_N=1)
        return log, tpo.memory_report().groups, room.max_M, room.max_N


def run_compiled(rank: int, world_size: int) -> tuple[list[bool], list[int], int]:
    """(whether outputs equal the eager ones, how often each graph calls the op, sums by the group)"""
    graphs: list[int] = []

    def count_ops(graph: torch.fx.GraphModule, _: Any) -> Any:
        graphs.append(sum("gemm_all_reduce" in str(node.target) for node in graph.graph.nodes))
        return graph

    torch.compiler.reset()
    case = Case("", layer={"return_bias": False})
    with engine(case, "auto") as made, torch.no_grad():
        layer = build(made, case)
        traced = torch.compile(layer, fullgraph=True, dynamic=True, backend=count_ops)
        inputs = [integers((rows, K // world_size), -2, 2, rows).to(BF16) for rows in (5, 17, 48)]
        equal = [torch.equal(traced(x), layer(x)) for x in inputs]
        return equal, graphs, made.group.sums


# ---- tests

FUSED = [
    Case("a bias"),
    Case("no bias", layer={"bias": False}),
    Case("the bias is the caller's", layer={"skip_bias_add": True}),
    Case("the output alone", layer={"return_bias": False}),
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
    Case("tensor parallelism is off for the layer", "one_rank", layer={"disable_tp": True}),
    Case("LoRA", "lora", engine={"lora_config": SimpleNamespace()}),
    Case("batch invariance", "batch_invariant", engine={"batch_invariant": True}),
    Case("two batches at once", "two_batches", engine={"ubatching": True}),
    Case("the compile cache cannot be told", "compile_cache", engine={"additional_config": None}),
    Case("no arena can be made", "topology", no_arena=True),
]
CALL_DECLINED = [
    Case("the weight is packed", "weight", spoil="pack"),
    Case("the weight is gone", "weight", spoil="remove"),
    Case("the weight is transposed in memory", "weight", spoil="transpose_in_memory"),
    Case("no tensor comes in", "input", activation=True),
    Case("a gradient is wanted", "needs_grad", grad=True),
]


def same(ours: Any, theirs: Any) -> bool:
    """Bits, shapes and structure."""
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(same(*pair) for pair in zip(ours, theirs, strict=True))
    return ours is None if theirs is None else torch.equal(ours, theirs)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("case", FUSED, ids=str)
def test_the_op_gives_the_sum_that_vllm_gives_and_nothing_is_summed_again(ranks, case, world_size):
    for seen in ranks(world_size).run(run, case):
        assert same(seen.ours, seen.theirs)
        assert seen.counted == {"fused": 1} and (seen.our_sums, seen.their_sums) == (0, 1)


@pytest.mark.parametrize("case", LAYER_DECLINED + CALL_DECLINED, ids=str)
def test_what_is_declined_runs_as_vllm_runs_it_and_is_counted_and_said(ranks, case):
    for rank, seen in enumerate(ranks(2).run(run, case)):
        assert same(seen.ours, seen.theirs) and seen.our_sums == seen.their_sums
        assert seen.counted == {f"unfused: {case.reason}": 1}
        said = [line for line in seen.log if "not active for model.layers.*.mlp.down_proj" in line or "unfused" in line]
        assert len(said) == (1 if rank == 0 else 0), seen.log


@pytest.mark.parametrize("case", LAYER_DECLINED + CALL_DECLINED, ids=str)
def test_where_the_op_is_required_the_same_is_an_error_that_says_why(ranks, case):
    for text, counted in ranks(2).run(run_required, case):
        assert "mlp.down_proj" in text and "cannot be fused, and was required to be: " in text and counted == {}


def test_a_group_of_one_rank_has_nothing_to_sum(ranks):
    for seen in ranks(2).run(run, Case("alone"), True):
        assert same(seen.ours, seen.theirs) and seen.counted == {"unfused: one_rank": 1} and seen.our_sums == 0


def test_a_layer_that_lora_has_wrapped_sums_once_by_itself(ranks):
    case = Case("LoRA", engine={"lora_config": SimpleNamespace()}, layer={"return_bias": False})
    total = integers((M, K), -2, 2, 1) @ integers((N, K), -2, 2, 2).T + integers((N,), -8, 8, 3)
    for rank, seen in enumerate(ranks(2).run(run_lora, case)):
        assert torch.equal(seen.ours, total.to(BF16)) and seen.our_sums == 1 and seen.counted == {}
        assert any("LoRA is on" in line for line in seen.log) == (rank == 0)


def test_the_engines_budget_sizes_the_arena_and_each_kind_of_layer_is_said_once(ranks):
    for rank, (log, groups, max_M, max_N) in enumerate(ranks(2).run(run_model)):
        assert (max_M, max_N) == (48, 64), "max_num_batched_tokens, hidden size"
        ((_, regions),) = groups.items()
        said = [line for line in log if line.startswith("tp_overlap_kernels for vLLM: ")]
        if rank != 0:
            assert said == []
            continue
        attention, mlp, gate = said
        assert "active for model.layers.*.self_attn.o_proj (N=40, K=24 a rank)" in attention
        assert "active for model.layers.*.mlp.down_proj" in mlp
        assert f"max_M=48; {sum(regions.values())} bytes a rank" in attention and "not active for" in gate


def test_a_compiled_layer_is_one_graph_that_calls_the_op(ranks):
    assert ranks(2).run(run_compiled) == [([True] * 3, [1], 0)] * 2


def test_vllms_key_for_compiled_graphs_holds_the_decision(ranks):
    fused, declined = (ranks(2).run(run, case) for case in (FUSED[0], LAYER_DECLINED[-1]))
    for one, other in zip(fused, declined, strict=True):
        assert list(one.decisions) == list(other.decisions) == ["model.layers.*.mlp.down_proj"]
        assert one.decisions != other.decisions
        assert set(other.decisions.values()) == {"declined: topology"}


# ---- the entry point, without ranks


@contextlib.contextmanager
def process(overlap: str | None) -> Any:
    made = VLLM(SimpleNamespace(world_size=2, rank_in_group=0))
    with environment(overlap), made.running():
        yield made


@pytest.mark.parametrize("overlap", [None, "0"])
def test_an_installed_plugin_does_nothing_unless_it_is_asked(overlap):
    with process(overlap) as made, heard() as log:
        adapter.register()
        assert made.registry == {} and log == []


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
    import sys

    del sys.modules["vllm.model_executor.custom_op"].PluggableLayer


@pytest.mark.parametrize(
    ("hindrance", "text"), [(other_plugin, "another plugin has replaced"), (older_vllm, "no registry")], ids=str
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
    import logging

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
        ours.handlers, ours.propagate, ours.level = kept
        ours.manager._clear_cache()


def test_the_entry_point_names_the_function():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11, which reads toml")
    root = pathlib.Path(__file__).resolve().parents[2]
    points = tomllib.loads((root / "pyproject.toml").read_text())["project"]["entry-points"]
    module, _, function = points["vllm.general_plugins"]["tp_overlap_kernels"].partition(":")
    assert (module, getattr(adapter, function)) == (adapter.__name__, adapter.register)
