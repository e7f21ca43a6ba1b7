"""What the tuner tries: plan specs of each op, with the range of M they are worth trying at.

A spec here is a guess worth a measurement, not a promise: one that the library refuses, that does not fit a shared
memory, or that is wrong is dropped where it is tried.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from tp_overlap_kernels.dispatch.defaults import plan_of_kernel
from tp_overlap_kernels.dispatch.problem import Plan

from .cases import ALL_REDUCE, ALL_REDUCE_NORM, GEMM_ALL_REDUCE, GEMM_ALL_REDUCE_NORM, GEMM_REDUCE_SCATTER, Case

ANY = 1 << 30


@dataclass(frozen=True)
class Candidate:
    """A plan spec as `force_plan` reads it, for least_M <= M <= most_M and at most `most_ranks` ranks."""

    spec: str
    least_M: int = 1
    most_M: int = ANY
    most_ranks: int = ANY

    def suits(self, case: Case) -> bool:
        return self.least_M <= case.M <= self.most_M and case.world_size <= self.most_ranks


def _tiles(name: str, tile: Sequence[int], stagger_ns: int | None = None) -> str:
    """tile: block_m, block_n, block_k, num_stages, num_warps, group_m."""
    names = ("block_m", "block_n", "block_k", "num_stages", "num_warps", "group_m")
    late = "" if stagger_ns is None else f",stagger_ns={stagger_ns}"
    return f"{name}:" + ",".join(f"{key}={value}" for key, value in zip(names, tile, strict=True)) + late


# Decode: a block owns block_n columns over all of K. Narrow blocks fill the GPU, deep stages keep memory busy.
_ONE_SHOT = (  # block_m, block_n, block_k, num_stages, num_warps, least M, most M
    (16, 64, 128, 4, 4, 1, 16),
    (16, 64, 256, 4, 4, 1, 16),
    (16, 32, 256, 4, 4, 1, 16),
    (16, 32, 128, 6, 4, 1, 16),
    (64, 64, 128, 4, 4, 17, 256),
    (64, 64, 64, 6, 4, 17, 64),
    (64, 32, 128, 6, 4, 17, 64),
    (128, 64, 64, 4, 4, 65, 512),
    (128, 128, 64, 4, 8, 65, 1024),
)

# Prefill: 128 x 256 is the tile of the best plain GEMM; smaller ones where it leaves SMs idle. The stagger is the
# link's time for a tile (187 ns for 128 x 256), less where the last wave matters more, more where links are slow.
_STAGED = (  # block_m, block_n, block_k, num_stages, num_warps, group_m, staggers, least M, most M
    (128, 256, 64, 3, 8, 8, (1, 93, 187), 512, 2047),
    (128, 256, 64, 3, 8, 8, (93, 187, 280), 2048, ANY),
    (128, 128, 64, 4, 8, 8, (1, 46, 93), 128, 1024),
    (64, 256, 64, 4, 8, 8, (1, 46, 93), 128, 512),
    (64, 128, 64, 4, 4, 8, (1, 46), 65, 256),
)
_SCATTER_FEW = ((64, 64, 128, 4, 4, 65, 128),)  # a rank's share is a part of these rows
# The CUDA kernels for Hopper, own tiles last or among the others: behind a wave of each peer's, or half of one. Tiles
# are sent whole, by as many blocks at a time as fill the link; or in small pieces by all, or in larger ones by turns,
# which delays products less where they take longer than the link.
_WHOLE, _BY_TURNS, _PIECES = 65536, 24, (512, 0)
_PAIR, _ROW = (2, 1), (1, 2)  # rows and columns of blocks in a cluster
_SM90 = {  # columns of a tile, staging buffers, cluster, lead, bytes of a piece, senders, least M
    GEMM_ALL_REDUCE: (
        (128, 1, _PAIR, 0, _WHOLE, _BY_TURNS, 256),
        (128, 1, _PAIR, 66, _WHOLE, _BY_TURNS, 256),
        (128, 1, _PAIR, 66, _WHOLE, 32, 512),
        (128, 1, _PAIR, 66, 2048, _BY_TURNS, 512),
        (128, 1, _PAIR, 66, *_PIECES, 256),
        (128, 2, _PAIR, 66, _WHOLE, _BY_TURNS, 1024),
        (256, 1, _PAIR, 0, 2048, 32, 1024),
        (256, 1, _PAIR, 33, _WHOLE, 16, 2048),
        (256, 1, _PAIR, 33, 2048, 32, 1024),
        (256, 1, _PAIR, 66, _WHOLE, 16, 1024),
        (256, 1, _PAIR, 66, 2048, 32, 1024),
        (256, 1, _PAIR, 66, *_PIECES, 2048),
    ),
    GEMM_REDUCE_SCATTER: (
        (128, 1, _PAIR, 0, *_PIECES, 256),
        (128, 1, _PAIR, 66, _WHOLE, _BY_TURNS, 256),
        (128, 2, _PAIR, 0, _WHOLE, _BY_TURNS, 256),
        (128, 2, _PAIR, 0, 2048, _BY_TURNS, 512),
        (128, 2, _PAIR, 66, _WHOLE, _BY_TURNS, 512),
        (64, 2, _ROW, 0, _WHOLE, 48, 128),
        (64, 2, _ROW, 0, *_PIECES, 128),
        (128, 2, _ROW, 0, _WHOLE, _BY_TURNS, 128),
        (256, 1, _PAIR, 66, _WHOLE, 16, 1024),
        (256, 1, _PAIR, 66, 2048, 32, 1024),
        (256, 1, _PAIR, 66, *_PIECES, 2048),
    ),
}
# The same between two ranks, where the L2 cache adds. An all-reduce has no lead: what is given says nothing.
_SM90_ADD = {
    GEMM_ALL_REDUCE: (
        (128, 1, _PAIR, 66, _WHOLE, _BY_TURNS, 256),
        (128, 1, _PAIR, 66, _WHOLE, 32, 512),
        (128, 1, _PAIR, 66, 2048, _BY_TURNS, 256),
        (128, 1, _PAIR, 66, *_PIECES, 256),
        (256, 1, _PAIR, 66, _WHOLE, 16, 2048),
        (256, 1, _PAIR, 66, 2048, 32, 1024),
    ),
    GEMM_REDUCE_SCATTER: (
        (128, 2, _PAIR, 0, _WHOLE, _BY_TURNS, 512),
        (128, 2, _PAIR, 66, _WHOLE, _BY_TURNS, 512),
        (128, 2, _PAIR, 66, _WHOLE, 32, 1024),
        (128, 2, _PAIR, 66, 2048, _BY_TURNS, 1024),
        (256, 1, _PAIR, 0, 2048, 32, 1024),
        (256, 1, _PAIR, 66, _WHOLE, 16, 2048),
    ),
}
_CHUNKS = ((2, 1), (2, 2), (2, 4), (4, 4))  # of the peer's rows, of the own rows


def _one_shot() -> list[Candidate]:
    return [Candidate(_tiles("one_shot", (*tile, 1)), least, most) for *tile, least, most in _ONE_SHOT]


def _decode() -> list[Candidate]:
    """Tiles of 64 or 128 rows of the weight, and K in as many parts as give every SM a block at N=4096 and 8192.

    With stages for two blocks an SM, so that the next call's first loads find room; for more rows of a, also with as
    many as one block can have.
    """
    narrow = [Candidate(f"decode:block_n=64,splits={splits}", most_M=128) for splits in (1, 2)]
    wide = [Candidate(f"decode:block_n=128,splits={splits}", most_M=64) for splits in (2, 4)]
    deep = [Candidate(f"decode:block_n=64,splits={splits},num_stages=12", 17, 64) for splits in (1, 2)]
    deep += [Candidate(f"decode:block_n=128,splits={splits},num_stages=8", 17, 64) for splits in (2, 4)]
    return [*narrow, *wide, *deep]


def _staged(name: str) -> list[Candidate]:
    return [
        Candidate(_tiles(name, tile, stagger), least, most)
        for *tile, staggers, least, most in _STAGED
        for stagger in staggers
    ]


def _sm90(op: str) -> list[Candidate]:
    """One for each row of _SM90 and _SM90_ADD."""
    found = []
    for name, rows in (("sm90", _SM90[op]), ("sm90_add", _SM90_ADD[op])):
        for cols, stagings, (down, across), lead, piece, senders, least in rows:
            link = (("group_m", 8), ("lead", lead), ("piece", piece), ("senders", senders))
            plan = Plan(name, (*plan_of_kernel(name, (cols, stagings, down, across)).params, *link))
            found.append(Candidate(str(plan), least, most_ranks=2 if name == "sm90_add" else ANY))
    return found


def _chunked() -> list[Candidate]:
    return [Candidate(f"chunked:chunks={c},own_chunks={own}", 2048, most_ranks=2) for c, own in _CHUNKS]


CANDIDATES: dict[str, list[Candidate]] = {
    GEMM_ALL_REDUCE: [
        *_one_shot(),
        *_staged("two_shot"),
        *_sm90(GEMM_ALL_REDUCE),
        *_chunked(),
        Candidate("unfused_one_shot", most_M=1024),
        Candidate("unfused_two_shot", least_M=64),
        *_decode(),
        Candidate("unfused_sentinel", most_M=512),
        Candidate("unfused_nccl"),
    ],
    GEMM_REDUCE_SCATTER: [
        *_one_shot(),
        *(Candidate(_tiles("push", (*tile, 1), 1), least, most) for *tile, least, most in _SCATTER_FEW),
        *_staged("push"),
        *_sm90(GEMM_REDUCE_SCATTER),
        *_chunked(),
        Candidate("unfused_push"),
        Candidate("unfused_sentinel", most_M=1024),
        Candidate("unfused_nccl"),
    ],
    ALL_REDUCE: [Candidate("one_shot"), Candidate("two_shot"), Candidate("sentinel"), Candidate("nccl")],
}
CANDIDATES[ALL_REDUCE_NORM] = [Candidate("one_shot_norm"), Candidate("sentinel_norm"), *CANDIDATES[ALL_REDUCE]]
CANDIDATES[GEMM_ALL_REDUCE_NORM] = [
    Candidate("unfused_one_shot_norm", most_M=1024),
    Candidate("unfused_sentinel_norm", most_M=64),
    *CANDIDATES[GEMM_ALL_REDUCE],
]


def candidates(case: Case) -> list[str]:
    """Specs to try for a case, each once."""
    return list(dict.fromkeys(each.spec for each in CANDIDATES[case.op] if each.suits(case)))
