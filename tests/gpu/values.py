"""Every bit pattern and the order of addition on devices: the rules of tests/values.py, for every plan."""

from __future__ import annotations

import itertools

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests import epochs
from tests.cases import BF16, FP16, Case
from tests.gpu.checks import bits_agree
from tests.gpu.mixtures import call_and_judge, mixture, plans_for
from tests.ops.calls import Call, group_name
from tests.values import PATTERNS, arrangements, assert_sum, in_order, shuffled_patterns
from tp_overlap_kernels.lang.signal import LAST_EPOCH

MAX_M, MAX_N = 64, PATTERNS
OPS = torch.ops.tp_overlap
OWNER_FIRST = ("two_shot", "push", "chunked", "sm90")


def every_bit_pattern_is_summed(rank: int, world_size: int) -> None:
    """Alone on each rank in turn, in another order on every rank, and nothing but negative zeros."""
    for dtype in (BF16, FP16):
        patterns = [shuffled_patterns(source, dtype) for source in range(world_size)]
        silent, negative = torch.zeros(PATTERNS, dtype=dtype), torch.full((PATTERNS,), -0.0, dtype=dtype)
        rows = [[patterns[0] if s == alone else silent for s in range(world_size)] for alone in range(world_size)]
        for values in (*rows, patterns, [negative] * world_size):
            _sum(rank, values)


def _sum(rank: int, values: list[torch.Tensor]) -> None:
    dtype, expected = values[0].dtype, in_order(values)
    call = Call("all_reduce", Case(1, expected.numel(), 0, dtype, len(values), ""))
    for plan in plans_for(call):
        if plan == "nccl":  # its order and its zeros are its own
            continue
        with tpo.force_plan(plan):
            outs = [OPS.all_reduce(values[rank].cuda(), group_name()) for _ in range(4)]
        torch.cuda.synchronize()
        tpo.check()
        for out in outs:
            assert_sum(out.cpu(), expected, f"{plan} {dtype}")
            assert bits_agree(out), f"{plan} {dtype}: ranks hold different bits"


def every_bit_pattern_is_a_weight(rank: int, world_size: int) -> None:
    """One column of ones times all patterns: the partials are the patterns. Every rank owns a row of the sum."""
    for dtype in (BF16, FP16):
        expected = in_order([shuffled_patterns(0, dtype), torch.zeros(PATTERNS, dtype=dtype)])
        for alone in (0, world_size - 1):
            weights = shuffled_patterns(0, dtype) if rank == alone else torch.zeros(PATTERNS, dtype=dtype)
            for op, plan, out in _products(world_size, weights[:, None]):
                for row in out.cpu():
                    assert_sum(row, expected, f"{op} {plan} {dtype}, rank {alone} alone")


def _products(world_size: int, weights: torch.Tensor):
    """(op, plan, result) of a column of ones times the weights, for every plan but NCCL's."""
    a = torch.ones(world_size, 1, dtype=weights.dtype, device="cuda")
    for op in ("gemm_all_reduce", "gemm_reduce_scatter"):
        case = Case(world_size, len(weights), 1, weights.dtype, world_size, "")
        for plan in (name for name in plans_for(Call(op, case)) if "nccl" not in name):
            with tpo.force_plan(plan):
                out = getattr(OPS, op)(a, weights.cuda(), group_name())
            torch.cuda.synchronize()
            tpo.check()
            yield op, plan, out


def ranks_are_added_in_the_order_that_is_stated(rank: int, world_size: int) -> None:
    """Two ranks have one order."""
    if world_size < 3:
        return
    for dtype in (BF16, FP16):
        rows = arrangements(world_size, dtype)
        by_rank = list(rows.T.contiguous())
        assert any(not torch.equal(in_order(by_rank), in_order(others)) for others in itertools.permutations(by_rank))
        _sum(rank, by_rank)
        for op, plan, out in _products(world_size, by_rank[rank][:, None]):
            for row, values in enumerate(out.cpu()):
                # sm90 deals out tiles, and here there is one
                owner = rank if op == "gemm_reduce_scatter" else 0 if plan == "sm90" else row
                first = [owner] if plan in OWNER_FIRST else []
                order = first + [source for source in range(world_size) if source not in first]
                assert_sum(values, in_order([by_rank[source] for source in order]), f"{op} {plan} row {row}")


def epochs_pass_their_limits(rank: int, world_size: int) -> None:
    """2^31, 2^32, and up to the last."""
    for seed, start in enumerate((*epochs.STARTS.values(), LAST_EPOCH - 5000)):
        tpo.close()
        tpo.init(max_M=MAX_M, max_N=MAX_N)
        epochs.start_at(start, _meet)
        for part in range(2):
            call_and_judge(rank, world_size, mixture(world_size, 100 + 2 * seed + part, 40))
        assert epochs.epoch() > start + 10
    tpo.close()
    tpo.init(max_M=MAX_M, max_N=MAX_N)


def _meet() -> None:
    torch.cuda.synchronize()
    dist.barrier()


CHECKS = (
    every_bit_pattern_is_summed,
    every_bit_pattern_is_a_weight,
    ranks_are_added_in_the_order_that_is_stated,
    epochs_pass_their_limits,
)
