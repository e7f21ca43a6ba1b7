"""Builds the package; the CUDA library too, where a CUDA compiler is found. Metadata and tools: pyproject.toml.

Environment, read at build time only:
  TPO_SKIP_CUDA=1     do not build csrc, even where nvcc and cmake exist
  TPO_CUDA_ARCHS=...  architectures as CMake lists them, such as "90a;100a" (default: see CMakeLists.txt)
  CUDACXX, CUDA_HOME  where nvcc is, if it is neither on PATH nor in /usr/local/cuda/bin

Without nvcc or cmake the package installs without the library, and the Triton kernels serve. Where both exist,
a build that fails fails the installation: a half-built package would be slow for reasons nobody can see.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys

from setuptools import Extension, find_packages, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = pathlib.Path(__file__).resolve().parent
LIBRARY = "libtpo_kernels.so"


def find_nvcc() -> str | None:
    candidates = [os.environ.get("CUDACXX"), shutil.which("nvcc")]
    candidates += [f"{home}/bin/nvcc" for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if home]
    return next((path for path in candidates if path and os.access(path, os.X_OK)), None)


def native_extensions() -> list[Extension]:
    reason = None
    if os.environ.get("TPO_SKIP_CUDA", "0") not in ("", "0"):
        reason = "TPO_SKIP_CUDA is set"
    elif not find_nvcc():
        reason = "no nvcc on PATH, in CUDACXX, CUDA_HOME or /usr/local/cuda"
    elif not shutil.which("cmake"):
        reason = "nvcc is there, but cmake is not"
    if reason:
        print(f"tp_overlap_kernels: {LIBRARY} is not built: {reason}", file=sys.stderr)
        return []
    return [Extension("tp_overlap_kernels.libtpo_kernels", sources=[])]


class CMakeBuild(build_ext):
    """Calls CMake, which knows everything else, and puts the one library where the package looks for it."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")[:-1], LIBRARY)  # a plain C library: no Python version in its name

    def build_extension(self, ext: Extension) -> None:
        target = pathlib.Path(self.get_ext_fullpath(ext.name)).resolve()
        target.parent.mkdir(parents=True, exist_ok=True)
        tree = ROOT / "build" / "cmake"
        configure = ["cmake", "-S", str(ROOT), "-B", str(tree), "-DCMAKE_BUILD_TYPE=Release"]
        configure += [f"-DCMAKE_CUDA_COMPILER={find_nvcc()}", f"-DTPO_OUTPUT_DIR={target.parent}"]
        if archs := os.environ.get("TPO_CUDA_ARCHS"):
            configure.append(f"-DTPO_CUDA_ARCHS={archs}")
        for command in (configure, ["cmake", "--build", str(tree), "--parallel"]):
            if subprocess.run(command).returncode:
                sys.exit(
                    f"tp_overlap_kernels: building {LIBRARY} failed at `{' '.join(command)}`; the reason is printed "
                    "above. Set TPO_SKIP_CUDA=1 to install without it; the Triton kernels then serve."
                )


class PlatformWheel(bdist_wheel):
    """The library needs a platform, but no Python version: it is loaded by path."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, platform = super().get_tag()
        return "py3", "none", platform


bench = ["tp_overlap_kernels.bench"] + [f"tp_overlap_kernels.bench.{name}" for name in find_packages("bench")]
setup(
    packages=find_packages(include=["tp_overlap_kernels", "tp_overlap_kernels.*"]) + bench,
    package_dir={"tp_overlap_kernels": "tp_overlap_kernels", "tp_overlap_kernels.bench": "bench"},
    ext_modules=native_extensions(),
    cmdclass={"build_ext": CMakeBuild, "bdist_wheel": PlatformWheel},
)
