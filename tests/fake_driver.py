"""Triton's own launcher over a C function that is not there: what would reach the driver is kept for the test to see.

The classes and functions between `compiled[grid](...)` and the C launcher are Triton's, of the version installed;
only the C launcher, the encoder of TMA descriptors and the device are stand-ins. The number of arguments that the C
launcher takes is read from Triton's own account of it.
"""

import dataclasses
import re
from types import SimpleNamespace
from typing import Any

import triton
from triton.backends.nvidia import driver as nvidia
from triton.compiler.compiler import CompiledKernel
from triton.tools.tensor_descriptor import TensorDescriptor

FLAT = triton.__version__.startswith("3.6.")  # the kernel's arguments stand behind the launcher's own
STREAM, FUNCTION = 77, 4242


@dataclasses.dataclass(eq=False)
class Map:
    """An encoded descriptor: by what it was made."""

    address: int
    made_of: tuple


class Driver:
    """Stands for triton.runtime.driver.active. encoded: every descriptor that was made."""

    def __init__(self):
        self.stream = STREAM
        self.encoded: list[Map] = []
        self.utils = SimpleNamespace(fill_tma_descriptor=self._encode, fill_tma_descriptor_tiled=self._encode)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return self.stream

    def _encode(self, address: int, *made_of: Any) -> Map:
        self.encoded.append(Map(address, tuple(map(str, made_of))))
        return self.encoded[-1]


class CLauncher:
    """Stands for the C function: counts its arguments as PyArg_ParseTuple does, and keeps them."""

    def __init__(self, takes: int):
        self.takes, self.calls = takes, []

    def __call__(self, *args: Any) -> None:
        if len(args) != self.takes:
            raise TypeError(f"function takes exactly {self.takes} arguments ({len(args)} given)")
        self.calls.append(args)

    @property
    def last(self) -> list:
        """The kernel's arguments in the latest launch, addresses of tensors as numbers."""
        return values_of(self.calls[-1])


def values_of(args: tuple) -> list:
    """The kernel's arguments among those of the C launcher, addresses and descriptors as what they stand for."""
    values = args[13:] if FLAT else args[-1]
    return [
        ("map", v.address, v.made_of) if isinstance(v, Map) else v.data_ptr() if hasattr(v, "data_ptr") else v
        for v in values
    ]


def signature_of(names: list[str], args: tuple, constants: int) -> dict[str, str]:
    """Types as Triton writes them; the last `constants` arguments are constexpr, and so is an integer 1."""
    kinds = {}
    for index, (name, arg) in enumerate(zip(names, args, strict=True)):
        if index >= len(args) - constants or (isinstance(arg, int) and arg == 1):
            kinds[name] = "constexpr"
        elif isinstance(arg, TensorDescriptor):
            kinds[name] = f"tensordesc<bf16[{arg.block_shape[0]}, {arg.block_shape[1]}]>"
        else:
            kinds[name] = "i64" if isinstance(arg, int) else "*bf16"
    return kinds


def compiled(names: list[str], args: tuple, constants: int, tma: bool = True) -> tuple[Any, CLauncher]:
    """A compiled kernel that takes these arguments, and the C launcher under it. tma: descriptors are encoded."""
    signature = signature_of(names, args, constants)
    described = [arg for arg in args if isinstance(arg, TensorDescriptor)]
    metas = [
        {"swizzle": 3, "elem_size": 2, "elem_type": 10, "block_size": arg.block_shape, "fp4_padded": False}
        for arg in described
    ]
    metas = metas if tma else None
    launcher = nvidia.CudaLauncher.__new__(nvidia.CudaLauncher)
    launcher.num_ctas = 1
    for name in ("global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align"):
        setattr(launcher, name, 0)
    launcher.launch_cooperative_grid = launcher.launch_pdl = False
    if FLAT:
        source = nvidia.make_launcher({}, signature, metas)
        own = re.search(r'PyArg_ParseTuple\(args, "(\w+)"', source)
        assert own is not None
        c_launcher = CLauncher(len(own.group(1)))
    else:
        launcher.arg_annotations = list(nvidia.expand_signature(signature.values(), metas))
        launcher.kernel_signature = b""
        c_launcher = CLauncher(16)  # "iiiKKpp(iii)OOOOOOy*O": a tuple and a buffer are one argument each
    launcher.launch = nvidia.wrap_handle_tensordesc(c_launcher, signature, metas)
    kernel = CompiledKernel.__new__(CompiledKernel)
    kernel.metadata = SimpleNamespace(tensordesc_meta=metas)
    kernel.src = SimpleNamespace(signature=signature, fn=None)
    kernel.name, kernel.function, kernel.module, kernel.packed_metadata = "fake", FUNCTION, object(), (4, 1, 0)
    kernel._run = launcher
    return kernel, c_launcher
