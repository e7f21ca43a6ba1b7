"""Layers in stand-ins of engines, and what ranks do with them. Small integers: sums are exact, and bits compared."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests.integrations import stand_in
from tests.integrations.stand_in import Group, QuantizedActivation
from tests.integrations.surroundings import environment, heard, integers, no_arena
from tests.integrations.traced import traced
from tp_overlap_kernels.errors import InvalidInput
from tp_overlap_kernels.layers import counters, routing

K, N, M = 48, 40, 6  # K of the whole layer; divides over 2 and 3 ranks
BF16 = torch.bfloat16
NAME = "model.layers.3.mlp.down_proj"


@dataclasses.dataclass(frozen=True)
class Case:
    """A layer, the engine it is in, and what is to come of a call. reason: counted as unfused; empty: fused."""

    why: str
    reason: str = ""
    layer: dict[str, Any] = dataclasses.field(default_factory=dict)
    engine: dict[str, Any] = dataclasses.field(default_factory=dict)
    spoil: str = ""  # a function of stand_in that changes the layer after loading
    call: dict[str, Any] = dataclasses.field(default_factory=dict)  # arguments beside the input
    activation: bool = False  # the input is no tensor
    rows: tuple[int, ...] = (M,)
    grad: bool = False
    no_arena: bool = False

    def __str__(self) -> str:
        return self.why


@dataclasses.dataclass
class Seen:
    """Of a module with the plugin and without: what it returned, and how many sums it asked the group for."""

    ours: Any
    theirs: Any
    our_sums: int
    their_sums: int
    counted: dict[str, int]
    log: list[str]
    notes: dict[str, str]  # what the adapter has left in the engine's settings


@contextlib.contextmanager
def engine(kind: type, case: Case, overlap: str | None, group: dist.ProcessGroup | None = None) -> Iterator[Any]:
    """A process of the engine, a stand-in of class `kind`, that has loaded its plugins."""
    routing.reset_counters()
    made = kind(Group(group or dist.group.WORLD), **case.engine)
    without = no_arena() if case.no_arena else contextlib.nullcontext()
    with environment(overlap), made.running(), without:
        made.load_plugins()
        try:
            yield made
        finally:
            tpo.close(group)


def build(made: Any, case: Case) -> Any:
    layer = made.RowParallelLinear(**{"input_size": K, "output_size": N, "prefix": NAME} | case.layer)
    prepare(layer, case)
    return layer


def prepare(layer: Any, case: Case, seed: int = 2) -> None:
    """Weights are loaded, and the engine, or the case, does to them what it does."""
    layer.load(integers((N, K), -2, 2, seed), integers((N,), -8, 8, 3))
    if case.spoil:
        getattr(stand_in, case.spoil)(layer)


def call(module: Any, case: Case, rank: int, world_size: int) -> Any:
    """rank, world_size: of the input's columns; 1 for a module that takes all of them."""
    x = integers((*case.rows, K), -2, 2, 1).to(case.layer.get("params_dtype", BF16))
    columns = x.chunk(world_size, dim=-1)[rank].contiguous().requires_grad_(case.grad)
    arguments = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in case.call.items()}
    with torch.set_grad_enabled(case.grad):
        output = module(QuantizedActivation(columns) if case.activation else columns, **arguments)
    parts = [None if part is None else part.detach() for part in (output if isinstance(output, tuple) else [output])]
    return parts if isinstance(output, tuple) else parts[0]


def call_layer(made: Any, case: Case) -> Any:
    layer = build(made, case)
    whole = case.layer.get("input_is_parallel") is False
    return call(layer, case, *((0, 1) if whole else (layer.tp_rank, layer.tp_size)))


def run(rank: int, world_size: int, kind: type, case: Case, alone: bool = False) -> Seen:
    """A layer without the plugin and with it. alone: each rank is a group by itself."""
    group = [dist.new_group([each]) for each in range(world_size)][rank] if alone else None
    with engine(kind, case, None, group) as own:
        theirs = call_layer(own, case)
        assert counters() == {} and not own.notes(), "TP_OVERLAP is unset"
    with heard() as log, engine(kind, case, "auto", group) as made:
        ours = call_layer(made, case)
        return Seen(ours, theirs, made.group.sums, own.group.sums, counters(), log, made.notes())


def run_required(rank: int, world_size: int, kind: type, case: Case) -> tuple[str, dict[str, int]]:
    with engine(kind, case, "1") as made:
        try:
            return f"fused: {call_layer(made, case)}", counters()
        except InvalidInput as error:
            return str(error), counters()


def run_compiled(rank: int, world_size: int, kind: type, case: Case) -> tuple[list[bool], list[int], int]:
    """(whether outputs equal the eager ones, how often each graph calls the op, sums by the group)"""
    with engine(kind, case, "auto") as made, torch.no_grad():
        layer = build(made, case)
        one_graph, graphs = traced(layer, "gemm_all_reduce")
        inputs = [integers((rows, K // world_size), -2, 2, rows).to(BF16) for rows in (5, 17, 48)]
        equal = [same(list(one_graph(x)), list(layer(x))) for x in inputs]
        return equal, graphs, made.group.sums


def run_model(rank: int, world_size: int, kind: type, case: Case) -> tuple[list[str], int, int]:
    """(what is logged, the arena's bytes, its max_M) of layers of three kinds, two of each."""
    with heard() as log, engine(kind, case, "auto") as made:
        for index in range(2):
            for name, more in (("attention.out", {}), ("mlp.down", {}), ("gate", {"reduce_results": False})):
                made.RowParallelLinear(K, N, bias=False, prefix=f"model.layers.{index}.{name}", **more)
        return log, tpo.memory_report().total_bytes, tpo.init(dist.group.WORLD, max_M=1, max_N=1).max_M


def same(ours: Any, theirs: Any) -> bool:
    """Bits, shapes and structure."""
    if isinstance(theirs, list):
        return len(ours) == len(theirs) and all(same(*pair) for pair in zip(ours, theirs, strict=True))
    return ours is None if theirs is None else torch.equal(ours, theirs)
