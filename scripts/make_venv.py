"""Makes the environment that `make` uses: a virtual environment with this package, editable, and what its verbs need.

    python3 scripts/make_venv.py .venv bench,test

An importable torch is reused, never replaced: the environment then sees the packages of the Python that runs this
file, also where that Python is a virtual environment itself. Works without a network where everything is importable
already. Needs nothing but the standard library and some pip.
"""

from __future__ import annotations

import importlib.util
import os
import pathlib
import shutil
import site
import subprocess
import sys
import venv

ROOT = pathlib.Path(__file__).resolve().parent.parent
TORCH = ["torch==2.13.0", "triton==3.7.1"]  # installed first, and only where no torch is importable
OFFLINE = ["--no-index", "--no-build-isolation"]


def torch_is_importable() -> bool:
    return subprocess.run([sys.executable, "-c", "import torch"], capture_output=True).returncode == 0


def create(folder: pathlib.Path, reuse: bool) -> pathlib.Path:
    """Makes the environment without a pip of its own: Debian's Python lacks ensurepip, and ours can serve it."""
    python = folder / "bin" / "python"
    if python.exists() and subprocess.run([python, "-c", ""]).returncode == 0:
        return python  # there already; what it lacks is added
    shutil.rmtree(folder, ignore_errors=True)
    venv.create(folder, system_site_packages=reuse, symlinks=True, with_pip=False)
    if reuse and sys.prefix != sys.base_prefix:
        # Our Python is a virtual environment: "system" would mean the one below it, which lacks what we have.
        purelib = subprocess.check_output(
            [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"], text=True
        ).strip()
        lines = [f"import site; site.addsitedir({path!r})" for path in site.getsitepackages()]
        pathlib.Path(purelib, "parent_environment.pth").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return python


def pip_command(python: pathlib.Path) -> list[str]:
    """The pip of our Python, made to work on `python`; else a pip inside the environment."""
    outer = [sys.executable, "-m", "pip", "--python", str(python)]
    if subprocess.run([*outer, "--version"], capture_output=True).returncode == 0:
        return outer
    if importlib.util.find_spec("ensurepip"):
        subprocess.run([str(python), "-m", "ensurepip", "--upgrade"], check=True, capture_output=True)
    return [str(python), "-m", "pip"]


def install(pip: list[str], *arguments: str, quiet_failure: bool = False) -> bool:
    command = [*pip, "--disable-pip-version-check", "install", "--quiet", *arguments]
    if quiet_failure:
        return subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
    print("+", " ".join(command[command.index("install") :]), flush=True)
    quiet = os.environ | {"PYTHONWARNINGS": "ignore"}  # of setuptools, about editable installations
    return subprocess.run(command, cwd=ROOT, env=quiet).returncode == 0


def main(folder: str, extras: str) -> int:
    reuse = torch_is_importable()
    python = create(pathlib.Path(folder), reuse)
    pip = pip_command(python)
    if not reuse and not install(pip, *TORCH):
        return 1
    for tool in ("pip", "setuptools>=77"):
        if not install(pip, "--no-index", tool, quiet_failure=True) and not install(pip, tool):
            return 1
    if not install(pip, "--no-deps", *OFFLINE, "--editable", "."):
        return 1
    wanted = f"tp-overlap-kernels[{extras}]"
    if not install(pip, "--no-index", wanted, quiet_failure=True) and not install(pip, wanted):
        print(f"make_venv: {wanted} could not be completed; what is missing is printed above", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
