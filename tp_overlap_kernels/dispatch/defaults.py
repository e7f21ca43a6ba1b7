"""(plan name, Problem, Topology) -> the parameters that nobody gave: tiles, stages, and how kernels share the link.

2 x H200, bf16, CUDA graphs. What was measured for a shape stands in its table and comes before these.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .problem import Plan, Problem, Topology

# Large M. Stock Triton on H200: within 3 % of cuBLAS on nearly the whole grid.
TILES_LARGE_M = {"block_m": 128, "block_n": 256, "block_k": 64, "num_stages": 3, "num_warps": 8, "group_m": 8}
# The same where 128 x 256 tiles would leave SMs idle (N=4096, M=512).
TILES_FEW = {"block_m": 128, "block_n": 128, "block_k": 64, "num_stages": 4, "num_warps": 8, "group_m": 8}
FEW_TILES = 128  # SMs of an H100 or H200 (132), a little less so that a grid just short of full still takes large tiles
# Decode: a block owns BLOCK_N columns over the whole of K. 64 columns give 128 blocks at N=8192, 32 at N=4096.
TILES_SMALL_M = {"block_k": 128, "num_stages": 4, "num_warps": 4, "group_m": 1}
# Interpreter: small enough that small shapes have several tiles.
TILES_INTERP = {"block_m": 32, "block_n": 32, "block_k": 32, "num_stages": 2, "num_warps": 4, "group_m": 2}
TILED = ("one_shot", "two_shot", "push")

# The CUDA decode kernel: as many blocks as there are SMs, or a few less. Above 32 rows of a, tiles of 128 rows of b:
# every tile reads a again, which is then at most a third of what comes out of L2. By a model; not measured.
DECODE_WIDE_TILE_MIN_M, DECODE_SMS = 33, 132
DECODE_MIN_K = 256  # of a part: four stages

# The CUDA kernels for Hopper that there are, by plan and op: columns of a tile, buffers on the way to peers (more have
# no room), rows and columns of blocks in a cluster. sm90_add: between two ranks, the L2 cache adds.
_KERNELS_SM90 = ((128, 1, 2, 1), (128, 2, 2, 1), (256, 1, 2, 1))
KERNELS_SM90 = {
    ("sm90", "gemm_all_reduce"): _KERNELS_SM90,
    ("sm90", "gemm_reduce_scatter"): (*_KERNELS_SM90, (128, 2, 1, 2), (64, 2, 1, 2)),
    ("sm90_add", "gemm_all_reduce"): ((128, 1, 2, 1), (256, 1, 2, 1)),
    ("sm90_add", "gemm_reduce_scatter"): ((128, 2, 2, 1), (256, 1, 2, 1)),
}
SM90_PLANS = ("sm90", "sm90_add")
KERNEL_PARAMS_SM90 = ("block_n", "stagings", "cluster_m", "cluster_n")
# Tiles of each peer before the first own one: one wave of 66 pairs of blocks. So many blocks send at a time as fill the
# link: with fewer it runs dry (12 of 128 columns: half as fast), with more their tiles all come late. Wide tiles, whose
# products are long, go in pieces: behind a whole one the loads of the next product would wait.
SM90 = {"group_m": 8, "lead": 66, "cluster_m": 2, "cluster_n": 1}
TURNS_SM90 = {  # by columns of a tile
    64: {"piece": 65536, "senders": 48},
    128: {"piece": 65536, "senders": 24},
    256: {"piece": 2048, "senders": 32},
}
# Tiles of 256 columns from so many elements of the sum on: they leave the last wave emptier, and a partial is later by
# as much as its product takes longer; but they take less power, at whose limit long products run. A reduce-scatter's
# block pushes while the next product goes on, a second buffer between them; where products are long, wide tiles hide as
# much. N=8192 K=4096: RS M=1024 104 us against 109; AR M=4096, under load, 467 against 514.
SM90_WIDE_MIN_ELEMENTS = {"gemm_all_reduce": 4096 * 8192, "gemm_reduce_scatter": 1024 * 8192}
SM90_WIDE_MIN_K = 3072
# Where the L2 cache adds, no product waits for a partial, but the last wave's are on the link longer. N=8192 K=4096,
# AR, under load: M=1024 117 by 128 columns; M=2048 233 and 234; M=4096 463 and 443.
SM90_ADD_WIDE_MIN_ELEMENTS = 2048 * 8192
SM90_STAGINGS = {"gemm_all_reduce": 1, "gemm_reduce_scatter": 2}  # of narrower tiles

# Two chunks each for the peer's and the own rows: the best of 1, 2 and 4 nearly everywhere.
CHUNKS = {"chunks": 2, "own_chunks": 2}

NOTHING: Mapping[str, int] = MappingProxyType({})


def plan_of_kernel(name: str, kernel: tuple[int, ...]) -> Plan:
    """The plan that names one of KERNELS_SM90, all else left open."""
    return Plan(name, tuple(zip(KERNEL_PARAMS_SM90, kernel, strict=True)))


def default_params(
    name: str, problem: Problem, topology: Topology, given: Mapping[str, int] = NOTHING
) -> dict[str, int]:
    """All parameters of plan `name`, fitted to the shape and to those that are given."""
    if name == "chunked":
        return CHUNKS
    if name == "decode":
        return _decode(problem)
    if name in SM90_PLANS:
        return _sm90(name, problem, given.get("block_n"))
    if problem.op == "all_reduce" or name not in TILED:
        return {}
    if topology.backend == "interp":
        return TILES_INTERP
    if name == "one_shot":
        block_m = 16 if problem.M <= 16 else 32 if problem.M <= 32 else 64
        # 128 for a vocabulary: the one-shot pad has flags for 2048 tiles.
        block_n = 32 if problem.N <= 4096 else 64 if problem.N <= 65536 else 128
        return TILES_SMALL_M | {"block_m": block_m, "block_n": block_n}
    large = TILES_LARGE_M
    tiles = -(-problem.M // large["block_m"]) * -(-problem.N // large["block_n"])
    return large if tiles >= FEW_TILES else TILES_FEW


def _decode(problem: Problem) -> dict[str, int]:
    """Tiles of the weight's rows, and in how many parts K is split so that there is a block for every SM."""
    block_n = 128 if DECODE_WIDE_TILE_MIN_M <= problem.M <= 64 else 64
    tiles = -(-problem.N // block_n)
    splits = 1
    while splits < 8 and 2 * splits * tiles <= DECODE_SMS and problem.K >= 2 * splits * DECODE_MIN_K:
        splits *= 2
    return {"block_n": block_n, "splits": splits}


def _sm90(name: str, problem: Problem, block_n: int | None) -> dict[str, int]:
    op, adds = problem.op, name == "sm90_add"
    least = SM90_ADD_WIDE_MIN_ELEMENTS if adds else SM90_WIDE_MIN_ELEMENTS[op]
    wide = problem.M * problem.N >= least and problem.K >= SM90_WIDE_MIN_K
    block_n = block_n or (256 if wide else 128)
    stagings = SM90_STAGINGS[op] if block_n < 256 else 1
    lead = -(-SM90["lead"] // (problem.world_size - 1))
    if adds and block_n == 256:
        lead = 0
    turns = TURNS_SM90.get(block_n, {"piece": 65536, "senders": 0})
    if adds and problem.K >= SM90_WIDE_MIN_K:
        turns = turns | {"piece": 2048}
    return SM90 | {"block_n": block_n, "stagings": stagings, "lead": lead} | turns
