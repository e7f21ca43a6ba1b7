"""What one rank does in a test of the operators: calls described by values, made in a row, results handed back.

Inputs follow from the description alone, so the process that judges the results (judge.py) can make them again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Iterator

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests import inputs
from tests.cases import Case
from tests.dist import barrier
from tp_overlap_kernels.lang.interpreter import jitter
from tp_overlap_kernels.memory import arena as arenas
from tp_overlap_kernels.memory import nodes as on_nodes

NAN = float("nan")


# The plans of each op that interpreted CPU ranks can run.
CPU_PLANS = {
    "gemm_all_reduce": ("one_shot", "two_shot", "chunked", "unfused_one_shot", "unfused_two_shot"),
    "gemm_reduce_scatter": ("push", "one_shot", "chunked", "unfused_push"),
    "all_reduce": ("one_shot", "two_shot"),
}


def cpu_plans(op: str, world_size: int) -> list[str]:
    return [plan for plan in CPU_PLANS[op] if plan != "chunked" or world_size == 2]


@dataclasses.dataclass(frozen=True)
class Setup:
    """Where calls are made. plan: for all calls that name none; None leaves it to dispatch."""

    backend: str = "ref"
    plan: str | None = None
    max_M: int = 256
    max_N: int = 1024
    jitter_s: float = 0.0  # random delays around every signal of the interpreted kernels
    slow_rank: int | None = None  # the only rank with delays; None: all
    ranks_per_node: int | None = None  # TP_OVERLAP_RANKS_PER_NODE

    def __str__(self) -> str:
        return self.plan or self.backend

    def has_ranks(self, world_size: int) -> bool:
        """Whether more than one rank, and as many as the plan takes."""
        return world_size == 2 if self.plan == "chunked" else world_size > 1


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of an operator, the same on every rank."""

    op: str
    case: Case
    kind: str = "normal"
    number: int = 0
    bias: bool = False
    into_out: bool = False  # the _out form, into a tensor full of NaN
    plan: str | None = None
    layout: str = "contiguous"  # of every input; a name of LAYOUTS
    layout_b: str | None = None  # of b, where it is another
    leading: tuple[int, ...] | None = None  # a is [*leading, K], x is [*leading]; None: [M, K] and [N]
    late_rank: int | None = None  # sleeps before the call
    late_s: float = 0.06


def in_a_row(op: str, case: Case) -> list[Call]:
    """More calls than an arena has halves, in both forms, with and without a bias; the last two are exact."""
    biased = op != "all_reduce"
    return [
        Call(op, case, number=0, bias=biased),
        Call(op, case, number=1, into_out=True),
        Call(op, case, number=2, bias=biased, into_out=True),
        Call(op, case, "integer", 3, bias=biased),
        Call(op, case, "tagged", 4),
    ]


def in_other_strides(op: str, case: Case) -> list[Call]:
    """Every layout, with inputs of several dimensions where the layout allows it."""
    shapes = {"in wider rows": (3, case.M // 3), "every other row": (case.M // 3, 3), "every other column": (case.M,)}
    if op == "all_reduce":
        shapes = dict.fromkeys(LAYOUTS, (3, case.N // 3))
    assert case.M % 3 == 0 or op == "all_reduce"
    bias = op != "all_reduce"
    return [Call(op, case, "normal", i, bias, layout=name, leading=shapes.get(name)) for i, name in enumerate(LAYOUTS)]


def in_a_row_with_late_ranks(op: str, case: Case) -> list[Call]:
    """Each rank in turn comes late, three times; tags say whose data was not waited for."""
    late = [rank for rank in range(case.world_size) for _ in range(3)]
    return [Call(op, case, "tagged", number, late_rank=rank) for number, rank in enumerate(late)]


# --- the same values in other strides; what lies between them is NaN


def _padded(x: torch.Tensor, *sizes: int) -> torch.Tensor:
    return torch.full(sizes, NAN, dtype=x.dtype, device=x.device)


def _in_wider_rows(x: torch.Tensor) -> torch.Tensor:
    wide = _padded(x, *x.shape[:-1], -(-x.shape[-1] // 8) * 8 + 16)
    return wide[..., 8 : 8 + x.shape[-1]].copy_(x)


def _at_odd_offset(x: torch.Tensor) -> torch.Tensor:
    flat = _padded(x, x.numel() + 9)
    return flat[1 : 1 + x.numel()].view(x.shape).copy_(x)


def _transposed(x: torch.Tensor) -> torch.Tensor:
    return x.movedim(-1, 0).contiguous().movedim(0, -1)


def _every_other_column(x: torch.Tensor) -> torch.Tensor:
    return _padded(x, *x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)


def _every_other_row(x: torch.Tensor) -> torch.Tensor:
    return _padded(x, 2 * x.shape[0], *x.shape[1:])[::2].copy_(x)


LAYOUTS = {
    "contiguous": lambda x: x,
    "in wider rows": _in_wider_rows,
    "at an odd offset": _at_odd_offset,
    "transposed": _transposed,
    "every other column": _every_other_column,
    "every other row": _every_other_row,
}


# --- one rank


def group_name() -> str:
    return dist.group.WORLD.group_name


def prepare_arena(setup: Setup) -> arenas.Arena:
    """An arena of exactly the capacity asked for, with NaN wherever data will be."""
    with nodes_of(setup.ranks_per_node):
        info = tpo.init(max_M=setup.max_M, max_N=setup.max_N)
        if (info.max_M, info.max_N) != (setup.max_M, setup.max_N):  # a larger one was there
            tpo.close()
            tpo.init(max_M=setup.max_M, max_N=setup.max_N)
    arena = arenas.get(group_name())
    barrier()
    arena.store.buffer[arena.layout.one_shot :].view(torch.bfloat16).fill_(NAN)
    barrier()
    return arena


@contextlib.contextmanager
def nodes_of(ranks_per_node: int | None) -> Iterator[None]:
    """While it lasts, `init` sees the ranks on nodes of so many."""
    before = on_nodes.settings
    seen = dataclasses.replace(before(), ranks_per_node=ranks_per_node)
    on_nodes.settings = lambda: seen
    try:
        yield
    finally:
        on_nodes.settings = before


def operands(call: Call, rank: int, device: str = "cpu") -> list[torch.Tensor]:
    """The tensors that `rank` passes: a, b and perhaps bias; or x."""
    case = call.case
    if call.op == "all_reduce":
        return laid_out(call, [inputs.message(case, rank, call.kind, call.number, device)])
    bias = [inputs.bias(case, call.number, device)] if call.bias else []
    return laid_out(call, [*inputs.operands(case, rank, call.kind, call.number, device), *bias])


def laid_out(call: Call, tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Contiguous a (M, K), b (N, K) and perhaps bias, or x (N,), in the dimensions and strides of the call."""
    first, *others = tensors
    if call.leading is not None:
        first = first.view((*call.leading, *first.shape[1:]))
    layouts = [call.layout, call.layout_b or call.layout, call.layout]
    return [LAYOUTS[name](x) for name, x in zip(layouts, [first, *others], strict=False)]


def out_shape(call: Call, rank: int) -> tuple[int, ...]:
    if call.op == "all_reduce":
        return call.leading if call.leading is not None else (call.case.N,)
    if call.op == "gemm_all_reduce":
        return (*(call.leading if call.leading is not None else (call.case.M,)), call.case.N)
    rows = call.case.rows_of(rank)
    return (rows.stop - rows.start, call.case.N)


def invoke(call: Call, tensors: list[torch.Tensor], rank: int) -> torch.Tensor:
    """The call itself."""
    ops, fixed = torch.ops.tp_overlap, 1 if call.op == "all_reduce" else 2
    arguments, bias = tensors[:fixed], tensors[fixed:]
    if not call.into_out:
        return getattr(ops, call.op)(*arguments, group_name(), *bias)
    out = torch.full(out_shape(call, rank), NAN, dtype=call.case.dtype, device=arguments[0].device)
    getattr(ops, call.op + "_out")(*arguments, group_name(), out, *bias)
    return out


def make_calls(rank: int, world_size: int, setup: Setup, calls: list[Call]) -> list[torch.Tensor]:
    """The results of the calls, which follow each other without a pause, but for ranks that are late on purpose."""
    prepare_arena(setup)
    prepared = [operands(call, rank) for call in calls]
    barrier()
    results = []
    jitter_s = setup.jitter_s if setup.slow_rank in (None, rank) else 0.0
    with tpo.cpu_backend(setup.backend), tpo.force_plan(setup.plan), jitter(jitter_s), torch.inference_mode():
        for call, tensors in zip(calls, prepared, strict=True):
            if call.late_rank == rank:
                time.sleep(call.late_s)
            with tpo.force_plan(call.plan) if call.plan else contextlib.nullcontext():
                results.append(invoke(call, tensors, rank))
    return results
