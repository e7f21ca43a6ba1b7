"""What is measured: the row-parallel layers of known models, the grid of M, and the floor a time is held against.

A row-parallel layer of tensor-parallel degree TP holds w[N, K / TP] on each rank. `Layer` names such a shard and
`Case` one call of it. The degree of the shard and the number of ranks that run it are separate numbers: two ranks can
run the shards of TP8, which are smaller than their own and so bound by the link rather than by the GEMM.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

GEMM_ALL_REDUCE = "gemm_all_reduce"
GEMM_REDUCE_SCATTER = "gemm_reduce_scatter"
ALL_REDUCE = "all_reduce"
GEMM_ALL_REDUCE_NORM = "gemm_all_reduce_add_rms_norm"
ALL_REDUCE_NORM = "all_reduce_add_rms_norm"
OPS = (GEMM_ALL_REDUCE, GEMM_REDUCE_SCATTER, ALL_REDUCE, GEMM_ALL_REDUCE_NORM, ALL_REDUCE_NORM)
MESSAGES = (ALL_REDUCE, ALL_REDUCE_NORM)  # have no GEMM
SUM_OF = {GEMM_ALL_REDUCE_NORM: GEMM_ALL_REDUCE, ALL_REDUCE_NORM: ALL_REDUCE}  # ops that give (y, new_residual)

M_GRID = (1, 16, 64, 128, 256, 512, 1024, 2048, 4096, 8192)
CPU_M_GRID = (1, 16, 64)
LAUNCH_US = 2.0  # one round trip from a launch to the peer and back: what no way of doing it avoids


@dataclass(frozen=True)
class Layer:
    """One rank's shard w[N, K_local] of a row-parallel layer."""

    name: str  # as in "Qwen2.5-72B o_proj"
    shard: str  # as in "TP8"; empty where the shard belongs to no model
    N: int
    K_local: int

    @property
    def label(self) -> str:
        return f"{self.name} {self.shard}".strip()


@dataclass(frozen=True)
class Case:
    """One call: op(a[M, K_local], w[N, K_local]) over world_size ranks. Without a GEMM, x[M, N] and K_local is 0."""

    op: str
    layer: Layer
    M: int
    dtype: str  # "bfloat16" or "float16"
    world_size: int

    @property
    def N(self) -> int:
        return self.layer.N

    @property
    def K_local(self) -> int:
        return 0 if self.op in MESSAGES else self.layer.K_local

    @property
    def rows_per_rank(self) -> int:
        """Rows a rank owns in a reduce-scatter, the last ranks possibly fewer or none."""
        return -(-self.M // self.world_size)

    def owned_rows(self, rank: int) -> tuple[int, int]:
        """First row and end row of what a reduce-scatter leaves on `rank`."""
        first = min(self.M, rank * self.rows_per_rank)
        return first, min(self.M, first + self.rows_per_rank)

    @property
    def flops(self) -> float:
        """Of one rank."""
        return 2.0 * self.M * self.N * self.K_local

    @property
    def wire_bytes(self) -> float:
        """Bytes that must leave each rank: (W-1)/W of the message to reduce it, as much again to gather it."""
        one_way = (self.world_size - 1) / self.world_size * self.M * self.N * ITEMSIZE[self.dtype]
        return one_way if self.op == GEMM_REDUCE_SCATTER else 2 * one_way


ITEMSIZE = {"bfloat16": 2, "float16": 2}


def link_us(case: Case, link_gbps: float | None) -> float | None:
    """Time of the wire bytes over a link of `link_gbps` in each direction; None where no link was measured."""
    if case.world_size == 1:
        return 0.0
    return None if link_gbps is None else case.wire_bytes / link_gbps / 1e3


def floor_us(mm_us: float | None, link: float | None) -> float | None:
    """What a perfect overlap would take: the longer of GEMM and link, and one round trip."""
    return None if mm_us is None or link is None else max(mm_us, link) + LAUNCH_US


@dataclass(frozen=True)
class Model:
    """Sizes of a model's two row-parallel layers: o_proj is w[hidden, attention], down_proj w[hidden, intermediate]."""

    name: str
    hidden: int
    attention: int  # heads * head_dim
    intermediate: int

    def layers(self, tp: int) -> list[Layer]:
        for projection, K in (("o_proj", self.attention), ("down_proj", self.intermediate)):
            if K % tp:
                raise ValueError(f"{self.name} {projection}: K={K} does not divide over TP={tp}. Choose another --tp.")
        return [
            Layer(f"{self.name} o_proj", f"TP{tp}", self.hidden, self.attention // tp),
            Layer(f"{self.name} down_proj", f"TP{tp}", self.hidden, self.intermediate // tp),
        ]


MODELS = {
    "qwen2.5-72b": Model("Qwen2.5-72B", hidden=8192, attention=8192, intermediate=29568),
    "llama-3-8b": Model("Llama-3-8B", hidden=4096, attention=4096, intermediate=14336),
    "llama-3-70b": Model("Llama-3-70B", hidden=8192, attention=8192, intermediate=28672),
    "qwen3-32b": Model("Qwen3-32B", hidden=5120, attention=8192, intermediate=25600),
}


def _h200_baseline() -> list[Layer]:
    """Six layers for two ranks that span both regimes: TP8 shards are bound by the link, TP2 ones by the GEMM."""
    qwen, llama = MODELS["qwen2.5-72b"], MODELS["llama-3-8b"]
    return qwen.layers(8) + qwen.layers(2) + llama.layers(2)


def _cpu() -> list[Layer]:
    """Small enough for a laptop: a real small model, and a sixteenth of Llama-3-8B for the interpreted kernels."""
    small = Model("Qwen2.5-0.5B", hidden=896, attention=896, intermediate=4864)
    scaled = Model("Llama-3-8B/16", hidden=256, attention=256, intermediate=896)
    return small.layers(2) + scaled.layers(2)


def presets() -> list[str]:
    return [*MODELS, "h200_baseline", "cpu"]


def preset_layers(preset: str, tp: int) -> list[Layer]:
    """Layers of a preset. `tp` is the degree of the shards, except for the two presets that fix it.

    Errors: ValueError names the presets there are, or the layer that `tp` does not divide.
    """
    if preset == "h200_baseline":
        return _h200_baseline()
    if preset == "cpu":
        return _cpu()
    if preset not in MODELS:
        raise ValueError(f"no preset is called {preset!r}; there are {', '.join(presets())}")
    return MODELS[preset].layers(tp)


def parse_layer(text: str) -> Layer:
    """A layer as the command line gives it: `N,K_local` or `name=N,K_local`."""
    name, _, sizes = text.rpartition("=")
    try:
        N, K_local = (int(part) for part in sizes.split(","))
    except ValueError:
        raise ValueError(f"a layer is N,K_local or name=N,K_local, got {text!r}") from None
    if N < 1 or K_local < 1:
        raise ValueError(f"a layer needs N >= 1 and K_local >= 1, got {text!r}")
    return Layer(name or f"{N}x{K_local}", "", N, K_local)


def parse_grid(text: str) -> list[int]:
    """Values of M as the command line gives them: `1,16,64`."""
    try:
        grid = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise ValueError(f"M is a list of integers such as 1,16,4096, got {text!r}") from None
    if grid[0] < 1:
        raise ValueError(f"M must be at least 1, got {grid[0]}")
    return grid


def cases(ops: Iterable[str], layer: Layer, grid: Iterable[int], dtype: str, world_size: int) -> list[Case]:
    return [Case(op, layer, M, dtype, world_size) for op in ops for M in grid]
