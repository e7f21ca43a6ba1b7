"""Whether a host's row-parallel linear layer becomes ours: decided once from what all ranks share, and said once.

A layer that is declined, or a call of an adopted layer that cannot be fused, runs as its host would run it; the reason
is counted (`tp_overlap_kernels.counters()`) and logged. Where the user has required the op, it is an InvalidInput.

| declined as     | because                                                                              |
| --------------- | ------------------------------------------------------------------------------------ |
| one_rank        | there is nothing to sum                                                              |
| module          | it is not nn.Linear itself but, for example, an embedding or a quantised subclass    |
| dtype           | neither bf16 nor fp16                                                                |
| uneven          | in_features does not divide over the ranks, so K would differ between them           |
| output_layout   | the host wants rows of the sum or the partial, and the op gives the sum              |
| topology        | `init` cannot make an arena for the group; its sentence says why                     |

Serving engines have layers of their own, and reasons of their own beside one_rank, dtype and topology: `engines`.
The reasons of single calls are those of `layers.routing`. M is never among them: the op takes M = 0, and chooses by M
itself.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.tensor import DTensor

from .. import ops  # noqa: F401 - registers torch.ops.tp_overlap
from ..config import settings
from ..errors import InvalidInput, UnsupportedTopology
from ..layers import collectives, routing
from ..memory.arena import find
from ..session import init

log = logging.getLogger(__name__)


@dataclasses.dataclass
class Request:
    """What the user has asked of an adapter.

    max_tokens: max_M of the arena; None is TP_OVERLAP_MAX_TOKENS. max_N: at least so many columns of the arena; it has
    those of the widest layer in any case. required: what cannot be fused is an error.
    """

    host: str  # begins every message
    max_tokens: int | None = None
    max_N: int = 1
    required: bool = False
    said: set[str] = dataclasses.field(default_factory=set)
    refused: dict[str, str] = dataclasses.field(default_factory=dict)  # group_name: why `init` could not serve it


def wanted(host: str, required: bool | None, otherwise: bool) -> bool | None:
    """Whether the op is required, or None where TP_OVERLAP=0 has switched the adapters off.

    required: the caller's argument, which wins; None follows TP_OVERLAP, whose "auto" means `otherwise`.
    """
    setting = settings().overlap
    if setting == "0" and required:
        raise InvalidInput(f"{host}: required=True, while TP_OVERLAP=0 switches it off. Unset TP_OVERLAP, or drop one.")
    if setting == "0":
        return None
    return required if required is not None else setting == "1" or otherwise


@dataclasses.dataclass(frozen=True)
class Adopted:
    """A layer as its adapter calls it. declined: the reason, in a word; empty where the layer is ours.

    split_input: calls bring the whole input, [..., K * W], equal on all ranks, and not this rank's columns of it.
    """

    name: str
    group_name: str
    rank: int
    world_size: int
    N: int
    K: int  # of one rank
    required: bool
    split_input: bool
    declined: str

    def fuses(self, x: Any, weight: Any, bias: Tensor | None, hindrance: str = "") -> bool:
        """Whether this call goes to the op; counts it. weight, bias: this rank's, [N, K] and [N] or None.

        hindrance: the reason, in a word of `routing.sentence`, why the host knows that it cannot.
        Errors: InvalidInput where it does not and was required to, before any rank enters a collective.
        """
        if self.declined:
            routing.count_unfused(self.declined)
            return False
        dtype = weight.dtype if isinstance(weight, Tensor) else torch.get_default_dtype()
        device = x.device.type if isinstance(x, Tensor) else "cpu"
        reason = hindrance or self._why_not(x, weight, bias)
        # A compiled call must not read the name: the graph would be guarded by it, and each layer need one of its own.
        name = "a compiled linear layer" if torch.compiler.is_compiling() else self.name
        if reason and self.required:
            text = routing.sentence(reason, self.group_name, self.N, dtype, device)
            raise InvalidInput(f"{name}: cannot be fused, and was required to be: {text}")
        routing.note(reason, name, self.group_name, self.rank, self.N, dtype, device)
        return not reason

    def _why_not(self, x: Any, weight: Any, bias: Tensor | None) -> str:
        if not isinstance(weight, Tensor) or tuple(weight.shape) != (self.N, self.K) or not weight.is_contiguous():
            return "weight"
        # A subclass, such as a DTensor, means more than its numbers.
        if type(x) not in (Tensor, nn.Parameter) or x.dtype != weight.dtype:
            return "input" if weight.dtype in routing.FUSED_DTYPES else "dtype"
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        return routing.why_not(self.group_name, self.N, x.dtype, x.device.type, needs_grad)

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The sum over the ranks of x @ weight.T, plus the bias once: [..., N], a fresh tensor."""
        return torch.ops.tp_overlap.gemm_all_reduce.default(self._columns(x), weight, self.group_name, bias)

    def with_norm(
        self, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, scale: Tensor, eps: float
    ) -> tuple[Tensor, Tensor]:
        """(y, new_residual), both [..., N] and fresh: the sum with residual in it, and its RMS norm times scale [N]."""
        op = torch.ops.tp_overlap.gemm_all_reduce_add_rms_norm.default
        return op(self._columns(x), weight, residual, scale, eps, self.group_name, bias)

    def _columns(self, x: Tensor) -> Tensor:
        if not self.split_input:
            return x
        return collectives.own_columns(x, self.group_name, self.rank, self.world_size)


@dataclasses.dataclass(frozen=True)
class Part:
    """The weight that one rank holds: [N, K] of dtype."""

    N: int
    K: int
    dtype: torch.dtype


def adopt(
    request: Request,
    name: str,
    module: nn.Module,
    group: dist.ProcessGroup,
    *,
    split_input: bool = False,
    gives_sum: bool = True,
) -> Adopted:
    """`settle` for `module`, nn.Linear of the whole layer's in_features and out_features, on the ranks of `group`.

    gives_sum: the host wants the whole sum on every rank.
    """
    world_size = dist.get_world_size(group)
    if type(module) is not nn.Linear:
        text = f"it is {type(module).__name__}, and only nn.Linear itself is known to be x @ weight.T."
        return settle(request, name, group, Part(0, 0, torch.bfloat16), ("module", text))
    part = Part(module.out_features, module.in_features // world_size, module.weight.dtype)
    obstacle = ("", "")
    if module.in_features % world_size:
        text = f"in_features={module.in_features} does not divide evenly over {world_size} ranks."
        obstacle = ("uneven", text)
    elif not gives_sum:
        obstacle = ("output_layout", "its output is not the whole sum on every rank, which is what the op gives.")
    return settle(request, name, group, part, obstacle, split_input)


def settle(
    request: Request,
    name: str,
    group: dist.ProcessGroup | None,
    part: Part,
    obstacle: tuple[str, str] = ("", ""),
    split_input: bool = False,
) -> Adopted:
    """Decides for a layer of which this rank of `group` holds `part`. group: None where the layer is not divided.

    Collective: every rank decides for the same layers in the same order, since the first makes the arena, before
    weights are loaded and caches are sized. obstacle: (reason, sentence) of what the host itself sees in the way.
    Errors: InvalidInput where the layer must be declined and the op was required; those of `init`.
    """
    reason, text = obstacle if obstacle[0] else _obstacle(request, group, part)
    if reason and request.required:
        raise InvalidInput(
            f"{request.host}: {name} cannot be fused, and was required to be: {text} "
            "TP_OVERLAP=auto, or required=False, leaves such layers to the framework."
        )
    rank, world_size, group_name = dist.get_rank(), 1, ""
    if group is not None:
        rank, world_size, group_name = dist.get_rank(group), dist.get_world_size(group), group.group_name
    _say(request, name, group_name, rank, part, text)
    return Adopted(name, group_name, rank, world_size, part.N, part.K, request.required, split_input, reason)


def _obstacle(request: Request, group: dist.ProcessGroup | None, part: Part) -> tuple[str, str]:
    """(reason, sentence), both empty where there is none, and then there is room for the layer."""
    if group is None or dist.get_world_size(group) == 1:
        return "one_rank", "its group has one rank, and there is nothing to sum."
    if part.dtype not in routing.FUSED_DTYPES:
        return "dtype", f"its dtype is {part.dtype}. The op takes torch.bfloat16 and torch.float16."
    text = _make_room(request, group, part.N, part.dtype)
    return ("topology" if text else ""), text


def _make_room(request: Request, group: dist.ProcessGroup, N: int, dtype: torch.dtype) -> str:
    """An arena that is wide enough. Returns why there can be none, which `init` has then told every rank."""
    arena, name = find(group.group_name), group.group_name
    if arena is None or N > arena.layout.max_N or (request.max_tokens or 1) > arena.layout.max_M:
        try:
            if name not in request.refused:
                init(group, max_M=request.max_tokens, max_N=max(N, request.max_N), dtype=dtype)
        except UnsupportedTopology as error:
            request.refused[name] = str(error)
    return request.refused.get(name, "")


def kind(name: str) -> str:
    """The name of a layer without the numbers that tell it from others of its kind."""
    return re.sub(r"(^|\.)\d+(?=\.|$)", r"\1*", name)


def _say(request: Request, name: str, group_name: str, rank: int, part: Part, obstacle: str) -> None:
    """One line for all layers of a kind."""
    line = f"{kind(name)}: {obstacle}"
    if line in request.said or rank != 0:
        return
    request.said.add(line)
    if obstacle:
        log.warning("%s: not active for %s: %s", request.host, kind(name), obstacle)
        return
    arena = find(group_name)
    assert arena is not None
    log.info(
        "%s: active for %s (N=%d, K=%d a rank); group %r of %d ranks on %s, max_M=%d; %d bytes a rank, for all layers",
        *(request.host, kind(name), part.N, part.K, group_name, arena.world_size),
        *(arena.topology.backend, arena.layout.max_M, arena.layout.total_bytes),
    )


def local(tensor: Any) -> Any:
    """This rank's shard of a DTensor, its redistribution waited for; anything else as it is."""
    if not isinstance(tensor, DTensor):
        return tensor
    shard = tensor.to_local()
    return shard.wait() if isinstance(shard, AsyncCollectiveTensor) else shard
