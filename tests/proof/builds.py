"""Other builds of the device code: with delays that a table sets at run time, and with an order that is broken.

A build is a copy of the files of `lang` and `kernels`, edited as text, imported under another name and bound where
`ops` looks for kernels. The package itself has no switch, so nothing of this is in a kernel that is shipped.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import pathlib
import sys
import tempfile
from collections.abc import Iterator
from types import ModuleType

import tp_overlap_kernels
import tp_overlap_kernels.lang.interpreter
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.ops import chunked, launches

PACKAGE = pathlib.Path(tp_overlap_kernels.__file__).parent
DELAYS = pathlib.Path(__file__).parent / "delays.inc"


@dataclasses.dataclass(frozen=True)
class Edit:
    """`old` becomes `new` in a file of the copy, as often as it stands there, which is at least once."""

    file: str
    old: str
    new: str


MUTANTS = {
    "release without barrier": (
        Edit(
            "lang/ptx.py",
            "    barrier.sync.aligned 0;\n    mov.u32 tid, %tid.x;\n    setp.eq",
            "    mov.u32 tid, %tid.x;\n    setp.eq",
        ),
    ),
    "one staging half": (
        Edit("kernels/gemm_all_reduce_one_shot_push.py", "half = epoch & 1\n", "half = epoch & 0\n"),
        Edit("kernels/gemm_reduce_scatter_one_shot_push.py", "half = epoch & 1\n", "half = epoch & 0\n"),
        Edit("kernels/all_reduce_one_shot_push.py", "half = epoch & 1\n", "half = epoch & 0\n"),
    ),
    "no wait for done": (
        Edit(
            "lang/signal.py",
            "    staged = tl.load(control_ptr + STAGED)\n",
            "    staged = tl.load(control_ptr + STAGED) * 0\n",
        ),
    ),
}

# The plans that a mutant breaks, if not all.
CONCERNED = {
    "one staging half": ("one_shot", "unfused_one_shot"),
    "no wait for done": ("push", "unfused_push", "two_shot", "unfused_two_shot"),
}


def concerns(mutant: str | None, plan: str) -> bool:
    """Whether calls of this plan belong to the sweep of a build. The CUDA kernel has no delays."""
    return "sentinel" not in plan and plan in CONCERNED.get(mutant or "", (plan,))


@contextlib.contextmanager
def built(name: str, mutant: str | None, table: int) -> Iterator[None]:
    """The ops run this build while the context lasts. table: address of the delays' table, see delays.inc.

    Plans and launches that arenas remember are forgotten on the way in and out.
    """
    name = f"tpo_build_{name}"
    bound = {}
    with tempfile.TemporaryDirectory(prefix="tpo-build-") as folder:
        root = pathlib.Path(folder, name)
        _copy(root, MUTANTS[mutant] if mutant else ())
        _insert_delays(root, table)
        sys.path.insert(0, folder)
        try:
            # One interpreter: programs keep their state in it.
            sys.modules[f"{name}.lang.interpreter"] = tp_overlap_kernels.lang.interpreter
            for module in (launches, chunked):
                for attribute, value in list(vars(module).items()):
                    stem = _kernel_file(value)
                    if stem is not None:
                        made = importlib.import_module(f"{name}.kernels.{stem}")
                        bound[module, attribute] = value
                        setattr(module, attribute, made if isinstance(value, ModuleType) else getattr(made, attribute))
            forget()
            yield
        finally:
            for (module, attribute), value in bound.items():
                setattr(module, attribute, value)
            forget()
            sys.path.remove(folder)
            for module_name in [other for other in sys.modules if other.split(".")[0] == name]:
                del sys.modules[module_name]


def _kernel_file(value: object) -> str | None:
    """The file in kernels/ that a name of `ops` stands for: a module, or the kernel of one."""
    module = getattr(value, "__name__", "") if isinstance(value, ModuleType) else getattr(value, "__module__", "")
    prefix = "tp_overlap_kernels.kernels."
    return module.removeprefix(prefix) if isinstance(module, str) and module.startswith(prefix) else None


def _copy(root: pathlib.Path, edits: tuple[Edit, ...]) -> None:
    for folder in ("lang", "kernels"):
        (root / folder).mkdir(parents=True)
        (root / folder / "__init__.py").touch()
        for file in (PACKAGE / folder).glob("*.py"):
            if file.name != "__init__.py":
                (root / folder / file.name).write_text(file.read_text())
    (root / "__init__.py").touch()
    for edit in edits:
        path = root / edit.file
        text = path.read_text()
        assert edit.old in text, f"{edit.file} does not hold {edit.old!r} any more"
        path.write_text(text.replace(edit.old, edit.new))


def _insert_delays(root: pathlib.Path, table: int) -> None:
    """Points around every notify and wait, which are renamed for it, and at the end of every kernel."""
    signal = root / "lang" / "signal.py"
    text = signal.read_text()
    for word in ("notify", "wait"):
        text = text.replace(f"def {word}(", f"def {word}_at_once(").replace(
            f"@cpu_impl({word})", f"@cpu_impl({word}_at_once)"
        )
    signal.write_text(text + "\n\n" + DELAYS.read_text().replace("TABLE_ADDRESS", str(table)))
    for file in (root / "kernels").glob("*_push.py"):
        lines = file.read_text().split("\n")
        kernel = next(
            node
            for node in ast.parse(file.read_text()).body
            if isinstance(node, ast.FunctionDef) and node.name == file.stem
        )
        lines.insert(kernel.end_lineno or 0, "    signal.delay(4)")
        file.write_text("\n".join(lines))


def forget() -> None:
    """What arenas remember of calls: plans, launches, and the timeout that went with them."""
    for arena in arenas.all_arenas():
        arena.cache.clear()
        arena.prepared.clear()
