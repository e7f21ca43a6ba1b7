"""How an op runs: what the user has forced, which backend serves, and the plan that dispatch gives the problem."""

import contextlib
import logging
from collections.abc import Iterator

import torch

from ..config import settings
from ..dispatch import Plan, Problem, Topology, select
from ..errors import InvalidInput
from ..memory.arena import Arena
from .checks import DTYPE_NAMES

log = logging.getLogger(__name__)


class _Choice:
    """What the user has chosen for this process, to be equal on all ranks."""

    forced: str | None = None
    cpu_backend: str | None = None


_choice = _Choice()


@contextlib.contextmanager
def force_plan(plan: str | None) -> Iterator[None]:
    """Run the ops with one plan while the context lasts; all ranks alike.

    plan: `name`, or `name:key=value,...`; several with ";" between them, of which the first that belongs to the op
    counts. None: free choice. Errors: InvalidInput for a name that does not exist, now; for a plan that cannot run
    a call, in that call.
    """
    for text in plan.split(";") if plan else ():
        Plan.parse(text)
    before, _choice.forced = _choice.forced, plan
    try:
        yield
    finally:
        _choice.forced = before


@contextlib.contextmanager
def cpu_backend(name: str) -> Iterator[None]:
    """What runs on CPU tensors while the context lasts: "ref" (torch, fast) or "interp" (the Triton kernels)."""
    if name not in ("ref", "interp"):
        raise InvalidInput(f"cpu_backend: {name!r} is unknown. Give 'ref' or 'interp'.")
    before, _choice.cpu_backend = _choice.cpu_backend, name
    try:
        yield
    finally:
        _choice.cpu_backend = before


def cpu_backend_in_force() -> str:
    """What `cpu_backend`, else TP_OVERLAP_CPU_BACKEND, says."""
    return _choice.cpu_backend or settings().cpu_backend


def backend_of(arena: Arena) -> str:
    """cuda, interp or ref."""
    return "cuda" if arena.device.type == "cuda" else cpu_backend_in_force()


def forced_plan() -> str | None:
    """What `force_plan`, else TP_OVERLAP_PLAN, says."""
    return _choice.forced or settings().plan


def choices() -> tuple[str | None, str | None]:
    """What `force_plan` and `cpu_backend` say, as part of a cache key."""
    return _choice.forced, _choice.cpu_backend


def topology_of(arena: Arena) -> Topology:
    """The arena's topology, with the CPU backend in force now."""
    backend = backend_of(arena)
    if arena.topology.backend != backend:
        arena.topology = arena.topology.with_backend(backend)
    return arena.topology


def plan_for(arena: Arena, op: str, M: int, N: int, K: int, dtype: torch.dtype, bias: bool) -> tuple[Plan, int]:
    """The plan and the call hash, remembered for the life of the arena."""
    key = (op, M, N, K, dtype, bias, choices())
    found = arena.cache.get(key)
    if found is None:
        problem = Problem(op, M, N, K, DTYPE_NAMES[dtype], arena.world_size, bias)
        plan = select(problem, topology_of(arena), arena.table, forced_plan())
        found = arena.cache[key] = (plan, problem.call_hash(str(plan)))
        arena.record.calls[found[1]] = op
    return found


def warn_chunked(arena: Arena, op: str, rows: int, limit: int) -> None:
    """Rank 0 says once an arena what a call above the capacity costs."""
    if arena.rank == 0 and "warned" not in arena.cache:
        arena.cache["warned"] = True
        log.warning(
            "%s: a call of %d rows runs in chunks of %d, the capacity of group %r: right, but each chunk is a launch "
            "and a partly filled wave. init(max_M=%d) avoids it. This is said once.",
            op,
            rows,
            limit,
            arena.group_name,
            rows,
        )


def settle(arena: Arena, *outs: torch.Tensor) -> None:
    """On the CPU a launch is over when it returns: raise now what the device would have left for the next call.

    outs become NaN as a whole: a call that runs in pieces, or `ref`, may have written parts of them before it failed.
    """
    if arena.device.type == "cpu" and arena.record.failed:
        for out in outs:
            out.fill_(float("nan"))
        arena.fail()
