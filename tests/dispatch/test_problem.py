"""Problem and Plan: hashes that every process agrees on, and texts that read back."""

import dataclasses
import os
import subprocess
import sys

import pytest

from tp_overlap_kernels.dispatch.problem import PLAN_NAMES, Plan, Problem, Topology
from tp_overlap_kernels.errors import InvalidInput

BASE = Problem("gemm_all_reduce", 128, 8192, 4096, "bfloat16", 2)

OTHERS = [
    dataclasses.replace(BASE, op="gemm_reduce_scatter"),
    dataclasses.replace(BASE, M=129),
    dataclasses.replace(BASE, N=8191),
    dataclasses.replace(BASE, K=4097),
    dataclasses.replace(BASE, dtype="float16"),
    dataclasses.replace(BASE, world_size=4),
    dataclasses.replace(BASE, bias=True),
    dataclasses.replace(BASE, M=8192, N=128),
]


def test_call_hash_is_pinned():
    """A change here makes ranks of different builds refuse each other: do it knowingly."""
    assert BASE.call_hash() == 62368


@pytest.mark.parametrize("other", OTHERS, ids=str)
def test_call_hash_depends_on_every_field(other):
    assert other.call_hash() != BASE.call_hash()


def test_call_hash_is_the_same_in_a_process_with_another_hash_seed():
    code = (
        "from tp_overlap_kernels.dispatch.problem import Problem;"
        "print(Problem('gemm_all_reduce', 128, 8192, 4096, 'bfloat16', 2).call_hash())"
    )
    for seed in ("1", "2"):
        printed = subprocess.run(
            [sys.executable, "-c", code],
            env=os.environ | {"PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        assert int(printed) == BASE.call_hash()


def test_call_hashes_fit_16_bits_are_never_0_and_spread():
    hashes = [dataclasses.replace(BASE, M=M).call_hash() for M in range(20_000)]
    assert min(hashes) >= 1 and max(hashes) <= 0xFFFF
    # 20000 draws from 65535 values hit about 65535 * (1 - exp(-20000/65535)) = 17238 of them.
    assert abs(len(set(hashes)) - 17238) < 300


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"op": "gemm_all_gather"}, "gemm_all_gather"),
        ({"dtype": "torch.bfloat16"}, "torch.bfloat16"),
        ({"dtype": "int8"}, "int8"),
        ({"M": -1}, "M=-1"),
        ({"world_size": 0}, "world_size=0"),
    ],
    ids=lambda value: str(value),
)
def test_a_problem_that_cannot_be_is_refused_with_its_value(changes, named):
    with pytest.raises(InvalidInput, match=named):
        dataclasses.replace(BASE, **changes)


def test_an_unknown_backend_is_refused():
    with pytest.raises(InvalidInput, match="rocm"):
        Topology("gpu", "rocm", 2)


@pytest.mark.parametrize(
    "text",
    ["two_shot", "local", "ref", "chunked:chunks=2,own_chunks=1", "two_shot:block_m=128,block_n=256,num_stages=3"],
)
def test_a_plan_is_the_text_it_was_read_from(text):
    assert str(Plan.parse(text)) == text


def test_plans_are_equal_by_name_and_params_whatever_their_order_and_origin():
    plan = Plan("two_shot", (("num_stages", 4), ("block_m", 128)), why="measured", us=3.5)
    assert plan == Plan.parse("two_shot:block_m=128,num_stages=4") == Plan.parse("two_shot:num_stages=4,block_m=128")
    assert hash(plan) == hash(Plan.parse("two_shot:block_m=128,num_stages=4"))
    assert plan != Plan.parse("two_shot:block_m=64,num_stages=4")
    assert plan.get("block_m") == 128 and plan.get("block_n", 7) == 7 and plan.get("block_n") is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        "twoshot",
        "two_shot:block_m",
        "two_shot:block_m=",
        "two_shot:block_m=0",
        "two_shot:block_m=-128",
        "two_shot:block_m=1e3",
        "two_shot:blockm=128",
        "two_shot:block_m=64,block_m=128",
        "two_shot:block_m=64,",
    ],
)
def test_a_plan_that_cannot_be_read_is_refused_with_its_text(text):
    with pytest.raises(InvalidInput) as caught:
        Plan.parse(text)
    assert repr(text) in str(caught.value)


def test_every_plan_name_can_be_written():
    for names in PLAN_NAMES.values():
        for name in names:
            assert Plan.parse(name).name == name
