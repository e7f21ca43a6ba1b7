"""A linear layer whose input features are divided over the ranks: each holds weight[:, its K/W columns].

    x = concatenation over r of x_r          out = sum over r of  x_r @ weight_r.T   (+ bias, once)

GEMM and sum are one fused op. A layer that cannot use it falls back to F.linear and torch's collective, says so once,
and counts it (`counters()`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from .. import ops  # noqa: F401 - registers torch.ops.tp_overlap
from ..errors import InvalidInput
from . import collectives, routing
from .loading import ColumnLoader


class RowParallelLinear(nn.Module):
    """`nn.Linear` over a group of ranks, for inference. Every rank calls it, in the same order, with the same M.

    in_features, out_features: of the whole layer. in_features must be a multiple of the world size.
    bias: [out_features], whole on every rank, added once to the sum.
    input_is_parallel: the input is this rank's [..., in_features / W]; else the whole [..., in_features], equal on all
        ranks, of which the layer takes its own columns.
    skip_bias_add: forward returns (output, bias) and adds nothing; the caller adds the bias, once, to the sum.
    reduce_results: False returns this rank's partial, [..., out_features]; somebody else owes the sum.
    scatter: the output is this rank's rows of the sum, 2-D: rows [r*c, min(M, (r+1)*c)) with c = ceil(M / W) of the
        input flattened to [M, K].
    group: a torch ProcessGroup; None is dist.group.WORLD, or a single rank where torch.distributed is not initialised.
        It is looked up here, once: initialise torch.distributed first.
    name: what messages call the layer, for example "model.layers.0.mlp.down_proj".

    Parameters: `weight` [out_features, in_features / W], uninitialised until loaded, and `bias` [out_features], zeros;
    neither requires grad. `load_state_dict` takes the whole weight, [out_features, in_features], as well as this rank's
    shard, told apart by shape; `weight_loader` is for engines, which call it for each parameter.
    Equals, on W ranks: all_reduce(F.linear(x_r, weight_r)) + bias, up to rounding (the op adds in f32, rounds once).
    Works under torch.compile(fullgraph=True), with one graph for all M; `init` and `close` lead to another.
    Errors: InvalidInput, before any rank enters a collective, for sizes, dtypes and flags that do not fit.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        input_is_parallel: bool = True,
        skip_bias_add: bool = False,
        reduce_results: bool = True,
        scatter: bool = False,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        name: str = "",
    ) -> None:
        super().__init__()
        self.name = name or f"RowParallelLinear({in_features}, {out_features})"
        self.group_name, self.tp_rank, self.tp_size = _place(group)
        self._refuse_bad_sizes(in_features, out_features)
        self._refuse_bad_flags(bias, skip_bias_add, reduce_results, scatter)
        self.in_features = self.input_size = in_features
        self.out_features = self.output_size = self.output_size_per_partition = out_features
        self.input_size_per_partition = in_features // self.tp_size
        self.input_is_parallel = input_is_parallel
        self.skip_bias_add = skip_bias_add
        self.reduce_results = reduce_results
        self.scatter = scatter
        self._loader = ColumnLoader(self.name, (out_features, in_features), self.tp_rank, self.tp_size)
        weight = torch.empty(out_features, self.input_size_per_partition, device=device, dtype=dtype)
        self.weight = self._parameter(weight)
        if bias:
            self.bias = self._parameter(torch.zeros(out_features, device=device, dtype=dtype))
        else:
            self.register_parameter("bias", None)

    @classmethod
    def from_linear(cls, linear: nn.Linear, **flags: Any) -> RowParallelLinear:
        """The same layer divided over the ranks of `group`. `linear` is whole and equal on all of them.

        flags: the keyword arguments of the constructor; device and dtype default to those of `linear`.
        """
        places = {"device": linear.weight.device, "dtype": linear.weight.dtype}
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, **(places | flags))
        layer.load_state_dict(linear.state_dict())
        return layer

    # ---- calling

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor | None]:
        """x: [..., in_features / W], or [..., in_features] without input_is_parallel; the weight's dtype and device.

        Returns the output, fresh and aliasing nothing: [..., out_features], or [rows, out_features] with scatter;
        with skip_bias_add a pair, (output, bias).
        """
        weight, bias = self.weight, self.bias  # looked up once: nn.Module takes 0.5 us for each
        self._refuse_bad_input(x, weight)
        if not self.input_is_parallel:
            x = collectives.own_columns(x, self.group_name, self.tp_rank, self.tp_size)
        if self.skip_bias_add:
            return self._output(x, weight, None), bias
        return self._output(x, weight, bias)

    def _output(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        if self.tp_size == 1 or not self.reduce_results:
            output = F.linear(x, weight, bias)  # without reduce_results the constructor has seen to it: no bias
            return output.reshape(-1, self.out_features) if self.scatter else output
        if self._fuses(x, weight, bias):
            op = torch.ops.tp_overlap.gemm_reduce_scatter if self.scatter else torch.ops.tp_overlap.gemm_all_reduce
            return op.default(x, weight, self.group_name, bias)
        partial = F.linear(x, weight)
        if self.scatter:
            rows = partial.reshape(-1, self.out_features)
            output = collectives.reduce_scatter_rows(rows, self.group_name, self.tp_rank, self.tp_size)
        else:
            output = collectives.all_reduce(partial, self.group_name)
        return output if bias is None else output + bias

    def _fuses(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        needs_grad = torch.is_grad_enabled() and (
            x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
        )
        # A compiled call must not read the name: the graph would be guarded by it, and each layer need one of its own.
        name = "a compiled RowParallelLinear" if torch.compiler.is_compiling() else self.name
        return routing.fuses(
            name,
            self.group_name,
            self.tp_rank,
            self.out_features,
            x.dtype,
            x.device.type,
            needs_grad,
        )

    # ---- loading

    def weight_loader(self, param: nn.Parameter, loaded_weight: Tensor, *, presharded: bool = False) -> None:
        """Copies `loaded_weight` into `param`, this layer's `weight` or `bias`; see `ColumnLoader.__call__`.

        The whole weight [out_features, in_features] is cut to this rank's columns; with presharded it is cut already.
        """
        self._loader(param, loaded_weight, presharded=presharded)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        key = prefix + "weight"
        whole = state_dict.get(key)
        if not self._loader.is_whole(whole):
            super()._load_from_state_dict(state_dict, prefix, *args)  # a shard, nothing, or an error to report
            return
        # A copy, since with assign=True a view would keep the whole weight alive.
        state_dict[key] = self._loader.cut(whole).contiguous()
        super()._load_from_state_dict(state_dict, prefix, *args)
        state_dict[key] = whole

    def _parameter(self, data: Tensor) -> nn.Parameter:
        param = nn.Parameter(data, requires_grad=False)
        param.weight_loader = self._loader
        return param

    # ---- refusing

    def _refuse_bad_sizes(self, in_features: int, out_features: int) -> None:
        if in_features < 1 or out_features < 1:
            raise InvalidInput(
                f"{self.name}: in_features and out_features must be at least 1, got {in_features} and {out_features}."
            )
        if in_features % self.tp_size:
            padded = -(-in_features // self.tp_size) * self.tp_size
            raise InvalidInput(
                f"{self.name}: in_features must divide evenly over the ranks, got in_features={in_features} with "
                f"world_size={self.tp_size} (remainder {in_features % self.tp_size}). Pad weight and input with zero "
                f"columns to {padded}, or use a group whose size divides {in_features}."
            )

    def _refuse_bad_flags(self, bias: bool, skip_bias_add: bool, reduce_results: bool, scatter: bool) -> None:
        if bias and not reduce_results and not skip_bias_add:
            raise InvalidInput(
                f"{self.name}: reduce_results=False with a bias would add it {self.tp_size} times, once on each rank. "
                "Give skip_bias_add=True and add the returned bias after the sum, or bias=False."
            )
        if scatter and not reduce_results:
            raise InvalidInput(
                f"{self.name}: scatter=True returns rows of the sum, reduce_results=False forbids the sum. Drop one."
            )

    def _refuse_bad_input(self, x: Tensor, weight: Tensor) -> None:
        wanted = self.input_size_per_partition if self.input_is_parallel else self.in_features
        if x.dim() == 0 or x.shape[-1] != wanted:
            got = x.shape[-1] if x.dim() else "a scalar"
            fix = "Give the input of the whole layer."
            if self.input_is_parallel:
                fix = f"Give the columns of rank {self.tp_rank}, or construct with input_is_parallel=False."
            raise InvalidInput(
                f"{self.name}: the last dimension of the input must be {wanted} (in_features={self.in_features}, "
                f"world_size={self.tp_size}, input_is_parallel={self.input_is_parallel}), got {got}. {fix}"
            )
        if x.dtype != weight.dtype or x.device != weight.device:
            raise InvalidInput(
                f"{self.name}: input and weight must be alike, got {x.dtype} on {x.device} and {weight.dtype} on "
                f"{weight.device}. Convert the input, or move the layer with .to()."
            )

    def extra_repr(self) -> str:
        flags = f"input_is_parallel={self.input_is_parallel}, skip_bias_add={self.skip_bias_add}, "
        flags += f"reduce_results={self.reduce_results}, scatter={self.scatter}"
        shape = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return f"{shape}, {flags}, rank {self.tp_rank} of {self.tp_size} in group {self.group_name!r}"


def _place(group: dist.ProcessGroup | None) -> tuple[str, int, int]:
    """(name, rank, world size) of a group. The name and not the group is kept: modules are copied and traced."""
    if group is None:
        if not (dist.is_available() and dist.is_initialized()):
            return "local", 0, 1
        group = dist.group.WORLD
    return group.group_name, dist.get_rank(group), dist.get_world_size(group)
