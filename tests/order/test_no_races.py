"""Every kernel that CPU ranks can run, in every kind of sequence: nothing that ranks share is accessed out of order.

The values of such calls are judged elsewhere, and would be right on x86 without any order at all.
"""

from __future__ import annotations

import contextlib
import pathlib
import random

import pytest
import torch
import triton.language as tl

import tp_overlap_kernels as tpo
from tests.cases import BF16, FP16, Case
from tests.dist import barrier
from tests.ops import calls as rank_side
from tests.ops import norms
from tests.ops.calls import CPU_PLANS, Call, Setup, cpu_plans
from tests.ops.norms import NormCall
from tests.order.replay import Found, replay
from tests.order.trace import tracing
from tp_overlap_kernels import kernels
from tp_overlap_kernels.lang import signal
from tp_overlap_kernels.lang.interpreter import as_tensor, program_state, substitute, value_of
from tp_overlap_kernels.memory.layout import layout

CAPACITY = {"max_M": 600, "max_N": 80}
PROGRAMS = 3

# By op and plan: who loads and stores in the arena. The chunked plan's signals are kernels, its copies torch's.
MOVERS = {
    ("gemm_all_reduce", "one_shot"): "gemm_all_reduce_one_shot_push",
    ("gemm_all_reduce", "two_shot"): "gemm_all_reduce_two_shot_push",
    ("gemm_all_reduce", "chunked"): "torch",
    ("gemm_reduce_scatter", "push"): "gemm_reduce_scatter_push",
    ("gemm_reduce_scatter", "one_shot"): "gemm_reduce_scatter_one_shot_push",
    ("gemm_reduce_scatter", "chunked"): "torch",
    ("gemm_reduce_scatter", "unfused_push"): "reduce_scatter_push",
    ("all_reduce", "one_shot"): "all_reduce_one_shot_push",
    ("all_reduce", "two_shot"): "all_reduce_two_shot_push",
    (norms.SUM, "one_shot_norm"): "all_reduce_one_shot_push_add_rms_norm",
}
WORLDS = {"chunked": (2,), "one_shot_norm": (2, 3)}  # which exchanges as one_shot does
PLANS = [(op, plan, W) for op, plan in MOVERS for W in WORLDS.get(plan, (2, 3, 4))]

# (M, N, most programs of a grid) of each call, by the number of ranks
SEQUENCES = {
    "uniform": lambda W: [(40, 40, 3)] * 3,
    # each less than half of the one before: were slots placed by shape, one of any two neighbours would overlap
    "mixed shapes": lambda W: [(40, 40, 3), (8, 72, 3), (3, 8, 3), (70, 8, 3), (33, 41, 3)],
    "M=0": lambda W: [(40, 24, 3), (0, 24, 3), (40, 24, 3), (0, 24, 3), (0, 24, 3), (40, 24, 3)],
    "M<W": lambda W: [(40, 24, 3), (1, 24, 3), (W - 1, 24, 3), (40, 24, 3)],
    "an owner of nothing": lambda W: [(70, 24, 3), (owner_of_nothing(W), 24, 3), (70, 24, 3), (W + 1, 24, 3)],
    # a tile goes to another program for two calls, and then back
    "grids that change": lambda W: [(70, 40, 4), (70, 40, 1), (70, 40, 1), (70, 40, 5), (8, 8, 3)],
}


def owner_of_nothing(world_size: int) -> int:
    """Rows of which the last rank gets none, though there are at least as many as ranks where that can be."""
    return world_size + 1 if world_size > 2 else 1


def trace_calls(rank, world_size, calls, programs, broken=None):
    """The log of one rank. broken: a key of BROKEN."""
    arena = rank_side.prepare_arena(Setup(**CAPACITY))
    made_by = [norms if isinstance(call, NormCall) else rank_side for call in calls]
    prepared = [module.operands(call, rank) for module, call in zip(made_by, calls, strict=True)]
    damage = contextlib.nullcontext()
    if broken:
        word, stand_in = BROKEN[broken]
        damage = substitute(getattr(signal, word), stand_in)
    try:
        with tpo.cpu_backend("interp"), torch.inference_mode(), damage, tracing(arena) as trace:
            barrier()
            for module, call, tensors, arena.programs in zip(made_by, calls, prepared, programs, strict=True):
                with tpo.force_plan(call.plan):
                    module.invoke(call, tensors, rank)
            barrier()
    finally:
        arena.programs = PROGRAMS
    return trace.events


def find_races(ranks, calls: list[Call | NormCall], programs: list[int], broken: str | None = None) -> Found:
    world_size = calls[0].case.world_size
    logs = ranks(world_size).run(trace_calls, calls, programs, broken)
    return replay(logs, layout(**CAPACITY, itemsize=2, world_size=world_size))


def call_of(op: str, plan: str, M: int, N: int, world_size: int, number: int, dtype: torch.dtype = BF16):
    if op == norms.SUM:
        M, N = -(-M // 16), 8 * N  # a tile a row: as many as the other kernels have
        return norms.call_of(op, Case(M, N, 0, dtype, world_size, ""), number=number, plan=plan)
    sizes = (1, M * N, 0) if op == "all_reduce" else (M, N, 8)
    return Call(op, Case(*sizes, dtype, world_size, ""), number=number, plan=plan)


def sequence(name: str, op: str, plan: str, world_size: int) -> tuple[list[Call | NormCall], list[int]]:
    rows = SEQUENCES[name](world_size)
    return [call_of(op, plan, M, N, world_size, i) for i, (M, N, _) in enumerate(rows)], [row[2] for row in rows]


@pytest.mark.parametrize("op, plan, world_size", PLANS)
@pytest.mark.parametrize("name", SEQUENCES)
def test_one_plan(ranks, name, op, plan, world_size):
    found = find_races(ranks, *sequence(name, op, plan, world_size))
    found.raise_if_any()
    mover = MOVERS[op, plan]
    assert found.nbytes[mover, "load"] and found.nbytes[mover, "store"], "the trace shows no data"
    assert sum(found.joined.values()) >= 3 * (world_size - 1), "the trace shows no arrivals"


def test_chunks_and_streams(ranks):
    """Several chunks of both kinds, on three streams of which only the joins are order."""
    calls = [
        call_of(op, f"chunked:chunks={chunks},own_chunks={own}", M, 24, 2, i)
        for i, (op, M, chunks, own) in enumerate(
            (op, M, chunks, own)
            for op in ("gemm_all_reduce", "gemm_reduce_scatter")
            for M, chunks, own in ((600, 2, 2), (600, 4, 1), (40, 1, 4), (520, 2, 3))
        )
    ]
    find_races(ranks, calls, [PROGRAMS] * len(calls)).raise_if_any()


@pytest.mark.parametrize("world_size, seed", [(2, 1), (3, 2), (4, 3)])
def test_any_plan_after_any_other(ranks, world_size, seed):
    """Each kernel's argument for reuse counts on what the others do: mixed ops, shapes, grids and dtypes."""
    choose = random.Random(seed)
    calls, programs = [], []
    for number in range(60 // world_size):
        op = choose.choice([*CPU_PLANS, norms.SUM])
        plan = choose.choice(cpu_plans(op, world_size) if op in CPU_PLANS else norms.CPU_PLANS[op])
        M, N = choose.choice([0, 1, 2, 3, 5, 33, 70]), choose.choice([8, 24, 41, 72])
        calls.append(call_of(op, plan, M, N, world_size, number, choose.choice([BF16, FP16])))
        programs.append(choose.choice([1, 2, 3, 4]))
    find_races(ranks, calls, programs).raise_if_any()


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("op, plan", [("gemm_reduce_scatter", "one_shot"), ("gemm_reduce_scatter", "push")])
def test_reuse_after_each_other_plan(ranks, op, plan, world_size):
    """Between two uses of one half, and of staging, lies one call of each kind: it must bring what the reuse needs."""
    calls = []
    for other_op, other in MOVERS:
        if (other_op, other, world_size) in PLANS:
            calls.append(call_of(op, plan, 40, 24, world_size, len(calls)))
            calls.append(call_of(other_op, other, 8, 24, world_size, len(calls)))
    calls.append(call_of(op, plan, 40, 24, world_size, len(calls)))
    find_races(ranks, calls, [PROGRAMS] * len(calls)).raise_if_any()


def test_every_kernel_is_traced():
    """A new kernel belongs in MOVERS."""
    folder = pathlib.Path(kernels.__path__[0])
    written_in_triton = {path.stem for path in folder.glob("*.py") if "@triton.jit" in path.read_text()}
    files = written_in_triton - {"stream_signals", "add_rms_norm"}  # the chunked plan's; no rank but its own
    assert files == set(MOVERS.values()) - {"torch"}


# --- it bites: the same calls with a word that orders nothing


def _notify_with(order: str, scope: str):
    def notify(slot, word):
        program_state().barrier()
        tl.atomic_xchg(as_tensor(value_of(slot), tl.int64).to(tl.pointer_type(tl.int64)), word, sem=order, scope=scope)
        return as_tensor(0, tl.int32)

    return notify


def _no_wait(*_):
    return as_tensor(0, tl.int32)


BROKEN = {
    "relaxed notify": ("notify", _notify_with("relaxed", "sys")),
    "notify of this device only": ("notify", _notify_with("release", "gpu")),
    "no wait for data": ("wait", _no_wait),
    "no wait for the end of the call before": ("wait_done", _no_wait),
}


@pytest.mark.parametrize("broken", ["relaxed notify", "notify of this device only", "no wait for data"])
@pytest.mark.parametrize("op, plan", MOVERS)
def test_data_that_nobody_waited_for_is_found(ranks, op, plan, broken):
    found = find_races(ranks, *sequence("uniform", op, plan, 2), broken)
    regions = {race.region for race in found.races if "load" in race.kind}
    assert regions & {"one_shot", "staging"}, found.races


@pytest.mark.parametrize("op, plan", [("gemm_reduce_scatter", plan) for plan in ("push", "unfused_push", "chunked")])
def test_staging_that_is_written_too_early_is_found(ranks, op, plan):
    found = find_races(ranks, *sequence("uniform", op, plan, 2), "no wait for the end of the call before")
    assert {race.region for race in found.races} == {"staging"}, found.races
