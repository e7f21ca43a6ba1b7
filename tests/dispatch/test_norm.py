"""Choosing for the ops that end in a norm: one launch where a call is small, else what the sum by itself would get."""

import dataclasses

import pytest

from tests.dispatch.test_select import cpu, gemm, h200
from tp_overlap_kernels.dispatch import explain_text
from tp_overlap_kernels.dispatch.problem import SUM_OF, Plan, Problem
from tp_overlap_kernels.dispatch.select import select
from tp_overlap_kernels.dispatch.table import Entry, Table
from tp_overlap_kernels.errors import InvalidInput

GEMM, SUM = SUM_OF
KIB = 1024


def rows(M, H=8192, world_size=2):
    return Problem(SUM, M, H, 0, "bfloat16", world_size)


@pytest.mark.parametrize(
    ("problem", "topology", "name"),
    [
        pytest.param(rows(16), h200(), "sentinel_norm", id="exactly 256 KiB"),
        pytest.param(rows(16), h200(native=False), "one_shot_norm", id="no CUDA library"),
        pytest.param(rows(1, 8193), h200(), "one_shot_norm", id="a row too long for a block"),
        pytest.param(rows(100, 9), h200(sentinel_bytes=3200), "sentinel_norm", id="rows of 9 take 16"),
        pytest.param(rows(100, 9), h200(sentinel_bytes=3199), "one_shot_norm", id="1800 bytes would fit"),
        pytest.param(rows(64), h200(), "sentinel_norm", id="exactly 1 MiB"),
        pytest.param(rows(65), h200(sentinel_bytes=1 << 22), "sentinel", id="one row more: the sum's own plan"),
        pytest.param(rows(16, world_size=3), h200(3), "sentinel_norm", id="three ranks, exactly 256 KiB"),
        pytest.param(rows(17, world_size=3), h200(3), "one_shot_norm", id="three ranks, one row more than 256 KiB"),
        pytest.param(rows(32, world_size=3), h200(3), "one_shot_norm", id="three ranks, exactly 512 KiB"),
        pytest.param(rows(33, world_size=3), h200(3), "two_shot", id="three ranks, one row more"),
        pytest.param(rows(1), h200(one_shot_bytes=KIB, native=False), "two_shot", id="an arena too small"),
        pytest.param(rows(4), cpu("interp"), "one_shot_norm", id="interpreted, exactly 64 KiB"),
        pytest.param(rows(5), cpu("interp"), "two_shot", id="interpreted, one row more"),
        pytest.param(rows(5), cpu("ref"), "ref", id="the CPU reference"),
        pytest.param(rows(5, world_size=1), h200(1), "local", id="one rank"),
        pytest.param(gemm(GEMM, 16), h200(), "decode", id="decode, and the norm behind it"),
        pytest.param(gemm(GEMM, 2, 100), h200(sentinel_bytes=448), "unfused_sentinel_norm", id="no room for tiles"),
        pytest.param(gemm(GEMM, 17), h200(), "unfused_sentinel_norm", id="decode, one row more"),
        pytest.param(gemm(GEMM, 64), h200(), "unfused_sentinel_norm", id="decode of more rows"),
        pytest.param(gemm(GEMM, 32), h200(native=False), "unfused_one_shot_norm", id="without the CUDA library"),
        pytest.param(gemm(GEMM, 33), h200(native=False), "one_shot", id="one row more: the sum's own plan, without it"),
        pytest.param(gemm(GEMM, 4096), h200(), "sm90_add", id="prefill"),
        pytest.param(gemm(GEMM, 8192, K=14784), h200(), "chunked", id="prefill with a very long GEMM"),
        pytest.param(gemm(GEMM, 4), cpu("interp"), "unfused_one_shot_norm", id="interpreted"),
        pytest.param(gemm(GEMM, 4, world_size=1), cpu("interp", 1), "local", id="one rank, interpreted"),
    ],
)
def test_rule_of_thumb(problem, topology, name):
    assert select(problem, topology).name == name


def test_a_table_of_the_sum_serves_its_norm():
    """Tables need no entries of these ops; the time in them is not theirs."""
    tiles = "two_shot:block_m=64,block_n=128,block_k=64,num_stages=3,num_warps=4,group_m=8"
    plans = (dataclasses.replace(Plan.parse(tiles), us=400.0), Plan("unfused_nccl", us=500.0))
    measured = Table("t", "NVIDIA H200", 2, (Entry("gemm_all_reduce", 8192, 4096, "bfloat16", 4096, plans),))
    plan = select(gemm(GEMM, 4096), h200(), measured)
    assert str(plan) == tiles and plan.us is None
    text = str(explain_text(gemm(GEMM, 4096), h200(), measured))
    assert "the sum: measured" in text and "400" not in text
    assert select(gemm(GEMM, 17), h200(), measured).name == "unfused_sentinel_norm"
    assert select(rows(1000), h200(), measured).name == "two_shot"


def test_entries_of_their_own_come_first():
    plans = (Plan("unfused_two_shot", us=10.0), Plan("unfused_one_shot_norm", us=11.0))
    measured = Table("t", "NVIDIA H200", 2, (Entry(GEMM, 8192, 4096, "bfloat16", 16, plans),))
    plan = select(gemm(GEMM, 16), h200(), measured)
    assert (plan.name, plan.us, plan.why) == ("unfused_two_shot", 10.0, "measured")


@pytest.mark.parametrize("op", SUM_OF)
def test_every_plan_of_the_sum_can_be_forced_as_for_the_sum(op):
    problem = gemm(op, 64) if op == GEMM else rows(64)
    for name in ("one_shot", "two_shot", f"{'unfused_' * (op == GEMM)}nccl"):
        assert select(problem, h200(), forced=name) == select(problem.sum, h200(), forced=name)


@pytest.mark.parametrize(
    ("problem", "topology", "name", "reason"),
    [
        (rows(65), h200(one_shot_bytes=1 << 20), "one_shot_norm", "1064960 bytes exceeds the one-shot region"),
        (gemm(GEMM, 65), h200(one_shot_bytes=1 << 20), "unfused_one_shot_norm", "exceeds the one-shot region"),
        (rows(1, 8200), h200(), "sentinel_norm", "rows of up to 8192 elements, not 8200"),
        (rows(1), h200(native=False), "sentinel_norm", "the CUDA library is not loaded"),
        (rows(1), cpu("interp"), "sentinel_norm", "no CPU twin"),
        (gemm(GEMM, 1), h200(), "one_shot_norm", f"not a plan of {GEMM}"),
        (rows(1), h200(ranks_per_device=2), "nccl", "two ranks on one device"),
        (gemm("gemm_all_reduce", 1), h200(), "unfused_one_shot_norm", "not a plan of gemm_all_reduce"),
    ],
)
def test_a_forced_plan_that_cannot_run(problem, topology, name, reason):
    with pytest.raises(InvalidInput, match=reason):
        select(problem, topology, forced=name)


def test_calls_with_and_without_a_norm_are_told_apart():
    assert gemm(GEMM, 8).call_hash() != gemm("gemm_all_reduce", 8).call_hash()
    assert rows(2, 64).call_hash() != rows(64, 2).call_hash()
    assert str(rows(3, 64)) == f"{SUM} 3 rows of 64 elements bfloat16, world_size=2"
