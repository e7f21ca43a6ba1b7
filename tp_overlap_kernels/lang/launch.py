"""Launching a kernel with little host time: bound once, then a few microseconds a call; interpreted on CPU tensors.

`kernel[grid](...)` of Triton re-reads and re-specialises every argument on every launch, 15 us and more for twenty
of them. A `Launch` does so once and keeps the compiled kernel. That is right as long as what Triton specialises on
does not change between calls: whether a pointer is a multiple of 16, whether an int is 1 or a multiple of 16.
Whoever keeps a Launch keys it by these (see `specialisation`), or lists the argument in `do_not_specialize`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch

from .interpreter import interpret


@dataclass
class Launch:
    """One kernel in one configuration.

    kernel: a @triton.jit function. meta: its constexpr arguments and num_warps, num_stages. on_cpu: interpret it.
    """

    kernel: Any
    meta: dict[str, Any]
    on_cpu: bool = False
    _compiled: Any = field(default=None, repr=False)
    _constants: tuple = field(default=(), repr=False)

    def __call__(self, grid: int, *args: Any) -> None:
        """Launch on the current stream. args: all arguments that are not constexpr, in order; constexprs come last in the kernel."""
        if self.on_cpu:
            interpret(self.kernel, (grid,), *args, **self.meta)
        elif self._compiled is None:
            self._compiled = self.kernel[(grid,)](*args, **self.meta)
            names = list(self.kernel.arg_names)[len(args) :]
            self._constants = tuple(self.meta[name] for name in names)
        else:
            self._compiled[(grid, 1, 1)](*args, *self._constants)


def specialisation(*values: Any) -> tuple:
    """What Triton looks at in these arguments, as part of a cache key: tensors by alignment, ints by 1 and multiples of 16."""
    return tuple(
        (value.data_ptr() % 16 == 0) if isinstance(value, torch.Tensor) else (value == 1, value % 16 == 0)
        for value in values
    )
