"""Runs the real `@triton.jit` kernels on CPU tensors, one thread a program.

    interpret(kernel, grid, *args, **kwargs)        like kernel[grid](*args, **kwargs)

Triton's own interpreter evaluates each operation with numpy. Built on it, this one differs where kernels that talk to
each other need it:

* programs run at the same time, so that one may wait for another (launch.py);
* bf16 and fp8 are numbers and not integers (number_formats.py, operations.py);
* a device function around inline PTX is replaced by its Python stand-in, `cpu_impl` (functions.py);
* loops count in tensors, as compiled ones do, and promises that the compiler would take on trust are checked: a barrier
  between a tile's stores and the release (`lint`), `tl.multiple_of`, `tl.assume`, what is passed as a `tl.constexpr`.

Nothing is set in the environment, and kernels stay compilable: Triton's language is patched while a launch runs and
restored when the last of those that overlap has ended. Hence compile nothing in another thread meanwhile.

What it cannot show: weak memory order, the async proxy, threads of a block that pass each other, a grid that is not
resident. It leans on private names of `triton.runtime.interpreter`, so versions are gated, and
tests/lang/test_interpreter.py says which assumption has broken when another one is tried.
"""

from .functions import cpu_impl, substitute
from .launch import interpret
from .program import Aborted, LintError, jitter, lint, pause, poll, program_state
from .values import address_of, as_tensor, value_of

__all__ = [
    "Aborted",
    "LintError",
    "address_of",
    "as_tensor",
    "cpu_impl",
    "interpret",
    "jitter",
    "lint",
    "pause",
    "poll",
    "program_state",
    "substitute",
    "value_of",
]
