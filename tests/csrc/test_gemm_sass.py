"""The CUDA GEMM, compiled for sm_90a and read: tensor cores kept busy, nothing spilled, no fence in the mainloop."""

from __future__ import annotations

import pathlib
import re
import shutil
import subprocess

import pytest

from tests import ptx

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"

pytestmark = pytest.mark.skipif(not pathlib.Path(NVCC).exists(), reason="needs nvcc")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory) -> tuple[dict[str, list[str]], str]:
    """Instructions of each kernel by its name, and the assembler's report."""
    cubin = tmp_path_factory.mktemp("gemm") / "gemm.cubin"
    command = [NVCC, "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v"]
    command += [f"-I{CSRC}", f"-I{CSRC / 'include'}", "-o", cubin, CSRC / "kernels" / "gemm.cu"]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    dump = subprocess.run([ptx.CUOBJDUMP, "-sass", cubin], check=True, capture_output=True, text=True).stdout
    kernels = re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", dump, flags=re.S)
    lines = r"/\*[0-9a-f]{4}\*/\s+(.*?) ;"
    return {name: re.findall(lines, text) for name, text in kernels}, report


def places(code: list[str], opcode: str) -> list[int]:
    return [i for i, line in enumerate(code) if re.search(rf"\b{opcode}", line)]


def mainloop(code: list[str]) -> list[str]:
    """From the first product to the wait for the last one."""
    return code[places(code, "HGMMA")[0] : places(code, r"WARPGROUP\.DEPBAR\.LE gsb0, 0x0")[0]]


def test_products_are_not_serialised_and_registers_move_between_warps(compiled):
    _, report = compiled
    assert "C7510" not in report and "C7508" not in report  # ptxas: wgmma serialised; setmaxnreg ignored


def test_nothing_spills_and_the_launch_has_its_registers(compiled):
    kernels, report = compiled
    usage = re.findall(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report)
    assert usage == [("0", "0", "0")] * len(kernels)
    assert set(re.findall(r"Used (\d+) registers", report)) == {"168"}  # 384 threads; handed over by USETMAXREG
    for code in kernels.values():
        assert places(code, "USETMAXREG.DEALLOC.CTAPOOL 0x28") and places(
            code, "USETMAXREG.TRY_ALLOC.CTAPOOL UP0, 0xe8"
        )
        assert not places(code, "LDL|STL|CALL")


def test_a_stage_is_four_products_in_a_row(compiled):
    kernels, _ = compiled
    for code in kernels.values():
        first, *rest = products = places(code, "HGMMA")
        assert len(products) == 4  # 64 elements of K, 16 a product; the loop over stages is not unrolled
        assert rest[-1] - first < 24  # nothing but addresses in between
        assert not places(code[first : rest[-1]], "WARPGROUP|SYNCS|BAR")


def test_no_fence_waits_for_memory_in_the_mainloop(compiled):
    kernels, _ = compiled
    for code in kernels.values():
        assert not places(mainloop(code), "MEMBAR|ERRBAR|CCTL")
        assert not places(code, r"MEMBAR\.\w+\.(GPU|SYS)")


def test_the_copy_engine_moves_all_data_and_pairs_share_b(compiled):
    kernels, _ = compiled
    for name, code in kernels.items():
        pair = re.search(r"GemmShapeILi\d+ELi\dELi2E", name) is not None
        assert len(places(code, "UTMALDG.2D.MULTICAST")) == pair
        assert len(places(code, "UTMALDG.2D")) == 2
        assert places(code, "UTMASTG.2D") and not places(code, "STG")
