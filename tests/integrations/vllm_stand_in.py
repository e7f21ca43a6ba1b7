"""A small vLLM: what vLLM 0.32 and 0.33 show to an adapter of their row-parallel linear layer.

| here                                       | there                                               |
| ------------------------------------------ | --------------------------------------------------- |
| PluggableLayer, op_registry_oot            | vllm/model_executor/custom_op.py                    |
| RowParallelLinear, UnquantizedLinearMethod | vllm/model_executor/layers/linear.py                |
| RowParallelLinearWithLoRA                  | vllm/lora/layers/row_parallel_linear.py             |
| get_tp_group                               | vllm/distributed/parallel_state.py                  |
| the configuration                          | vllm/config/{vllm,scheduler,model,parallel,lora}.py |
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests.integrations.stand_in import Group, Int8LinearMethod, UnquantizedLinearMethod, installed, pack
from tp_overlap_kernels.integrations import vllm as adapter


class VLLM:
    """One process of the engine: its registry, its settings, its group, its classes."""

    def __init__(self, group: Group, batch_invariant: bool = False, ubatching: bool = False, **config: Any) -> None:
        self.group = group
        self.registry: dict[str, type] = {}
        self.envs = SimpleNamespace(VLLM_BATCH_INVARIANT=batch_invariant)
        settings = {
            "scheduler_config": SimpleNamespace(max_num_batched_tokens=48),
            "model_config": SimpleNamespace(get_hidden_size=lambda: 64),
            "parallel_config": SimpleNamespace(use_ubatching=ubatching),
            "lora_config": None,
            "additional_config": {},
        }
        self.config = SimpleNamespace(**settings | config)
        self.PluggableLayer = _pluggable_layer(self.registry)
        self.RowParallelLinear = _row_parallel_linear(self)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        names: dict[str, dict[str, Any]] = {
            "vllm": {"envs": self.envs},
            "vllm.config": {"get_current_vllm_config": lambda: self.config},
            "vllm.distributed": {"get_tp_group": lambda: self.group},
            "vllm.model_executor.custom_op": {
                "PluggableLayer": self.PluggableLayer,
                "op_registry_oot": self.registry,
            },
            "vllm.model_executor.layers.linear": {
                "RowParallelLinear": self.RowParallelLinear,
                "UnquantizedLinearMethod": UnquantizedLinearMethod,
            },
        }
        with installed(names):
            yield

    def load_plugins(self) -> None:
        adapter.register()

    def is_changed(self) -> bool:
        return bool(self.registry)

    def notes(self) -> dict[str, str]:
        return (self.config.additional_config or {}).get("tp_overlap", {})


def _pluggable_layer(registry: dict[str, type]) -> type:
    class PluggableLayer(nn.Module):
        def __new__(cls, *_: Any, **__: Any) -> Any:
            return super().__new__(registry.get(cls.__name__, cls))

        @classmethod
        def register_oot(cls, *, name: str) -> Any:
            def register(layer: type) -> type:
                assert name not in registry, f"Duplicate layer name: {name}"
                registry[name] = layer
                return layer

            return register

    return PluggableLayer


def _row_parallel_linear(engine: VLLM) -> Any:
    class RowParallelLinear(engine.PluggableLayer):  # type: ignore[name-defined]
        def __init__(
            self,
            input_size: int,
            output_size: int,
            bias: bool = True,
            input_is_parallel: bool = True,
            skip_bias_add: bool = False,
            params_dtype: torch.dtype = torch.bfloat16,
            reduce_results: bool = True,
            quantised: bool = False,
            prefix: str = "",
            *,
            return_bias: bool = True,
            disable_tp: bool = False,
        ) -> None:
            super().__init__()
            group = engine.group
            self.tp_rank, self.tp_size = (0, 1) if disable_tp else (group.rank_in_group, group.world_size)
            self.input_size, self.output_size = input_size, output_size
            self.input_size_per_partition = input_size // self.tp_size
            self.input_is_parallel, self.reduce_results = input_is_parallel, reduce_results
            self.skip_bias_add, self.return_bias = skip_bias_add, return_bias
            self.params_dtype, self.prefix = params_dtype, prefix
            self.quant_method = Int8LinearMethod() if quantised else UnquantizedLinearMethod()
            self.quant_method.create_weights(self, output_size, self.input_size_per_partition, params_dtype)
            if not reduce_results and bias and not skip_bias_add:
                raise ValueError("a bias of every rank would be added")
            empty = nn.Parameter(torch.empty(output_size, dtype=params_dtype), requires_grad=False)
            self.register_parameter("bias", empty if bias else None)

        def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
            """weight, bias: of the whole layer. Afterwards vLLM on a CPU packs the weight, unless told not to."""
            K = self.input_size_per_partition
            self.weight.data.copy_(weight.narrow(1, self.tp_rank * K, K))
            if self.bias is not None:
                self.bias.data.copy_(bias)
            if type(self.quant_method) is UnquantizedLinearMethod and not getattr(self, "_cpu_skip_gemm_dispatch", 0):
                pack(self)

        def forward(self, input_: Any) -> Any:
            columns = input_ if self.input_is_parallel else input_.chunk(self.tp_size, dim=-1)[self.tp_rank]
            bias = None if self.tp_rank > 0 or self.skip_bias_add else self.bias
            output = self.quant_method.apply(self, columns, bias)
            if self.reduce_results and self.tp_size > 1:
                output = engine.group.all_reduce(output)
            if not self.return_bias:
                return output
            return output, self.bias if self.skip_bias_add else None

    return RowParallelLinear


class RowParallelLinearWithLoRA(nn.Module):
    """Takes the layer's place, and asks it for its weight, never for its output. Here the adapter adds nothing."""

    def __init__(self, engine: VLLM, base_layer: Any) -> None:
        super().__init__()
        assert type(base_layer) is engine.registry.get("RowParallelLinear", engine.RowParallelLinear)
        self.engine, self.base_layer = engine, base_layer

    def forward(self, input_: torch.Tensor) -> Any:
        layer = self.base_layer
        bias = None if layer.tp_rank > 0 or layer.skip_bias_add else layer.bias
        output = layer.quant_method.apply(layer, input_, bias)
        if layer.reduce_results and layer.tp_size > 1:
            output = self.engine.group.all_reduce(output)
        return (output, layer.bias if layer.skip_bias_add else None) if layer.return_bias else output
