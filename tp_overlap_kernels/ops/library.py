"""The operator library `torch.ops.tp_overlap`: one object that owns every schema and registration of the package.

`Library.define` + `impl` costs 2 us a call where the `custom_op` decorator costs 9-17.
"""

from collections.abc import Callable

import torch
from torch._higher_order_ops.effects import _EffectType, _register_effectful_op

LIBRARY = torch.library.Library("tp_overlap", "DEF")


def register(schema: str, real: Callable, fake: Callable) -> None:
    """Define an op with its kernel (CPU and CUDA tensors alike) and its fake kernel.

    Functional ops are ordered effects: a compiler keeps them in the order of the program. Without that it may order two
    that do not depend on each other by the sizes of their results, which for a reduce-scatter differ between ranks, and
    ranks would call them in different orders. An _out form has no effect token (torch allows none beside a mutation):
    in a compiled graph its order is that of the data.
    """
    LIBRARY.define(schema)
    name = schema[: schema.index("(")]
    for key in ("CPU", "CUDA"):
        LIBRARY.impl(name, real, key)
    torch.library.register_fake(f"tp_overlap::{name}", fake, lib=LIBRARY)
    if "(a!)" not in schema:
        _register_effectful_op(f"tp_overlap::{name}", _EffectType.ORDERED)
