"""What only one rank sees (strides and addresses of its own tensors) changes how it loads, and never what is called."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, Case
from tests.ops import calls as rank_side
from tests.ops.calls import CPU_PLANS, LAYOUTS, Call, Setup, cpu_plans
from tests.ops.judge import judge

TIMEOUT_S = 5.0  # a rank that goes another way would keep its peers waiting


@pytest.mark.parametrize("backend", ["ref", "interp"])
@pytest.mark.parametrize("op", CPU_PLANS)
def test_one_rank_in_other_strides(ranks, op, backend):
    sizes = (1, 600, 0) if op == "all_reduce" else (40, 72, 24)
    layouts = [name for name in LAYOUTS if name != "contiguous"]
    plans = cpu_plans(op, 2) if backend == "interp" else [None]
    calls = [
        Call(op, Case(*sizes, BF16, 2, ""), "tagged", number, plan=plan, layout=layout)
        for number, (plan, layout) in enumerate((plan, layout) for plan in plans for layout in layouts)
    ]
    by_rank = ranks(2).run(call_unlike, calls, backend)
    for call, results in zip(calls, zip(*by_rank, strict=True), strict=True):
        judge(call, call.plan or "ref", list(results))


def call_unlike(rank, world_size, calls, backend):
    """The odd calls' layout is rank 0's alone, the even calls' rank 1's."""
    arena = rank_side.prepare_arena(Setup())
    before, arena.timeout_s = arena.timeout_s, TIMEOUT_S
    try:
        results = []
        with tpo.cpu_backend(backend), torch.inference_mode():
            for call in calls:
                mine = call if call.number % 2 != rank else dataclasses.replace(call, layout="contiguous")
                with tpo.force_plan(call.plan):
                    results.append(rank_side.invoke(mine, rank_side.operands(mine, rank), rank))
        return results
    finally:
        arena.timeout_s = before
