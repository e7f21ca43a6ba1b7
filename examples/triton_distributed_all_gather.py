"""An all-gather with notify and wait, written as for Triton-Distributed: every rank gets every rank's x.

    torchrun --standalone --nproc-per-node 2 examples/triton_distributed_all_gather.py

On GPUs, or on CPU ranks where there are none.

Program i of a rank sends to one peer and receives from one. Two halves of buffer and signals, by the parity of the
call: in call e+2 a rank writes what peers have read in call e, and in e+1 it has heard from each of them, hence after
the end of their e. One half would not do: a wait is for equality, and a peer that is one call ahead would have raised
the word past the value that is waited for. The call is a number from the host, so this is not for graph capture.
"""

import os

import torch
import torch.distributed as dist
import triton.language as tl

from tp_overlap_kernels.lang import distributed as dl  # was: import triton_dist.language as dl
from tp_overlap_kernels.memory.world import World


@dl.jit  # was: @triton_dist.jit
def all_gather(x_ptr, gathered_ptr, signal_ptr, out_ptr, n, call, BLOCK: tl.constexpr):
    """x: (n,). gathered: (2, num_ranks, n), symmetric. signal: (2, num_ranks) int64, symmetric, zeros at first. out:
    (num_ranks, n). call: 1, 2, ... Grid: num_ranks programs."""
    rank, num_ranks = dl.rank(), dl.num_ranks()
    peer = (rank + 1 + tl.program_id(0)) % num_ranks  # no two ranks begin with the same peer; the last is ourselves
    gathered_ptr += (call % 2) * num_ranks * n
    signal_ptr += (call % 2) * num_ranks
    # 1. store our x at the peer, then say so
    there = dl.symm_at(gathered_ptr, peer) + rank * n
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(there + index, tl.load(x_ptr + index, mask=index < n), mask=index < n)
    tl.debug_barrier()  # was: __syncthreads()
    dl.notify(signal_ptr + rank, peer, signal=call, sig_op="set", comm_scope="intra_node")
    # 2. wait for the peer's x, and take it out
    token = dl.wait(signal_ptr + peer, 1, "sys", "acquire", waitValue=call)
    here = dl.consume_token(gathered_ptr, token) + peer * n
    for start in range(0, n, BLOCK):
        index = start + tl.arange(0, BLOCK)
        tl.store(out_ptr + peer * n + index, tl.load(here + index, mask=index < n), mask=index < n)


class AllGather:
    """The symmetric tensors of it, for up to n elements. Collective."""

    def __init__(self, n: int, dtype: torch.dtype) -> None:
        num_ranks = dist.get_world_size()
        self.world = World(2 * num_ranks * (n * dtype.itemsize + 8) + 1024)  # was: nvshmem_create_tensor
        self.gathered = self.world.empty(2, num_ranks, n, dtype=dtype)
        self.signal = self.world.empty(2, num_ranks, dtype=torch.int64)
        self.calls = 0

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """x: (n,), the same n on every rank. A fresh (num_ranks, n)."""
        out = torch.full((self.world.num_ranks, *x.shape), float("nan"), dtype=x.dtype, device=x.device)
        self.calls += 1
        arguments = (x, self.gathered, self.signal, out, x.numel(), self.calls)
        all_gather[(self.world.num_ranks,)](*arguments, BLOCK=1024, world=self.world)
        return out


def run(rank: int, num_ranks: int, n: int = 5000) -> None:
    """Seven calls, each checked by bits against torch's all_gather."""
    gather = AllGather(n, torch.bfloat16)
    for call in range(7):
        x = torch.randn(n, generator=torch.Generator().manual_seed(10 * call + rank)).bfloat16().to(gather.world.device)
        out = gather(x)
        gather.world.check()
        expected = [torch.empty_like(x) for _ in range(num_ranks)]
        dist.all_gather(expected, x)
        assert torch.equal(out, torch.stack(expected)), f"rank {rank}, call {call}: not what torch gathers"
    gather.world.close()


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    run(dist.get_rank(), dist.get_world_size())
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: right")
    dist.destroy_process_group()
