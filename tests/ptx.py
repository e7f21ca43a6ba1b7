"""Compile our kernels without a GPU, and read the result.

`hopper(kernel, types, meta)` returns Triton's compiled object for sm_90a: `.asm["ptx"]`, `.asm["cubin"]`,
`.metadata.shared`; `gfx942` the one for an MI300: `.asm["amdgcn"]`, `.asm["hsaco"]`.
SASS and the resource report come from the cuobjdump that Triton's wheel carries.
"""

import pathlib
import re
import subprocess
import tempfile

import triton
from triton.backends.compiler import GPUTarget

HOPPER, GFX942 = GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx942", 64)
CUOBJDUMP = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def hopper(kernel, types, meta, aligned=()):
    """types: Triton type by argument name ("*bf16", "tensordesc<...>"); aligned: names that are multiples of 16."""
    return _compiled(kernel, types, meta, aligned, HOPPER)


def gfx942(kernel, types, meta, aligned=()):
    """As `hopper`, for an AMD GPU, where a kernel takes pointers in the place of tensor descriptors (tile.operand)."""
    described = {name: "*" + kind[11:].split("[")[0] for name, kind in types.items() if kind.startswith("tensordesc")}
    return _compiled(kernel, types | described, meta, [*aligned, *described], GFX942)


def _compiled(kernel, types, meta, aligned, target):
    names = list(kernel.arg_names)
    options = {key: value for key, value in meta.items() if key not in names}  # num_warps and the like
    constants = {(names.index(key),): value for key, value in meta.items() if key not in options}
    signature = {name: types.get(name, "constexpr") for name in names}
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = triton.compiler.ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=target, options=options)


def _dump(cubin, *options):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([CUOBJDUMP, *options, file.name], check=True, capture_output=True, text=True).stdout


def sass(compiled):
    """Disassembly."""
    return _dump(compiled.asm["cubin"], "-sass")


def resources(compiled):
    """{'REG': ..., 'STACK': ..., 'SHARED': ..., 'LOCAL': ...} of the one kernel."""
    text = _dump(compiled.asm["cubin"], "-res-usage")
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", text)}
