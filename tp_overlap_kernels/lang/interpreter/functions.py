"""Device functions: their Python stand-ins, or their own source rewritten to run as Python.

Both are kept as attributes of the function that they belong to, so that they live exactly as long.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import itertools
import textwrap
import threading
from collections.abc import Callable, Iterator
from typing import Any

import triton.language as tl
from triton.runtime.jit import JITFunction

from .program import maybe_delay, program_state
from .values import as_tensor, as_value, value_of


def cpu_impl(device_function: JITFunction) -> Callable[[Callable], Callable]:
    """Registers the Python stand-in of a device function; compiled kernels never see it.

        @triton.jit
        def globaltimer(): ...inline PTX...

        @cpu_impl(globaltimer)
        def _globaltimer_cpu():
            return as_tensor(time.monotonic_ns(), tl.int64)

    It gets the call's arguments: tensors (`value_of`, `address_of` look inside), Python numbers, constexprs. Tensors
    that it returns go back as they are; a Python int goes back as int64, a float as f32, a tuple by element. It may use
    `tl`, and no lint watches it then: one that releases calls `program_state().check_release()`, one that synchronises
    the block `program_state().barrier()`. One that waits calls `poll`, or `pause` and `check_stop` in its own loop.
    """

    def register(stand_in: Callable) -> Callable:
        device_function.fn._cpu_impl = stand_in
        return stand_in

    return register


@contextlib.contextmanager
def substitute(device_function: JITFunction, stand_in: Callable) -> Iterator[None]:
    """Another stand-in for a while: for a test that breaks a primitive on purpose, or watches it."""
    fn = device_function.fn
    before = vars(fn).get("_cpu_impl")
    fn._cpu_impl = stand_in
    try:
        yield
    finally:
        fn._cpu_impl = before


def call_device_function(function: JITFunction, *args: Any, **kwargs: Any) -> Any:
    """What `function(...)` does inside a kernel."""
    stand_in = vars(function.fn).get("_cpu_impl")
    if stand_in is not None:
        return _call_stand_in(stand_in, args, kwargs)
    python = as_python(function.fn)
    for name, value in itertools.chain(zip(python.parameters, args, strict=False), kwargs.items()):
        if name in python.constexprs and isinstance(value, tl.tensor):
            raise TypeError(f"{function.fn.__name__}: {name} is a tl.constexpr, and the caller passes a tensor")
    return python(*args, **kwargs)


def _call_stand_in(stand_in: Callable, args: tuple, kwargs: dict) -> Any:
    program = program_state()
    outer, program.in_stand_in = program.in_stand_in, True
    maybe_delay()
    try:
        result = stand_in(*args, **kwargs)
    finally:
        program.in_stand_in = outer
    maybe_delay()
    return as_value(result, integers=tl.int64)


_rewriting = threading.Lock()


def as_python(fn: Callable) -> Callable:
    """`fn` rewritten to run as Python, with its parameters' names and those that are constexpr as attributes."""
    with _rewriting:
        if "_cpu_python" not in vars(fn):
            fn._cpu_python = _rewrite(fn)
        return fn._cpu_python


def _rewrite(fn: Callable) -> Callable:
    lines, first_line = inspect.getsourcelines(fn)
    tree = ast.parse(textwrap.dedent("".join(lines)))
    tree.body[0].decorator_list = []
    tree = ast.fix_missing_locations(_WrapAssignments().visit(tree))
    ast.increment_lineno(tree, first_line - 1)  # tracebacks show the kernel's file
    # A private copy of the globals: the kernel's module gains no names, and its constexprs are plain values in here.
    names = {**fn.__globals__, **inspect.getclosurevars(fn).nonlocals}
    names = {name: v.value if isinstance(v, tl.constexpr) else v for name, v in names.items()}
    names |= {"range": tensor_range, "_as_value": as_value}
    exec(compile(tree, inspect.getsourcefile(fn), "exec", dont_inherit=True), names)
    python = names[fn.__name__]
    parameters = inspect.signature(fn).parameters
    python.parameters = tuple(parameters)
    python.constexprs = frozenset(name for name, p in parameters.items() if "constexpr" in str(p.annotation))
    return python


class _WrapAssignments(ast.NodeTransformer):
    """`x = e` becomes `x = _as_value(e)`; `x: tl.constexpr = e` stays, as with the compiler."""

    def visit_Assign(self, node):
        self.generic_visit(node)
        node.value = ast.Call(func=ast.Name(id="_as_value", ctx=ast.Load()), args=[node.value], keywords=[])
        return node


def tensor_range(start, stop=None, step=1, **_compiler_hints) -> Iterator[tl.tensor]:
    """`range` and `tl.range`. The index is a tensor, as compiled: `i.to(...)` works, use as a constexpr does not. It
    has 64 bits if a bound has."""
    start, stop = (0, start) if stop is None else (start, stop)
    bounds = (start, stop, step)
    is_wide = any(isinstance(bound, tl.tensor) and bound.dtype.primitive_bitwidth == 64 for bound in bounds)
    for index in range(*(int(value_of(bound)) for bound in bounds)):
        yield as_tensor(index, tl.int64 if is_wide else tl.int32)
