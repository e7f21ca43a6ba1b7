"""The link between GPUs, measured in the run that is held against it: copy engine, both directions busy."""

from __future__ import annotations

import torch

from .launch import World
from .timing import CudaClock, one_line, quantiles, slowest_rank

PUSH_BYTES = 256 << 20
WARM, TIMED = 3, 7


def link_gbps(world: World, clock: CudaClock) -> tuple[float | None, str]:
    """(GB/s in each direction, how it was measured). None, with the reason, where ranks share one GPU or no peer is
    reachable. Every rank pushes to the next GPU's rank at once, so that each link carries both directions."""
    topology = world.topology
    if world.world_size <= topology.ranks_per_device:
        return None, "all ranks share one GPU"
    import torch.distributed._symmetric_memory as symmetric_memory

    try:
        target = symmetric_memory.empty(PUSH_BYTES, dtype=torch.uint8, device=world.device)
        handle = symmetric_memory.rendezvous(target, world.group_name)
        peer = (world.rank + topology.ranks_per_device) % world.world_size
        remote = handle.get_buffer(peer, (PUSH_BYTES,), torch.uint8)
        local = torch.randint(0, 256, (PUSH_BYTES,), dtype=torch.uint8, device=world.device)
        samples = []
        for _ in range(WARM + TIMED):
            begin, end = clock.start(50.0), clock.event()
            remote.copy_(local)
            end.record()
            clock.idle()
            samples.append(begin.elapsed_time(end) * 1e3)
        reason = None
    except Exception as error:
        reason, samples = one_line(error), []
    reason = world.agree(reason)
    if reason is not None:
        return None, reason
    median_us, _, _ = quantiles(slowest_rank(world.gather(samples[WARM:])))
    return PUSH_BYTES / median_us / 1e3, "copy engine pushes 256 MiB to the next GPU, both directions busy"
