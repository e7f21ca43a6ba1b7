"""Other projects' cases at their own sizes, on devices: see tests/peers."""

from __future__ import annotations

import time

import torch

import tp_overlap_kernels as tpo
from tests.cases import Case
from tests.gpu.mixtures import plans_for
from tests.ops.calls import Call, group_name
from tests.peers import held
from tests.peers.cases import GEMMS, MAILBOX, SEQUENCES, SUMS, PeerCase, of_tokens

MAX_M, MAX_N = 8192, 8192
DEVICE = "cuda"


def _plans(peer: PeerCase, case: Case) -> list[str]:
    return plans_for(Call(peer.op, case)) if case.M and case.N else ["one_shot"]


def gemms_at_their_sizes(rank: int, world_size: int) -> None:
    """Three calls in a row by every plan, M of 28000 in chunks."""
    for peer in GEMMS:
        case = peer.on(world_size, original=True)
        if case.M > MAX_M:
            plans = [plan for plan in _plans(peer, case) if plan == "unfused_two_shot"]  # owners are those of the call
        else:
            plans = _plans(peer, case)
        for plan in plans:
            held.hold(peer, case, plan, rank, DEVICE)


def sums_at_their_sizes(rank: int, world_size: int) -> None:
    for peer in SUMS:
        for plan in _plans(peer, peer.on(world_size, original=True)):
            held.hold(peer, peer.on(world_size, original=True), plan, rank, DEVICE)


def sums_in_layers(rank: int, world_size: int) -> None:
    """SGLang's four layers and sixteen loops, without its synchronisation after each; vLLM's and FlashInfer's rows."""
    for sequence in (MAILBOX, SEQUENCES, [(n, 64) for n in (1, 16, 2048, 8)] * 16):
        for hidden in (64, 2880):
            peers = [of_tokens(tokens, hidden) for tokens, _ in sequence]
            for plan in ("one_shot", "two_shot"):
                some = [peer for peer in peers if plan in _plans(peer, peer.on(world_size, True))]
                held.layers_in_a_row(some, [plan], rank, world_size, DEVICE)


def layers_in_a_graph(rank: int, world_size: int) -> None:
    """Captured once, replayed with other inputs, which are spoiled right after each replay."""
    plans, group = ("sentinel", "one_shot", "two_shot"), group_name()
    peers = [of_tokens(tokens, 64) for tokens, _ in MAILBOX[:4]]
    inputs = [held.operands(peer, peer.on(world_size, True), rank, DEVICE)[0] for peer in peers]

    def layers() -> list[torch.Tensor]:
        outs = []
        for i, x in enumerate(inputs):
            with tpo.force_plan(
                plans[i % 3] if plans[i % 3] in _plans(peers[i], peers[i].on(world_size, True)) else None
            ):
                outs.append(torch.ops.tp_overlap.all_reduce(x, group))
        return outs

    layers()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        outs = layers()
    for replay in range(17):
        for x, peer in zip(inputs, peers, strict=True):
            x.copy_(held.operands(peer, peer.on(world_size, True), rank, DEVICE, replay)[0])
        graph.replay()
        kept = [out.clone() for out in outs]
        for x in inputs:
            x.fill_(float("nan"))
        held.agree(
            DEVICE,
            lambda kept=kept, replay=replay: [
                held.judge(peer, peer.on(world_size, True), "one_shot", out, rank, DEVICE, replay)
                for peer, out in zip(peers, kept, strict=True)
            ],
        )


def means_split_along_any_dimension(rank: int, world_size: int) -> None:
    for dim in range(3):
        for plan in ("push", "unfused_push"):
            held.scattered_average(dim, (8, 64, 16, 1024), plan, rank, world_size, DEVICE)


def stragglers(rank: int, world_size: int) -> None:
    """Triton-distributed: ranks begin 0 to 10 ms times (rank + 1) late, before each call."""
    peer = next(peer for peer in GEMMS if peer.source.startswith("Triton") and peer.op == "gemm_reduce_scatter")
    case = Case(1024, 1024, 512, peer.dtype, world_size, "")
    for turn in range(8):
        time.sleep((turn * 3 % 10) * (rank + 1) / 1000)
        for plan in _plans(peer, case):
            held.hold(peer, case, plan, rank, DEVICE, calls=1)


CHECKS = (
    gemms_at_their_sizes,
    sums_at_their_sizes,
    sums_in_layers,
    layers_in_a_graph,
    means_split_along_any_dimension,
    stragglers,
)
