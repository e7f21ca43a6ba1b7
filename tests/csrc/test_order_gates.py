"""Rules of order for every CUDA kernel, read from its PTX: what no run on one machine could show. Needs only nvcc."""

from __future__ import annotations

import pathlib
import re

import pytest

from tests.csrc.built import CSRC, NVCC, compiled_alone

SOURCES = sorted((CSRC / "kernels").glob("*.cu"))


BYTES_STORED = r"cp\.async\.bulk\.global\.shared"


def instructions(ptx: str) -> list[str]:
    return [line.strip() for line in ptx.split("\n") if line.strip().endswith(";")]


def check_scopes(ptx: str) -> None:
    """Signals reach other devices; device scope is for words of `control`. Nothing is volatile, nothing that a peer may
    have written goes the way of constants, and no fence stands in the place of a release."""
    for line in instructions(ptx):
        found = re.search(r"\b(ld|st|atom|red)\.(\S*global\S*)", line)
        modifiers = set(found[2].split(".")) if found else set()
        assert not re.search(r"\bmembar\b|\bfence\.(sc|acq_rel)\.(?!cluster)", line), (
            f"a fence, not looked at: {line!r}"
        )
        assert not {"volatile", "mmio", "cta"} & modifiers, f"too small a scope: {line!r}"
        is_wide = bool({"v2", "v4", "b64", "u64", "b128"} & modifiers)  # data of peers; a bias comes in 4 bytes
        assert not ("nc" in modifiers and is_wide), f"a load as of constants: {line!r}"
        if found and found[1] in ("ld", "st") and {"acquire", "release"} & modifiers:
            assert "sys" in modifiers, f"no other device sees it: {line!r}"


def check_bulk_stores(ptx: str) -> None:
    """Between stores of the copy engine and a release stands a wait until they are visible, not merely read.

    Stores of bytes alone: those through a tensor map go to `out`, which no release publishes. Nor does the release that
    ends the record of a failure, whose words come right before it.
    """
    for entry in re.split(r"\.entry ", ptx)[1:]:
        lines = instructions(entry)
        unseen = None  # a store that may not be visible yet
        for i, line in enumerate(lines):
            if re.search(BYTES_STORED, line):
                unseen = line
            elif re.search(r"cp\.async\.bulk\.wait_group \S", line):
                unseen = None
            elif "st.release.sys" in line and not any(
                "st.relaxed.sys" in before for before in lines[max(0, i - 4) : i]
            ):
                assert unseen is None, f"stores are published before they are visible: {unseen!r}, {line!r}"


@pytest.fixture(scope="module", params=SOURCES, ids=lambda path: path.stem)
def compiled(request) -> str:
    if not pathlib.Path(NVCC).exists():
        pytest.skip("needs nvcc")
    return compiled_alone(request.param.stem).text


def test_scopes(compiled):
    check_scopes(compiled)


def test_bulk_stores_are_complete_before_they_are_published(compiled):
    check_bulk_stores(compiled)


def test_the_sources_are_found():
    assert "all_reduce_one_shot_sentinel" in {path.stem for path in SOURCES}


@pytest.mark.parametrize(
    "line, text",
    [
        ("@%p1 ld.volatile.global.b64 %rd1, [%rd2];", "too small a scope"),
        ("st.release.gpu.global.b64 [%rd1], %rd2;", "no other device"),
        ("ld.acquire.cta.global.b64 %rd1, [%rd2];", "too small a scope"),
        ("ld.global.nc.v4.b32 {%r1, %r2, %r3, %r4}, [%rd1];", "constants"),
        ("membar.sys;", "a fence"),
        ("fence.acq_rel.sys;", "a fence"),
    ],
)
def test_a_weak_signal_does_not_pass(line, text):
    with pytest.raises(AssertionError, match=text):
        check_scopes(f".entry bad\n{line}\nret;")


STORE = "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r3], 64;"
RELEASE = "@%p1 st.release.sys.global.b64 [%rd1], %rd2;"


@pytest.mark.parametrize(
    "between, good",
    [("", False), ("cp.async.bulk.wait_group.read 0;", False), ("cp.async.bulk.wait_group 0;", True)],
)
def test_a_store_that_is_only_read_does_not_pass(between, good):
    ptx = f".entry kernel\n{STORE}\ncp.async.bulk.commit_group;\n{between}\nbar.sync 0;\n{RELEASE}\nret;"
    if good:
        check_bulk_stores(ptx)
    else:
        with pytest.raises(AssertionError, match="published before they are visible"):
            check_bulk_stores(ptx)
