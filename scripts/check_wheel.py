"""Builds a wheel, installs it into an empty environment, and uses it from a folder that is not the checkout.

The environment borrows torch, triton and numpy from the Python that runs this file, since they weigh a gigabyte; the
package itself must come from the wheel, with its data.
"""

from __future__ import annotations

import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent

USE = """
import pathlib, sys
import tp_overlap_kernels as tpo
where = pathlib.Path(tpo.__file__).resolve().parent
assert where.is_relative_to(sys.prefix), f"imported from {where}, not from the wheel"
assert "triton" not in sys.modules, "importing the package imports triton"
import tp_overlap_kernels.bench
assert pathlib.Path(tp_overlap_kernels.bench.__file__).is_relative_to(where)
assert (where / "py.typed").exists() and list((where / "dispatch" / "tables").glob("*.json"))
from tp_overlap_kernels import native
if HAS_NATIVE:
    native.library()
import torch
tpo.init(max_M=64, max_N=256)
a, b = torch.randn(16, 128, dtype=torch.bfloat16), torch.randn(256, 128, dtype=torch.bfloat16)
out = torch.ops.tp_overlap.gemm_all_reduce(a, b, "local")
torch.testing.assert_close(out.float(), a.float() @ b.float().T, atol=0.1, rtol=0.02)
print(tpo.explain("gemm_all_reduce", 16, 256, 128))
tpo.close()
print(f"the wheel works: {where}, CUDA library: {native.available()}")
"""


def borrow(python: pathlib.Path) -> None:
    """Let `python` import what ours can, behind its own site-packages, so that nothing there hides the wheel."""
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    purelib = pathlib.Path(subprocess.check_output([python, "-c", code], text=True).strip())
    lenders = [path for path in sys.path if path.endswith(("site-packages", "dist-packages"))]
    (purelib / "borrowed.pth").write_text("\n".join(lenders) + "\n", encoding="utf-8")


def main() -> int:
    has_native = bool(shutil.which("nvcc") and shutil.which("cmake")) and os.environ.get("TPO_SKIP_CUDA", "0") in (
        "",
        "0",
    )
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        build = f"from setuptools import build_meta; build_meta.build_wheel({str(folder)!r})"
        subprocess.run([sys.executable, "-c", build], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        (wheel,) = folder.glob("*.whl")
        venv.create(folder / "empty", symlinks=True, with_pip=False)
        python = folder / "empty" / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check"]
        subprocess.run([*pip, "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
        borrow(python)
        subprocess.run([python, "-c", USE.replace("HAS_NATIVE", str(has_native))], cwd=folder, check=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
