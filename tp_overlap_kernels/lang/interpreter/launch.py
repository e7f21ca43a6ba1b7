"""A launch: the language patched, one thread a program, the first failure raised."""

from __future__ import annotations

import inspect
import itertools
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import triton
import triton.compiler.code_generator  # which remembers tl.static_assert: never first while that is patched
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction

from .functions import as_python, call_device_function, tensor_range
from .number_formats import is_bits
from .operations import builder, semantic
from .program import LintError, program_state
from .values import as_argument, value_of

_OLDEST, _NEWEST = (3, 6), (3, 9)
_LAUNCH_OPTIONS = frozenset(
    "num_warps num_stages num_ctas maxnreg launch_cooperative_grid launch_pdl enable_fp_fusion".split()
)


def interpret(kernel: JITFunction, grid: Any, *args: Any, **kwargs: Any) -> None:
    """Runs `kernel[grid](*args, **kwargs)` on CPU tensors; returns when all programs have ended.

    grid: up to three ints, one int, or a function of the bound arguments. Tensors are passed as pointers, whatever
    their strides; an int may be an address; num_warps and the like have no effect. If programs fail, the first failure
    is raised as it is, with a note that names the program, and the others end with Aborted at their next wait. Several
    threads may call this at once, each being a rank.
    """
    _refuse_unknown_triton()
    python = as_python(kernel.fn)
    arguments = _bind(kernel.fn, args, kwargs)
    grid = grid(arguments) if callable(grid) else grid
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    grid_size = grid + (1,) * (3 - len(grid))
    stop, failures = threading.Event(), []

    def run_program(position: tuple[int, int, int]) -> None:
        vars(program_state()).update(
            grid_position=position, grid_size=grid_size, stop=stop, dirty=False, in_stand_in=False
        )
        try:
            with np.errstate(all="ignore"):
                # Converted for each program, since some of the stock operations change their operands.
                own = {n: v if n in python.constexprs else as_argument(v, n) for n, v in arguments.items()}
                python(**own)
        except BaseException as error:
            failures.append((position, error))
            stop.set()

    with _language:
        _run_threads(run_program, list(itertools.product(*map(range, grid_size))), stop)
    if failures:
        position, error = failures[0]
        if hasattr(error, "add_note"):  # Python 3.11
            error.add_note(f"in program {position} of {kernel.fn.__name__}, grid {grid_size}")
        raise error


def _bind(fn: Callable, args: tuple, kwargs: dict) -> dict[str, Any]:
    signature = inspect.signature(fn)
    unknown = {name for name in kwargs if name not in signature.parameters} - _LAUNCH_OPTIONS
    if unknown:
        raise TypeError(f"interpret: {fn.__name__} has no parameter {', '.join(sorted(unknown))}")
    bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name in signature.parameters})
    bound.apply_defaults()
    return bound.arguments


def _run_threads(run_program: Callable, positions: list, stop: threading.Event) -> None:
    threads = [threading.Thread(target=run_program, args=(p,), daemon=True) for p in positions]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt: the programs end before the language is restored under them
        stop.set()
        for thread in threads:
            thread.join(5)
        raise


def _refuse_unknown_triton() -> None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if not _OLDEST <= version <= _NEWEST:
        tested = " to ".join(".".join(map(str, v)) for v in (_OLDEST, _NEWEST))
        raise RuntimeError(
            f"interpret: Triton {triton.__version__} is outside the tested versions, {tested}. Install one of them, or "
            "use the ref backend (tp_overlap_kernels.cpu_backend)."
        )


class _ExecutableLanguage:
    """While entered, `tl` computes. Counted, since launches overlap when ranks are threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._patches: Any = None

    def __enter__(self) -> None:
        with self._lock:
            if self._users == 0:
                self._patches = _patch_language()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if self._users == 0:
                self._patches.restore()


_language = _ExecutableLanguage()


def _patch_language() -> stock._LangPatchScope:
    patches = stock._LangPatchScope()
    patches.set_attr(stock, "interpreter_builder", builder)
    patches.set_attr(stock, "interpreter_semantic", semantic)
    for language in (tl, tl.core):
        stock._patch_builtin(language, builder, patches)
        stock._patch_builtin(language.tensor, builder, patches)
        stock._patch_lang_tensor(language.tensor, patches)
        stock._patch_lang_core(language, patches)
    for language in (tl, tl.core):  # after the loop above, each turn of which patches reductions in both
        patches.set_attr(language, "range", tensor_range)
        patches.set_attr(language, "multiple_of", _checking(language.multiple_of))
        for name in ("reduce", "associative_scan"):
            patches.set_attr(language, name, _reducing_f32(getattr(language, name)))
    stock._patch_builtin(tl.math, builder, patches)
    stock._patch_builtin(tl.core.tensor_descriptor_base, builder, patches)
    for called in (JITFunction, stock.InterpretedFunction):
        patches.set_attr(called, "__call__", call_device_function)
    # Triton 3.6 has int() of a one-dimensional array here, which numpy 2.4 refuses.
    patches.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    return patches


def _reducing_f32(reduction: Callable) -> Callable:
    """numpy would reduce the bits of bf16 as integers; the compiler too reduces bf16 in f32."""

    def reduce(x, axis, combine, *args, **kwargs):
        if not isinstance(x, tl.tensor) or not is_bits(x.dtype):
            return reduction(x, axis, combine, *args, **kwargs)
        return reduction(x.to(tl.float32), axis, combine, *args, **kwargs).to(x.dtype)

    return reduce


def _checking(multiple_of: Callable) -> Callable:
    """On a GPU a false promise of alignment faults or reads elsewhere. Scalars only: of a tile it is said of the first
    element of each run."""

    def checked(x, values):
        x = multiple_of(x, values)
        wanted = value_of(values[0] if isinstance(values, (list, tuple)) else values)
        if isinstance(x, tl.tensor) and not x.type.is_block() and value_of(x) % wanted:
            position = program_state().grid_position
            raise LintError(f"tl.multiple_of: {value_of(x):#x} is no multiple of {wanted}, in program {position}")
        return x

    return checked
