"""What a kernel is being compiled for, as constants in the kernel.

Asked of the compilation and not of the machine (as triton.language.target_info does): a kernel can be compiled for a
device that is not there. Triton runs these functions as it runs its own: they get its `_semantic`, and their source is
no part of a kernel's. It keeps compiled kernels under their target and options, which is all that is looked at here;
whoever changes this file clears Triton's cache.
"""

import triton.language as tl


def on_amd(_semantic=None):
    """Whether the kernel is for an AMD GPU; not, where it is interpreted."""
    return tl.constexpr(_semantic is not None and _semantic.builder.options.backend_name == "hip")


def threads(_semantic=None):
    """How many threads a CTA has: one, where it is interpreted. Of kernels for AMD GPUs."""
    if _semantic is None:
        return tl.constexpr(1)
    options = _semantic.builder.options
    return tl.constexpr(options.num_warps * options.warp_size)


on_amd.__triton_builtin__ = True
threads.__triton_builtin__ = True
