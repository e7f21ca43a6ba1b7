"""init, close and what can be asked about a group: the public calls around the ops."""

import logging
from dataclasses import dataclass

import torch
import torch.distributed as dist

from .config import settings
from .dispatch import Explanation, Problem, Topology, explain_text, load
from .errors import InvalidInput
from .memory import arena as arenas
from .memory.layout import MAX_WORLD_SIZE, layout
from .ops import execute
from .ops.checks import DTYPE_NAMES

DEFAULT_MAX_N = 8192

log = logging.getLogger("tp_overlap_kernels")


@dataclass(frozen=True)
class GroupInfo:
    """What `init` has made. `bytes`: symmetric memory of this rank. `nodes`: over which the ranks are spread."""

    group_name: str
    rank: int
    world_size: int
    backend: str
    store: str
    max_M: int
    max_N: int
    bytes: int
    nodes: int = 1


def init(
    group: dist.ProcessGroup | None = None,
    *,
    max_M: int | None = None,
    max_N: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    store: str = "auto",
) -> GroupInfo:
    """Make the arena of a process group: all symmetric memory that the ops on this group will ever use.

    group: a torch process group of 1 to 8 ranks on one host, or of equally many on each of several; None is the
    world, or one rank by itself (group_name "local") where torch.distributed is not initialised. Set the CUDA device
    first. max_M: rows of the largest call that runs in one piece (default TP_OVERLAP_MAX_TOKENS, else 8192): an
    engine's prefill budget. max_N: columns of the widest layer (default 8192). dtype: bf16 or fp16; both run in the
    same arena. store: "auto", "symm_mem" (CUDA), "nvshmem" (CUDA, by this name alone: memory.nvshmem, extra
    `[nvshmem]`), "shm" (CPU processes), "local" (one rank a host).
    On several hosts the ops run in two levels (ops.two_level), and this makes process groups, which live as long as
    `group`. No rank may be making others meanwhile, and where `group` is a part of the world, its ranks must be members
    of equally many.
    Collective: every rank of the group calls it, with equal arguments and settings. Where the group has an arena
    already, one that is large enough stays, unless another store is named; a smaller one is replaced, which graphs that
    were captured with it do not survive.
    Errors, on every rank, whichever rank has met them: InvalidInput (bad sizes or settings; ranks that disagree, with
    every rank's values; a larger arena asked for during graph capture), UnsupportedTopology (more than 8 ranks on a
    host, hosts of unequally many, a store that cannot serve, memory that cannot be had or that peers do not reach),
    PeerDied and PeerTimeout (a rank ends meanwhile, or never calls; how long it is waited for is torch.distributed's
    timeout).
    """

    def wish() -> arenas.Wish:
        M = settings().max_tokens if max_M is None else max_M
        N = DEFAULT_MAX_N if max_N is None else max_N
        _check_sizes("init", M, N, dtype, 1)
        level = settings().log_level
        if level:
            log.setLevel(level.upper())
        return arenas.Wish(M, N, dtype, store)

    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        old, asked = arenas.find(arenas.name_of(group)), wish()
        room = old.layout if old is not None and not old.record.failed else None
        if old is not None and asked.store != "auto" and old.store.name not in (asked.store, "local"):
            room = None
        if old is not None and room is not None and room.max_M >= asked.max_M and room.max_N >= asked.max_N:
            return _describe(old)
        named = "" if asked.store == "auto" else f", store={asked.store!r}"
        raise InvalidInput(
            "init: the arena cannot be made or grown while a CUDA graph is being captured. "
            f"Call tp_overlap_kernels.init(group, max_M={asked.max_M}, max_N={asked.max_N}{named}) on every rank "
            "before the capture."
        )
    with torch.device("cpu"):  # engines build models under another default; where we name none, we mean the host
        arena = arenas.obtain(group, wish, execute.cpu_backend_in_force())
    _tag_compiled_code(arena, True)
    return _describe(arena)


def close(group: dist.ProcessGroup | None = None) -> None:
    """Free the arena of a group; nothing happens if there is none. Every rank calls it, and waits until the others do.

    Where the group has failed on this rank, it waits for nobody, and nobody waits for it.
    Graphs captured with the arena must not be replayed any more. `init` may be called again.
    """
    old = arenas.find(arenas.name_of(group))
    if old is not None:
        _tag_compiled_code(old, False)
        arenas.destroy(old)


def check(group: dist.ProcessGroup | None = None) -> None:
    """Raise if a device wait of the group has failed so far; looks at one word of host memory and waits for nothing.

    Every op call does this first. After torch.cuda.synchronize() it says whether the results at hand are good.
    Errors: PeerTimeout, CallMismatch, PeerDied, PeerClosed (all GroupFailed), NotInitialised.
    """
    arenas.get(arenas.name_of(group), "check").check()


def bytes_needed(max_M: int, max_N: int, dtype: torch.dtype = torch.bfloat16, world_size: int | None = None) -> int:
    """Bytes of symmetric memory a rank that `init` will take; pure, to be called before a KV cache is sized.

    At most 2 * max_M * max_N * itemsize + 4 MiB (max_N rounded up to 16), whatever the number of layers.
    world_size: default that of the initialised torch.distributed, else 1. In a group on several hosts: the ranks of
    one host.
    """
    if world_size is None:
        world_size = dist.get_world_size() if dist.is_initialized() else 1
    _check_sizes("bytes_needed", max_M, max_N, dtype, world_size)
    return layout(max_M, max_N, dtype.itemsize, world_size).total_bytes


@dataclass(frozen=True)
class MemoryReport:
    """Bytes of symmetric memory of this rank: `groups` maps group_name to bytes by region."""

    groups: dict[str, dict[str, int]]

    @property
    def total_bytes(self) -> int:
        return sum(sum(regions.values()) for regions in self.groups.values())

    def __str__(self) -> str:
        lines = [f"tp_overlap_kernels: {self.total_bytes} bytes of symmetric memory on this rank"]
        for name, regions in self.groups.items():
            lines.append(f"  group {name!r}: {sum(regions.values())}")
            lines += [f"    {region:<9} {nbytes:>12}" for region, nbytes in regions.items()]
        return "\n".join(lines)


def memory_report() -> MemoryReport:
    """Who uses what: every group of this process, by region of its arena."""
    return MemoryReport({arena.group_name: arena.layout.regions() for arena in arenas.all_arenas()})


def explain(
    op: str,
    M: int,
    N: int,
    K: int,
    *,
    dtype: torch.dtype = torch.bfloat16,
    world_size: int | None = None,
    device: str | None = None,
    group: dist.ProcessGroup | None = None,
) -> Explanation:
    """Which plan a call gets, and why: candidates, measured microseconds, what was ruled out; readable as a str.

    op: "gemm_all_reduce", "gemm_reduce_scatter", "all_reduce" (then N is the number of elements),
    "gemm_all_reduce_add_rms_norm" or "all_reduce_add_rms_norm" (M rows of N elements). K: of one rank.
    With an initialised group its topology counts; else `device` (a name such as "NVIDIA H200") and world_size
    describe one, and no GPU is needed.
    """
    arena = arenas.find(arenas.name_of(group))
    if arena is not None and device is None and world_size in (None, arena.world_size):
        topology, table = execute.topology_of(arena), arena.table
    else:
        W = world_size or 2
        name = device or "NVIDIA H200"
        room = layout(settings().max_tokens, max(N if op != "all_reduce" else 1, DEFAULT_MAX_N), dtype.itemsize, W)
        backend = settings().cpu_backend if name == "cpu" else "cuda"
        topology = Topology(name, backend, W, 1, True, **room.limits())
        table = load(settings().table, name, W)
    if dtype not in DTYPE_NAMES:
        raise InvalidInput(f"explain: dtype must be bfloat16 or float16, got {dtype}.")
    M = 1 if op == "all_reduce" else M
    K = 0 if op in ("all_reduce", "all_reduce_add_rms_norm") else K
    problem = Problem(op, M, N, K, DTYPE_NAMES[dtype], topology.world_size)
    return explain_text(problem, topology, table, execute.forced_plan())


def _check_sizes(call: str, max_M: int, max_N: int, dtype: torch.dtype, world_size: int) -> None:
    if max_M < 1 or max_N < 1:
        raise InvalidInput(f"{call}: max_M and max_N must be at least 1, got max_M={max_M}, max_N={max_N}.")
    if dtype not in DTYPE_NAMES:
        raise InvalidInput(f"{call}: dtype must be bfloat16 or float16, got {dtype}.")
    if not 1 <= world_size <= MAX_WORLD_SIZE:
        raise InvalidInput(f"{call}: world_size must be 1 to {MAX_WORLD_SIZE}, got {world_size}.")


def _tag_compiled_code(arena: arenas.Arena, present: bool) -> None:
    """Keep ranks from finding each other's code in torch.compile's caches, which processes share.

    The rows that gemm_reduce_scatter gives depend on the rank, and nothing else in the caches' keys does: the graphs of
    two ranks read the same, and where each sees its GPU as device 0, their inputs look the same too.
    """
    if arena.world_size == 1:
        return
    from torch.compiler import config

    tag = f" tp_overlap:{arena.group_name}:{arena.rank}/{arena.world_size}"
    others = config.cache_key_tag.replace(tag, "")
    config.cache_key_tag = others + tag if present else others


def _describe(arena: arenas.Arena) -> GroupInfo:
    room = arena.layout
    return GroupInfo(
        group_name=arena.group_name,
        rank=arena.rank,
        world_size=arena.world_size,
        backend=execute.backend_of(arena),
        store=arena.store.name,
        max_M=room.max_M,
        max_N=room.max_N,
        bytes=room.total_bytes,
        nodes=arena.topology.nodes,
    )
