"""The CUDA kernels, compiled for sm_90a and read as PTX and SASS: no GPU and no driver needed, only nvcc."""

from __future__ import annotations

import re

import pytest

from tests.csrc.built import CSRC, Compiled, compiled_alone, needs_nvcc, opcodes

WORLDS = {"all_reduce_one_shot_sentinel": range(1, 9), "reduce_scatter_one_shot_sentinel": range(2, 9)}

pytestmark = needs_nvcc


@pytest.fixture(scope="module", params=WORLDS)
def sentinel(request) -> Compiled:
    return compiled_alone(request.param)


def test_every_element_and_world_size_is_compiled(sentinel):
    assert len(sentinel.sass) == len(sentinel.ptx) == 2 * len(WORLDS[sentinel.file])


def test_nothing_spills_and_nothing_lives_on_a_stack(sentinel):
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", sentinel.report)
    assert len(usage) == 2 * len(WORLDS[sentinel.file])
    assert set(usage) == {("0", "0", "0")}
    registers = [int(count) for count in re.findall(r"Used (\d+) registers", sentinel.report)]
    # so that the whole grid of 256 KiB is resident beside other kernels; a scatter holds a vector of each peer, too
    assert max(registers) <= (72 if "scatter" in sentinel.file else 64), registers


@pytest.mark.parametrize("element", ["Bf16", "Fp16"])
@pytest.mark.parametrize("world_size", [2, 3, 4, 8])
def test_data_travels_in_16_byte_accesses_at_system_scope(sentinel, element, world_size):
    code = opcodes(sentinel.entry(sentinel.sass, element, world_size))
    assert code.count("STG.E.128.STRONG.SYS") == world_size - 1  # one push a peer
    assert code.count("LDG.E.128.STRONG.SYS") == world_size  # one poll a rank, the own one predicated off
    assert "LDG.E.128" in code and "STG.E.128" in code  # x, out
    text = sentinel.entry(sentinel.ptx, element, world_size)
    assert "st.relaxed.sys.global.v4.b32" in text and "ld.relaxed.sys.global.v4.b32" in text


def test_a_single_rank_polls_nobody(sentinel):
    if 1 not in WORLDS[sentinel.file]:
        assert not re.search(r"ELi1E", " ".join(sentinel.sass))
        return
    assert "STG.E.128.STRONG.SYS" not in opcodes(sentinel.entry(sentinel.sass, "Bf16", 1))


@pytest.mark.parametrize("world_size", [2, 8])
def test_no_fence_and_no_call_lies_between_push_and_sum(sentinel, world_size):
    code = opcodes(sentinel.entry(sentinel.sass, "Bf16", world_size))
    first_push, first_poll = code.index("STG.E.128.STRONG.SYS"), code.index("LDG.E.128.STRONG.SYS")
    assert first_push < first_poll
    assert not [op for op in code[first_push:first_poll] if op.startswith(("MEMBAR", "BAR", "CCTL", "ATOM", "RED"))]
    assert not [op for op in code if op.startswith(("CALL", "LDL", "STL"))]


def test_a_scatter_touches_nothing_before_the_kernels_before_it_have_ended(sentinel):
    for text in sentinel.ptx.values():
        waits = [at.start() for at in re.finditer(r"griddepcontrol\.wait", text)]
        assert len(waits) == ("scatter" in sentinel.file)
        if waits:
            assert not re.search(r"\b(ld|st|atom|red)\.\S*(global|shared)", text[: waits[0]])


@pytest.mark.parametrize("world_size", [1, 2, 8])
def test_waits_are_bounded_by_a_clock_in_nanoseconds(sentinel, world_size):
    if world_size not in WORLDS[sentinel.file]:
        return
    spins = 2 if world_size > 1 else 1  # header and data
    text = sentinel.entry(sentinel.ptx, "Bf16", world_size)
    assert text.count("%globaltimer") >= spins
    assert "GLOBALTIMER" in sentinel.entry(sentinel.sass, "Bf16", world_size)


def test_only_a_failure_is_published_with_a_release(sentinel):
    text = sentinel.entry(sentinel.ptx, "Bf16", 2)
    releases = text.count("st.release.sys.global.b64")
    assert releases == text.count("atom.acq_rel.gpu.global.cas.b64") > 0


def test_multicast_is_never_touched(sentinel):
    assert not re.search(r"multimem", " ".join(sentinel.ptx.values()))
    assert not re.search(r"\b(LDGMC|REDGMC|STGMC)", " ".join(sentinel.sass.values()))
    sources = "".join(path.read_text() for path in CSRC.rglob("*") if path.is_file())
    assert "cuMulticast" not in sources and "multimem" not in sources
