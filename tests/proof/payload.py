"""Data of a call that follow from its number, and what the result must be, both as views of tables on the device.

A table T of small integers; call number n reads it from an offset of its own. Rank r gives tag(r) * T: as x, or as a,
where each row of b holds a single one, so that a @ b.T repeats the columns of a. Every sum is exact in any order, and
the right result is a view of sum_r tag(r) * T: a call costs no truth, only a comparison, and no two calls of a run
have the same data. What an earlier call left behind differs nearly everywhere; what one rank lacks, everywhere but at
zeros.
"""

from __future__ import annotations

import contextlib
import dataclasses
import random

import torch

import tp_overlap_kernels as tpo
from tests import inputs
from tests.ops.calls import CPU_PLANS, group_name
from tests.proof import ranks

STEP = 40503  # odd: successive calls read far apart, and none twice in a power of two of calls
ALIGNED_ELEMS = 8  # offsets are multiples of 16 bytes


@dataclasses.dataclass(frozen=True)
class Row:
    """One call but for its data. all_reduce: N elements, M = 1, K = 0. K divides N, or N is at most K."""

    op: str
    plan: str
    M: int
    N: int
    K: int
    dtype: torch.dtype

    @property
    def read_elems(self) -> int:
        """Elements of a or x."""
        return self.N if self.op == "all_reduce" else self.M * self.K

    def rows_of(self, rank: int, world_size: int) -> slice:
        """What `rank` gets of the M rows."""
        if self.op != "gemm_reduce_scatter":
            return slice(0, self.M)
        height = -(-self.M // world_size)
        return slice(min(self.M, rank * height), min(self.M, (rank + 1) * height))


@dataclasses.dataclass(frozen=True)
class Sizes:
    """M, N, K of GEMMs and elements of sums, and those of them that run in fp16 too.

    Few, since a kernel is compiled anew for other tiles and where another size divides by 16.
    """

    gemms: tuple[tuple[int, int, int], ...]
    sums: tuple[int, ...]
    in_fp16: tuple[tuple[int, int, int] | int, ...] = ()


SIZES = {
    # one row; fewer rows than ranks; whole tiles, few and many; ragged ones
    "cuda": Sizes(
        ((1, 128, 64), (3, 72, 72), (16, 1024, 128), (33, 41, 72), (300, 1024, 128)),
        (8, 1001, 4096, 65_536),
        ((16, 1024, 128), (33, 41, 72), 1001),
    ),
    "cpu": Sizes(((1, 32, 16), (3, 24, 24), (40, 64, 32)), (7, 2100), ((3, 24, 24), 7)),
}
FEW_SIZES = {
    "cuda": Sizes(((16, 1024, 128), (300, 1024, 128)), (1001, 65_536)),
    "cpu": Sizes(((3, 24, 24), (40, 64, 32)), (7, 2100)),
}
DTYPES = (torch.bfloat16, torch.float16)


def rows(sizes: Sizes, with_nccl: bool = False) -> list[Row]:
    """Every op with one result, every plan and size that this group can run."""
    made = []
    for op in CPU_PLANS:
        for size in sizes.sums if op == "all_reduce" else sizes.gemms:
            M, N, K = (1, size, 0) if isinstance(size, int) else size
            for dtype in DTYPES if size in sizes.in_fp16 else DTYPES[:1]:
                made += [Row(op, plan, M, N, K, dtype) for plan in ranks.plans(op, M, N, K, dtype, with_nccl)]
    return made


class Tables:
    """T, on this rank's device: what the rank gives of it, and the sum over the ranks."""

    def __init__(self, rank: int, world_size: int, device: torch.device, rows: list[Row], count: int, seed: int = 0):
        self.rank, self.world_size, self.device = rank, world_size, device
        self.positions = 1 << max(0, count - 1).bit_length()
        tags = [inputs.tag(each, world_size) for each in range(world_size)]
        largest = inputs.EXACT_LIMIT[torch.bfloat16] // sum(tags)
        length = self.positions * ALIGNED_ELEMS + max(row.read_elems for row in rows)
        drawn = torch.randint(-largest, largest + 1, (length,), generator=torch.Generator().manual_seed(seed))
        self.mine = {dtype: (drawn * tags[rank]).to(device, dtype) for dtype in DTYPES}
        self.sums = {dtype: (drawn * sum(tags)).to(device, dtype) for dtype in DTYPES}
        self._weights: dict[tuple, torch.Tensor] = {}

    def offset(self, number: int) -> int:
        return number * STEP % self.positions * ALIGNED_ELEMS

    def given(self, row: Row, offset: int) -> torch.Tensor:
        """a or x, a view."""
        shape = (row.N,) if row.op == "all_reduce" else (row.M, row.K)
        return self.mine[row.dtype].as_strided(shape, (row.K, 1)[-len(shape) :], offset)

    def weight(self, row: Row) -> torch.Tensor | None:
        """b: (N, K), in row n a one in column n % K. None for all_reduce."""
        if row.op == "all_reduce":
            return None
        key = (row.N, row.K, row.dtype)
        if key not in self._weights:
            b = torch.zeros(row.N, row.K, dtype=row.dtype)
            b[torch.arange(row.N), torch.arange(row.N) % row.K] = 1
            self._weights[key] = b.to(self.device)
        return self._weights[key]

    def wanted(self, row: Row, offset: int) -> torch.Tensor:
        """The result that this rank must get, as a view of three dimensions: rows, repetitions, columns."""
        if row.op == "all_reduce":
            return self.sums[row.dtype].as_strided((1, 1, row.N), (0, 0, 1), offset)
        rows = row.rows_of(self.rank, self.world_size)
        columns = min(row.N, row.K)
        shape = (rows.stop - rows.start, row.N // columns, columns)
        return self.sums[row.dtype].as_strided(shape, (row.K, 0, 1), offset + rows.start * row.K)


def invoke(row: Row, given: torch.Tensor, weight: torch.Tensor | None) -> torch.Tensor:
    """The call, by its plan."""
    op = getattr(torch.ops.tp_overlap, row.op)
    with tpo.force_plan(row.plan):
        return op(given, group_name()) if weight is None else op(given, weight, group_name())


def count_wrong(out: torch.Tensor, wanted: torch.Tensor, into: torch.Tensor) -> None:
    """Write the number of wrong elements, on the device: NaN is wrong. into: one int64."""
    torch.sum(torch.ne(out.view(wanted.shape), wanted), (0, 1, 2), out=into)


class Eager:
    """Calls one after the other, each with its own data, each compared on the device; nobody waits for the device."""

    def __init__(self, tables: Tables, rows: list[Row], count: int):
        self.tables, self.rows = tables, rows
        self.wrong = torch.full((count,), -1, dtype=torch.int64, device=tables.device)  # elements, by call
        self.chosen: list[int] = []  # index of the row, by call
        self._written = [torch.empty_like(tables.given(row, 0)) for row in rows]

    def call(self, index: int) -> None:
        """The next call, with the row of this index."""
        number, row, tables = len(self.chosen), self.rows[index], self.tables
        offset = tables.offset(number)
        given = tables.given(row, offset)
        if number % 2:  # written just before the call, and again before the next one of this row
            given = self._written[index].copy_(given)
        self.chosen.append(index)
        count_wrong(invoke(row, given, tables.weight(row)), tables.wanted(row, offset), self.wrong[number])

    def failures(self, most: int = 5) -> list[str]:
        """Of the calls so far. Waits for the device."""
        wrong = self.wrong[: len(self.chosen)].tolist()
        return [
            f"rank {self.tables.rank}, call {number}: {elements} wrong elements, {self.rows[self.chosen[number]]}"
            for number, elements in enumerate(wrong)
            if elements
        ][:most]

    def mismatches(self) -> int:
        """Calls with a wrong element, or never compared."""
        return int((self.wrong[: len(self.chosen)] != 0).sum())


def sequence(rows: list[Row], count: int, seed: int) -> list[int]:
    """Indices of rows in random order, equal on all ranks. Plans of many launches come more rarely."""
    slow = ("chunked", "nccl", "unfused_nccl")
    weights = [0.2 if row.plan in slow else 1.0 for row in rows]
    return random.Random(seed).choices(range(len(rows)), weights, k=count)


@contextlib.contextmanager
def reporting(failures: list[str], rank: int):
    """An error of the library is a failure of the part, and not of its harness."""
    try:
        yield
    except tpo.TpOverlapError as error:
        failures.append(f"rank {rank}: {type(error).__name__}: {error}")
