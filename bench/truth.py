"""The float64 truth of a case, the tolerance it grants, and the check that comes before any time is printed.

A sample of rows (first, last, every owner's boundary rows and many between; all rows where M is small) is held against
float64 with a tolerance computed for each element. Where rows were left out, all elements are held against a float32
sum of torch's own products with a wider bound, so that a stale or missing tile anywhere is seen. Ranks that promise
equal bits are compared by a checksum of the bits.

    u   = finfo(dtype).eps / 2          u32 = 2**-24
    tol = (1 + 2**-6) * ( u * (sum_r |p_r| + |ref|)                              wire, last rounding
                        + 2 * (K_local + world_size) * u32 * sum_r |a_r| @ |w_r|.T )    accumulation

The 2 allows for units that truncate, the factor in front for products of small terms; fp16 adds world_size + 1 of its
smallest subnormals. A way that rounds at each of its W-1 additions has u * W * sum_r |p_r| as its first line.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

import torch

from .cases import GEMM_REDUCE_SCATTER, SUM_OF, Case
from .inputs import LayerInputs, MessageInputs
from .norm import EPS, norm_operands, wrong_norm
from .timing import Result

ALL_ROWS_UP_TO = 128
SAMPLED_ROWS = 72
ONCE, AT_EACH_HOP, PARTIAL = "once", "at each hop", "partial"  # where a way rounds; PARTIAL: the rank's own product
COLUMNS_A_STEP = 2048  # of the float64 products: bounds their memory
ROWS_A_STEP = 1024  # of the float32 sum


def sample_rows(M: int, world_size: int) -> list[int]:
    """Rows of the result to hold against float64. The same on all ranks."""
    if M <= ALL_ROWS_UP_TO:
        return list(range(M))
    owned = -(-M // world_size)
    edges = {0, M - 1}
    for rank in range(world_size):
        edges |= {rank * owned - 1, rank * owned, rank * owned + owned // 2}
    between = random.Random(M).sample(range(M), SAMPLED_ROWS)
    return sorted({row for row in edges if 0 <= row < M}.union(between))


@dataclass
class Reference:
    """float64 of some rows, for all columns. Each field is [rows, N]."""

    total: torch.Tensor  # sum over ranks of the partials
    magnitude: torch.Tensor  # sum over ranks of |partial|
    products: torch.Tensor  # sum over ranks of |a| @ |w|.T
    own: torch.Tensor  # this rank's partial
    own_products: torch.Tensor


def tolerance(reference: Reference, K_local: int, world_size: int, dtype: torch.dtype, rounding: str) -> torch.Tensor:
    """Per element, by the formula at the top of this file."""
    u, u32 = torch.finfo(dtype).eps / 2, 2.0**-24
    if rounding == PARTIAL:
        bound = u * reference.own.abs() + 2 * (K_local + 1) * u32 * reference.own_products
    else:
        wire = reference.magnitude * world_size
        if rounding == ONCE:
            wire = reference.magnitude + reference.total.abs()
        bound = u * wire + 2 * (K_local + world_size) * u32 * reference.products
    if dtype == torch.float16:
        bound = bound + (world_size + 1) * torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return bound * (1 + 2.0**-6)


class Truth:
    """The truth of one layer at one M, for every op and provider. Costs world_size GEMMs and a sample in float64."""

    def __init__(self, inputs: LayerInputs, M: int) -> None:
        self.M, self.world, self.dtype = M, inputs.world, inputs.dtype
        self.message = isinstance(inputs, MessageInputs)
        self.K_local = 0 if self.message else inputs.layer.K_local
        self.rows = torch.tensor(sample_rows(M, self.world.world_size), device=self.world.device)
        self.reference = self._reference(inputs)
        self.everything = None if len(self.rows) == M else self._everything(inputs)

    def _reference(self, inputs: LayerInputs) -> Reference:
        shape = (len(self.rows), inputs.layer.N)
        fields = [torch.zeros(shape, dtype=torch.float64, device=self.world.device) for _ in range(5)]
        total, magnitude, of_all, own, own_products = fields
        for rank in range(self.world.world_size):
            a64 = inputs.activation(rank)[self.rows].double()  # (S, K_local), or (S, N) of a message
            partial, product = products(a64, None if self.message else inputs.weight(rank, 0))
            total += partial
            magnitude += partial.abs()
            of_all += product
            if rank == self.world.rank:
                own[:], own_products[:] = partial, product
        return Reference(*fields)

    def _everything(self, inputs: LayerInputs) -> tuple[torch.Tensor, torch.Tensor]:
        """(sum[M, N] of torch's rounded partials, bound[M, N]) in float32; the bound covers this sum's error and that
        of either rounding. |a| @ |w|.T is replaced by what it cannot exceed, the product of the norms."""
        W, u, u32 = self.world.world_size, torch.finfo(self.dtype).eps / 2, 2.0**-24
        total = torch.zeros((self.M, inputs.layer.N), dtype=torch.float32, device=self.world.device)
        bound = torch.zeros_like(total)
        for rank in range(W):
            a = inputs.activation(rank)
            w = None if self.message else inputs.weight(rank, 0)
            w_norms = None if w is None else w.float().norm(dim=1)  # (N,)
            for first in range(0, self.M, ROWS_A_STEP):
                rows = slice(first, min(self.M, first + ROWS_A_STEP))
                partial = (a[rows] if w is None else a[rows] @ w.T).float()
                total[rows] += partial
                bound[rows] += u * (W + 2) * partial.abs()
                if w_norms is not None:
                    bound[rows] += 4 * (self.K_local + W) * u32 * torch.outer(a[rows].float().norm(dim=1), w_norms)
        if self.dtype == torch.float16:
            bound += 2 * (W + 1) * torch.finfo(self.dtype).smallest_normal * torch.finfo(self.dtype).eps
        return total, bound.mul_(1 + 2.0**-6)

    def wrong(self, out: Result, case: Case, rounding: str) -> str | None:
        """What is wrong with a result of this rank, or None; nothing is exchanged with the others.

        out: [M, N], or this rank's rows of it for a reduce-scatter, or (y, new_residual), each [M, N], where a norm
        follows the sum. `rounding` is one of the three names above.
        """
        if isinstance(out, torch.Tensor):
            return self._wrong_sum(out, case, rounding)
        y, new_residual = out
        residual, weight = norm_operands(case.layer, self.M, self.dtype, self.world.device)
        reason = self._wrong_sum(new_residual, case, rounding, residual)
        if reason is not None:
            return f"new_residual: {reason}"
        if y.shape != new_residual.shape or y.dtype != self.dtype:
            return f"y: got {y.dtype} {tuple(y.shape)}, want {self.dtype} {tuple(new_residual.shape)}"
        return wrong_norm(y, new_residual, weight, EPS, outside)

    def _wrong_sum(
        self, out: torch.Tensor, case: Case, rounding: str, residual: torch.Tensor | None = None
    ) -> str | None:
        """residual: what was added to the sum, in f32, with one rounding more."""
        if (case.op in SUM_OF) != (residual is not None) and rounding != PARTIAL:
            return "got one tensor, want (y, new_residual)"
        scattered = case.op == GEMM_REDUCE_SCATTER and rounding != PARTIAL
        first, end = case.owned_rows(self.world.rank) if scattered else (0, case.M)
        if tuple(out.shape) != (end - first, case.N) or out.dtype != self.dtype:
            return f"got {out.dtype} {tuple(out.shape)}, want {self.dtype} {(end - first, case.N)}"
        picked = ((self.rows >= first) & (self.rows < end)).nonzero()[:, 0]
        bound = tolerance(self.reference, self.K_local, self.world.world_size, self.dtype, rounding)[picked]
        want = (self.reference.own if rounding == PARTIAL else self.reference.total)[picked]
        rows = self.rows[picked]
        if residual is not None:
            want = want + residual[rows].double()
            bound = bound + of_one_more(want, self.dtype)
        reason = outside(out[rows - first].double(), want, bound, rows.tolist())
        if reason is None and self.everything is not None and rounding != PARTIAL:
            total, wide = self.everything
            for step in range(first, end, ROWS_A_STEP):
                part = slice(step, min(end, step + ROWS_A_STEP))
                got = out[part.start - first : part.stop - first].float()
                want, bound = total[part], wide[part]
                if residual is not None:
                    want = want + residual[part].float()
                    bound = bound + of_one_more(want, self.dtype)
                reason = reason or outside(got, want, bound, range(part.start, part.stop))
        return reason


def of_one_more(want: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """What an addition in f32 and one rounding to dtype may add to an error."""
    smallest = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps
    return (1 + 2.0**-6) * (torch.finfo(dtype).eps / 2 + 2.0**-23) * want.abs() + smallest


def products(a: torch.Tensor, w: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
    """(a @ w.T, |a| @ |w|.T) in float64, of a in float64; a message (w None) is its own partial, without a product."""
    if w is None:
        return a, torch.zeros_like(a)
    both = [torch.empty((a.shape[0], w.shape[0]), dtype=torch.float64, device=a.device) for _ in range(2)]
    for first in range(0, w.shape[0], COLUMNS_A_STEP):
        columns = slice(first, first + COLUMNS_A_STEP)
        w64 = w[columns].double()
        both[0][:, columns] = a @ w64.T
        both[1][:, columns] = a.abs() @ w64.abs().T
    return both[0], both[1]


def outside(got: torch.Tensor, want: torch.Tensor, bound: torch.Tensor, rows: list[int] | range) -> str | None:
    """A sentence on the elements further from `want` than `bound`; NaN counts as far."""
    bad = ~((got - want).abs() <= bound)
    count = int(bad.sum())
    if count == 0:
        return None
    excess = torch.where(bad, (got - want).abs().nan_to_num(nan=torch.inf) / bound, 0)
    row, column = divmod(int(excess.argmax()), got.shape[1])
    return (
        f"{count} of {got.numel()} checked elements are outside the tolerance; worst at row {rows[row]}, column "
        f"{column}: got {float(got[row, column]):.6g}, want {float(want[row, column]):.6g} "
        f"within {float(bound[row, column]):.2g}"
    )


def checksum(x: Result) -> tuple[int, ...]:
    """Two 64-bit sums over the bits of each tensor that equal ones share and others nearly never do."""
    if not isinstance(x, torch.Tensor):
        return tuple(part for tensor in x for part in checksum(tensor))
    words = x.contiguous().view(torch.int16).flatten()
    plain = weighted = 0
    for first in range(0, words.numel(), 1 << 22):
        part = words[first : first + (1 << 22)].long()
        # An odd factor a position, so that a swap of two elements is seen.
        factors = torch.arange(first, first + part.numel(), device=x.device) * 2 + 1
        plain += int(part.sum())
        weighted += int((part * factors * 0x9E3779B1).sum())
    return plain, weighted & 0xFFFFFFFFFFFFFFFF
