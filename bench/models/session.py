"""What both verbs share on a rank: the model and its arms, the clock, and what is written down about the run."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from rich.console import Console

from .. import report
from ..launch import World
from ..results import describe_run
from ..runner import DTYPES
from ..timing import Clock, CpuClock, CudaClock
from .arms import Arms
from .configs import ModelSizes
from .sharded import sharded

MAX_TOKENS = 8192  # of the arena: what an engine's prefill chunk is, and `init` takes where nothing is said


@dataclass(frozen=True)
class ModelOptions:
    """What the command line asks of either verb."""

    sizes: ModelSizes
    dtype: str = "bfloat16"
    max_tokens: int = MAX_TOKENS
    run_name: str = ""
    budget_s: float | None = None
    seed: int = 0
    command: str = ""
    commit: str | None = None


@dataclass
class ModelSession:
    """One rank's model in its arms. `about`: fields that every result of the run carries."""

    world: World
    options: ModelOptions
    arms: Arms
    clock: Clock
    console: Console
    about: dict[str, Any]

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.options.dtype]

    def prompt(self, batch: int, tokens: int, salt: int = 0) -> torch.Tensor:
        """Random tokens [batch, tokens], the same on all ranks and in all arms."""
        generator = torch.Generator().manual_seed(self.options.seed + salt)
        return torch.randint(self.options.sizes.vocab, (batch, tokens), generator=generator).to(self.world.device)


@contextlib.contextmanager
def opened(world: World, options: ModelOptions) -> Iterator[ModelSession]:
    """Collective. The model, its arms and its arena, which is given back at the end; all of it in inference mode."""
    transformers.utils.logging.set_verbosity_error()
    clock: Clock = CudaClock(world) if world.device.type == "cuda" else CpuClock(world)
    console = report.console() if world.rank == 0 else Console(quiet=True)
    model, mesh = sharded(options.sizes, world, DTYPES[options.dtype], options.seed)
    arms = Arms(model, mesh, options.max_tokens)
    gc.collect()
    gc.freeze()  # capturing collects garbage each time; what is here by now stays, and need not be looked through
    try:
        with torch.inference_mode():
            yield ModelSession(world, options, arms, clock, console, _about(world, options) if world.rank == 0 else {})
    finally:
        gc.unfreeze()
        arms.close()


def _about(world: World, options: ModelOptions) -> dict[str, Any]:
    sizes = options.sizes
    described = describe_run(world, None, "not measured", options.command, options.commit)
    for of_other_runs in ("link_gbps", "link", "floor"):
        del described[of_other_runs]
    return {
        "model": sizes.name,
        "layers": sizes.layers,
        "published_layers": sizes.published_layers or sizes.layers,
        "dtype": options.dtype,
        "world_size": world.world_size,
        "max_tokens": options.max_tokens,
        "graph": world.device.type == "cuda",
        "weights": "random",
        "all_reduce_of_nccl": "nccl" if world.has_nccl else "gloo",
        "run": described | {"transformers": transformers.__version__, "sizes_from": sizes.source},
    }
