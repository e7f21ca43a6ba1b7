"""What the ops launch on a GPU, made without one: the kernel, its constants and the types of its arguments.

The launchers of ops.launches run with an arena of the default capacity, tensors that have a shape and no memory, and a
recorder in the place of the launch. So a kernel is compiled here as it will be there: for these tiles and alignments.
"""

from __future__ import annotations

import contextlib
import dataclasses
import types
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from triton.tools.tensor_descriptor import TensorDescriptor

from tests import ptx
from tp_overlap_kernels.dispatch import Plan, Problem, Topology, select
from tp_overlap_kernels.memory.layout import layout
from tp_overlap_kernels.ops import chunked, launches, norm_launches
from tp_overlap_kernels.ops.norm import Norm

BF16, FP16 = torch.bfloat16, torch.float16


@dataclasses.dataclass
class Launched:
    """One launch: what `tests.ptx.hopper` needs to compile its kernel."""

    kernel: Any
    args: tuple
    meta: dict[str, Any]

    @property
    def name(self) -> str:
        return self.kernel.fn.__name__

    def compile(self, compiler: Callable = ptx.hopper):
        """Triton's compiled kernel for sm_90a, or as `compiler` makes it, specialised as the launch would be."""
        types_by_name, constants, aligned = {}, dict(self.meta), []
        for name, arg in zip(self.kernel.arg_names, self.args, strict=False):
            kind, is_aligned = _type_of(arg)
            if isinstance(arg, int) and name not in self.kernel.do_not_specialize:
                if arg == 1:
                    constants[name] = 1
                    continue
                is_aligned = arg % 16 == 0
            elif isinstance(arg, int):
                is_aligned = False
            types_by_name[name] = kind
            if is_aligned:
                aligned.append(name)
        return compiler(self.kernel, types_by_name, constants, aligned)


def _type_of(arg: Any) -> tuple[str, bool]:
    names = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.int64: "i64", torch.uint8: "u8"}
    if isinstance(arg, TensorDescriptor):
        return f"tensordesc<{names[arg.base.dtype]}[{arg.block_shape[0]},{arg.block_shape[1]}]>", False
    if isinstance(arg, torch.Tensor):
        return "*" + names[arg.dtype], arg.data_ptr() % 16 == 0
    if isinstance(arg, float):
        return "fp32", False
    return ("i32" if -(2**31) <= arg < 2**31 else "i64"), False


@contextlib.contextmanager
def recording() -> Iterator[list[Launched]]:
    """Launches made inside are recorded, not made."""
    made: list[Launched] = []

    class Recorder:
        def __init__(self, kernel, meta, on_cpu=False):
            self.kernel, self.meta = kernel, meta

        def __call__(self, grid, *args):
            made.append(Launched(self.kernel, args, self.meta))

    with mock.patch.object(launches, "Launch", Recorder):
        yield made


def arena(world_size: int, max_M: int = 8192, max_N: int = 8192) -> Any:
    """As much of an arena as launchers look at; on one of W H200s."""
    words = torch.empty(64, dtype=torch.int64, device="meta")
    return types.SimpleNamespace(
        layout=layout(max_M, max_N, 2, world_size),
        world_size=world_size,
        rank=0,
        device=torch.device("cuda", 0),
        heap=words,
        control=words,
        record=types.SimpleNamespace(words=words),
        programs=132,
        timeout_s=30.0,
        timeout_ns=30_000_000_000,
        cache={},
    )


def empty(*shape: int, dtype: torch.dtype = BF16) -> torch.Tensor:
    """Address 0, hence aligned."""
    return torch.empty(shape, dtype=dtype, device="meta")


def gemm(
    op: str, name: str, M: int, N: int, K: int, world_size: int = 2, *, bias: bool = False, dtype: torch.dtype = BF16
) -> Launched:
    """The launch of a fused plan, with the parameters that its text gives or else dispatch does for this shape."""
    room = arena(world_size, max_N=max(8192, N))
    problem = Problem(op, M, N, K, "bfloat16" if dtype == BF16 else "float16", world_size, bias)
    topology = Topology("NVIDIA H200", "cuda", world_size, one_shot_bytes=1 << 40)
    plan = select(problem, topology, forced=name)
    run = {
        ("gemm_all_reduce", "one_shot"): launches.gemm_all_reduce_one_shot,
        ("gemm_all_reduce", "two_shot"): launches.gemm_all_reduce_two_shot,
        ("gemm_reduce_scatter", "one_shot"): launches.gemm_reduce_scatter_one_shot,
        ("gemm_reduce_scatter", "push"): launches.gemm_reduce_scatter,
    }[op, plan.name]
    rows = M if op == "gemm_all_reduce" else -(-M // world_size)
    with recording() as made:
        some_bias = empty(N, dtype=dtype) if bias else None
        run(
            room,
            plan,
            empty(M, K, dtype=dtype),
            empty(N, K, dtype=dtype),
            some_bias,
            empty(rows, N, dtype=dtype),
            12345,
        )
    return made[0]


def copying(which: str, n: int, world_size: int = 2, dtype: torch.dtype = BF16) -> Launched:
    """The launch of a kernel that only moves and adds: one_shot, two_shot, or the unfused reduce-scatter's push."""
    room = arena(world_size)
    with recording() as made:
        if which == "push":
            launches.reduce_scatter(
                room, empty(n // 4096, 4096, dtype=dtype), None, empty(n // 4096, 4096, dtype=dtype), 12345
            )
        else:
            run = {"one_shot": launches.all_reduce_one_shot, "two_shot": launches.all_reduce_two_shot}[which]
            run(room, Plan(which), empty(n, dtype=dtype), empty(n, dtype=dtype), 12345)
    return made[0]


def norming(H: int, world_size: int, dtype: torch.dtype = BF16) -> Launched:
    """The launch of sum and norm in one, on one row; of the norm alone with one rank."""
    room, (x, residual, y, new_residual) = arena(world_size), (empty(1, H, dtype=dtype) for _ in range(4))
    norm = Norm(residual, empty(H, dtype=dtype), 1e-5, y, new_residual)
    with recording() as made:
        if world_size == 1:
            norm_launches.add_rms_norm(room, x, norm)
        else:
            norm_launches.all_reduce_add_rms_norm(room, x, norm, 12345)
    return made[0]


def signalling(step: Callable[[Any], None]) -> Launched:
    """The launch of one step of a chunked call: `signalling(lambda call: call.begin())`."""
    with recording() as made:
        step(chunked._Call(arena(2), "gemm_all_reduce", 12345))
    return made[0]
