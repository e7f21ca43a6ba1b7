"""Ways to compute an op, each under a name a stranger understands.

`ours` lets the library choose, `ours:<plan>` forces a plan; `matmul` is cuBLAS alone, `matmul:sm90` our GEMM alone; the
others are what people use without this library (see torch_providers.py). `mine=package.module:function` adds a
function(a, w, group_name) -> result of the user's own. A provider that cannot run a case raises Declined with the
reason; any other exception is a failure.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import torch

from tp_overlap_kernels import native
from tp_overlap_kernels.kernels import gemm

from .cases import ALL_REDUCE, GEMM_ALL_REDUCE, GEMM_ALL_REDUCE_NORM, GEMM_REDUCE_SCATTER, MESSAGES, OPS, SUM_OF, Case
from .launch import World
from .norm import EPS, norm_operands
from .norm_providers import NORMS
from .provider import Provider, Session, weight_of
from .timing import Call
from .torch_providers import UNFUSED as SUMS
from .truth import AT_EACH_HOP, ONCE, PARTIAL

UNFUSED = SUMS | NORMS
LEAST_MAX_M = 8192  # what tpo.init takes where nothing is said
ARENA = "arena"  # what the session calls it
INTERPRETER_LIMIT = 8_000_000  # multiply-adds of a case: above, interpreted kernels take seconds a call
INTERPRETED_ROWS = 32  # of a tile: fewer rows cost as much


class Matmul(Provider):
    """The GEMM alone: this rank's partial, summed over nobody."""

    ops = (GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, GEMM_ALL_REDUCE_NORM)
    rounding = PARTIAL

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        return lambda w: torch.mm(a, weight_of(w).t())


class HopperMatmul(Matmul):
    """The GEMM of the plan sm90 alone, csrc/kernels/gemm.cu, with the schedule of its rule."""

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        device = self.world.device
        here = device.type == "cuda" and torch.cuda.get_device_capability(device) == (9, 0)
        self.decline_unless(here and native.available(), "needs a GPU of compute capability 9.0 and the CUDA library")
        self.session.once("gemm prepared", gemm.prepare)
        schedule = gemm.schedule_for(
            case.M, case.N, case.K_local, torch.cuda.get_device_properties(device).multi_processor_count
        )
        dtype_code = gemm.BF16 if a.dtype == torch.bfloat16 else gemm.FP16

        def call(w: torch.Tensor | None) -> torch.Tensor:
            b, out = weight_of(w), a.new_empty(case.M, case.N)
            gemm.launch(
                a_ptr=a.data_ptr(),
                b_ptr=b.data_ptr(),
                out_ptr=out.data_ptr(),
                bias_ptr=0,
                M=case.M,
                N=case.N,
                K=case.K_local,
                a_stride=a.stride(0),
                b_stride=b.stride(0),
                out_stride=case.N,
                dtype_code=dtype_code,
                schedule=schedule,
                stream=torch.cuda.current_stream(device).cuda_stream,
            )
            return out

        return call


class Ours(Provider):
    """The library's functional ops, results in fresh tensors. `plan` None lets it choose."""

    ops = OPS
    equal_bits = True
    fused = True

    def __init__(self, name: str, session: Session, plan: str | None = None, cpu_backend: str | None = None) -> None:
        super().__init__(name, session)
        self.forced, self.cpu_backend = plan, cpu_backend
        self.library = _initialised(session)

    @property
    def rounding(self) -> str:  # type: ignore[override]
        """Plans that hand the sum to another library round as that one does; with two ranks there is one addition."""
        foreign = self.forced is None or any(word in self.forced for word in ("nccl", "symm_mem"))
        return AT_EACH_HOP if foreign and self.world.world_size > 2 else ONCE

    def active(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        if self.cpu_backend:
            stack.enter_context(self.library.cpu_backend(self.cpu_backend))
        if self.forced:
            stack.enter_context(self.library.force_plan(self.forced))
        return stack

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        if self.cpu_backend == "interp":
            work = max(case.M, INTERPRETED_ROWS) * case.N * max(case.K_local, 1)
            self.decline_unless(work <= INTERPRETER_LIMIT, "too large to interpret")
        group_name = self.world.group_name
        op = getattr(torch.ops.tp_overlap, case.op)
        if case.op in SUM_OF:
            residual, weight = norm_operands(case.layer, case.M, a.dtype, a.device)
            if case.op in MESSAGES:
                return lambda w: op(a, residual, weight, EPS, group_name)
            return lambda w: op(a, w, residual, weight, EPS, group_name)
        if case.op == ALL_REDUCE:
            return lambda w: op(a, group_name)
        return lambda w: op(a, w, group_name)

    def plan(self, case: Case) -> str | None:
        sizes = (1, case.M * case.N, 0) if case.op == ALL_REDUCE else (case.M, case.N, case.K_local)
        with self.active():
            return str(self.library.explain(case.op, *sizes, dtype=self.session.dtype).plan)

    def check(self) -> None:
        self.library.check()

    def refuses(self, error: Exception) -> bool:
        """A forced plan that cannot run a case says so before it does anything."""
        return self.forced is not None and isinstance(error, self.library.InvalidInput)


class UserFunction(Provider):
    """A function(a, w, group_name) -> result that the user named by module and attribute."""

    def __init__(self, name: str, session: Session, target: str) -> None:
        super().__init__(name, session)
        module, _, attribute = target.partition(":")
        self.function: Callable[..., torch.Tensor] = getattr(importlib.import_module(module), attribute)

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        return lambda w: self.function(a, w, self.world.group_name)


def _initialised(session: Session) -> Any:
    """The library, with one arena for the whole run: all providers of ours share it, as the layers of a model do.

    On GPUs it holds the default max_M at least, whatever the cases: a smaller arena has less room for one-shot calls,
    and a table tuned in it would not be that of a user.
    """
    import torch.distributed as dist

    import tp_overlap_kernels as tpo

    max_M = max(session.max_M, LEAST_MAX_M) if torch.cuda.is_available() else session.max_M
    sizes: dict[str, Any] = {"max_M": max_M, "max_N": session.max_N, "dtype": session.dtype}
    session.once(ARENA, lambda: tpo.init(dist.group.WORLD, **sizes, store=session.store))
    return tpo


def close(session: Session) -> None:
    """Gives the arena back, where one was made. Graphs captured with it must not run any more."""
    if session.made.pop(ARENA, None) is not None:
        import tp_overlap_kernels as tpo

        tpo.close()


def recovered(session: Session) -> bool:
    """Whether the group had failed and has a new arena now, in which case earlier graphs are lost. All ranks ask.

    A group fails when a wait on the device has timed out. Where only some ranks know yet, nothing is done: a rank that
    does not know would wait in `close` for those that do. It learns in its next call.
    """
    if ARENA not in session.made:
        return False
    import tp_overlap_kernels as tpo

    failed = False
    try:
        tpo.check()
    except tpo.GroupFailed:
        failed = True
    if not all(session.world.gather(failed)):
        return False
    close(session)
    _initialised(session)
    return True


def default_names(op: str, world: World) -> list[str]:
    """What `run` compares for an op where the user named nothing."""
    if world.device.type == "cpu":
        names = ["ref", "interp"]
    else:
        names = ["ours"]
    if op not in MESSAGES:
        names.append("matmul")
    if world.world_size == 1 and world.device.type != "cpu":
        return names
    return names + [name for name, kind in UNFUSED.items() if op in kind.ops and kind.for_device == world.device.type]


def label(name: str) -> str:
    """What a provider is called in results: `mine` of `mine=package.module:function`, else the name itself. A plan's
    parameters hold the other equals signs there are."""
    before, equals, after = name.partition("=")
    return before if equals and ":" not in before and ":" in after else name


def make(name: str, session: Session) -> Provider:
    """The provider of a name.

    Errors: Declined where this machine or layout of ranks cannot have it, ValueError where there is no such name.
    """
    base, _, plan = name.partition(":")
    if label(name) != name:
        return UserFunction(label(name), session, name.partition("=")[2])
    if base == "ours":
        return Ours(name, session, plan or None)
    if base in ("ref", "interp"):
        return Ours(name, session, plan or None, cpu_backend=base)
    if base == "matmul" and plan in ("", "sm90"):
        return HopperMatmul(name, session) if plan else Matmul(name, session)
    if name not in UNFUSED:
        raise ValueError(
            f"no provider is called {name!r}; there are ours, ours:<plan>, ref, interp, matmul, matmul:sm90, "
            f"{', '.join(UNFUSED)}, and name=package.module:function"
        )
    return UNFUSED[name](name, session)
