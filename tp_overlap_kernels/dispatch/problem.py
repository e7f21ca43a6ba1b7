"""What is asked (Problem), what the machine and the arena allow (Topology), what will be launched (Plan).

All three are plain values of Python numbers and strings. Every rank builds equal ones, so a choice made from them is
the same on every rank without a word being exchanged. dtypes are named as torch prints them: "bfloat16", "float16".
"""

from __future__ import annotations

import dataclasses
import hashlib

from ..errors import InvalidInput

ITEMSIZE = {"bfloat16": 2, "float16": 2, "float32": 4}
PITCH_ELEMS = 16  # rows of partials in the arena start at multiples of this many elements, as memory.layout has it

# Every plan there is, by operator, the preferred ones first where nothing else decides.
# "local" (one rank, nothing to send), "ref" (CPU reference) and "two_level" (several nodes) belong to all operators and
# stand in _ANYWHERE.
_SUMS = {
    "gemm_all_reduce": (
        "two_shot",
        "one_shot",
        "decode",
        "sm90",
        "sm90_add",
        "chunked",
        "unfused_two_shot",
        "unfused_one_shot",
        "unfused_sentinel",
        "unfused_nccl",
    ),
    "gemm_reduce_scatter": (
        "push",
        "one_shot",
        "sm90",
        "sm90_add",
        "chunked",
        "unfused_push",
        "unfused_sentinel",
        "unfused_nccl",
    ),
    "all_reduce": ("two_shot", "one_shot", "sentinel", "nccl"),
}
# An op with a norm has every plan of its sum, with the norm as a launch behind it, and such as sum and norm in one
# launch (`*_norm`).
SUM_OF = {"gemm_all_reduce_add_rms_norm": "gemm_all_reduce", "all_reduce_add_rms_norm": "all_reduce"}
PLAN_NAMES = {
    **_SUMS,
    "gemm_all_reduce_add_rms_norm": ("unfused_one_shot_norm", "unfused_sentinel_norm", *_SUMS["gemm_all_reduce"]),
    "all_reduce_add_rms_norm": ("one_shot_norm", "sentinel_norm", *_SUMS["all_reduce"]),
}
OPS = tuple(PLAN_NAMES)
_ANYWHERE = ("local", "two_level", "ref")
_ALL_NAMES = frozenset(name for names in PLAN_NAMES.values() for name in names) | frozenset(_ANYWHERE)

PARAM_NAMES = (
    "block_m",
    "block_n",
    "block_k",
    "num_stages",
    "num_warps",
    "group_m",
    "splits",
    "chunks",
    "own_chunks",
    "taper",
    "stagger_ns",
    "lead",
    "stagings",
    "piece",
    "senders",
    "cluster_m",
    "cluster_n",
)
LEAST = {"lead": 0, "senders": 0}  # of all others 1


@dataclasses.dataclass(frozen=True)
class Problem:
    """One call, as every rank sees it. K is the K of one rank.

    all_reduce: N elements, M = 1, K = 0. all_reduce_add_rms_norm: M rows of N elements, K = 0.
    """

    op: str
    M: int
    N: int
    K: int
    dtype: str
    world_size: int
    bias: bool = False

    def __post_init__(self) -> None:
        if self.op not in PLAN_NAMES:
            raise InvalidInput(f"dispatch: unknown op {self.op!r}. Give one of {', '.join(OPS)}.")
        if self.dtype not in ITEMSIZE:
            raise InvalidInput(
                f"{self.op}: dtype {self.dtype!r} is not supported. Give one of {', '.join(ITEMSIZE)}, "
                "written as torch prints them without 'torch.'."
            )
        if min(self.M, self.N, self.K) < 0 or self.world_size < 1:
            raise InvalidInput(
                f"{self.op}: sizes must be at least 0 and world_size at least 1, "
                f"got M={self.M}, N={self.N}, K={self.K}, world_size={self.world_size}."
            )

    @property
    def message_bytes(self) -> int:
        """Bytes of one rank's partial, which is what it has to tell the others."""
        return self.M * self.N * ITEMSIZE[self.dtype]

    @property
    def arena_bytes(self) -> int:
        """Bytes that the same partial takes in the arena."""
        return self.M * -(-self.N // PITCH_ELEMS) * PITCH_ELEMS * ITEMSIZE[self.dtype]

    @property
    def sum(self) -> Problem:
        """The same call without its norm, for an op that has one."""
        op = SUM_OF[self.op]
        if op == "all_reduce":
            return dataclasses.replace(self, op=op, M=1, N=self.M * self.N)
        return dataclasses.replace(self, op=op)

    def inside(self, ranks_per_node: int) -> Problem | None:
        """The reduce-scatter that each node runs of this call, as ops.two_level has it; None where no GEMM is in it."""
        if SUM_OF.get(self.op, self.op) == "all_reduce":
            return None
        rows = self.M
        if self.op == "gemm_reduce_scatter":
            rows = -(-self.M // self.world_size) * self.world_size
        return dataclasses.replace(self, op="gemm_reduce_scatter", M=rows, world_size=ranks_per_node)

    def call_hash(self, plan: str = "") -> int:
        """16 bits over all fields and the plan, equal in every process and never 0; it travels in each signal word.

        0 is kept for "no call yet", the value of a fresh signal pad.
        """
        text = f"{self.op} {self.M} {self.N} {self.K} {self.dtype} {self.world_size} {int(self.bias)}{plan}"
        digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
        return int.from_bytes(digest, "little") % 0xFFFF + 1

    def __str__(self) -> str:
        bias = ", bias" if self.bias else ""
        sizes = f"M={self.M} N={self.N} K={self.K}"
        if self.op == "all_reduce":
            sizes = f"{self.N} elements"
        elif self.op == "all_reduce_add_rms_norm":
            sizes = f"{self.M} rows of {self.N} elements"
        return f"{self.op} {sizes} {self.dtype}, world_size={self.world_size}{bias}"


@dataclasses.dataclass(frozen=True)
class Topology:
    """What can run here: the same value on every rank of the group (checked at init)."""

    device: str  # name of the device, as the driver gives it; "cpu" on a CPU
    backend: str  # "cuda", "interp" (Triton kernels, interpreted) or "ref" (torch on CPU)
    world_size: int
    ranks_per_device: int = 1
    native: bool = False  # the CUDA library of csrc is loaded
    one_shot_bytes: int = 0  # largest message (arena_bytes of a problem) that the one-shot region of the arena holds
    sentinel_bytes: int = 0  # largest message (message_bytes) of the CUDA sentinel kernel
    staged_bytes: int = 0  # of a rank's share of a call that the arena holds, on its way to the owner and as a sum
    tile_slots: int = 0  # flags of tiles
    inside: Topology | None = None  # of one node, where the group is on several; all but world_size is then as there

    def __post_init__(self) -> None:
        if self.backend not in ("cuda", "interp", "ref"):
            raise InvalidInput(f"dispatch: unknown backend {self.backend!r}. Give one of cuda, interp, ref.")

    @property
    def nodes(self) -> int:
        return self.world_size // self.inside.world_size if self.inside else 1

    def with_backend(self, backend: str) -> Topology:
        """The same machine with another backend."""
        return dataclasses.replace(self, backend=backend, inside=self.inside and self.inside.with_backend(backend))


@dataclasses.dataclass(frozen=True)
class Plan:
    """A way to run a problem: a name of PLAN_NAMES and the numbers its kernel takes.

    Two plans are equal when name, params and inside are; `why` and `us` only tell where the plan came from.
    inside: of a two_level plan, the reduce-scatter that each node runs.
    params are kept in the order of PARAM_NAMES, so that the order in which they were written does not matter.
    """

    name: str
    params: tuple[tuple[str, int], ...] = ()
    why: str = dataclasses.field(default="", compare=False)
    us: float | None = dataclasses.field(default=None, compare=False)  # measured microseconds, where known
    inside: Plan | None = None

    def __post_init__(self) -> None:
        unknown = sorted({key for key, _ in self.params} - set(PARAM_NAMES))
        if unknown:
            raise InvalidInput(
                f"plan {self.name!r}: unknown parameter {unknown[0]!r}. Known are {', '.join(PARAM_NAMES)}."
            )
        object.__setattr__(self, "params", tuple(sorted(self.params, key=lambda item: PARAM_NAMES.index(item[0]))))

    def get(self, param: str, default: int | None = None) -> int | None:
        return dict(self.params).get(param, default)

    def __getitem__(self, param: str) -> int:
        return dict(self.params)[param]

    def with_defaults(self, defaults: dict[str, int]) -> Plan:
        """This plan with every parameter that it leaves open taken from `defaults`."""
        return dataclasses.replace(self, params=tuple((defaults | dict(self.params)).items()))

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Reads `name` or `name:key=val,key=val`; the inverse of str(), but for the plan inside."""
        name, _, tail = text.strip().partition(":")
        if name not in _ALL_NAMES:
            raise InvalidInput(f"plan {text!r}: unknown name {name!r}. Known are {', '.join(sorted(_ALL_NAMES))}.")
        params: dict[str, int] = {}
        for item in tail.split(",") if tail else ():
            key, _, value = (part.strip() for part in item.partition("="))
            if key not in PARAM_NAMES or not value.isdecimal() or int(value) < LEAST.get(key, 1) or key in params:
                raise InvalidInput(
                    f"plan {text!r}: cannot read {item!r}. Write name:key=val,key=val with each key once, a whole "
                    f"number of at least {LEAST.get(key, 1)}, and keys among {', '.join(PARAM_NAMES)}."
                )
            params[key] = int(value)
        return cls(name, tuple(params.items()))

    def __str__(self) -> str:
        own = self.name + (":" if self.params else "") + ",".join(f"{key}={value}" for key, value in self.params)
        return f"{own};{self.inside}" if self.inside else own
