"""The unfused ways of stock PyTorch: a cuBLAS product, then a collective; and torch's own fused reduce-scatter.

Where a collective needs its input in registered or symmetric memory, the product is written there directly, and the
result stays there: no way is charged for a copy that its user could avoid.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist

from .cases import ALL_REDUCE, GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, Case
from .provider import Provider, Session, weight_of
from .timing import Call


class Unfused(Provider):
    """Product into `partial`, then a collective in place or into `out`."""

    for_device = "cuda"


class Nccl(Unfused):
    """NCCL as everybody calls it."""

    def __init__(self, name: str, session: Session) -> None:
        super().__init__(name, session)
        self.decline_unless(self.world.has_nccl, "NCCL refuses two ranks on one GPU")

    def flat(self, elems: int) -> torch.Tensor | None:
        """Memory that the collective wants its input in, or None where any will do."""
        return None

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        if case.op == GEMM_REDUCE_SCATTER:
            return self._reduce_scatter(case, a)
        memory = self.flat(case.M * case.N)
        into = None if memory is None else memory.view(case.M, case.N)

        def all_reduce(w: torch.Tensor | None) -> torch.Tensor:
            partial = torch.mm(a, weight_of(w).t()) if into is None else torch.mm(a, weight_of(w).t(), out=into)
            dist.all_reduce(partial)
            return partial

        return all_reduce

    def _reduce_scatter(self, case: Case, a: torch.Tensor) -> Call:
        """NCCL wants equal parts, so the product is made in a buffer padded to a multiple of the ranks."""
        rows, W = case.rows_per_rank, case.world_size
        memory = self.flat(rows * W * case.N)
        padded = a.new_zeros(rows * W * case.N) if memory is None else memory.zero_()
        into = padded.view(rows * W, case.N)
        first, end = case.owned_rows(self.world.rank)

        def reduce_scatter(w: torch.Tensor | None) -> torch.Tensor:
            torch.mm(a, weight_of(w).t(), out=into[: case.M])
            out = a.new_empty(rows, case.N)
            dist.reduce_scatter_tensor(out, into)
            return out[: end - first]

        return reduce_scatter


class NcclSymmetric(Nccl):
    """NCCL on memory registered with it as a symmetric window on all ranks, which its one-hop kernels need."""

    def flat(self, elems: int) -> torch.Tensor:
        _, memory = self.session.once("NCCL window", self._register)
        return memory[:elems]

    def _register(self) -> tuple[Any, torch.Tensor]:
        group: Any = dist.group.WORLD
        dist.all_reduce(torch.zeros(1, device=self.world.device))  # the communicator exists before memory joins it
        backend = group._get_backend(self.world.device)
        pool = torch.cuda.MemPool(backend.mem_allocator)
        with torch.cuda.use_mem_pool(pool):
            memory = torch.empty(self.session.max_elems, dtype=self.session.dtype, device=self.world.device)
        backend.register_mem_pool(pool, symm=True)
        return pool, memory  # the pool lives as long as its memory is used


class SymmetricMemory(Unfused):
    """torch.ops.symm_mem: the product is written into torch's symmetric memory, one buffer for the whole run."""

    def buffer(self, rows: int, N: int) -> torch.Tensor:
        return self.session.once("symmetric buffer", self._allocate)[: rows * N].view(rows, N)

    def _allocate(self) -> torch.Tensor:
        import torch.distributed._symmetric_memory as symmetric_memory

        flat = symmetric_memory.empty(self.session.max_elems, dtype=self.session.dtype, device=self.world.device)
        symmetric_memory.rendezvous(flat, self.world.group_name)
        return flat


class OneShot(SymmetricMemory):
    ops = (GEMM_ALL_REDUCE,)

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        partial, group_name = self.buffer(case.M, case.N), self.world.group_name

        def call(w: torch.Tensor | None) -> torch.Tensor:
            torch.mm(a, weight_of(w).t(), out=partial)
            return torch.ops.symm_mem.one_shot_all_reduce(partial, "sum", group_name)

        return call


class TwoShot(SymmetricMemory):
    ops = (GEMM_ALL_REDUCE,)

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        partial, group_name = self.buffer(case.M, case.N), self.world.group_name

        def call(w: torch.Tensor | None) -> torch.Tensor:
            torch.mm(a, weight_of(w).t(), out=partial)
            return torch.ops.symm_mem.two_shot_all_reduce_(partial, "sum", group_name)

        return call


class SymmetricReduceScatter(SymmetricMemory):
    """The op takes and gives one-dimensional tensors: rows are contiguous, so a share of the rows is a share of it."""

    ops = (GEMM_REDUCE_SCATTER,)

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        self.decline_unless(hasattr(torch.ops.symm_mem, "reduce_scatter_out"), "this torch has no such op")
        self.decline_unless(case.M % case.world_size == 0, f"M={case.M} does not divide over {case.world_size} ranks")
        partial, group_name = self.buffer(case.M, case.N), self.world.group_name

        def call(w: torch.Tensor | None) -> torch.Tensor:
            torch.mm(a, weight_of(w).t(), out=partial)
            out = a.new_empty(case.rows_per_rank, case.N)
            torch.ops.symm_mem.reduce_scatter_out(partial.view(-1), group_name, False, out.view(-1))
            return out

        return call


class TorchFusedReduceScatter(Unfused):
    """torch's micro-pipelined matmul + reduce-scatter (async tensor parallelism)."""

    ops = (GEMM_REDUCE_SCATTER,)

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        import torch.distributed._symmetric_memory  # defines the op

        self.decline_unless(case.M % case.world_size == 0, f"M={case.M} does not divide over {case.world_size} ranks")
        group_name = self.world.group_name
        return lambda w: torch.ops.symm_mem.fused_matmul_reduce_scatter(a, weight_of(w).t(), "sum", 0, group_name)


class Gloo(Unfused):
    """The CPU's way: torch.mm and gloo, which has no reduce-scatter, so that the sum is made whole and cut."""

    for_device = "cpu"

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        first, end = case.owned_rows(self.world.rank) if case.op == GEMM_REDUCE_SCATTER else (0, case.M)

        def call(w: torch.Tensor | None) -> torch.Tensor:
            partial = torch.mm(a, weight_of(w).t())
            dist.all_reduce(partial)
            return partial[first:end]

        return call


class AllReduceAlone(Unfused):
    """The collective alone, on a copy of the message, since it works in place; the copy is the result."""

    ops = (ALL_REDUCE,)

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        self.decline_unless(self.world.has_nccl or a.device.type == "cpu", "NCCL refuses two ranks on one GPU")

        def call(w: torch.Tensor | None) -> torch.Tensor:
            total = a.clone()
            dist.all_reduce(total)
            return total

        return call


class GlooAlone(AllReduceAlone):
    for_device = "cpu"


class OneShotAlone(SymmetricMemory):
    """torch's one-shot all-reduce of a message that lies in ordinary memory, as ours takes it; the result is fresh.

    Peers can read symmetric memory alone, so the message is copied there: by the collective's own kernel, which costs
    no launch. It is read by all until the kernel ends, and the next call may overwrite it.
    """

    ops = (ALL_REDUCE,)

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        message, group_name = self.buffer(case.M, case.N), self.world.group_name
        return lambda w: torch.ops.symm_mem.one_shot_all_reduce_copy(message, a, "sum", group_name)


class TwoShotAlone(SymmetricMemory):
    """torch's two-shot all-reduce of a message that lies in ordinary memory, as ours takes it; the result is fresh.

    The message is copied into symmetric memory, where peers read it, by a kernel in front: this collective has no
    copy of its own. Its sums are gathered into a new tensor, not back into symmetric memory, which spares one.
    """

    ops = (ALL_REDUCE,)

    def prepare(self, case: Case, a: torch.Tensor) -> Call:
        message, group_name = self.buffer(case.M, case.N), self.world.group_name

        def call(w: torch.Tensor | None) -> torch.Tensor:
            message.copy_(a)
            return torch.ops.symm_mem.two_shot_all_reduce_out(message, "sum", group_name, torch.empty_like(a))

        return call


UNFUSED: dict[str, type[Unfused]] = {
    "matmul+nccl": Nccl,
    "matmul+nccl_symmetric": NcclSymmetric,
    "matmul+symm_mem_one_shot": OneShot,
    "matmul+symm_mem_two_shot": TwoShot,
    "matmul+symm_mem_reduce_scatter": SymmetricReduceScatter,
    "torch_fused_matmul_reduce_scatter": TorchFusedReduceScatter,
    "matmul+gloo": Gloo,
    "copy+nccl": AllReduceAlone,
    "copy+symm_mem_one_shot": OneShotAlone,
    "copy+symm_mem_two_shot": TwoShotAlone,
    "copy+gloo": GlooAlone,
}
