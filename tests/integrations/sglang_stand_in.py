"""A small SGLang: what SGLang 0.5.23 shows to hooks around its row-parallel linear layer and its dense decoder layers.

| here                                       | there (sglang/srt)                                        |
| ------------------------------------------ | --------------------------------------------------------- |
| HookRegistry, HookType                     | plugins/hook_registry.py                                  |
| RowParallelLinear                          | layers/linear.py                                          |
| SumImplementation                          | layers/layer_boundary/output.py                           |
| Declaration, Boundary                      | layers/layer_boundary/{factories,stage,prepare,exit}.py   |
| a decoder layer                            | models/{llama,qwen2,qwen3}.py                             |
| get_parallel() and the like                | runtime_context.py                                        |

A decoder layer here has o_proj, down_proj and its two boundaries, and nothing else that computes: both layers read the
input, so that integers stay small, and the residual adds up what they give.
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import pkgutil
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from tests.integrations.stand_in import Group, Int8LinearMethod, UnquantizedLinearMethod, installed
from tp_overlap_kernels.integrations import sglang as adapter

DECODERS = {"llama": "LlamaDecoderLayer", "qwen2": "Qwen2DecoderLayer", "qwen3": "Qwen3DecoderLayer"}


class HookType(enum.Enum):
    AFTER = "after"
    AROUND = "around"


class Registry:
    """A target that cannot be wrapped is passed over, and the others are wrapped all the same."""

    def __init__(self, broken: str) -> None:
        self.hooks: list[tuple[str, Any, HookType]] = []
        self.broken = broken  # a target of this end cannot be

    def register(self, target: str, hook: Any, hook_type: HookType) -> None:
        self.hooks.append((target, hook, hook_type))

    def apply_hooks(self) -> None:
        for target, hook, hook_type in self.hooks:
            if self.broken and target.endswith(self.broken):
                continue
            owner_name, _, name = target.rpartition(".")
            owner = pkgutil.resolve_name(owner_name)
            raw = vars(owner)[name]
            kind = type(raw) if isinstance(raw, (classmethod, staticmethod)) else None
            setattr(owner, name, (kind or (lambda x: x))(_wrap(raw.__func__ if kind else raw, hook, hook_type)))


def _wrap(original: Any, hook: Any, hook_type: HookType) -> Any:
    @functools.wraps(original)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if hook_type is HookType.AROUND:
            return hook(original, *args, **kwargs)
        result = original(*args, **kwargs)
        changed = hook(result, *args, **kwargs)
        return result if changed is None else changed

    return wrapper


@dataclasses.dataclass(frozen=True)
class SumImplementation:
    run: Any


@dataclasses.dataclass(frozen=True)
class Declaration:
    """What a stage says of itself."""

    sum_impl: SumImplementation | None = None
    output_complete: bool = False
    sparse: bool = False
    read: Any = dataclasses.field(default_factory=lambda: SimpleNamespace(completing_fusions=()))


class Boundary:
    """Owes the sum of a stage's output, unless the declaration says otherwise."""

    def __init__(self, declaration: Declaration, group: Group) -> None:
        assert declaration.sum_impl is None or not declaration.output_complete, "one or the other"
        self.declaration, self.group = declaration, group

    def finish(self, output: torch.Tensor) -> torch.Tensor:
        if self.declaration.sum_impl is not None:
            return self.declaration.sum_impl.run(output, None)
        return output if self.declaration.output_complete else self.group.all_reduce(output)


class SGLang:
    """One process of the engine: its registry, its settings, its group, its classes.

    broken: of `Registry`. own_layers: decoder layers make layers of a subclass. ffn: what they declare of their FFN.
    """

    def __init__(
        self,
        group: Group,
        mlp_reduce_scatter: bool = False,
        broken: str = "",
        own_layers: bool = False,
        ffn: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.group = group
        self.registry = Registry(broken)
        self.mlp_reduce_scatter = mlp_reduce_scatter
        names = {
            "parallel": {
                "tp_group": group,
                "attn_dp_size": 1,
                "attn_cp_size": 1,
                "pp_size": 1,
                "moe_dense_tp_size": None,
            }
            | {"enable_layernorm_sp": False, "enable_attn_tp_input_scattered": False},
            "comm": {
                "enable_quant_communications": False,
                "flashinfer_allreduce_fusion_backend": None,
                "enable_aiter_allreduce_fusion": False,
            },
            "deterministic": {"enable_deterministic_inference": False, "rl_on_policy_target": None},
            "overlap": {"enable_two_batch_overlap": False},
            "lora": {"enable_lora": None, "lora_paths": None},
            "spec": {"speculative_algorithm": None},
            "schedule": {"chunked_prefill_size": 48, "max_prefill_tokens": 64, "max_running_requests": None},
        }
        unknown = set(settings) - {name for values in names.values() for name in values}
        assert not unknown, unknown
        bags = {
            bag: SimpleNamespace(**{name: settings.get(name, value) for name, value in values.items()})
            for bag, values in names.items()
        }
        bags["exec"] = SimpleNamespace(**{name: bags[name] for name in ("comm", "deterministic", "overlap")})
        self.bags = bags
        self.RowParallelLinear = _row_parallel_linear(self)
        layer = type("Own", (self.RowParallelLinear,), {}) if own_layers else self.RowParallelLinear
        facts = Declaration(), Declaration(**ffn or {})
        self.decoders = {model: _decoder(self, layer, facts, model, name) for model, name in DECODERS.items()}

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        names: dict[str, dict[str, Any]] = {
            "sglang.srt.plugins.hook_registry": {"HookRegistry": self.registry, "HookType": HookType},
            "sglang.srt.runtime_context": {f"get_{name}": functools.partial(self.bags.get, name) for name in self.bags},
            "sglang.srt.layers.linear": {"RowParallelLinear": self.RowParallelLinear},
            "sglang.srt.layers.quantization.unquant": {"UnquantizedLinearMethod": UnquantizedLinearMethod},
            "sglang.srt.layers.moe.utils": {"should_skip_mlp_all_reduce": lambda: self.mlp_reduce_scatter},
            "sglang.srt.layers.layer_boundary.output": {"SumImplementation": SumImplementation},
        }
        for model, name in DECODERS.items():
            names[f"sglang.srt.models.{model}"] = {name: self.decoders[model]}
        with installed(names):
            try:
                yield
            finally:
                adapter._plugin = None  # the classes that it has hooks in are gone

    def load_plugins(self) -> None:
        adapter.register()
        self.registry.apply_hooks()

    def is_changed(self) -> bool:
        return bool(self.registry.hooks)

    def notes(self) -> dict[str, str]:
        return {}


def _row_parallel_linear(engine: SGLang) -> Any:
    class RowParallelLinear(nn.Module):
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
            use_dp_attention_reduce: bool = False,
            parallel_group: str | None = None,
        ) -> None:
            super().__init__()
            self.parallel_group = parallel_group
            others = SimpleNamespace(world_size=4, rank_in_group=engine.group.rank_in_group)
            self.tp_group = {"replicated": None, "shared_experts_tp": others}.get(parallel_group or "tp", engine.group)
            self.use_dp_attention_reduce = use_dp_attention_reduce
            self.tp_rank, self.tp_size = 0, 1
            if self.tp_group is not None:
                self.tp_rank, self.tp_size = self.tp_group.rank_in_group, self.tp_group.world_size
            self.input_size, self.output_size, self.skip_bias_add = input_size, output_size, skip_bias_add
            self.input_size_per_partition = input_size // self.tp_size
            self.input_is_parallel, self.reduce_results = input_is_parallel, reduce_results
            self.params_dtype = params_dtype
            self.quant_method = Int8LinearMethod() if quantised else UnquantizedLinearMethod()
            self.quant_method.create_weights(self, output_size, self.input_size_per_partition, params_dtype)
            empty = nn.Parameter(torch.empty(output_size, dtype=params_dtype), requires_grad=False)
            self.register_parameter("bias", empty if bias else None)

        def load(self, weight: torch.Tensor, bias: torch.Tensor) -> None:
            K = self.input_size_per_partition
            self.weight.data.copy_(weight.narrow(1, self.tp_rank * K, K))
            if self.bias is not None:
                self.bias.data.copy_(bias)

        def forward(
            self,
            input_: Any,
            skip_all_reduce: bool = False,
            forward_batch: Any = None,
            output_tensor: torch.Tensor | None = None,
        ) -> Any:
            columns = input_ if self.input_is_parallel else input_.chunk(self.tp_size, dim=-1)[self.tp_rank]
            bias = None if self.tp_rank > 0 or self.skip_bias_add else self.bias
            output = self.quant_method.apply(self, columns, bias)
            if output_tensor is not None:
                output = output_tensor.copy_(output)
            if self.reduce_results and self.tp_size > 1 and not skip_all_reduce and not engine.mlp_reduce_scatter:
                output = engine.group.all_reduce(output)
            return output, self.bias if self.skip_bias_add else None

    return RowParallelLinear


def _decoder(engine: SGLang, linear: Any, facts: tuple[Declaration, Declaration], model: str, name: str) -> Any:
    class Part(nn.Module):
        def forward(self, x: Any, **arguments: Any) -> Any:
            (layer,) = self.children()
            return layer(x, **arguments)[0]

    class DecoderLayer(nn.Module):
        def __init__(self, width: int, N: int, index: int = 0, stage_boundaries: bool = True, **layer: Any) -> None:
            super().__init__()
            self.self_attn, self.mlp = Part(), Part()
            layer = {"bias": False, "reduce_results": not stage_boundaries} | layer
            for part, child in ((self.self_attn, "o_proj"), (self.mlp, "down_proj")):
                prefix = f"model.layers.{index}.{'self_attn' if part is self.self_attn else 'mlp'}.{child}"
                quantised = layer.get("quantised", False) in (True, child)  # of one of the two, by its name
                part.add_module(child, linear(width, N, prefix=prefix, **layer | {"quantised": quantised}))
            if not stage_boundaries:
                return
            attention, ffn = self.stage_facts(None, index)
            self.attn_boundary, self.ffn_boundary = Boundary(attention, engine.group), Boundary(ffn, engine.group)

        def forward(self, x: Any) -> torch.Tensor:
            attention, ffn = self.self_attn(x), self.mlp(x, forward_batch=SimpleNamespace())
            if hasattr(self, "attn_boundary"):
                attention, ffn = self.attn_boundary.finish(attention), self.ffn_boundary.finish(ffn)
            return attention + ffn

    # Of Qwen3 it is a static method, of the others a class method.
    DecoderLayer.stage_facts = (  # type: ignore[attr-defined]
        staticmethod(lambda config, index: facts) if model == "qwen3" else classmethod(lambda cls, config, index: facts)
    )
    DecoderLayer.__name__ = DecoderLayer.__qualname__ = name
    return DecoderLayer
