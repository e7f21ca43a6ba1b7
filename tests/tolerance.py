"""How far from the truth a kernel may be, computed for each element from what the kernel rounds, never chosen.

    u   = finfo(dtype).eps / 2          u32 = 2**-24
    tol = (1 + 2**-6) * ( u * (roundings to the dtype, see `Rounding`)
                        + 2 * (K_local + world_size) * u32 * sum_r |a_r| @ |b_r|.T )        accumulation in f32

The 2 allows for units that truncate, the factor in front for products of small terms. fp16 adds world_size + 1 smallest
subnormals: below its normal range an error is no longer relative.
"""

from __future__ import annotations

import enum

import torch

from tests.truth import Truth

U32 = 2.0**-24


class Rounding(enum.Enum):
    """What a kernel's docstring promises under `Rounding:`, as the sum that multiplies u."""

    WIRE = "every partial once, then the sum"  # sum_r |p_r| + |ref|
    OWNER_F32 = "every partial but the owner's, then the sum"  # sum_(r != owner) |p_r| + |ref|
    F32 = "the sum only; partials travel as f32"  # |ref|
    EACH_HOP = "every partial, and the running sum at each hop"  # world_size * sum_r |p_r|; a ring, or NCCL


def tolerance(truth: Truth, rounding: Rounding = Rounding.WIRE, *, owner: torch.Tensor | None = None) -> torch.Tensor:
    """(rows, N) f64.

    owner: (rows,) int64, for OWNER_F32: the rank whose partial of that row is not rounded. For EACH_HOP a bias is added
    to the rounded sum, and the result rounded again.
    """
    world_size = truth.partials.shape[0]
    u = torch.finfo(truth.dtype).eps / 2
    sizes = truth.partials.abs()
    all_partials = sizes.sum(0) if truth.K_local else torch.zeros_like(truth.ref)  # inputs are not rounded again
    if rounding is Rounding.WIRE:
        rounded = all_partials + truth.ref.abs()
    elif rounding is Rounding.F32:
        rounded = truth.ref.abs()
    elif rounding is Rounding.EACH_HOP:
        rounded = all_partials + (world_size - 1) * sizes.sum(0) + truth.ref.abs()
    else:
        assert owner is not None, "OWNER_F32 needs the owner of each row"
        kept = torch.gather(sizes, 0, owner.view(1, -1, 1).expand(1, *truth.ref.shape)).squeeze(0)
        rounded = all_partials - kept + truth.ref.abs()
    accumulated = 2 * (truth.K_local + world_size) * U32 * truth.magnitude
    smallest = torch.finfo(torch.float16).smallest_normal * 2.0**-10 if truth.dtype == torch.float16 else 0.0
    return (1 + 2.0**-6) * (u * rounded + accumulated) + (world_size + 1) * smallest


def two_level(
    truth: Truth, rounding: Rounding, ranks_per_node: int, *, owner: torch.Tensor | None = None
) -> torch.Tensor:
    """(rows, N) f64, for a sum that is made in each node by `rounding`, and then across nodes one node after another.

    The sum of a node, with the bias that is not in a partial on the first, is rounded once on its way out, and the
    running sum with every further node: of n roundings none exceeds u times the nodes' sums in absolute value.
    owner: (rows,) int64, for OWNER_F32: by place within the node.
    """
    world_size = truth.partials.shape[0]
    u = torch.finfo(truth.dtype).eps / 2
    nodes = truth.partials.unflatten(0, (-1, ranks_per_node))  # (n, L, rows, N)
    sums = nodes.sum(1)
    sums[0] += truth.ref - truth.partials.sum(0)
    rounded = len(sums) * sums.abs().sum(0)
    if truth.K_local and rounding is not Rounding.F32:  # else what is sent inside a node is not rounded
        rounded = rounded + nodes.abs().sum((0, 1))
        if rounding is Rounding.OWNER_F32:
            assert owner is not None, "OWNER_F32 needs the owner of each row"
            place = owner.view(1, 1, -1, 1).expand(len(sums), 1, *truth.ref.shape)
            rounded = rounded - torch.gather(nodes.abs(), 1, place).sum((0, 1))
    accumulated = 2 * (truth.K_local + world_size) * U32 * truth.magnitude
    smallest = torch.finfo(torch.float16).smallest_normal * 2.0**-10 if truth.dtype == torch.float16 else 0.0
    return (1 + 2.0**-6) * (u * rounded + accumulated) + (world_size + 2 * len(sums)) * smallest


def check(out: torch.Tensor, truth: Truth, tol: torch.Tensor, what: str = "out") -> float:
    """Raises unless |out - truth| <= tol everywhere; returns the largest error in units of tol. NaN never passes."""
    assert out.shape == truth.ref.shape, f"{what}: shape {tuple(out.shape)}, wanted {tuple(truth.ref.shape)}"
    assert out.dtype == truth.dtype, f"{what}: {out.dtype}, wanted {truth.dtype}"
    out = out.to(truth.ref.device).double()
    error = (out - truth.ref).abs()
    bad = ~(error <= tol)  # not `error > tol`, which a NaN would pass
    if bad.any():
        first = tuple(bad.nonzero()[0].tolist())
        ratio = (error[first] / tol[first]).item()
        raise AssertionError(
            f"{what}: {int(bad.sum())} of {bad.numel()} elements are wrong, {int(out.isnan().sum())} of them NaN; "
            f"first at {list(first)}: got {out[first].item()!r}, truth {truth.ref[first].item()!r}, "
            f"error {error[first].item():.3g}, allowed {tol[first].item():.3g} ({ratio:.3g} times); "
            f"without rank r it would be {(truth.ref - truth.partials)[(slice(None), *first)].tolist()}"
        )
    return float((error / tol.clamp_min(torch.finfo(torch.float64).tiny)).max()) if error.numel() else 0.0


def check_bits(out: torch.Tensor, truth: Truth, what: str = "out") -> None:
    """For exact inputs: raises unless `out` is the truth to the last bit (0.0 and -0.0 are equal)."""
    check(out, truth, torch.zeros_like(truth.ref), what)
    truth.exact()


def check_bites(truth: Truth, tol: torch.Tensor) -> None:
    """Raises unless the bound is tight enough to notice that one rank's partial is missing, at most elements."""
    if not truth.ref.numel():
        return
    for rank, partial in enumerate(truth.partials):
        noticed = (partial.abs() > tol).double().mean().item()
        assert noticed > 0.5, f"a result without rank {rank} would pass at {1 - noticed:.0%} of the elements"
        try:
            check((truth.ref - partial).to(truth.dtype), truth, tol)
        except AssertionError:
            continue
        raise AssertionError(f"a result without rank {rank} passes")
