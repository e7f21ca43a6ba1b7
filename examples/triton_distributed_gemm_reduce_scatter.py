"""A GEMM and its reduce-scatter in one kernel, written as for Triton-Distributed.

    torchrun --standalone --nproc-per-node 2 examples/triton_distributed_gemm_reduce_scatter.py

    out_r[M / W, N] = rows of rank r of  sum over s of  a_s[M, K] @ b_s[N, K].T

Rounding: f32 over K, one rounding of each partial, ranks added in order in f32, one last rounding. Each tile of a
partial is stored at the owner of its rows and notified there, in a word of its own for each source; the owner waits for
the words of all sources at once. Every rank owns a tile and hears in each call from every peer, so two halves by the
parity of the call are enough (see the all-gather beside this file). Every program sends before it waits, and the grid
is at most one program an SM, hence resident: nobody waits for ever.

It shows the words, not speed: what makes the overlap pay is in docs/design.md, and `torch.ops.tp_overlap` has it.
"""

import os

import torch
import torch.distributed as dist
import triton
import triton.language as tl

from tp_overlap_kernels.lang import distributed as dl  # was: import triton_dist.language as dl
from tp_overlap_kernels.memory.world import World


@dl.jit
def product(a_ptr, b_ptr, row0, col0, M, N, K, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """(BLOCK_M, BLOCK_N) f32 of a @ b.T, from row0 and col0 on."""
    rows, cols = row0 + tl.arange(0, BLOCK_M), col0 + tl.arange(0, BLOCK_N)
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    for k in range(0, K, BLOCK_K):
        ks = k + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + rows[:, None] * K + ks[None, :], mask=(rows < M)[:, None] & (ks < K)[None, :], other=0.0)
        b = tl.load(b_ptr + cols[:, None] * K + ks[None, :], mask=(cols < N)[:, None] & (ks < K)[None, :], other=0.0)
        acc = tl.dot(a, b.T, acc)
    return acc


@dl.jit
def gemm_reduce_scatter(
    a_ptr,
    b_ptr,
    partial_ptr,
    signal_ptr,
    out_ptr,
    M,
    N,
    K,
    call,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """a: (M, K), b: (N, K), out: (M / W, N). partial: (2, W, M / W, N), symmetric. signal: (2, tiles of out, W) int64,
    symmetric, zeros at first. call: 1, 2, ..."""
    rank, num_ranks = dl.rank(), dl.num_ranks()
    owned_rows = M // num_ranks
    n_tiles = tl.cdiv(N, BLOCK_N)
    tiles = tl.cdiv(owned_rows, BLOCK_M) * n_tiles  # of one owner
    partial_ptr += (call % 2) * num_ranks * owned_rows * N
    signal_ptr += (call % 2) * tiles * num_ranks
    # 1. produce, those of the next rank first, and store each tile at its owner
    for step in range(tl.program_id(0), num_ranks * tiles, tl.num_programs(0)):
        owner = (rank + 1 + step // tiles) % num_ranks
        tile = step % tiles
        row0, col0 = (tile // n_tiles) * BLOCK_M, (tile % n_tiles) * BLOCK_N
        end = (owner + 1) * owned_rows
        acc = product(a_ptr, b_ptr, owner * owned_rows + row0, col0, end, N, K, BLOCK_M, BLOCK_N, BLOCK_K)
        rows, cols = row0 + tl.arange(0, BLOCK_M)[:, None], col0 + tl.arange(0, BLOCK_N)[None, :]
        there = dl.symm_at(partial_ptr, owner) + rank * owned_rows * N
        tl.store(there + rows * N + cols, acc.to(out_ptr.dtype.element_ty), mask=(rows < owned_rows) & (cols < N))
        tl.debug_barrier()  # was: __syncthreads()
        dl.notify(signal_ptr + tile * num_ranks + rank, owner, signal=call, sig_op="set", comm_scope="intra_node")
    # 2. own tiles: wait for all ranks', our own too, and add them in rank order
    for tile in range(tl.program_id(0), tiles, tl.num_programs(0)):
        token = dl.wait(signal_ptr + tile * num_ranks, num_ranks, "sys", "acquire", waitValue=call)
        here = dl.consume_token(partial_ptr, token)
        rows = (tile // n_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)[:, None]
        cols = (tile % n_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)[None, :]
        mask = (rows < owned_rows) & (cols < N)
        total = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
        for source in range(0, num_ranks):
            total += tl.load(here + (source * owned_rows + rows) * N + cols, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + rows * N + cols, total.to(out_ptr.dtype.element_ty), mask=mask)


class GemmReduceScatter:
    """The symmetric tensors of it, for one shape. Collective. M must divide evenly over the ranks."""

    def __init__(self, M: int, N: int, dtype: torch.dtype, block_m: int = 64, block_n: int = 64) -> None:
        num_ranks = dist.get_world_size()
        assert M % num_ranks == 0 and M > 0, f"M={M} does not divide over {num_ranks} ranks"
        self.M, self.N, self.block_m, self.block_n = M, N, block_m, block_n
        tiles = triton.cdiv(M // num_ranks, block_m) * triton.cdiv(N, block_n)
        self.world = World(2 * M * N * dtype.itemsize + 2 * tiles * num_ranks * 8 + 1024)
        self.partial = self.world.empty(2, M, N, dtype=dtype)
        self.signal = self.world.empty(2, tiles, num_ranks, dtype=torch.int64)
        on_gpu = self.world.device.type == "cuda"
        programs = torch.cuda.get_device_properties(self.world.device).multi_processor_count if on_gpu else 2
        self.grid = (min(programs, num_ranks * tiles),)
        self.calls = 0

    def __call__(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        """a: (M, K), b: (N, K), contiguous. A fresh (M / W, N): this rank's rows of the sum."""
        out = torch.full((self.M // self.world.num_ranks, self.N), float("nan"), dtype=a.dtype, device=a.device)
        self.calls += 1
        arguments = (a, b, self.partial, self.signal, out, self.M, self.N, a.shape[1], self.calls)
        blocks = {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": 64}
        gemm_reduce_scatter[self.grid](*arguments, **blocks, world=self.world)
        return out


def run(rank: int, num_ranks: int, rows_a_rank: int = 72, N: int = 136, K: int = 80) -> None:
    """Five calls with small integers, exact in every step, hence checked by bits."""
    M = rows_a_rank * num_ranks
    op = GemmReduceScatter(M, N, torch.bfloat16)

    def operand(rows: int, source: int, seed: int) -> torch.Tensor:
        random = torch.Generator().manual_seed(1000 * seed + source)
        return torch.randint(-1, 2, (rows, K), generator=random).bfloat16().to(op.world.device)

    for call in range(5):
        operands = [(operand(M, s, 2 * call), operand(N, s, 2 * call + 1)) for s in range(num_ranks)]
        out = op(*operands[rank])
        op.world.check()
        exact = sum(a.double() @ b.double().T for a, b in operands)
        mine = exact[rank * rows_a_rank : (rank + 1) * rows_a_rank]
        assert torch.equal(out.double(), mine), f"rank {rank}, call {call}: a wrong sum"
    op.world.close()


if __name__ == "__main__":
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    run(dist.get_rank(), dist.get_world_size())
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: right")
    dist.destroy_process_group()
