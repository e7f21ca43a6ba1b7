"""The meanings, held by Triton-Distributed itself: `torchrun --nproc-per-node 2 -m tests.words.of_triton_dist`.

Needs TPO_TEST_WORDS=triton_dist, that project's compiler, NVSHMEM and two GPUs.
"""

from __future__ import annotations

import torch
from triton_dist import utils  # type: ignore[import-not-found]

from tests.words.meanings import MEANINGS


class Room:
    """As meanings.Room, of NVSHMEM's memory."""

    def __init__(self, group: torch.distributed.ProcessGroup) -> None:
        self.rank, self.num_ranks = group.rank(), group.size()
        self.device = torch.device("cuda", torch.cuda.current_device())
        self.made: list[torch.Tensor] = []

    def symmetric(self, *shape: int, dtype: torch.dtype) -> torch.Tensor:
        self.made.append(utils.nvshmem_create_tensor(shape, dtype).zero_())
        self.end()
        return self.made[-1]

    def local(self, *shape: int, dtype: torch.dtype, value: float = -1) -> torch.Tensor:
        return torch.full(shape, value, dtype=dtype, device=self.device)

    def launch(self, kernel, grid: int, *args) -> None:
        kernel[(grid,)](*args)

    def end(self) -> None:
        utils.nvshmem_barrier_all_on_stream(torch.cuda.current_stream())
        torch.cuda.synchronize()

    def close(self) -> None:
        for tensor in self.made:
            utils.nvshmem_free_tensor_sync(tensor)


def main() -> None:
    group = utils.initialize_distributed()
    for meaning in MEANINGS:
        room = Room(group)
        meaning(room)
        room.close()
        if room.rank == 0:
            print(f"held: {meaning.__name__}", flush=True)
    utils.finalize_distributed()


if __name__ == "__main__":
    main()
