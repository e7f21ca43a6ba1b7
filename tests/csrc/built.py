"""The CUDA kernels compiled for sm_90a, each once a session, to be read: no GPU and no driver needed, only nvcc."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
import shutil
import subprocess
import tempfile

import pytest

from tests import ptx

CSRC = pathlib.Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
needs_nvcc = pytest.mark.skipif(not pathlib.Path(NVCC).exists(), reason="needs nvcc")


@functools.cache
def quickly() -> list[str]:
    """The kernels of a file side by side, where the compiler can: the same code, as CMakeLists.txt has it."""
    return ["--split-compile=0"] if "--split-compile" in subprocess.check_output([NVCC, "--help"], text=True) else []


@dataclasses.dataclass(frozen=True)
class Compiled:
    file: str
    text: str  # PTX
    ptx: dict[str, str]  # bodies by entry name
    sass: dict[str, str]
    report: str  # of ptxas -v

    def entry(self, listing: dict[str, str], element: str, world_size: int) -> str:
        (found,) = (text for name, text in listing.items() if re.search(rf"{element}ELi{world_size}E", name))
        return found


@functools.cache
def compiled_alone(kernel: str) -> Compiled:
    """csrc/kernels/<kernel>.cu for sm_90a."""
    with tempfile.TemporaryDirectory(prefix="tpo-sass-") as name:
        folder = pathlib.Path(name)
        command = [NVCC, "-std=c++17", "-O3", "-gencode", "arch=compute_90a,code=sm_90a", "-cubin", "-Xptxas", "-v"]
        command += [
            *quickly(),
            "--keep",
            "--keep-dir",
            folder,
            f"-I{CSRC}",
            f"-I{CSRC / 'include'}",
            "-o",
            folder / "out.cubin",
        ]
        command += [CSRC / "kernels" / f"{kernel}.cu"]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stderr
        (ptx_file,) = folder.glob("*.ptx")
        text = ptx_file.read_text()
        dump = subprocess.run(
            [ptx.CUOBJDUMP, "-sass", folder / "out.cubin"], check=True, capture_output=True, text=True
        )
    return Compiled(
        file=kernel,
        text=text,
        ptx=dict(re.findall(r"\.entry (\w+)\(.*?\n\{\n(.*?)\n\}\n", text, flags=re.S)),
        sass=dict(re.findall(r"Function : (\w+)\n(.*?)(?=\n\s*Function :|\Z)", dump.stdout, flags=re.S)),
        report=report,
    )


def opcodes(sass: str) -> list[str]:
    """Mnemonics with their modifiers, in the order of the code."""
    return re.findall(r"/\*[0-9a-f]{4}\*/\s+(?:@!?U?P\w+ )?([A-Z][\w.]*)", sass)


def reached(ptx: str, stop: str, behind: str | None = None) -> list[str]:
    """The instructions of an entry that a thread may reach without passing `stop`, on whichever way.

    From the beginning, or from behind each instruction that matches `behind`.
    """
    lines = [line.strip() for line in ptx.splitlines() if re.search(r";\s*$|^\s*\$L\w+:", line)]
    labels = {line.split(":")[0]: i for i, line in enumerate(lines) if line.startswith("$L")}
    todo = [0] if behind is None else [i + 1 for i, line in enumerate(lines) if re.search(behind, line)]
    found: set[int] = set()
    while todo:
        for i in range(todo.pop(), len(lines)):
            line = lines[i]
            if i in found or re.search(stop, line) or re.match(r"ret;|exit;", line):
                break
            found.add(i)
            if jump := re.search(r"\bbra\S*\s+(\$L\w+);", line):
                todo.append(labels[jump[1]])
                if not line.startswith("@"):
                    break
    return [lines[i] for i in sorted(found) if not lines[i].startswith("$L")]
