"""Runs the real `@triton.jit` kernels on CPU tensors, one thread a program.

    interpret(kernel, grid, *args, **kwargs)        like kernel[grid](*args, **kwargs)

Triton's own interpreter evaluates each operation with numpy. Built on it, this one differs where kernels that talk to each
other need it: programs run at the same time, so that one may wait for another; bf16 and fp8 are numbers and not integers;
a device function around inline PTX is replaced by its Python stand-in (`cpu_impl`); loops count in tensors, as compiled
ones do; and promises that the compiler would take on trust are checked (`lint`, `tl.multiple_of`, `tl.constexpr` arguments).
Nothing is set in the environment and kernels stay compilable: Triton's language is patched while a launch runs and restored
after the last one that runs at the same time. Hence, compile nothing in another thread meanwhile.

What no interpreter on this machine can show: weak memory order, the async proxy, and that a grid is resident.

Leans on private names of `triton.runtime.interpreter`, so versions are gated; tests/lang/test_interpreter.py says which
assumption has broken when a new version is tried.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import inspect
import itertools
import os
import random
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.runtime.jit import JITFunction
from triton.tools.tensor_descriptor import TensorDescriptor

from .number_formats import is_bits, narrow, widen

_TESTED_VERSIONS = ((3, 6), (3, 9))
_LAUNCH_OPTIONS = frozenset(
    "num_warps num_stages num_ctas maxnreg launch_cooperative_grid launch_pdl enable_fp_fusion".split()
)
Handle = stock.TensorHandle


class Aborted(RuntimeError):
    """Another program of the launch failed; this one stopped waiting."""


class LintError(AssertionError):
    """The kernel would race on a GPU, though on a CPU its result is right."""


# --- 1. One program: a thread, and what it knows of itself


class _ProgramState(threading.local):
    """Each thread sees its own: `grid_position` and `grid_size` (x, y, z), `stop`, set when another program has failed, and
    `dirty`, whether a tile has been stored since the last barrier of the block."""

    grid_position: tuple[int, int, int] | None = None
    grid_size: tuple[int, int, int] | None = None
    stop: threading.Event | None = None
    dirty: bool = False

    def barrier(self) -> None:
        """For the stand-in of a primitive that synchronises the block."""
        self.dirty = False

    def check_release(self, what: str = "release") -> None:
        """For the stand-in of a primitive that releases: tiles stored before it need a barrier in between.

        On a GPU all threads of the block store the tile and one thread releases. Triton before 3.9 puts no bar.sync there.
        """
        if self.dirty and _options.lint:
            raise LintError(
                f"{what} after a tile store without a barrier of the block, in program {self.grid_position}: one thread "
                "releases what all have stored. Call tl.debug_barrier() before it."
            )

    def check_stop(self) -> None:
        if self.stop is not None and self.stop.is_set():
            raise Aborted(f"program {self.grid_position} stopped, since another program of the launch failed")


@dataclasses.dataclass
class _Options:
    lint: bool = True
    jitter_s: float = 0.0


_program = _ProgramState()
_options = _Options()


def program_state() -> _ProgramState:
    return _program


@contextlib.contextmanager
def _set_option(name: str, value: Any) -> Iterator[None]:
    before = getattr(_options, name)
    setattr(_options, name, value)
    try:
        yield
    finally:
        setattr(_options, name, before)


def lint(enabled: bool = True) -> contextlib.AbstractContextManager[None]:
    """Whether a release that a GPU could overtake raises LintError. It does unless a test switches it off here."""
    return _set_option("lint", enabled)


def jitter(max_seconds: float) -> contextlib.AbstractContextManager[None]:
    """Each `poll` that succeeds is followed by a random delay, so that programs meet in other orders."""
    return _set_option("jitter_s", max_seconds)


def poll(condition: Callable[[], bool], timeout_s: float | None = None) -> bool:
    """Waits until `condition()` holds: True. After `timeout_s`: False. Raises Aborted if another program fails.

    Gives way to threads and processes (`pause`), first at once and then by sleeping, since a busy thread keeps the
    interpreter's lock from the one it waits for.
    """
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    for turn in itertools.count():
        if condition():
            break
        _program.check_stop()
        if deadline is not None and time.monotonic() > deadline:
            return False
        pause(turn)
    if _options.jitter_s:
        time.sleep(random.random() * _options.jitter_s)
    return True


def pause(turn: int) -> None:
    """What a loop that waits does in its `turn`th turn."""
    time.sleep(0 if turn < 20 else 1e-4 if turn < 2000 else 1e-3)
    if turn < 20:
        os.sched_yield()


# --- 2. Values that cross between Python stand-ins and kernels


def as_tensor(value: Any, dtype: tl.dtype) -> tl.tensor:
    """A kernel's tensor from a Python number or a numpy array, for a stand-in to return. A pointer type takes addresses."""
    data = np.asarray(value)
    shape = list(data.shape)
    data = data.reshape(shape or [1])
    data = narrow(data, dtype) if is_bits(dtype) else data.astype(stock._get_np_dtype(dtype))
    return tl.tensor(Handle(data, dtype), tl.block_type(dtype, shape) if shape else dtype)


def value_of(x: Any) -> Any:
    """The Python number of a scalar tensor, constexpr or number; the numpy array of a tile (f32 for bf16 and fp8)."""
    if isinstance(x, tl.constexpr):
        x = x.value
    if not isinstance(x, tl.tensor):
        return x
    data = widen(x.handle.data, x.dtype)
    return data if x.type.is_block() else data.item()


def address_of(pointer: Any) -> Any:
    """The address in a pointer tensor, or in an int64 that holds one: int, or an array of uint64 for a tile of pointers."""
    address = value_of(pointer)
    return address.astype(np.uint64) if isinstance(address, np.ndarray) else int(address)


def _as_argument(value: Any, name: str) -> Any:
    """A launch argument as the kernel sees it: pointers, scalars, descriptors and tuples of these; None stays None."""
    if isinstance(value, tuple):
        return (
            type(value)(*(_as_argument(v, name) for v in value))
            if hasattr(value, "_fields")
            else tuple(_as_argument(v, name) for v in value)
        )
    device = getattr(getattr(value, "base", value) if isinstance(value, TensorDescriptor) else value, "device", None)
    if device is not None and getattr(device, "type", "cpu") != "cpu":
        raise ValueError(f"interpret: argument {name} lies on {device}; only CPU tensors can be interpreted")
    if isinstance(value, bool):
        return as_tensor(value, tl.int1)
    if isinstance(value, float):
        return as_tensor(value, tl.float32)
    return stock._implicit_cvt(value)


def _as_value(value: Any, integers: tl.dtype | None = None) -> Any:
    """What an assignment in a kernel, or the return of a stand-in, makes of a Python number: a tensor, tuples by element."""
    if isinstance(value, tuple):
        return tuple(_as_value(v, integers) for v in value)
    if integers is not None and isinstance(value, int) and not isinstance(value, bool):
        return as_tensor(value, integers)
    return _semantic.to_tensor(value, False)


# --- 3. Operations: what Triton's numpy builder lacks, gets wrong, or cannot check


class _Builder(stock.InterpreterBuilder):
    grid_idx = property(lambda self: _program.grid_position)
    grid_dim = property(lambda self: _program.grid_size)

    def __init__(self) -> None:
        super().__init__()
        # debug: tl.device_assert asserts.
        self.options = dataclasses.replace(self.options, debug=True, sanitize_overflow=False)

    # numbers
    def get_bf16(self, value):
        return Handle(narrow(np.array([value]), tl.bfloat16), tl.bfloat16)

    def cast_impl(self, source, target):
        source_type, target_type = source.dtype.scalar, target.scalar
        is_pointer = isinstance(source_type, tl.pointer_type) or isinstance(target_type, tl.pointer_type)
        if is_pointer or not (is_bits(source_type) or is_bits(target_type)):
            return super().cast_impl(source, target)
        values = widen(source.data, source_type)
        if is_bits(target_type):
            return Handle(narrow(values, target_type), target_type)
        return Handle(values.astype(stock._get_np_dtype(target)), target_type)

    def create_fp_to_fp(self, source, target, rounding):
        if rounding == stock._ir.ROUNDING_MODE.RTZ:
            raise NotImplementedError("interpret: rounding toward zero is not implemented")
        return self.cast_impl(source, target)

    def _through_f32(self, op, dtype, *handles):
        result = op(*(widen(h.data, h.dtype) for h in handles))
        return Handle(result if result.dtype == np.bool_ else narrow(result, dtype), dtype.scalar)

    def binary_op(self, lhs, rhs, op):
        if not is_bits(lhs.dtype) or op in (np.bitwise_and, np.bitwise_or, np.bitwise_xor):
            return super().binary_op(lhs, rhs, op)
        return self._through_f32(op, lhs.dtype, lhs, rhs)

    def unary_op(self, arg, op):
        return self._through_f32(op, arg.dtype, arg) if is_bits(arg.dtype) else super().unary_op(arg, op)

    def create_clampf(self, arg, low, high, propagate_nans):
        if not is_bits(arg.dtype):
            return super().create_clampf(arg, low, high, propagate_nans)
        return self._through_f32(np.clip, arg.dtype, arg, low, high)

    def create_fma(self, x, y, z):
        if not is_bits(z.dtype):
            return super().create_fma(x, y, z)
        return self._through_f32(lambda a, b, c: a * b + c, z.dtype, x, y, z)

    def create_dot(self, a, b, acc, input_precision, max_num_imprecise_acc):
        product = np.matmul(widen(a.data, a.dtype), widen(b.data, b.dtype), dtype=acc.data.dtype)
        return Handle(product + acc.data, acc.dtype.scalar)

    # memory: what the lint must know, and where a kernel spins
    def create_masked_load(self, ptrs, mask, other, cache_modifier, eviction_policy, is_volatile):
        if is_volatile and ptrs.data.size == 1:
            self._spin()
        return super().create_masked_load(ptrs, mask, other, cache_modifier, eviction_policy, is_volatile)

    def create_masked_store(self, ptrs, value, mask, *policy):
        _program.dirty |= value.data.size > 1
        return super().create_masked_store(ptrs, value, mask, *policy)

    def create_barrier(self, *_):
        _program.barrier()

    def create_atomic_cas(self, ptr, expected, value, sem, scope):
        self._lint_atomic(value, sem, scope)
        return super().create_atomic_cas(ptr, expected, value, sem, scope)

    def create_atomic_rmw(self, op, ptr, value, mask, sem, scope):
        self._lint_atomic(value, sem, scope)
        if value.dtype.scalar == tl.bfloat16:
            return self._atomic_add_bf16(op, ptr, value, mask, sem)
        return super().create_atomic_rmw(op, ptr, value, mask, sem, scope)

    def _lint_atomic(self, value, sem, scope):
        """A scalar release is a signal, and so is any at system scope. Other tile-wide atomics are stores of a tile, whose
        default order (acq_rel) nobody means."""
        is_release = sem in (stock._ir.MEM_SEMANTIC.RELEASE, stock._ir.MEM_SEMANTIC.ACQUIRE_RELEASE)
        if is_release and (value.data.size == 1 or scope == stock._ir.MEM_SYNC_SCOPE.SYSTEM):
            _program.check_release("atomic release")
        if value.data.size == 1:
            self._spin()
        elif not is_release:
            _program.dirty = True

    def _spin(self):
        """A scalar atomic or volatile load may be one turn of a loop that waits."""
        _program.check_stop()
        time.sleep(0)

    def _atomic_add_bf16(self, op, ptr, value, mask, sem):
        if op != stock._ir.ATOMIC_OP.FADD:
            raise NotImplementedError(f"interpret: atomic {op} on bf16")
        before = np.zeros(value.data.shape, np.uint16)
        for index in np.ndindex(value.data.shape):
            if not mask.data[index]:
                continue
            seen, addend = np.zeros(1, np.uint16), widen(value.data[index].reshape(1), tl.bfloat16)
            while True:
                total = narrow(widen(seen, tl.bfloat16) + addend, tl.bfloat16)
                found = stock._interpreter.atomic_cas(
                    ptr.data[index].reshape(1), seen, total, self.ir_sem_to_interpreter_sem[sem]
                )
                if found[0] == seen[0]:
                    break
                seen = found
            before[index] = seen[0]
        return Handle(before, tl.bfloat16)

    # what has no meaning on a CPU
    def create_inline_asm(self, *_):
        raise NotImplementedError(
            "interpret: inline assembly; give the device function around it a stand-in (cpu_impl)"
        )

    def create_extern_elementwise(self, *_):
        raise NotImplementedError(
            "interpret: external function; give the device function around it a stand-in (cpu_impl)"
        )


for _cast in ("si_to_fp", "ui_to_fp", "fp_to_si", "fp_to_ui", "fp_ext", "fp_trunc"):
    setattr(_Builder, f"create_{_cast}", lambda self, source, target: self.cast_impl(source, target))
_builder = _Builder()
_semantic = stock.TritonSemantic(_builder)


# --- 4. Device functions: their stand-ins, and their source as Python


def cpu_impl(device_function: JITFunction) -> Callable[[Callable], Callable]:
    """Registers the Python stand-in of a device function; compiled kernels never see it.

        @triton.jit
        def globaltimer(): ...inline PTX...

        @cpu_impl(globaltimer)
        def _(): return as_tensor(time.monotonic_ns(), tl.int64)

    The stand-in gets the call's arguments: tensors (`value_of`, `address_of`), Python numbers, or constexprs. Tensors that it
    returns (`as_tensor`) go back as they are; a Python int becomes an int64, a float an f32, a tuple by element.
    """

    def register(stand_in: Callable) -> Callable:
        device_function.fn._cpu_impl = stand_in
        return stand_in

    return register


@contextlib.contextmanager
def substitute(device_function: JITFunction, stand_in: Callable) -> Iterator[None]:
    """Another stand-in for a while, for a test that breaks a primitive on purpose."""
    before = getattr(device_function.fn, "_cpu_impl", None)
    device_function.fn._cpu_impl = stand_in
    try:
        yield
    finally:
        device_function.fn._cpu_impl = before


def _call_device_function(jit_function: JITFunction, *args, **kwargs):
    fn = jit_function.fn
    stand_in = getattr(fn, "_cpu_impl", None)
    if stand_in is not None:
        return _as_value(stand_in(*args, **kwargs), integers=tl.int64)
    python = _python_of(fn)
    for name, value in itertools.chain(zip(python.parameters, args, strict=False), kwargs.items()):
        if name in python.constexprs and isinstance(value, tl.tensor):
            raise TypeError(f"{fn.__name__}: {name} is a tl.constexpr, but the caller passes a tensor")
    return python(*args, **kwargs)


_rewriting = threading.Lock()


def _python_of(fn: Callable) -> Callable:
    """The function rewritten to run as Python; kept on `fn` itself, so that it lives exactly as long."""
    with _rewriting:
        if not hasattr(fn, "_cpu_python"):
            fn._cpu_python = _rewrite(fn)
        return fn._cpu_python


def _rewrite(fn: Callable) -> Callable:
    lines, first_line = inspect.getsourcelines(fn)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    tree.body[0].decorator_list = []
    tree = ast.fix_missing_locations(_WrapAssignments().visit(tree))
    ast.increment_lineno(tree, first_line - 1)
    # A private copy: the kernel's module gains no names, and its constexprs are plain values here.
    names = {**fn.__globals__, **inspect.getclosurevars(fn).nonlocals}
    names = {name: v.value if isinstance(v, tl.constexpr) else v for name, v in names.items()}
    names |= {"range": _tensor_range, "_as_value": _as_value}
    exec(compile(tree, inspect.getsourcefile(fn), "exec", dont_inherit=True), names)
    python = names[fn.__name__]
    parameters = inspect.signature(fn).parameters
    python.parameters = tuple(parameters)
    python.constexprs = frozenset(name for name, p in parameters.items() if "constexpr" in str(p.annotation))
    return python


class _WrapAssignments(ast.NodeTransformer):
    """`x = e` becomes `x = _as_value(e)`; `x: tl.constexpr = e` stays, as the compiler has it."""

    def visit_Assign(self, node):
        self.generic_visit(node)
        node.value = ast.Call(func=ast.Name(id="_as_value", ctx=ast.Load()), args=[node.value], keywords=[])
        return node


def _tensor_range(start, stop=None, step=1, **_compiler_hints) -> Iterator[tl.tensor]:
    """`range` and `tl.range`: the index is a tensor, 64 bits wide if a bound is, so that code which needs one is not let pass."""
    start, stop = (0, start) if stop is None else (start, stop)
    is_wide = any(
        isinstance(bound, tl.tensor) and bound.dtype.primitive_bitwidth == 64 for bound in (start, stop, step)
    )
    for index in range(int(value_of(start)), int(value_of(stop)), int(value_of(step))):
        yield as_tensor(index, tl.int64 if is_wide else tl.int32)


# --- 5. Launch


def interpret(kernel: JITFunction, grid: Any, *args: Any, **kwargs: Any) -> None:
    """Runs `kernel[grid](*args, **kwargs)` on CPU tensors and returns when all programs have ended.

    `grid`: a tuple of up to three ints, an int, or a function of the bound arguments. Tensors may be strided and are passed as
    pointers; a Python int may be an address; launch options (num_warps, ...) have no effect. If programs fail, the first
    failure is raised as it is, with a note that names the program; the others end with Aborted at their next wait.
    May be called by several threads at once, each being a rank.
    """
    _refuse_unknown_triton()
    fn = kernel.fn
    signature = inspect.signature(fn)
    options = {name for name in kwargs if name not in signature.parameters}
    if options - _LAUNCH_OPTIONS:
        raise TypeError(f"interpret: {fn.__name__} has no parameter {sorted(options - _LAUNCH_OPTIONS)}")
    bound = signature.bind(*args, **{name: value for name, value in kwargs.items() if name not in options})
    bound.apply_defaults()
    grid = grid(bound.arguments) if callable(grid) else grid
    grid = (grid,) if isinstance(grid, int) else tuple(grid)
    grid_size = grid + (1,) * (3 - len(grid))
    python = _python_of(fn)
    stop, failures = threading.Event(), []

    def run_program(position: tuple[int, int, int]) -> None:
        _program.__dict__.update(grid_position=position, grid_size=grid_size, stop=stop, dirty=False)
        try:
            with np.errstate(all="ignore"):
                # Converted for each program: some operations of the stock builder change their operands.
                python(
                    **{
                        name: value if name in python.constexprs else _as_argument(value, name)
                        for name, value in bound.arguments.items()
                    }
                )
        except BaseException as error:
            failures.append((position, error))
            stop.set()

    with _language_patched():
        _run_threads(run_program, list(itertools.product(*(range(n) for n in grid_size))), stop)
    if failures:
        position, error = failures[0]
        if hasattr(error, "add_note"):
            error.add_note(f"in program {position} of {fn.__name__}, grid {grid_size}")
        raise error


def _run_threads(run_program: Callable, positions: list, stop: threading.Event) -> None:
    threads = [threading.Thread(target=run_program, args=(p,), daemon=True) for p in positions]
    for thread in threads:
        thread.start()
    try:
        for thread in threads:
            thread.join()
    except BaseException:  # an interrupt: end the programs before the language is restored under them
        stop.set()
        for thread in threads:
            thread.join(5)
        raise


def _refuse_unknown_triton() -> None:
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    oldest, newest = _TESTED_VERSIONS
    if not oldest <= version <= newest:
        raise RuntimeError(
            f"interpret: Triton {triton.__version__} is outside the tested versions {oldest[0]}.{oldest[1]} to "
            f"{newest[0]}.{newest[1]}. Install one of these, or use the ref backend (tp_overlap_kernels.cpu_backend)."
        )


class _LanguagePatch:
    """Triton's language made executable; counted, since launches overlap when ranks are threads."""

    def __init__(self) -> None:
        self.lock, self.users, self.scope = threading.Lock(), 0, None

    def __enter__(self) -> None:
        with self.lock:
            if self.users == 0:
                self.scope = _patch_language()
            self.users += 1

    def __exit__(self, *_) -> None:
        with self.lock:
            self.users -= 1
            if self.users == 0:
                self.scope.restore()


_patch = _LanguagePatch()


def _language_patched() -> _LanguagePatch:
    return _patch


def _patch_language() -> stock._LangPatchScope:
    scope = stock._LangPatchScope()
    scope.set_attr(stock, "interpreter_builder", _builder)
    scope.set_attr(stock, "interpreter_semantic", _semantic)
    for language in (tl, tl.core):
        stock._patch_builtin(language, _builder, scope)
        stock._patch_builtin(language.tensor, _builder, scope)
        stock._patch_lang_tensor(language.tensor, scope)
        stock._patch_lang_core(language, scope)
        scope.set_attr(language, "range", _tensor_range)
        scope.set_attr(language, "multiple_of", _checked_multiple_of(language.multiple_of))
        for name in ("reduce", "associative_scan"):
            scope.set_attr(language, name, _through_f32(getattr(language, name)))
    stock._patch_builtin(tl.math, _builder, scope)
    stock._patch_builtin(tl.core.tensor_descriptor_base, _builder, scope)
    for called in (JITFunction, stock.InterpretedFunction):
        scope.set_attr(called, "__call__", _call_device_function)
    # Triton 3.6 with numpy >= 2.4 raises here: int() of an array with one dimension.
    scope.set_attr(tl.tensor, "__index__", lambda self: int(self.handle.data.item()))
    return scope


def _through_f32(reduction: Callable) -> Callable:
    """numpy would reduce the bits of bf16 as integers; and f32 is what the hardware reduces in."""

    def reduce(x, axis, combine, *args, **kwargs):
        if not isinstance(x, tl.tensor) or not is_bits(x.dtype):
            return reduction(x, axis, combine, *args, **kwargs)
        return reduction(x.to(tl.float32), axis, combine, *args, **kwargs).to(x.dtype)

    return reduce


def _checked_multiple_of(multiple_of: Callable) -> Callable:
    """A false promise of alignment would fault, or read elsewhere, on a GPU; here it is an error. Scalars only: for a tile
    the promise is about the first element of each run."""

    def checked(x, values):
        x = multiple_of(x, values)
        wanted = value_of(values[0] if isinstance(values, (list, tuple)) else values)
        if isinstance(x, tl.tensor) and not x.type.is_block() and value_of(x) % wanted:
            raise LintError(
                f"tl.multiple_of: {value_of(x):#x} is no multiple of {wanted}, program {_program.grid_position}"
            )
        return x

    return checked
