"""What the tuner tries: plan specs of each op, with the range of M they are worth trying at.

A spec here is a guess worth a measurement, not a promise: one that the library refuses, that does not fit a shared
memory, or that is wrong is dropped where it is tried.
"""

from __future__ import annotations

from dataclasses import dataclass

from .cases import ALL_REDUCE, GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, Case

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


def _tiles(name: str, m: int, n: int, k: int, stages: int, warps: int, group_m: int) -> str:
    return f"{name}:block_m={m},block_n={n},block_k={k},num_stages={stages},num_warps={warps},group_m={group_m}"


# Decode: a block owns block_n columns over all of K. Narrow blocks fill the GPU, deep stages keep memory busy.
_DECODE_TILES = (  # block_n, block_k, num_stages, num_warps
    (64, 128, 4, 4),
    (64, 64, 6, 4),
    (64, 256, 3, 4),
    (32, 128, 6, 4),
    (32, 256, 4, 4),
    (128, 64, 5, 4),
    (128, 128, 3, 8),
    (64, 128, 4, 8),
)
_DECODE_ROWS = ((16, 1, 16), (32, 17, 32), (64, 1, 256), (128, 65, 256))  # block_m, tried from M to M

# Prefill. 128 x 256 is the tile of the best plain GEMM; smaller ones where it leaves SMs idle.
_PREFILL_TILES = (  # block_m, block_n, block_k, num_stages, num_warps, group_m, least M
    (128, 256, 64, 3, 8, 8, 256),
    (128, 256, 64, 4, 8, 8, 256),
    (128, 256, 64, 3, 8, 16, 1024),
    (256, 128, 64, 3, 8, 8, 512),
    (128, 128, 64, 4, 8, 8, 65),
    (128, 128, 64, 4, 4, 8, 65),
    (128, 128, 128, 3, 8, 8, 65),
    (64, 256, 64, 4, 8, 8, 65),
    (64, 128, 64, 5, 4, 8, 17),
    (64, 64, 128, 4, 4, 8, 17),
)
_SCATTER_DECODE_TILES = (  # as above; a rank's share is a part of these rows
    (16, 64, 128, 4, 4, 1),
    (16, 32, 256, 4, 4, 1),
    (32, 64, 128, 4, 4, 1),
    (64, 32, 128, 5, 4, 1),
)
_CHUNKS = ((1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4))  # of the peer's rows, of the own rows


def _decode(name: str) -> list[Candidate]:
    return [
        Candidate(_tiles(name, block_m, n, k, stages, warps, 1), least_M, most_M)
        for block_m, least_M, most_M in _DECODE_ROWS
        for n, k, stages, warps in _DECODE_TILES
    ]


def _prefill(name: str) -> list[Candidate]:
    return [Candidate(_tiles(name, *numbers), least_M) for *numbers, least_M in _PREFILL_TILES]


def _chunked() -> list[Candidate]:
    return [Candidate(f"chunked:chunks={c},own_chunks={own}", 512, most_ranks=2) for c, own in _CHUNKS]


CANDIDATES: dict[str, list[Candidate]] = {
    GEMM_ALL_REDUCE: [
        Candidate("one_shot", most_M=256),
        *_decode("one_shot"),
        Candidate("two_shot", least_M=17),
        *_prefill("two_shot"),
        *_chunked(),
        Candidate("unfused_one_shot", most_M=512),
        Candidate("unfused_two_shot"),
        Candidate("unfused_sentinel", most_M=256),
        Candidate("unfused_symm_mem_two_shot"),
        Candidate("unfused_nccl"),
    ],
    GEMM_REDUCE_SCATTER: [
        Candidate("push"),
        *(Candidate(_tiles("push", *numbers), most_M=64) for numbers in _SCATTER_DECODE_TILES),
        *_prefill("push"),
        *_chunked(),
        Candidate("unfused_push"),
        Candidate("unfused_nccl"),
    ],
    ALL_REDUCE: [Candidate("one_shot"), Candidate("two_shot"), Candidate("sentinel"), Candidate("nccl")],
}


def candidates(case: Case) -> list[str]:
    """Specs to try for a case, each once."""
    return list(dict.fromkeys(each.spec for each in CANDIDATES[case.op] if each.suits(case)))
