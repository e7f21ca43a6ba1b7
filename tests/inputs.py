"""What each rank holds, from (case, rank, kind, call) alone: any process can make any rank's inputs again.

kind    normal    a ~ N(0, 1), b ~ N(0, 1/K): products of size 1
        integer   small integers; every partial and every sum of partials, in any order, is exact in the dtype.
                  Results are compared by bits
        tagged    the partial of rank r is +-tag(r) everywhere: `read_tags` tells from a wrong sum who is missing or
                  doubled. Signs differ from call to call, so that what an earlier call left behind does not pass
call    number of the call; the inputs of each are different
"""

from __future__ import annotations

import math
import zlib

import torch

from tests.cases import Case

# Integers up to here are exact.
EXACT_LIMIT = {torch.bfloat16: 2**8, torch.float16: 2**11}


def operands(
    case: Case, rank: int, kind: str = "normal", call: int = 0, device: str = "cpu"
) -> tuple[torch.Tensor, torch.Tensor]:
    """a: (M, K) and b: (N, K) of `rank`, contiguous, the same bits on every device."""
    a, b = _OPERANDS[kind](case, rank, call)
    return a.to(case.dtype).to(device), b.to(case.dtype).to(device)


def message(case: Case, rank: int, kind: str = "normal", call: int = 0, device: str = "cpu") -> torch.Tensor:
    """x: (N,) of `rank`, for all-reduce."""
    return _MESSAGES[kind](case, rank, call).to(case.dtype).to(device)


def bias(case: Case, call: int = 0, device: str = "cpu") -> torch.Tensor:
    """(N,), the same on every rank; small integers, so that it fits every kind."""
    return _integers(_generator(case, -1, call), (case.N,), 3).to(case.dtype).to(device)


def tag(rank: int, world_size: int) -> int:
    """What each element of a rank's tagged partial is, but for the sign. Base 4 keeps mistakes apart; with more
    than four ranks the sum would no longer be exact in bf16."""
    return (4 if world_size <= 4 else 2) ** rank


def read_tags(value: float, world_size: int, dtype: torch.dtype = torch.bfloat16) -> str:
    """What a wrong sum of tagged partials says, given with the sign that makes the right sum positive.

    A mistake may make a sum that dtype rounds; then several are named.
    """
    tags = [tag(rank, world_size) for rank in range(world_size)]
    mistakes = {"every rank once": 0}
    for rank, own in enumerate(tags):
        mistakes[f"rank {rank} is missing"] = -own
        mistakes[f"rank {rank} is there twice"] = own
        mistakes[f"the partial of rank {rank} is of another call"] = -2 * own
        for other, theirs in enumerate(tags):
            if other != rank:
                mistakes[f"rank {other} is there in place of rank {rank}"] = theirs - own
    sums = torch.tensor([float(sum(tags) + change) for change in mistakes.values()]).to(dtype).tolist()
    readings = [mistake for mistake, total in zip(mistakes, sums, strict=True) if total == value]
    return " or ".join(readings) or f"{value} fits no single mistake"


def _generator(case: Case, rank: int, call: int) -> torch.Generator:
    text = f"{case.M} {case.N} {case.K} {case.dtype} {case.world_size} {rank} {call}"
    return torch.Generator().manual_seed(zlib.crc32(text.encode()))


def _normal_operands(case: Case, rank: int, call: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = _generator(case, rank, call)
    a = torch.randn(case.M, case.K, generator=generator)
    return a, torch.randn(case.N, case.K, generator=generator) / math.sqrt(case.K)


def _integer_operands(case: Case, rank: int, call: int) -> tuple[torch.Tensor, torch.Tensor]:
    """a and b in -1, 0, 1; b so sparse where K is long that sum_r |p_r| stays below the limit (about six sigma)."""
    generator = _generator(case, rank, call)
    world_size = case.world_size
    sigma = 0.8 * EXACT_LIMIT[case.dtype] / (0.8 * world_size + 3.5 * math.sqrt(world_size))
    density = min(1.0, sigma**2 * 9 / 4 / max(1, case.K))
    a, b = _integers(generator, (case.M, case.K), 1), _integers(generator, (case.N, case.K), 1)
    return a, b * (torch.rand(case.N, case.K, generator=generator) < density)


def _tagged_operands(case: Case, rank: int, call: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Row m of a has one element, +-1, in column m % K; row n of b is +-tag throughout."""
    assert case.world_size <= 8, "the sum of the tags must be exact in bf16"
    signs = _generator(case, -2, call)
    a = torch.zeros(case.M, case.K)
    a[torch.arange(case.M), torch.arange(case.M) % case.K] = _signs(signs, case.M)
    return a, (_signs(signs, case.N) * tag(rank, case.world_size))[:, None].expand(case.N, case.K).contiguous()


def _integers(generator: torch.Generator, shape: tuple[int, ...], largest: int) -> torch.Tensor:
    return torch.randint(-largest, largest + 1, shape, generator=generator).float()


def _signs(generator: torch.Generator, count: int) -> torch.Tensor:
    return torch.randint(0, 2, (count,), generator=generator).float() * 2 - 1


_OPERANDS = {"normal": _normal_operands, "integer": _integer_operands, "tagged": _tagged_operands}
_MESSAGES = {
    "normal": lambda case, rank, call: torch.randn(case.N, generator=_generator(case, rank, call)),
    "integer": lambda case, rank, call: _integers(
        _generator(case, rank, call), (case.N,), EXACT_LIMIT[case.dtype] // case.world_size
    ),
    "tagged": lambda case, rank, call: _signs(_generator(case, -2, call), case.N) * tag(rank, case.world_size),
}
