"""Launching a kernel with little host time: bound once, then a few microseconds a call; interpreted on CPU tensors.

`kernel[grid](...)` of Triton re-reads and re-specialises every argument on every launch, 15 us and more for twenty
of them. A `Launch` does so once and keeps the compiled kernel. That is right as long as what Triton specialises on
does not change between calls: whether a pointer is a multiple of 16, whether an int is 1 or a multiple of 16.
Whoever keeps a Launch keys it by these (see `specialisation`), or lists the argument in `do_not_specialize`.

What was issued once can be issued again with other addresses and nothing else changed: `Issued.again`.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from . import relaunch
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
    _maps: dict = field(default_factory=dict, repr=False)  # encoded descriptors, shared by all relaunches

    def __call__(self, grid: int, *args: Any) -> "Issued":
        """Launch on the current stream. args: all that are not constexpr; a kernel has its constexprs last."""
        if self.on_cpu:
            interpret(self.kernel, (grid,), *args, **self.meta)
        elif self._compiled is None:
            self._compiled = self.kernel[(grid,)](*args, **self.meta)
            names = list(self.kernel.arg_names)[len(args) :]
            self._constants = tuple(self.meta[name] for name in names)
        else:
            self._compiled[(grid, 1, 1)](*args, *self._constants)
        return Issued(self, grid, args)


@dataclass(slots=True)
class Issued:
    """A launch that has been made. It holds its tensors: ask what is wanted of it, then drop it."""

    launch: Launch
    grid: int
    args: tuple

    def again(self, **addresses: int) -> relaunch.Relaunch | None:
        """The same launch with other addresses, or None where only the ordinary way will do.

        addresses: by the kernel's argument names, in the order in which the relaunch will take them: where the
        caller's own tensors lie. None, too, if an argument lies elsewhere (it was copied on the way) or is no
        multiple of 16, which is what the relaunch will assume of every address.
        """
        launch = self.launch
        if launch.on_cpu:
            return None
        names = launch.kernel.arg_names
        for name, address in addresses.items():
            if address % 16 or _address(self.args[names.index(name)]) != address:
                return None
        args = (*self.args, *launch._constants)
        return relaunch.bind(launch._compiled, names, self.grid, args, tuple(addresses), launch._maps)


def _address(arg: Any) -> int:
    return (arg.base if isinstance(arg, TensorDescriptor) else arg).data_ptr()


def specialisation(*values: Any) -> tuple:
    """What Triton looks at in these arguments, for a cache key: tensors by alignment; ints by 1, by 16 and by width."""
    return tuple(
        (value.data_ptr() % 16 == 0)
        if isinstance(value, torch.Tensor)
        else (value == 1, value % 16 == 0, value >= 1 << 31)
        for value in values
    )
