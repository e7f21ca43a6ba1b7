"""The explanation says what is chosen, from what, and why not another; it never disagrees with `select`."""

import dataclasses

import pytest

from tp_overlap_kernels.dispatch.explain import explain_text
from tp_overlap_kernels.dispatch.problem import OPS, Plan, Problem, Topology
from tp_overlap_kernels.dispatch.select import select
from tp_overlap_kernels.dispatch.table import Entry, Table
from tp_overlap_kernels.errors import InvalidInput

HERE = Topology("NVIDIA H200", "cuda", 2, native=False, one_shot_bytes=1 << 20, sentinel_bytes=1 << 18)
PLANS = (
    Plan("unfused_sentinel", us=20.0),
    Plan.parse("one_shot:block_m=16,block_n=64"),
    Plan("unfused_nccl", us=30.0),
)
MEASURED = Table(
    "tables/nvidia_h200_w2.json",
    "NVIDIA H200",
    2,
    (
        Entry(
            "gemm_all_reduce",
            8192,
            4096,
            "bfloat16",
            16,
            (PLANS[0], Plan("one_shot", PLANS[1].params, us=24.0), PLANS[2]),
        ),
    ),
)

EXPLAINED = """\
gemm_all_reduce M=20 N=8192 K=4096 bfloat16, world_size=2, bias
  plan   one_shot  24.0 us
         block_m=16 block_n=64 block_k=128 num_stages=4 num_warps=4 group_m=1
  why    table: measured at M=16 N=8192 K=4096 bfloat16, the nearest
  not    unfused_sentinel  20.0 us: the CUDA library is not loaded
  then   unfused_nccl  30.0 us (+25%)
  where  NVIDIA H200, backend cuda, without the CUDA library, one-shot up to 1024 KiB, sentinel up to 256 KiB
  table  tables/nvidia_h200_w2.json, digest 16ce5e483b701f0d, measured problems: 1"""


def test_a_measured_choice_in_full():
    problem = Problem("gemm_all_reduce", 20, 8192, 4096, "bfloat16", 2, bias=True)
    assert str(explain_text(problem, HERE, MEASURED)) == EXPLAINED


def test_a_choice_by_rule_says_so():
    text = str(explain_text(Problem("gemm_all_reduce", 4096, 8192, 1024, "bfloat16", 2), HERE, None))
    assert "why    rule: M > 512: the sum hides behind the GEMM" in text
    assert "table  none for this device and world size: rule of thumb" in text


def test_a_forced_choice_says_so_and_an_impossible_one_raises_as_select_does():
    problem = Problem("gemm_all_reduce", 4096, 8192, 1024, "bfloat16", 2)
    assert "why    forced\n" in str(explain_text(problem, HERE, MEASURED, "two_shot:block_m=64"))
    with pytest.raises(InvalidInput, match="cannot run"):
        explain_text(problem, HERE, MEASURED, "one_shot")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["cuda", "interp", "ref"])
@pytest.mark.parametrize("table", [None, MEASURED], ids=["rule", "table"])
def test_it_explains_what_select_chooses(op, backend, table):
    topology = Topology("x", backend, 2, one_shot_bytes=1 << 20)
    for M in (0, 1, 16, 512, 8192):
        problem = Problem(op, *((1, M, 0) if op == "all_reduce" else (M, 8192, 4096)), "bfloat16", 2)
        explanation = explain_text(problem, topology, table)
        plan = select(problem, topology, table)
        assert explanation.plan == plan
        assert f"plan   {plan.name}" in str(explanation)


def test_the_plan_inside_a_node_is_said():
    nodes = dataclasses.replace(HERE, world_size=4, inside=HERE)
    text = str(explain_text(Problem("gemm_all_reduce", 4096, 8192, 1024, "bfloat16", 4), nodes))
    assert (
        "  plan   two_level\n  inside push:block_m=128" in text and "M > 512: the sum hides behind the GEMM\n" in text
    )
    assert "why    rule: ranks of different nodes do not map each other's memory" in text
    assert "NVIDIA H200, backend cuda, 2 nodes of 2 ranks, " in text
