"""Breaks the package in known ways and runs, for each, the tests that must notice.

    make mutants                          all of them, and the table of docs/proof.md
    make mutants ARGS="02 15"             those whose names begin so; no table

A mutant is a patch in this folder, applied to a copy of the tree. Above the patch stand the lines

    breaks: what it breaks
    killed by: a test, as pytest names it (several such lines: each of them must fail)
    note: what else a reader should know

A mutant is dead if each of its tests fails, which means that pytest ran it and says so: a test that is not found, or
that cannot be imported, has noticed nothing. All of these tests pass on the tree as it is, which is seen first.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

FOLDER = pathlib.Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent
PROOF = ROOT / "docs" / "proof.md"
COPIED = ("tp_overlap_kernels", "bench", "csrc", "tests", "pyproject.toml")
TABLE = re.compile(r"(?<=<!-- mutants -->\n).*?(?=<!-- end -->)", re.S)
TEST_TIMEOUT_S = 120
PASSED, FAILED = 0, 1  # exit codes of pytest


@dataclasses.dataclass(frozen=True)
class Mutant:
    name: str
    breaks: str
    killers: tuple[str, ...]
    note: str
    patch: pathlib.Path

    @classmethod
    def read(cls, path: pathlib.Path) -> Mutant:
        head = path.read_text().split("\n--- ", 1)[0]
        field = lambda key: re.findall(rf"^{key}: (.+)$", head, re.M)
        return cls(path.stem, field("breaks")[0], tuple(field("killed by")), " ".join(field("note")), path)


def all_mutants() -> list[Mutant]:
    return [Mutant.read(path) for path in sorted(FOLDER.glob("*.patch"))]


def copy_tree(to: pathlib.Path) -> None:
    """What the tests need of the package, as it stands in the working tree."""
    built = shutil.ignore_patterns("__pycache__", "*.so", "*.pyc")
    for name in COPIED:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, to / name, ignore=built)
        else:
            shutil.copy(source, to / name)


def apply(mutant: Mutant, tree: pathlib.Path) -> None:
    """Raises if the patch does not fit."""
    command = ["patch", "--strip=1", "--fuzz=0", "--no-backup-if-mismatch", "--input", str(mutant.patch)]
    done = subprocess.run(command, cwd=tree, capture_output=True, text=True)
    if done.returncode:
        raise AssertionError(f"{mutant.name} no longer applies:\n{done.stdout}{done.stderr}")


def pytest_in(tree: pathlib.Path, tests: list[str]) -> tuple[int, str]:
    """Exit code and output. The copy is what ranks import, too."""
    path = os.pathsep.join(filter(None, [str(tree), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-m", "pytest", "-q", "-x", f"--timeout={TEST_TIMEOUT_S}", "-p", "no:cacheprovider"]
    done = subprocess.run(
        [*command, *tests], cwd=tree, env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True
    )
    return done.returncode, done.stdout + done.stderr


@dataclasses.dataclass(frozen=True)
class Outcome:
    mutant: Mutant
    survived: tuple[str, ...]  # tests that did not fail
    seconds: float
    output: str


def try_to_kill(mutant: Mutant) -> Outcome:
    started, survived, outputs = time.monotonic(), [], []
    with tempfile.TemporaryDirectory(prefix="tpo-mutant-") as folder:
        tree = pathlib.Path(folder)
        copy_tree(tree)
        apply(mutant, tree)
        for killer in mutant.killers:
            code, output = pytest_in(tree, [killer])
            outputs.append(output)
            if code != FAILED:
                survived.append(killer)
    outcome = Outcome(mutant, tuple(survived), time.monotonic() - started, "\n".join(outputs))
    print(
        f"{'SURVIVES' if survived else 'dead':8}  {mutant.name}  {outcome.seconds:.0f} s  {_reason(outcome)}",
        flush=True,
    )
    return outcome


def _reason(outcome: Outcome) -> str:
    """What the test said first, or all that pytest said where it should have failed."""
    if outcome.survived:
        return "\n" + outcome.output
    said = re.findall(r"^E +(.+)$", outcome.output, re.M)
    return said[0][:150] if said else ""


def table(outcomes: list[Outcome]) -> str:
    lines = ["| mutant | what it breaks | killed by | seconds |", "| --- | --- | --- | ---: |"]
    for outcome in outcomes:
        mutant = outcome.mutant
        breaks = mutant.breaks + (f" ({mutant.note})" if mutant.note else "")
        killers = "<br>".join(f"**survives** `{t}`" if t in outcome.survived else f"`{t}`" for t in mutant.killers)
        lines.append(f"| `{mutant.name}` | {breaks} | {killers} | {outcome.seconds:.0f} |")
    alive = sum(bool(outcome.survived) for outcome in outcomes)
    return "\n".join([*lines, "", f"{len(outcomes) - alive} of {len(outcomes)} are dead.", ""])


def main(prefixes: list[str]) -> int:
    mutants = [m for m in all_mutants() if not prefixes or m.name.startswith(tuple(prefixes))]
    with tempfile.TemporaryDirectory(prefix="tpo-whole-") as folder:
        copy_tree(pathlib.Path(folder))
        code, output = pytest_in(pathlib.Path(folder), sorted({test for m in mutants for test in m.killers}))
    if code != PASSED:
        print(f"{output}\nThese tests must pass before a mutant can be killed by one of them.")
        return 1
    with ThreadPoolExecutor(max(1, min(len(mutants), os.cpu_count() or 1))) as pool:
        outcomes = list(pool.map(try_to_kill, mutants))
    if not prefixes:
        PROOF.write_text(TABLE.sub(lambda _: table(outcomes), PROOF.read_text()))
    alive = [outcome.mutant.name for outcome in outcomes if outcome.survived]
    print(f"{len(outcomes) - len(alive)} of {len(outcomes)} are dead. Alive: {', '.join(alive) or 'none'}")
    return bool(alive)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
