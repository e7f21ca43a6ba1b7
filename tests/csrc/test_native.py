"""The C library through ctypes: it loads where there is no driver, and what does not fit is refused with its path."""

from __future__ import annotations

import ctypes
import pathlib
import re
import shutil
import subprocess

import pytest
import torch

from tp_overlap_kernels import native
from tp_overlap_kernels.errors import NativeLibraryError, TpOverlapError
from tp_overlap_kernels.kernels import all_reduce_one_shot_sentinel as sentinel
from tp_overlap_kernels.kernels import all_reduce_one_shot_sentinel_add_rms_norm as sentinel_norm
from tp_overlap_kernels.kernels import gemm, gemm_collectives
from tp_overlap_kernels.kernels import gemm_all_reduce_one_shot_sentinel as decode
from tp_overlap_kernels.kernels import reduce_scatter_one_shot_sentinel as scatter

HEADER = pathlib.Path(__file__).resolve().parents[2] / "csrc" / "api.h"
needs_library = pytest.mark.skipif(
    not native.LIBRARY_PATH.exists(), reason="needs libtpo_kernels.so: install the package where nvcc and cmake are"
)
needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="needs a C compiler (cc)")
needs_no_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")


def compile_c(folder: pathlib.Path, source: str, *options: str) -> pathlib.Path:
    (folder / "source.c").write_text(source)
    subprocess.run(["cc", *options, f"-I{HEADER.parent}", "-o", "out", "source.c"], cwd=folder, check=True)
    return folder / "out"


@needs_library
def test_the_library_loads_and_has_our_abi():
    assert native.available()
    assert native.library().tpo_abi_version() == native.ABI_VERSION
    assert native.library() is native.library()


def test_python_and_header_name_the_same_abi():
    (version,) = re.findall(r"#define TPO_ABI_VERSION (\d+)", HEADER.read_text())
    assert int(version) == native.ABI_VERSION


@needs_compiler
@pytest.mark.parametrize(
    ("name", "mirror"),
    [
        ("TpoAllReduceArgs", sentinel.Args),
        ("TpoAllReduceNormArgs", sentinel_norm._Args),
        ("TpoReduceScatterArgs", scatter._Args),
        ("TpoGemmArgs", gemm.Args),
        ("TpoGemmCollectiveArgs", gemm_collectives._Args),
        ("TpoGemmAllReduceDecodeArgs", decode._Args),
    ],
)
def test_the_struct_in_python_is_the_struct_in_c(tmp_path, name, mirror):
    fields = [field for field, _ in mirror._fields_]
    prints = "".join(f'printf("%zu ", offsetof({name}, {field}));' for field in fields)
    program = f'#include <stdio.h>\n#include <stddef.h>\n#include "api.h"\nint main(void) {{ {prints} '
    program += f'printf("%zu", sizeof({name})); return 0; }}\n'
    printed = subprocess.check_output([compile_c(tmp_path, program)], text=True).split()
    offsets = [getattr(mirror, field).offset for field in fields]
    assert [int(word) for word in printed] == [*offsets, ctypes.sizeof(mirror)]


@needs_compiler
def test_another_abi_is_refused_with_path_and_both_numbers(tmp_path):
    path = compile_c(tmp_path, "int tpo_abi_version(void) { return 999; }\n", "-shared", "-fPIC")
    with pytest.raises(
        NativeLibraryError, match=rf"{re.escape(str(path))} has ABI version 999.*needs {native.ABI_VERSION}"
    ):
        native.load(path)


@needs_compiler
def test_a_library_that_is_not_ours_is_refused_with_its_path(tmp_path):
    path = compile_c(tmp_path, "int nothing;\n", "-shared", "-fPIC")
    with pytest.raises(NativeLibraryError, match=rf"{re.escape(str(path))} could not be loaded.*tpo_abi_version"):
        native.load(path)


def test_a_missing_library_is_named_with_the_way_to_get_it(tmp_path):
    with pytest.raises(NativeLibraryError, match=rf"{re.escape(str(tmp_path))}.*nvcc"):
        native.load(tmp_path / "libtpo_kernels.so")


def test_a_file_that_is_no_library_is_refused_with_the_loaders_reason(tmp_path):
    path = tmp_path / "libtpo_kernels.so"
    path.write_text("not an ELF file")
    with pytest.raises(NativeLibraryError, match=rf"{re.escape(str(path))} could not be loaded: .*(invalid|short)"):
        native.load(path)


@needs_library
def test_the_library_brings_its_own_cuda_runtime():
    needed = subprocess.run(["ldd", native.LIBRARY_PATH], capture_output=True, text=True, check=True).stdout
    assert "libcudart" not in needed and "libcuda" not in needed and "not found" not in needed


def launch(**changes: int) -> None:
    """The C launcher with arguments that are right but for `changes`; no kernel may come to run with these pointers."""
    right = {"x": 4096, "out": 4096, "n_elems": 8, "sentinel_bytes": 4096, "world_size": 2}
    args = sentinel.Args(**(right | changes))
    native.check(native.library().tpo_all_reduce_one_shot_sentinel(ctypes.byref(args), None), "launch")


@needs_library
@needs_no_gpu
def test_a_launch_without_a_driver_raises_the_cuda_reason():
    with pytest.raises(TpOverlapError, match=r"launch: .*driver.* \(CUDA error \d+\)"):
        launch()
    assert not native.runs_on_current_device()
    with pytest.raises(TpOverlapError, match=r"all_reduce: the CUDA kernels could not be loaded: .*driver"):
        sentinel.SentinelLauncher(
            base_table_ptr=0,
            control_ptr=0,
            record_ptr=0,
            sentinel_offset=0,
            sentinel_bytes=4096,
            header_offset=0,
            done_offset=0,
            rank=0,
            world_size=2,
            timeout_ns=0,
        )


@needs_library
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"n_elems": 2049}, id="longer than a slot"),
        pytest.param({"n_elems": -1}, id="negative length"),
        pytest.param({"dtype": 7}, id="unknown dtype"),
        pytest.param({"world_size": 9}, id="more than 8 ranks"),
        pytest.param({"rank": 2}, id="rank outside the group"),
        pytest.param({"sentinel_bytes": 4088}, id="slot not of whole vectors"),
        pytest.param({"data_threads": 48}, id="block not of whole warps"),
        pytest.param({"data_threads": 1024}, id="block too large"),
    ],
)
def test_what_the_kernel_cannot_do_is_refused_before_any_launch(changes):
    with pytest.raises(TpOverlapError, match="invalid argument"):
        launch(**changes)


@needs_library
def test_an_empty_call_launches_nothing():
    launch(n_elems=0)


def launch_scatter(part: int = 4, launched_ahead: int = 1, **changes: int) -> None:
    right = {"x": 4096, "out": 4096, "n_elems": 8, "sentinel_bytes": 4096, "world_size": 2}
    args = scatter._Args(sum=sentinel.Args(**(right | changes)), part=part, launched_ahead=launched_ahead)
    native.check(native.library().tpo_reduce_scatter_one_shot_sentinel(ctypes.byref(args), None), "launch")


@needs_library
@pytest.mark.parametrize(
    "changes",
    [
        pytest.param({"part": 2049, "n_elems": 4097}, id="longer than a slot"),
        pytest.param({"part": 3}, id="elements that nobody owns"),
        pytest.param({"part": -1}, id="negative part"),
        pytest.param({"n_elems": -1}, id="negative length"),
        pytest.param({"dtype": 7}, id="unknown dtype"),
        pytest.param({"world_size": 1}, id="nobody to send to"),
        pytest.param({"world_size": 9}, id="more than 8 ranks"),
        pytest.param({"rank": 2}, id="rank outside the group"),
        pytest.param({"sentinel_bytes": 4088}, id="slot not of whole vectors"),
    ],
)
def test_what_the_scatter_cannot_do_is_refused_before_any_launch(changes):
    with pytest.raises(TpOverlapError, match="invalid argument"):
        launch_scatter(**changes)


@needs_library
def test_an_empty_scatter_launches_nothing():
    launch_scatter(n_elems=0, part=0)


@needs_library
@needs_no_gpu
@pytest.mark.parametrize("launched_ahead", [0, 1])
def test_a_scatter_that_is_right_comes_as_far_as_the_driver(launched_ahead):
    with pytest.raises(TpOverlapError, match=r"launch: .*driver"):
        launch_scatter(part=2048, n_elems=4096, launched_ahead=launched_ahead)
