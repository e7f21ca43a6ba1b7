"""A call that a peer never joins gives NaN and nothing else, though the arena is full of earlier calls' numbers."""

from __future__ import annotations

import dataclasses

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.cases import BF16, Case
from tests.dist import barrier
from tests.ops import calls as rank_side
from tests.ops.calls import CPU_PLANS, Call, Setup

TIMEOUT_S = 1.0
CALLS_BEFORE = 3  # more than an arena has halves


@pytest.mark.parametrize("op, plan", [(op, plan) for op, plans in CPU_PLANS.items() for plan in plans])
def test_sums_of_before_are_not_given_out(ranks, op, plan):
    sizes = (1, 600, 0) if op == "all_reduce" else (40, 24, 8)
    call = Call(op, Case(*sizes, BF16, 2, ""), "integer", into_out=True, plan=plan)
    before, error, out = ranks(2).run(call_alone, call)[0]
    assert not before.isnan().any()
    assert error == "PeerTimeout"
    assert out.isnan().all(), f"{int((~out.isnan()).sum())} of {out.numel()} elements are numbers"


def call_alone(rank, world_size, call):
    """Calls of both ranks, then one of rank 0 alone: (last good result, error, what its tensor then holds)."""
    setup = Setup("interp")
    rank_side.prepare_arena(setup).timeout_s = TIMEOUT_S
    out, error = torch.zeros(rank_side.out_shape(call, rank), dtype=call.case.dtype), ""
    try:
        with tpo.cpu_backend("interp"), tpo.force_plan(call.plan), torch.inference_mode():
            for number in range(CALLS_BEFORE):
                tensors = rank_side.operands(dataclasses.replace(call, number=number), rank)
                before = rank_side.invoke(call, tensors, rank)
            barrier()
            if rank == 0:
                getattr(torch.ops.tp_overlap, call.op + "_out")(*tensors, rank_side.group_name(), out)
    except tpo.TpOverlapError as raised:
        error = type(raised).__name__
    barrier()
    tpo.close()
    return before, error, out
