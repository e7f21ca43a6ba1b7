"""The same launches again, with the same arguments and other data: what a captured graph does on a device.

An epoch, a parity or a count that the host hands over would be an old one from the second time on.
"""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest
import torch

import tp_overlap_kernels as tpo
from tests.dist import barrier
from tests.ops import calls as rank_side
from tests.ops import judge as of_sums
from tests.ops import norms
from tests.ops.calls import Setup
from tests.ops.norms import NormCall
from tests.order.replay import replay
from tests.order.test_no_races import CAPACITY, MOVERS, call_of
from tests.order.trace import tracing
from tp_overlap_kernels.lang.launch import Launch
from tp_overlap_kernels.memory.layout import layout

# Plans that are one launch: what torch does between the launches of the others is not launched again here.
ONE_LAUNCH = [(op, plan) for op, plan in MOVERS if plan not in ("chunked", "unfused_push")]
REPLAYS = 3  # and the call itself: an even number, then an odd one


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("op, plan", ONE_LAUNCH)
def test_a_launch_with_old_arguments_is_a_new_call(ranks, op, plan, world_size):
    call = changed(call_of(op, plan, 40, 24, world_size, 0), kind="integer")
    judge = norms.judge if isinstance(call, NormCall) else of_sums.judge
    logs, results = zip(*ranks(world_size).run(call_and_replay, call), strict=True)
    for number, by_rank in enumerate(zip(*results, strict=True)):
        judge(changed(call, number=number), plan, list(by_rank))
    replay(logs, layout(**CAPACITY, itemsize=2, world_size=world_size)).raise_if_any()


def changed(call, **fields):
    """The call with other fields of Call."""
    if isinstance(call, NormCall):
        return dataclasses.replace(call, sum=dataclasses.replace(call.sum, **fields))
    return dataclasses.replace(call, **fields)


def copy_of(result):
    return tuple(each.clone() for each in result) if isinstance(result, tuple) else result.clone()


def call_and_replay(rank, world_size, call):
    """(log, results): of the call, then of its launch again, over other inputs each time."""
    arena = rank_side.prepare_arena(Setup(**CAPACITY))
    made_by = norms if isinstance(call, NormCall) else rank_side
    tensors, launched = made_by.operands(call, rank), []

    def remembered(launch, grid, *args):
        launched.append((launch, grid, args))
        return run(launch, grid, *args)

    run = Launch.__call__
    with tpo.cpu_backend("interp"), tpo.force_plan(call.plan), torch.inference_mode(), tracing(arena) as trace:
        barrier()
        with mock.patch.object(Launch, "__call__", remembered):
            out = made_by.invoke(call, tensors, rank)
        ((launch, grid, args),) = launched
        results = [copy_of(out)]
        for number in range(1, 1 + REPLAYS):
            again = made_by.operands(changed(call, number=number), rank)
            for x, y in zip(tensors, again, strict=True):
                x.copy_(y)
            launch(grid, *args)
            results.append(copy_of(out))
    return trace.events, results
