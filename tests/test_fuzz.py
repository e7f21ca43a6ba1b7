"""Random calls on CPU ranks; that the fuzzer finds a fault, and what it says of it."""

from __future__ import annotations

import dataclasses
from unittest import mock

import pytest

from tests import fuzz
from tests.cases import BF16, Case
from tests.ops import calls as rank_side
from tests.ops.calls import Call

FIRST_SEED = {"interp": 0, "ref": 10_000}


@pytest.mark.parametrize("backend, world_size, count", [
    ("interp", 2, 80), ("interp", 3, 60), ("interp", 4, 30), ("interp", 8, 12), ("ref", 1, 30), ("ref", 2, 60),
    ("ref", 3, 60), ("ref", 8, 30),
])  # fmt: skip
def test_random_calls(ranks, backend, world_size, count):
    first = FIRST_SEED[backend]
    print(f"seeds {first} to {first + count - 1}, world_size {world_size}")
    calls = [fuzz.cpu_case(seed, world_size, backend) for seed in range(first, first + count)]
    verdicts = ranks(world_size).run(fuzz.on_cpu, backend, calls, timeout=200)
    assert verdicts[0] is None, verdicts[0]


def test_a_call_is_a_line_and_back():
    for seed in range(300):
        call = fuzz.cpu_case(seed, 2, "interp")
        assert fuzz.read(fuzz.write(call), 2) == call
        assert call == fuzz.cpu_case(seed, 2, "interp")


def test_seeds_reach_every_op_plan_layout_and_dtype():
    calls = [fuzz.cpu_case(seed, 2, "interp") for seed in range(400)]
    assert {(call.op, call.plan) for call in calls} >= {
        (op, plan) for op, plans in rank_side.CPU_PLANS.items() for plan in (*plans, None)
    }
    for of in (lambda call: call.layout, lambda call: call.layout_b):
        assert {of(call) for call in calls} >= set(rank_side.LAYOUTS)
    assert {(call.case.dtype, call.bias, call.into_out) for call in calls if call.op != "all_reduce"} >= {
        (dtype, bias, into) for dtype in (fuzz.BF16, fuzz.FP16) for bias in (False, True) for into in (False, True)
    }


def test_a_failure_of_one_call_shrinks_to_what_it_needs():
    calls = [call for call in (fuzz.cpu_case(seed, 2, "interp") for seed in range(40)) if not is_guilty(call)]
    guilty = dataclasses.replace(
        Call("gemm_all_reduce", Case(130, 100, 48, fuzz.FP16, 2, "")), layout="transposed", bias=True, into_out=True
    )
    shrunk = fuzz.shrink([*calls[:20], guilty, *calls[20:]], lambda some: any(is_guilty(call) for call in some))
    assert list(map(fuzz.write, shrunk)) == ["op=gemm_all_reduce M=17 N=1 K=1 dtype=bfloat16 layout=transposed"]


def is_guilty(call: Call) -> bool:
    return call.op == "gemm_all_reduce" and call.case.M >= 17 and call.layout == "transposed"


FAULTS = {"a wrong element": "rank 1: ", "other bits": "different bits", "an exception": "broken"}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found_and_shrunk(ranks, fault):
    """The ranks stay in step: each says the same, and the next calls are right."""
    calls = [Call("gemm_all_reduce", Case(M, 40, 24, BF16, 2, ""), number=M) for M in (3, 9, 20, 33)]
    for faulty, after in ranks(2).run(with_a_fault, fault, calls):
        assert "python -m tests.fuzz --world-size 2 'op=gemm_all_reduce M=17 N=1 K=1" in faulty, faulty
        assert FAULTS[fault] in faulty, faulty
        assert after is None, after


def with_a_fault(rank, world_size, fault, calls):
    """From 17 rows on, rank 1's results are wrong, or every rank raises: one alone would keep the others waiting."""

    def invoke(call, tensors, of_rank):
        out = rank_side.invoke(call, tensors, of_rank)
        if call.case.M < 17:
            return out
        if fault == "an exception":
            raise RuntimeError("broken")
        last = out.view(-1)[-1:]
        last.mul_(1 + (of_rank == 1) * (1 if fault == "a wrong element" else 2**-7))
        return out

    with mock.patch.object(fuzz, "invoke", invoke):
        faulty = fuzz.on_cpu(rank, world_size, "ref", calls)
    return faulty, fuzz.on_cpu(rank, world_size, "ref", calls)
