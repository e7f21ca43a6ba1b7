"""(Problem, Topology, Table) -> Plan. Pure: a function of values that all ranks share, so all ranks choose alike.

Three sources, asked in this order:
  forced  the plan that the user named; one that cannot run is an error and is never replaced
  table   the candidates measured on this device, fastest first, for the nearest measured shape
  rule    the rule of thumb below, where no table knows the shape
and the first candidate that can run is taken. Every rule ends with a plan that can always run, hence `select` never
fails for a valid problem unless a plan is forced.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..errors import InvalidInput
from . import nodes_model
from .defaults import KERNEL_PARAMS_SM90, KERNELS_SM90, default_params, plan_of_kernel
from .problem import ITEMSIZE, PLAN_NAMES, SUM_OF, Plan, Problem, Topology
from .table import Table

KIB, MIB = 1024, 1024 * 1024

# ---- thresholds of the rule of thumb: 2 and 4 x H200, NVSwitch, bf16, CUDA graphs. A table takes precedence.

# Fused one-shot at decode, against the best unfused way: 8B o_proj M=16 11.8 us (16.1), 72B down M=16 62.2 us (71.4).
ONE_SHOT_MAX_M = 64
# ... while what a rank sends, (W-1) messages, stays small. Unfused at W=4, N=8192: one-shot ties at M=1, is 5 % behind
# two-shot at M=16 (768 KiB sent) and 22 % at M=64 (3 MiB). W=2, M=64, N=8192 sends 1 MiB.
ONE_SHOT_MAX_SENT_BYTES = 1 * MIB
# The CUDA kernel for decode before it: 9.1 us against 11.0 at N=4096 K=2048 M=16, 61.6 against 62.8 at N=8192 K=14784
# M=1. At M=64 it wins in three of six layers.
DECODE_FIRST_MAX_M = 16
DECODE_MAX_M = 128  # of the kernel
# Between decode and prefill cuBLAS and a collective of ours: the GEMM has too few tiles to hide its epilogues behind.
# Measured at M=512: level with the fused kernels at N=8192 K=4096 (79.2 us against 79.7), ahead at N=4096 K=7168 (58.8
# against 65.6).
UNFUSED_MAX_M = 512
# The CUDA kernels for Hopper from here on: N=8192 K=4096 M=512 72.7 us against 76 of the Triton one, M=1024 125 against
# 133. An all-reduce with K=14784 is the exception: 408 against 401 at M=1024.
SM90_MIN_M, SM90_MIN_N = 512, 128
# A reduce-scatter between two ranks that the L2 cache adds: where the link takes as long as the products, N=8192 K=1024
# M=1024 40.1 us against 43.3. With longer products consumers add as fast, or faster.
SM90_ADD_SCATTER_MAX_K = 1536
# The collective then: one-shot up to here between two ranks (M=256, N=8192: 44.6 us with it, 48.6 with two-shot).
UNFUSED_ONE_SHOT_MAX_BYTES = 4 * MIB
# Chunked cuBLAS, W=2, needs copies large enough for the copy engine and a GEMM well longer than the transfer, which
# depends on K alone. Reduce-scatter: M=4096, N=8192, K=3696 403 us against 413 fused; K=1024 195 against 172.
CHUNKED_SCATTER_MIN_BYTES, CHUNKED_SCATTER_MIN_K = 32 * MIB, 3072
# All-reduce pushes twice as much: it wins at M=8192, N=8192, K=14784 (2931 us against 3063 fused), and nowhere else.
CHUNKED_SUM_MIN_BYTES, CHUNKED_SUM_MIN_K = 128 * MIB, 14336
# The sentinel kernel takes 1.4 us at 256 KiB where flags take 3.0, and behind cuBLAS, between two ranks, 2 less than
# flags at 1 MiB. More ranks send more.
SENTINEL_MAX_BYTES, SENTINEL_MAX_BYTES_OF_TWO = 256 * KIB, 4 * MIB
# One-shot and two-shot cross between 64 KiB (8.0 us against 8.4) and 256 KiB (9.1 against 8.4) in torch's kernels,
# which pay two barriers; ours pays one exchange (3.0 us at 256 KiB), so the crossing is put one step higher.
ONE_SHOT_ALL_REDUCE_MAX_BYTES = 512 * KIB
# Sum and norm in one launch where the sum alone would be one.
SENTINEL_NORM_MAX_BYTES_OF_TWO, ONE_SHOT_NORM_MAX_BYTES = 1 * MIB, ONE_SHOT_ALL_REDUCE_MAX_BYTES
SENTINEL_NORM_MAX_N = 8192  # a block has one row, two vectors a thread
# The interpreter has no speed to choose by: both kernels get their share of shapes, as on the device.
INTERP_ONE_SHOT_MAX_M = 32
INTERP_ONE_SHOT_MAX_BYTES = 64 * KIB

# A call of two launches takes the host 10 to 15 us longer than one of a fused kernel: more than decode has. So up to
# ONE_SHOT_MAX_M a fused plan is taken that measured up to this much slower in a graph, where the host does not count.
WORTH_A_LAUNCH = 1.1
ONE_LAUNCH = ("one_shot", "decode", "two_shot", "push")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What was chosen and everything that was looked at; `explain` prints it."""

    plan: Plan
    source: str  # "forced", "table" or "rule"
    candidates: tuple[tuple[Plan, str | None], ...]  # in order of preference, each with the reason why it cannot run


def select(problem: Problem, topology: Topology, table: Table | None = None, forced: str | None = None) -> Plan:
    """The plan for `problem`, with every kernel parameter filled in.

    forced: `name` or `name:key=val,...`, or several of these with ";" between them, of which the first that belongs to
    the op counts ("two_shot;push" forces all ops). Parameters left open take those of defaults.py. On several nodes
    what stands beside "two_level" is the plan of the reduce-scatter inside ("two_level;push"); one flat collective is
    forced by "unfused_nccl;nccl".
    Errors: InvalidInput when the forced plan cannot run, with the reason and the plans that can.
    """
    return decide(problem, topology, table, forced).plan


def decide(problem: Problem, topology: Topology, table: Table | None = None, forced: str | None = None) -> Decision:
    """`select`, with what was considered on the way."""
    if problem.world_size != topology.world_size:
        raise InvalidInput(
            f"{problem.op}: the problem has world_size={problem.world_size}, "
            f"its group world_size={topology.world_size}. Both must come from one group."
        )
    if forced:
        return Decision(_forced(problem, topology, table, forced), "forced", ())
    measured = []
    if table and topology.backend == "cuda" and not topology.inside:
        measured = _one_launch_first(problem, table.lookup(problem))
    looked_at = [(plan, why_not(plan, problem, topology)) for plan in measured]
    source = "table"
    if all(reason for _, reason in looked_at):
        looked_at += [(plan, why_not(plan, problem, topology)) for plan in _by_rule(problem, topology, table)]
        source = "rule"
    plan = next(plan for plan, reason in looked_at if reason is None)
    return Decision(_complete(plan, problem, topology, table), source, tuple(looked_at))


def _by_rule(problem: Problem, topology: Topology, table: Table | None) -> list[Plan]:
    """`rule_of_thumb`; for an op with a norm one launch for both where that is small, then what its sum gets."""
    if problem.op not in SUM_OF:
        return rule_of_thumb(problem, topology)
    of_sum = [
        dataclasses.replace(plan, why=f"the sum: {plan.why}", us=None)
        for plan, _ in decide(problem.sum, topology, table).candidates
    ]
    return of_sum if _only_plan(topology) else [*_one_launch_norm(problem, topology), *of_sum]


def _one_launch_first(problem: Problem, measured: list[Plan]) -> list[Plan]:
    """The same plans; at decode those of one launch first that are nearly as fast as the fastest."""
    if problem.op not in ("gemm_all_reduce", "gemm_reduce_scatter") or problem.M > ONE_SHOT_MAX_M or not measured:
        return measured
    enough = WORTH_A_LAUNCH * (measured[0].us or 0.0)
    return sorted(measured, key=lambda plan: not (plan.name in ONE_LAUNCH and (plan.us or 0.0) <= enough))


def why_not(plan: Plan, problem: Problem, topology: Topology) -> str | None:
    """The reason why `plan` cannot run `problem` on `topology`, or None when it can."""
    only = _only_plan(topology)
    if plan.name == only:
        return None
    if plan.name in _ONLY:
        return f"it is for {_ONLY[plan.name]}"
    if plan.name not in PLAN_NAMES[problem.op]:
        return f"it is not a plan of {problem.op}"
    if only == "two_level":
        if plan.name in _FLAT:  # collectives of the whole group: of any backend, gloo's too
            return _nccl_limit(plan, problem, topology) if topology.backend == "cuda" else None
        return "ranks of different nodes do not map each other's memory"
    if only:
        return f"{_ONLY[only]} knows only the plan {only!r}"
    if topology.backend == "interp" and plan.name in _CUDA_ONLY:
        return "it is CUDA code, which has no CPU twin"
    limit = _LIMITS.get(plan.name)
    return limit(plan, _served(plan.name, problem), topology) if limit else None


def runnable(problem: Problem, topology: Topology) -> list[str]:
    """Names of the plans that can run `problem` here."""
    names = (*PLAN_NAMES[problem.op], *_ONLY)
    return [name for name in names if why_not(Plan(name), problem, topology) is None]


def rule_of_thumb(problem: Problem, topology: Topology) -> list[Plan]:
    """Candidates without a measurement, best guess first; the last one can always run."""
    only = _only_plan(topology)
    if only == "two_level" and topology.backend == "cuda":
        return _on_nodes(problem, topology)
    if only:
        return [Plan(only, why=_WHY_ONLY[only])]
    rule = _INTERP_RULES if topology.backend == "interp" else _CUDA_RULES
    return [Plan(name, why=why) for name, why in rule[problem.op](problem)]


def _on_nodes(problem: Problem, topology: Topology) -> list[Plan]:
    """Two levels, or one flat collective behind the GEMM: by the bytes over either link (nodes_model.py)."""
    assert topology.inside is not None
    of = nodes_model.times(problem.message_bytes, topology.nodes, topology.inside.world_size)
    flat = "nccl" if problem.op == "all_reduce" else "unfused_nccl"
    us = {"two_level": of.two_level(problem.op), flat: of.one_level(problem.op)}
    why = _WHY_ONLY["two_level"]
    ordered = sorted(us.items(), key=lambda each: each[1])
    return [Plan(name, why=f"{why}; {time:.0f} us behind the GEMM, by bytes alone") for name, time in ordered]


# ---- what a plan needs


def _served(name: str, problem: Problem) -> Problem:
    """What the plan's sum serves: the call without its norm, where that is a launch of its own."""
    return problem.sum if problem.op in SUM_OF and not name.endswith("_norm") else problem


_CUDA_ONLY = (
    *("decode", "sm90", "sm90_add", "sentinel", "unfused_sentinel", "sentinel_norm", "unfused_sentinel_norm"),
    *("nccl", "unfused_nccl"),
)


_FLAT = ("nccl", "unfused_nccl")
# Plans that stand alone where they run, but for a flat collective that is forced on several nodes; and where that is.
_ONLY = {"local": "one rank", "two_level": "several nodes", "ref": "the ref backend"}
_WHY_ONLY = {
    "local": "one rank has nothing to send",
    "two_level": "ranks of different nodes do not map each other's memory",
    "ref": "the CPU reference",
}


def _only_plan(topology: Topology) -> str | None:
    if topology.world_size == 1:
        return "local"
    if topology.inside:
        return "two_level"
    return "ref" if topology.backend == "ref" else None


def _exceeds(needed_bytes: int, region: str, capacity_bytes: int) -> str | None:
    if needed_bytes <= capacity_bytes:
        return None
    return f"the message of {needed_bytes} bytes exceeds the {region} region of {capacity_bytes} bytes"


def _one_shot_limit(plan: Plan, problem: Problem, topology: Topology) -> str | None:
    return _exceeds(problem.arena_bytes, "one-shot", topology.one_shot_bytes)


def _sentinel_limit(plan: Plan, problem: Problem, topology: Topology) -> str | None:
    if not topology.native:
        return "the CUDA library is not loaded"
    if ITEMSIZE[problem.dtype] != 2:
        return f"the sentinel kernel takes bfloat16 and float16, not {problem.dtype}"
    if problem.op == "gemm_reduce_scatter":
        share = -(-problem.M // problem.world_size) * problem.N * ITEMSIZE[problem.dtype]  # what one owner gets
        return _exceeds(share, "sentinel", topology.sentinel_bytes)
    return _exceeds(problem.message_bytes, "sentinel", topology.sentinel_bytes)


def _sentinel_norm_limit(plan: Plan, problem: Problem, topology: Topology) -> str | None:
    if problem.N > SENTINEL_NORM_MAX_N:
        return f"the sentinel kernel norms rows of up to {SENTINEL_NORM_MAX_N} elements, not {problem.N}"
    whole_vectors = dataclasses.replace(problem, N=-(-problem.N // 8) * 8)
    return _sentinel_limit(plan, whole_vectors, topology)


def _decode_limit(plan: Plan, problem: Problem, topology: Topology) -> str | None:
    if not topology.native:
        return "the CUDA library is not loaded"
    if ITEMSIZE[problem.dtype] != 2:
        return f"the decode kernel takes bfloat16 and float16, not {problem.dtype}"
    if problem.M > DECODE_MAX_M:
        return f"the decode kernel takes M <= {DECODE_MAX_M}, not {problem.M}"
    # Tiles are whole, and of 128 rows at most.
    return _exceeds(problem.M * -(-problem.N // 128) * 128 * 2, "sentinel", topology.sentinel_bytes)


def _sm90_limit(plan: Plan, problem: Problem, topology: Topology) -> str | None:
    if not topology.native:
        return "the CUDA library is not loaded"
    if ITEMSIZE[problem.dtype] != 2:
        return f"the kernels for Hopper take bfloat16 and float16, not {problem.dtype}"
    if problem.N % 8:
        return f"N must be a multiple of 8 for the copy engine, got {problem.N}"
    complete = _complete(plan, problem, topology)
    kernel, kernels = tuple(complete[name] for name in KERNEL_PARAMS_SM90), KERNELS_SM90[plan.name, problem.op]
    if kernel not in kernels:
        return f"there is no kernel with {_named(kernel)}; there are {'; '.join(map(_named, kernels))}"
    if rows_of_whole_tiles(problem.N, complete, topology):
        return None
    rows, cols, _ = cluster_of(complete)
    return (
        f"the arena has no room for {rows} rows a rank in tiles of {cols} columns at N={problem.N}; "
        f"init with max_M={rows * topology.world_size} and max_N={-(-problem.N // cols) * cols} has"
    )


def _sm90_add_limit(plan: Plan, problem: Problem, topology: Topology) -> str | None:
    if topology.world_size != 2:  # more than two partials would be rounded one after the other
        return f"sm90_add works with world_size=2, not {topology.world_size}"
    return _sm90_limit(plan, problem, topology)


def _named(kernel: tuple[int, ...]) -> str:
    return str(plan_of_kernel("", kernel)).removeprefix(":")


def rows_of_whole_tiles(N: int, plan: Plan, topology: Topology) -> int:
    """The most rows of a call that sm90 and sm90_add run in one piece: those of a cluster a rank at a time. 0: none.

    It stages whole tiles of 128 x block_n, and all of a cluster, also where a matrix ends within them.
    """
    rows, cols, blocks = cluster_of(plan)
    tiles = min(topology.staged_bytes // (128 * plan["block_n"] * 2), topology.tile_slots // topology.world_size)
    return topology.world_size * rows * (tiles // blocks // -(-N // cols))


def cluster_of(plan: Plan) -> tuple[int, int, int]:
    """Of a complete plan of sm90 or sm90_add: rows and columns of the tiles of a cluster of blocks, and its blocks."""
    down, across = plan["cluster_m"], plan["cluster_n"]
    return 128 * down, plan["block_n"] * across, down * across


def _chunked_limit(plan: Plan, problem: Problem, topology: Topology) -> str | None:
    # With more peers their partials would have to be summed before the beta=1 of the own GEMM can add them.
    return None if topology.world_size == 2 else f"chunked works with world_size=2, not {topology.world_size}"


def _nccl_limit(plan: Plan, problem: Problem, topology: Topology) -> str | None:
    return "NCCL refuses two ranks on one device" if topology.ranks_per_device > 1 else None


_LIMITS: dict[str, Callable[[Plan, Problem, Topology], str | None]] = {
    "one_shot": _one_shot_limit,
    "unfused_one_shot": _one_shot_limit,
    "one_shot_norm": _one_shot_limit,
    "unfused_one_shot_norm": _one_shot_limit,
    "sentinel": _sentinel_limit,
    "unfused_sentinel": _sentinel_limit,
    "sentinel_norm": _sentinel_norm_limit,
    "unfused_sentinel_norm": _sentinel_norm_limit,
    "decode": _decode_limit,
    "sm90": _sm90_limit,
    "sm90_add": _sm90_add_limit,
    "chunked": _chunked_limit,
    "nccl": _nccl_limit,
    "unfused_nccl": _nccl_limit,
}


# ---- the rules. Each yields (name, why), best guess first, and ends with a plan that no limit can exclude.


def _gemm_all_reduce(problem: Problem) -> list[tuple[str, str]]:
    sent_bytes = (problem.world_size - 1) * problem.message_bytes
    if problem.M <= ONE_SHOT_MAX_M and sent_bytes <= ONE_SHOT_MAX_SENT_BYTES:
        why = f"M <= {ONE_SHOT_MAX_M} and a rank sends at most {ONE_SHOT_MAX_SENT_BYTES} bytes"
        decode = [("decode", f"M <= {DECODE_FIRST_MAX_M}")] if 0 < problem.M <= DECODE_FIRST_MAX_M else []
        return [*decode, ("one_shot", why), ("unfused_two_shot", "small M")]
    if problem.M <= UNFUSED_MAX_M:
        why = f"M <= {UNFUSED_MAX_M}: too few tiles to hide the epilogues behind"
        of_two = problem.world_size == 2 and problem.message_bytes <= UNFUSED_ONE_SHOT_MAX_BYTES
        one_shot = [("unfused_sentinel", why), ("unfused_one_shot", why)] if of_two else []
        return [*_sm90(problem), *one_shot, ("unfused_two_shot", why)]
    chunked = _chunked(problem, CHUNKED_SUM_MIN_BYTES, CHUNKED_SUM_MIN_K)
    return [*chunked, *_sm90(problem), ("two_shot", f"M > {UNFUSED_MAX_M}: the sum hides behind the GEMM")]


def _gemm_reduce_scatter(problem: Problem) -> list[tuple[str, str]]:
    if problem.M <= UNFUSED_MAX_M:
        why = f"M <= {UNFUSED_MAX_M}: too few tiles to hide the epilogues behind"
        unfused = [("unfused_sentinel", why)] * (problem.world_size == 2) + [("unfused_push", why)]
        one_shot = ("one_shot", f"M <= {ONE_SHOT_MAX_M}: a tile of all rows streams the weight once")
        return [one_shot, *unfused] if problem.M <= ONE_SHOT_MAX_M else [*_sm90(problem), *unfused]
    chunked = _chunked(problem, CHUNKED_SCATTER_MIN_BYTES, CHUNKED_SCATTER_MIN_K)
    return [*_sm90(problem), *chunked, ("push", f"M > {UNFUSED_MAX_M}: the sum hides behind the GEMM")]


def _sm90(problem: Problem) -> list[tuple[str, str]]:
    """Their tiles are whole: with few columns most of each would be padding."""
    if problem.M < SM90_MIN_M or problem.N < SM90_MIN_N:
        return []
    why = f"M >= {SM90_MIN_M}: copies of a CUDA kernel hide behind its products"
    gains = problem.op == "gemm_all_reduce" or problem.K <= SM90_ADD_SCATTER_MAX_K
    return [("sm90_add", why)] * (problem.world_size == 2 and gains) + [("sm90", why)]


def _chunked(problem: Problem, min_bytes: int, min_K: int) -> list[tuple[str, str]]:
    if problem.message_bytes < min_bytes or problem.K < min_K:
        return []
    return [("chunked", f"at least {min_bytes // MIB} MiB to move and K >= {min_K}")]


def _all_reduce(problem: Problem) -> list[tuple[str, str]]:
    ways = [("two_shot", "any size")]
    if problem.message_bytes <= ONE_SHOT_ALL_REDUCE_MAX_BYTES:
        ways.insert(0, ("one_shot", f"at most {ONE_SHOT_ALL_REDUCE_MAX_BYTES // KIB} KiB"))
    most = _sentinel_most(problem, SENTINEL_MAX_BYTES_OF_TWO)
    if problem.message_bytes <= most:
        ways.insert(0, ("sentinel", f"at most {most // KIB} KiB"))
    return ways


def _sentinel_most(problem: Problem, between_two: int) -> int:
    """Bytes of a message that are best sent without flags."""
    return between_two if problem.world_size == 2 else SENTINEL_MAX_BYTES


def _one_launch_norm(problem: Problem, topology: Topology) -> list[Plan]:
    of_decode = problem.op != "all_reduce_add_rms_norm" and 0 < problem.M <= DECODE_FIRST_MAX_M
    if of_decode and why_not(Plan("decode"), problem, topology) is None:
        return []  # a norm behind it: N=4096 K=7168 M=16 22.9 us, and 24.2 of cuBLAS, then sum and norm in one
    most_sentinel = _sentinel_most(problem, SENTINEL_NORM_MAX_BYTES_OF_TWO)
    ways = [("sentinel_norm", most_sentinel), ("one_shot_norm", ONE_SHOT_NORM_MAX_BYTES)]
    if topology.backend == "interp":
        ways = [("one_shot_norm", INTERP_ONE_SHOT_MAX_BYTES)]
    unfused = "" if problem.op == "all_reduce_add_rms_norm" else "unfused_"
    why = "at most {} KiB: sum and norm in one launch"
    return [Plan(unfused + name, why=why.format(most // KIB)) for name, most in ways if problem.message_bytes <= most]


def _interp_gemm_all_reduce(problem: Problem) -> list[tuple[str, str]]:
    return _interp_gemm(problem, "two_shot")


def _interp_gemm_reduce_scatter(problem: Problem) -> list[tuple[str, str]]:
    return _interp_gemm(problem, "push")


def _interp_gemm(problem: Problem, name: str) -> list[tuple[str, str]]:
    any_size = (name, "interpreter, any size")
    if problem.M > INTERP_ONE_SHOT_MAX_M:
        return [any_size]
    return [("one_shot", f"interpreter, M <= {INTERP_ONE_SHOT_MAX_M}"), any_size]


def _interp_all_reduce(problem: Problem) -> list[tuple[str, str]]:
    two_shot = ("two_shot", "interpreter, any size")
    if problem.message_bytes > INTERP_ONE_SHOT_MAX_BYTES:
        return [two_shot]
    return [("one_shot", f"interpreter, at most {INTERP_ONE_SHOT_MAX_BYTES // KIB} KiB"), two_shot]


_CUDA_RULES = {
    "gemm_all_reduce": _gemm_all_reduce,
    "gemm_reduce_scatter": _gemm_reduce_scatter,
    "all_reduce": _all_reduce,
}
_INTERP_RULES = {
    "gemm_all_reduce": _interp_gemm_all_reduce,
    "gemm_reduce_scatter": _interp_gemm_reduce_scatter,
    "all_reduce": _interp_all_reduce,
}


# ---- filling in


def _forced(problem: Problem, topology: Topology, table: Table | None, forced: str) -> Plan:
    texts = forced.split(";")
    plans = [Plan.parse(text) for text in texts]
    plan = next((plan for plan in plans if plan.name in PLAN_NAMES[problem.op]), plans[0])
    rest = None
    if topology.inside:
        plan = next((named for named in plans if named.name == "two_level"), plan)
        rest = ";".join(text for text, named in zip(texts, plans, strict=True) if named is not plan)
    reason = why_not(plan, problem, topology)
    if reason:
        beside = " The plan inside a node stands beside it: 'two_level;push'." if topology.inside else ""
        raise InvalidInput(
            f"{problem.op}: the forced plan {str(plan)!r} cannot run M={problem.M}, N={problem.N}, K={problem.K}, "
            f"{problem.dtype}, world_size={problem.world_size} on backend {topology.backend!r}: {reason}. "
            f"Force one of {', '.join(runnable(problem, topology))}, or none (force_plan(None), unset TP_OVERLAP_PLAN)."
            f"{beside}"
        )
    return _complete(dataclasses.replace(plan, why="forced"), problem, topology, table, rest)


def _complete(
    plan: Plan, problem: Problem, topology: Topology, table: Table | None = None, forced: str | None = None
) -> Plan:
    """forced: of the plan inside a node."""
    if plan.name == "two_level" and topology.inside:
        inside = problem.inside(topology.inside.world_size)
        return dataclasses.replace(plan, inside=select(inside, topology.inside, table, forced) if inside else None)
    served = _served(plan.name, problem)
    return plan.with_defaults(default_params(plan.name, served, topology, dict(plan.params)))
