"""Values that cross between Python and a kernel: launch arguments, assignments, what stand-ins take and give."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as stock
from triton.tools.tensor_descriptor import TensorDescriptor

from .number_formats import is_bits, narrow, widen
from .operations import Handle, semantic


def as_tensor(value: Any, dtype: tl.dtype) -> tl.tensor:
    """A kernel's tensor from a number or a numpy array, for a stand-in to return. A pointer type takes addresses."""
    data = np.asarray(value)
    shape = list(data.shape)
    data = data.reshape(shape or [1])
    data = narrow(data, dtype) if is_bits(dtype) else data.astype(stock._get_np_dtype(dtype))
    return tl.tensor(Handle(data, dtype), tl.block_type(dtype, shape) if shape else dtype)


def value_of(x: Any) -> Any:
    """The number in a scalar tensor, constexpr or number; the numpy array of a tile, f32 for bf16 and fp8."""
    if isinstance(x, tl.constexpr):
        x = x.value
    if not isinstance(x, tl.tensor):
        return x
    data = widen(x.handle.data, x.dtype)
    return data if x.type.is_block() else data.item()


def address_of(pointer: Any) -> Any:
    """The address in a pointer, or in an int64 that holds one; the uint64 array of those in a tile of pointers."""
    address = value_of(pointer)
    return address.astype(np.uint64) if isinstance(address, np.ndarray) else int(address)


def as_argument(value: Any, name: str) -> Any:
    """A launch argument as the kernel sees it: pointer, scalar, descriptor, or a tuple of these. None stays None."""
    if isinstance(value, tuple):
        items = [as_argument(item, name) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    memory = value.base if isinstance(value, TensorDescriptor) else value
    device = getattr(memory, "device", None)
    if getattr(device, "type", "cpu") != "cpu":
        raise ValueError(f"interpret: argument {name} lies on {device}; only CPU tensors can be interpreted")
    if isinstance(value, bool):
        return as_tensor(value, tl.int1)
    if isinstance(value, float):
        return as_tensor(value, tl.float32)
    return stock._implicit_cvt(value)


def as_value(value: Any, integers: tl.dtype | None = None) -> Any:
    """What `x = value` makes of a Python number: a tensor; tuples by element, all else as it is.

    integers: the type of ints. By default the smallest that holds the value, as the compiler has it.
    """
    if isinstance(value, tuple):
        return tuple(as_value(item, integers) for item in value)
    if integers is not None and isinstance(value, int) and not isinstance(value, bool):
        return as_tensor(value, integers)
    return semantic.to_tensor(value, False)
