"""What a wheel holds, and that a build which cannot be completed says so. `.ci/run` installs one and uses it."""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]
SOURCES = [
    "bench",
    "csrc",
    "tp_overlap_kernels",
    "CMakeLists.txt",
    "LICENSE",
    "MANIFEST.in",
    "pyproject.toml",
    "setup.py",
]
SOURCES += ["README.md"]
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
needs_nvcc = pytest.mark.skipif(
    not (pathlib.Path(NVCC).exists() and shutil.which("cmake")), reason="needs nvcc and cmake"
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory) -> pathlib.Path:
    """A copy of what is built, without what an earlier build left behind."""
    folder = tmp_path_factory.mktemp("tree")
    leftovers = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
    for path in (ROOT / name for name in SOURCES if (ROOT / name).exists()):
        if path.is_dir():
            shutil.copytree(path, folder / path.name, ignore=leftovers)
        else:
            shutil.copy(path, folder)
    return folder


def build(tree: pathlib.Path, **environment: str) -> subprocess.CompletedProcess:
    """As an installer would call it, but without one: the environment of the tests need not hold pip."""
    command = [sys.executable, "-c", "from setuptools import build_meta; build_meta.build_wheel('dist')"]
    return subprocess.run(command, cwd=tree, env=os.environ | environment, capture_output=True, text=True)


def wheel_of(tree: pathlib.Path, **environment: str) -> zipfile.ZipFile:
    shutil.rmtree(tree / "dist", ignore_errors=True)
    shutil.rmtree(tree / "build", ignore_errors=True)
    built = build(tree, **environment)
    assert built.returncode == 0, built.stdout + built.stderr
    (path,) = (tree / "dist").glob("*.whl")
    return zipfile.ZipFile(path)


def test_a_wheel_without_nvcc_holds_every_module_and_table(tree):
    wheel = wheel_of(tree, TPO_SKIP_CUDA="1")
    held = set(wheel.namelist())
    assert not [name for name in held if name.endswith(".so")]
    for folder, installed in (
        (tree / "tp_overlap_kernels", "tp_overlap_kernels"),
        (tree / "bench", "tp_overlap_kernels/bench"),
    ):
        for path in folder.rglob("*.py"):
            name = f"{installed}/{path.relative_to(folder)}"
            assert name in held, f"{name} is missing: does its folder have an __init__.py?"
    tables = list((tree / "tp_overlap_kernels/dispatch/tables").glob("*.json"))
    assert tables and all(f"tp_overlap_kernels/dispatch/tables/{path.name}" in held for path in tables)
    assert "tp_overlap_kernels/py.typed" in held
    assert not [name for name in held if name.startswith(("tests/", "csrc/", "bench/", "scripts/"))]
    assert any(name.endswith("licenses/LICENSE") for name in held)
    (points,) = (wheel.read(name).decode() for name in held if name.endswith("entry_points.txt"))
    named = [line.split(" = ")[1].split(":")[0] for line in points.splitlines() if " = " in line]
    assert named and all(name.replace(".", "/") + ".py" in held for name in named), "what engines load is there"


@pytest.fixture(scope="module")
def small_tree(tree, tmp_path_factory) -> pathlib.Path:
    """The same with one of the CUDA kernels, which is quickly compiled."""
    folder = tmp_path_factory.mktemp("small") / "tree"
    shutil.copytree(tree, folder, ignore=shutil.ignore_patterns("build", "dist"))
    for path in (folder / "csrc/kernels").glob("*.cu"):
        if path.stem != "reduce_scatter_one_shot_sentinel":
            path.unlink()
    return folder


@needs_nvcc
def test_a_wheel_with_nvcc_holds_the_library_for_any_python(small_tree):
    wheel = wheel_of(small_tree, TPO_SKIP_CUDA="0")
    assert "tp_overlap_kernels/libtpo_kernels.so" in wheel.namelist()
    assert "-py3-none-linux_" in pathlib.Path(wheel.filename).name


@needs_nvcc
def test_a_library_that_does_not_compile_fails_the_build_and_names_the_way_round(small_tree, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(small_tree, broken, ignore=shutil.ignore_patterns("build", "dist"))
    (broken / "csrc/api.cpp").write_text("#error planted\n")
    built = build(broken)
    assert built.returncode != 0
    assert "planted" in built.stdout + built.stderr and "TPO_SKIP_CUDA=1" in built.stdout + built.stderr
