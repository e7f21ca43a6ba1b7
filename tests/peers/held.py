"""One rank of a peer's case: its data, one call or several, and the comparison, at the source's tolerance and at ours.

Any device. All ranks come to one verdict before anyone raises, so that they stay in step.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch
import torch.distributed as dist

import tp_overlap_kernels as tpo
from tests import tolerance
from tests.cases import Case
from tests.ops.calls import Call, group_name, invoke
from tests.ops.judge import allowed
from tests.peers.cases import PeerCase
from tests.tolerance import Rounding
from tests.truth import Truth

EXACT = ("rank + 1", "0 to 15")


def operands(peer: PeerCase, case: Case, rank: int, device: str, call: int = 0) -> list[torch.Tensor]:
    """a (M, K) and b (N, K), or x (N,), of `rank`, from the source's distribution; others in every call."""
    seed = zlib.crc32(f"{peer} {rank} {call}".encode())
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> torch.Tensor:
        return torch.randn(sizes, generator=generator, device=device)

    if peer.data == "0 to 15":
        return [torch.randint(0, 16, (case.N,), generator=generator, device=device).to(case.dtype)]
    if peer.data == "rank + 1":
        pair = [torch.full((case.M, case.K), rank + 1.0, device=device), torch.ones(case.N, case.K, device=device)]
    elif peer.data == "uniform":
        pair = [torch.rand(n, case.K, generator=generator, device=device) for n in (case.M, case.N)]
    else:
        scales = {
            "normal": (1, 1),
            "a quarter": (0.25, case.K**-0.5),
            "a tenth": (0.1, 0.1),
            "flux": (0.01 * (rank + 1), 0.01 * (rank + 1)),
        }
        pair = [normal(n, case.K) * scale for n, scale in zip((case.M, case.N), scales[peer.data], strict=True)]
    return [x.to(case.dtype) for x in pair]


def truth(peer: PeerCase, case: Case, device: str, call: int = 0) -> Truth:
    """Float64, from the rounded inputs of all ranks."""
    partials, magnitude = [], 0.0
    for rank in range(case.world_size):
        first, *others = (x.double() for x in operands(peer, case, rank, device, call))
        partials.append(first @ others[0].T if others else first[None])
        magnitude = magnitude + (first.abs() @ others[0].abs().T if others else first.abs()[None])
    stacked = torch.stack(partials)
    return Truth(stacked.sum(0), stacked, magnitude, case.dtype, case.K)


def hold(peer: PeerCase, case: Case, plan: str, rank: int, device: str, calls: int = 3) -> None:
    """Calls in a row, with other data each, whose inputs are spoiled as soon as the op has returned; then judged."""
    names = Call(peer.op, case, plan=plan)
    outs = []
    with tpo.force_plan(plan):
        for call in range(calls):
            tensors = operands(peer, case, rank, device, call)
            outs.append(invoke(names, tensors, rank))
            for x in tensors:
                x.fill_(float("nan"))  # what was not read by now never will be
    agree(device, lambda: [judge(peer, case, plan, out, rank, device, call) for call, out in enumerate(outs)])


def judge(peer: PeerCase, case: Case, plan: str, out: torch.Tensor, rank: int, device: str, call: int) -> None:
    """With the unfused program at the source's tolerance; with float64 at ours, or by bits where all is exact."""
    wanted = truth(peer, case, device, call)
    rows = case.rows_of(rank) if peer.op == "gemm_reduce_scatter" else slice(None)
    part, what = wanted.rows(rows), f"{peer.source}: {peer}, {plan}, call {call}"
    out = out.reshape(part.ref.shape)
    # what the sources compare with: each rank's product in the dtype, then a collective
    unfused = part.partials.to(case.dtype).double().sum(0).to(case.dtype)
    close = {"rtol": peer.rtol, "atol": peer.atol, "msg": lambda text: f"{what}: {text}"}
    torch.testing.assert_close(out, unfused, **close)
    bound = ours(peer, case, plan, wanted)
    tolerance.check(out, part, bound[rows], what)


def ours(peer: PeerCase, case: Case, plan: str, wanted: Truth) -> torch.Tensor:
    """The computed bound; nothing, where partials and sums are integers that the dtype holds."""
    if peer.data in EXACT:
        wanted.exact()
        return torch.zeros_like(wanted.ref)
    if plan.startswith("chunked") or "nccl" in plan:
        return tolerance.tolerance(wanted, Rounding.EACH_HOP)
    return allowed(Call(peer.op, case), plan, wanted, torch.empty(0))[1]


def agree(device: str, question: Callable[[], object]) -> None:
    """Every rank waits for its calls and asks; if one's raises, all raise AssertionError."""
    text = ""
    try:
        if device != "cpu":
            torch.cuda.synchronize()
        tpo.check()
        question()
    except Exception as error:
        text = f"{type(error).__name__}: {error}"
    texts: list = [None] * dist.get_world_size()
    dist.all_gather_object(texts, text)
    assert not any(texts), "\n".join(f"rank {rank}: {text}" for rank, text in enumerate(texts) if text)


# --- cases that are more than a table's row


def layers_in_a_row(peers: list[PeerCase], plans: list[str], rank: int, world_size: int, device: str) -> None:
    """Shrinking and growing sums on one workspace, nobody synchronises; integers, so by bits."""
    outs = []
    for plan in plans:
        with tpo.force_plan(plan):
            for call, peer in enumerate(peers):
                x = operands(peer, peer.on(world_size, True), rank, device, call)[0]
                outs.append((peer, plan, call, torch.ops.tp_overlap.all_reduce(x, group_name())))
    agree(
        device,
        lambda: [
            judge(peer, peer.on(world_size, True), plan, out, rank, device, call) for peer, plan, call, out in outs
        ],
    )


def scattered_average(dim: int, sizes: tuple[int, ...], plan: str, rank: int, world_size: int, device: str) -> None:
    """PyTorch's fused matmul reduce-scatter: mean over ranks of A [B, M, K] @ W [K, N], split along any dimension.

    The dimension that is split becomes the rows of our op; for the last one the operands change places.
    """
    B, M, N, K = sizes
    both = []
    for source in range(world_size):
        generator = torch.Generator(device).manual_seed(42 + source)
        A = torch.rand(B, M, K, generator=generator, device=device).bfloat16()
        both.append((A, torch.rand(N, K, generator=generator, device=device).bfloat16()))
    A, W = both[rank]
    with tpo.force_plan(plan):
        if dim == 2:
            part = torch.ops.tp_overlap.gemm_reduce_scatter(W, A.view(-1, K), group_name())
            out = part.T.view(B, M, -1)
        else:
            part = torch.ops.tp_overlap.gemm_reduce_scatter(A.movedim(dim, 0).reshape(-1, K), W, group_name())
            others = [size for i, size in enumerate((B, M)) if i != dim]
            out = part.view(-1, *others, N).movedim(0, dim)
    mean = sum(a.double() @ w.double().T for a, w in both) / world_size
    expected = mean.chunk(world_size, dim)[rank]
    agree(device, lambda: torch.testing.assert_close((out / world_size).double(), expected, rtol=1e-2, atol=1e-2))
