"""`jit`: triton.jit for functions whose words need to know the group, although their calls do not say so.

Triton-Distributed's words ask NVSHMEM who they are. Stock Triton has no such global, so the group's table travels as
one argument more: `jit` gives the function a last parameter `tpo_world`, and every call in it of a function that has
such a parameter (a word, or another function under this `jit`, defined above) is given ours. What Triton compiles and
the interpreter runs is that source, and an ordinary JITFunction. Launched, it takes `world=` beside its own arguments.

    @jit                                            @triton.jit
    def kernel(x_ptr):                              def kernel(x_ptr, tpo_world=None):
        peer = dl.symm_at(x_ptr, dl.rank() + 1)         peer = dl.symm_at(x_ptr, dl.rank(tpo_world=tpo_world) + 1, ...
"""

from __future__ import annotations

import ast
import inspect
import itertools
import linecache
import textwrap
from collections.abc import Callable
from typing import Any, Protocol

import torch
from triton.runtime.jit import JITFunction

from .interpreter import interpret

PARAMETER = "tpo_world"


class HasTable(Protocol):
    """memory.world.World, or whatever else has a table laid out as there."""

    table: torch.Tensor


def jit(fn: Callable | None = None, **options: Any) -> Any:
    """Instead of `triton_dist.jit` or `triton.jit`; options as those of triton.jit (do_not_specialize and the like)."""
    return FunctionWithWorld(fn, **options) if fn is not None else lambda fn: FunctionWithWorld(fn, **options)


class FunctionWithWorld(JITFunction):
    """`kernel[grid](*args, world=world, **kwargs)`: interpreted where the world lies on the CPU."""

    def __init__(self, fn: Callable, **options: Any) -> None:
        super().__init__(_with_parameter(fn), **options)

    def run(self, *args: Any, grid: Any, warmup: bool, world: HasTable | None = None, **kwargs: Any) -> Any:
        if world is None:
            raise TypeError(f"{self.fn.__name__}: needs world=, the World whose ranks its words speak of.")
        kwargs[PARAMETER] = world.table
        if world.table.device.type == "cpu":
            return interpret(self, grid, *args, **kwargs)
        return super().run(*args, grid=grid, warmup=warmup, **kwargs)


_files = itertools.count()


def _with_parameter(fn: Callable) -> Callable:
    tree = ast.parse(textwrap.dedent(inspect.getsource(fn)))
    function = tree.body[0]
    assert isinstance(function, ast.FunctionDef)
    function.decorator_list = []
    function.args.args.append(ast.arg(PARAMETER))
    function.args.defaults.append(ast.Constant(None))
    nonlocals = inspect.getclosurevars(fn).nonlocals
    names = {**fn.__globals__, **nonlocals} if nonlocals else fn.__globals__
    _GiveWorld(names).visit(tree)
    source = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
    # Triton and the interpreter ask `inspect` for the source, and tracebacks show it.
    file = f"<{fn.__module__}.{fn.__qualname__} with {PARAMETER}, {next(_files)}>"
    linecache.cache[file] = (len(source), None, source.splitlines(keepends=True), file)
    made: dict[str, Any] = {}
    exec(compile(source, file, "exec", dont_inherit=True), names, made)
    made[fn.__name__].__qualname__, made[fn.__name__].__module__ = fn.__qualname__, fn.__module__
    return made[fn.__name__]


class _GiveWorld(ast.NodeTransformer):
    def __init__(self, names: dict[str, Any]) -> None:
        self.names = names

    def visit_Call(self, node: ast.Call) -> ast.Call:
        self.generic_visit(node)
        called = self._value(node.func)
        if isinstance(called, JITFunction) and PARAMETER in called.arg_names:
            node.keywords.append(ast.keyword(PARAMETER, ast.Name(PARAMETER, ast.Load())))
        return node

    def _value(self, node: ast.expr) -> Any:
        """What `name` or `module.name` stands for; None for all else."""
        if isinstance(node, ast.Name):
            return self.names.get(node.id)
        if isinstance(node, ast.Attribute):
            return getattr(self._value(node.value), node.attr, None)
        return None
