"""The decode kernel, compiled for sm_90a and read as PTX and SASS: no GPU and no driver needed, only nvcc."""

from __future__ import annotations

import re

import pytest

from tests.csrc.built import Compiled, compiled_alone, needs_nvcc, opcodes, reached

pytestmark = needs_nvcc

SHAPES = [(cols, groups) for groups in (1, 2) for cols in (8, 16, 32, 64, 128) if (cols, groups) != (128, 2)]


@pytest.fixture(scope="module")
def decode() -> Compiled:
    return compiled_alone("gemm_all_reduce_one_shot_sentinel")


def entry(listing: dict[str, str], cols: int, groups: int, element: str = "Bf16") -> str:
    (found,) = (text for name, text in listing.items() if re.search(rf"{element}.*ILi{cols}ELi{groups}E", name))
    return found


def test_every_element_and_shape_is_compiled(decode):
    assert len(decode.sass) == len(decode.ptx) == 2 * len(SHAPES)


def test_nothing_spills_and_two_blocks_share_an_sm(decode):
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", decode.report)
    assert len(usage) == 2 * len(SHAPES) and set(usage) == {("0", "0", "0")}
    compiled = re.findall(
        r"Compiling entry function '\w*ILi(\d+)ELi(\d)E\w*'.*?Used (\d+) registers", decode.report, re.S
    )
    assert len(compiled) == 2 * len(SHAPES)
    for cols, groups, registers in ((int(x) for x in numbers) for numbers in compiled):
        blocks = 2 if cols <= 64 else 1
        threads = 128 * groups + 64
        assert blocks * threads * -(-registers // 8) * 8 <= 65536, (cols, groups, registers)
    assert "wgmma" not in decode.report, "products are serialised"


@pytest.mark.parametrize("cols, groups", SHAPES)
def test_products_run_in_a_row_and_are_waited_for_once_a_stage(decode, cols, groups):
    code = opcodes(entry(decode.sass, cols, groups))
    products = [op for op in code if op.startswith("HGMMA")]
    assert products == [f"HGMMA.64x{cols}x16.F32.BF16"] * 4
    first = code.index(products[0])
    last = len(code) - 1 - code[::-1].index(products[0])
    between = [op for op in code[first:last] if op.startswith(("WARPGROUP", "BAR", "SYNCS", "MEMBAR", "LDG", "STG"))]
    assert not between
    assert code.count("WARPGROUP.DEPBAR.LE") == 2


@pytest.mark.parametrize("cols, groups", SHAPES)
def test_data_travels_in_16_byte_accesses_at_system_scope(decode, cols, groups):
    code = opcodes(entry(decode.sass, cols, groups))
    vecs = max(1, cols // 16)  # of a thread
    assert code.count("STG.E.128.STRONG.SYS") == vecs
    assert code.count("LDG.E.128.STRONG.SYS") == max(4, vecs)  # of so many ranks at a time
    last_push = len(code) - 1 - code[::-1].index("STG.E.128.STRONG.SYS")
    first_poll = code.index("LDG.E.128.STRONG.SYS", last_push)
    assert not [op for op in code[last_push:first_poll] if op.startswith(("MEMBAR", "BAR", "CCTL", "ATOM"))]


def before_the_wait(text: str) -> list[str]:
    return reached(text, r"griddepcontrol\.wait")


def test_only_the_copy_engine_goes_ahead_of_the_kernels_before(decode):
    for name, text in decode.ptx.items():
        ahead = before_the_wait(text)
        assert not [line for line in ahead if re.search(r"\b(ld|st|atom|red)\.\S*global|ldu\b", line)], name
        assert any("cp.async.bulk.tensor" in line for line in ahead), "the weight does not go ahead"
        assert not [line for line in ahead if "launch_dependents" in line], name


def test_an_access_on_any_path_before_the_wait_is_found():
    text = "@%p1 bra $L__1;\ngriddepcontrol.wait;\n$L__1:\nld.global.b32 %r1, [%rd1];\nret;"
    assert "ld.global.b32 %r1, [%rd1];" in before_the_wait(text)
    assert "ld.global.b32 %r1, [%rd1];" not in before_the_wait(text.replace("@%p1 bra $L__1;\n", ""))


def test_waits_are_bounded_and_only_a_failure_is_published_with_a_release(decode):
    for text in decode.ptx.values():
        assert text.count("%globaltimer") >= 2  # header and data
        assert text.count("st.release.sys.global.b64") == text.count("atom.acq_rel.gpu.global.cas.b64") > 0
