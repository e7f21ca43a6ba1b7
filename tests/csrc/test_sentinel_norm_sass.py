"""The sentinel kernel with a norm, compiled for sm_90a and read as PTX and SASS: needs nvcc, no GPU, no driver."""

from __future__ import annotations

import re

import pytest

from tests.csrc.built import Compiled, compiled_alone, needs_nvcc, opcodes

pytestmark = needs_nvcc

WORLDS = range(2, 9)
VECS = 2  # of a thread


@pytest.fixture(scope="module")
def norm() -> Compiled:
    return compiled_alone("all_reduce_one_shot_sentinel_add_rms_norm")


def test_every_element_and_world_size_is_compiled(norm):
    assert len(norm.sass) == len(norm.ptx) == 2 * len(WORLDS)


def test_nothing_spills_and_an_sm_holds_the_largest_block(norm):
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", norm.report)
    assert len(usage) == 2 * len(WORLDS) and set(usage) == {("0", "0", "0")}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", norm.report)]
    assert max(registers) * (512 + 32) <= 65536, registers


@pytest.mark.parametrize("element", ["Bf16", "Fp16"])
@pytest.mark.parametrize("world_size", WORLDS)
def test_data_travels_in_16_byte_accesses_at_system_scope(norm, element, world_size):
    code = opcodes(norm.entry(norm.sass, element, world_size))
    assert code.count("STG.E.128.STRONG.SYS") == VECS * (world_size - 1)
    polled = code.count("LDG.E.128.STRONG.SYS")
    assert polled == VECS * world_size, "the own one predicated off"
    assert code.count("LDG.E.128") >= 3 * VECS  # x, residual, weight
    assert code.count("STG.E.128") >= 2 * VECS  # y, new_residual


@pytest.mark.parametrize("world_size", [2, 8])
def test_no_fence_and_no_call_lies_between_push_and_sum(norm, world_size):
    code = opcodes(norm.entry(norm.sass, "Bf16", world_size))
    last_push = len(code) - 1 - code[::-1].index("STG.E.128.STRONG.SYS")
    first_poll = code.index("LDG.E.128.STRONG.SYS")
    assert code.index("STG.E.128.STRONG.SYS") < first_poll and last_push < first_poll
    assert not [op for op in code[last_push:first_poll] if op.startswith(("MEMBAR", "BAR", "CCTL", "ATOM", "RED"))]
    assert not [op for op in code if op.startswith(("CALL", "LDL", "STL"))]


@pytest.mark.parametrize("world_size", WORLDS)
def test_nothing_is_touched_before_the_kernel_before_has_ended(norm, world_size):
    """It may have been launched while that one runs."""
    for line in norm.entry(norm.ptx, "Bf16", world_size).split("\n"):
        if "griddepcontrol.wait" in line:
            return
        assert not re.search(r"\b(ld|st|atom|red)\.\S*(global|shared)", line), f"before griddepcontrol.wait: {line!r}"
    raise AssertionError("no griddepcontrol.wait")


@pytest.mark.parametrize("world_size", [2, 8])
def test_waits_are_bounded_by_a_clock_in_nanoseconds(norm, world_size):
    text = norm.entry(norm.ptx, "Bf16", world_size)
    assert text.count("%globaltimer") >= 2, "header and data"
    assert text.count("st.release.sys.global.b64") == text.count("atom.acq_rel.gpu.global.cas.b64") > 0
